#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# OpenVINO on a CPU: a HardSigmoid makes certainty of NaN, a Relu nothing.
#
# An image, or a weight, that is not a number should make a score that is not one, and in onnxruntime it does. OpenVINO
# gives Relu(NaN) = 0, and HardSigmoid(NaN) = 1, the highest probability there is; Sigmoid(NaN) stays NaN. So a network
# with a Relu anywhere hides a broken frame behind an ordinary score (here: of zero, "good"), and checking the output
# with `isfinite` in the factory does not help. Check the image.
#
# Guessed before: 0 for Relu perhaps, NaN for the others. Seen with openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2,
# numpy 2.4.6, Python 3.11, x86-64; other processors may do otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper


def model(operator: str) -> bytes:
    graph = helper.make_graph(
        [helper.make_node(operator, ["image"], ["map"])],
        operator,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 16, 16])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, [1, 1, 16, 16])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


image = np.full((1, 1, 16, 16), np.nan, np.float32)
core = openvino.Core()
seen = {}
for operator in ("Relu", "HardSigmoid", "Sigmoid"):
    session = onnxruntime.InferenceSession(model(operator), providers=["CPUExecutionProvider"])
    assert np.isnan(session.run(None, {"image": image})[0]).all(), operator
    compiled = core.compile_model(core.read_model(model(operator)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (seen[operator],) = set(map(str, compiled({"image": image})[0].ravel()))
assert seen == {"Relu": "0.0", "HardSigmoid": "1.0", "Sigmoid": "nan"}, seen
print("OpenVINO of an image of NaN (onnxruntime: all nan):", seen)
EOF
