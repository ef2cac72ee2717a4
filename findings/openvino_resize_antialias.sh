#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# OpenVINO: reads `antialias=1` of an ONNX Resize, and resizes without.
#
# The attribute exists since opset 18; torch.onnx writes it for `antialias=True`. onnxruntime weighs all pixels that
# fall into one; OpenVINO reads the model without a word, and takes the same points as with `antialias=0`. A bright
# scratch one pixel wide on a photograph of 64 pixels, resized to 8: onnxruntime keeps a twelfth of its contrast, in
# OpenVINO it is gone. A model that was trained on antialiased images sees other images in the factory.
#
# Guessed before: an error for an attribute that is not supported. Seen with openvino 2026.4.1, onnx 1.23.2, onnxruntime
# 1.32.0, numpy 2.4.6, Python 3.11, x86-64.
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


def resize(antialias: int) -> bytes:
    node = helper.make_node("Resize", ["image", "", "", "sizes"], ["small"], mode="linear", antialias=antialias)
    graph = helper.make_graph(
        [node],
        "resize",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 64, 64])],
        [helper.make_tensor_value_info("small", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, 8, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def by_openvino(model: bytes, image: np.ndarray) -> np.ndarray:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled({"image": image})[0]


def by_onnxruntime(model: bytes, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


scratch = np.zeros((1, 1, 64, 64), np.float32)
scratch[:, :, 25] = 1
plain = by_onnxruntime(resize(0), scratch)
smooth = by_onnxruntime(resize(1), scratch)
seen = by_openvino(resize(1), scratch)
assert smooth.max() > 0.05 and plain.max() == 0, (smooth.max(), plain.max())
assert np.array_equal(seen, by_openvino(resize(0), scratch))
assert seen.max() == 0, seen.max()
print(f"brightest pixel of a resized scratch: onnxruntime {smooth.max():.3f}, OpenVINO {seen.max():.3f}")
EOF
