# SPDX-License-Identifier: Apache-2.0
"""INT8 quantisation that keeps the defects: 8 bits where the time goes, float where the map is made."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

FIRST = re.compile(r"model\.pixel_decoder\.")
"""Weights that begin what is quantised."""

POINTWISE = re.compile(r"model\.backbone\..*\.conv_pwl?\.weight")
"""Weights of an EfficientNet's 1x1 convolutions, most of its operations: they bear 8 bits, the rest of it does not."""

WHITENING = re.compile(r"model\.detector\.distances\.whitening\.")
"""Statistics of the errors. They enlarge what 8 bits change in the targets, so that all the backbone stays in float."""

FOLDED_HEAD = re.compile(r"model\.heads\.\d+\.folded_weight")
"""Weights of folded heads, which end it."""

SECOND_TO_LAST = re.compile(r"model\.heads\.\d+\.convs\.1\.weight")
"""Weights of the other heads, which end behind them: the last convolution may have lost its name to what follows."""


def quantize_reconstruction(model: "ov.Model", images: Sequence[np.ndarray]) -> "ov.Model":
    """Quantise an exported UniAS after training, from the pixel decoder to the heads.

    Resize, frequency split and backbone stay in float: they make the target of the reconstruction. The backbone's
    pointwise convolutions do so only where statistics of the errors enlarge what changes in the target. In float stay
    also folded heads, the last convolution of the others, cosine distances and their product, where a rounding error is
    as large as what a defect leaves. All that is quick.

    Args:
        model: UniAS as exported to OpenVINO in float32.
        images: Images to calibrate with, ``(1, 3, H, W)`` in [0, 1] each.

    Returns:
        The quantised model.

    Raises:
        ValueError: If the model does not have UniAS' weights under their names.
    """
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset(images),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=float_operations(model)),
    )


def float_operations(model: "ov.Model") -> list[str]:
    """Return the operations that stay in float."""
    operations = [op for op in model.get_ordered_ops() if op.get_type_name() not in ("Constant", "Parameter", "Result")]
    quantised = _downstream(op for op in operations if FIRST.match(_weight(op)))
    folded = [op for op in operations if FOLDED_HEAD.match(_weight(op))]
    behind = _downstream(
        folded + [target for op in operations if SECOND_TO_LAST.match(_weight(op)) for target in _targets(op)]
    )
    if not quantised or not behind:
        msg = (
            f"Expected an exported UniAS with weights that match {FIRST.pattern!r}, and {FOLDED_HEAD.pattern!r} or "
            f"{SECOND_TO_LAST.pattern!r}, found none: it cannot be quantised."
        )
        raise ValueError(msg)
    whitens = any(WHITENING.match(_weight(op)) for op in operations)
    names = [op.get_friendly_name() for op in operations if whitens or not POINTWISE.match(_weight(op))]
    return [name for name in names if name not in quantised or name in behind]


def _weight(operation: "ov.Node") -> str:
    """Return the name of the constant that an operation multiplies with, or an empty string."""
    sources = [operation.input_value(i).get_node() for i in range(operation.get_input_size())]
    return next((source.get_friendly_name() for source in sources if source.get_type_name() == "Constant"), "")


def _downstream(operations: Iterable["ov.Node"]) -> set[str]:
    """Return the names of operations and of all that depends on them."""
    names: set[str] = set()
    waiting = list(operations)
    while waiting:
        operation = waiting.pop()
        if operation.get_friendly_name() not in names:
            names.add(operation.get_friendly_name())
            waiting += _targets(operation)
    return names


def _targets(operation: "ov.Node") -> list["ov.Node"]:
    """Return the operations that use an operation's outputs."""
    return [target.get_node() for output in operation.outputs() for target in output.get_target_inputs()]
