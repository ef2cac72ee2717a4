# SPDX-License-Identifier: Apache-2.0
"""Which precision OpenVINO computes in, where and by whose choice: a hint is no more than a wish."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import openvino as ov

DEFAULT_PRECISION = "default"
"""Leaves the precision to OpenVINO, which takes bfloat16 where the processor has it."""

PRECISIONS = ("f32", "bf16", "f16", DEFAULT_PRECISION)

MULTIPLYING = ("Convolution", "FullyConnected", "MatMul")
"""Layers whose precision is that of a graph."""


class Computed(NamedTuple):
    """What a compiled model computes in.

    Attributes:
        precision: Such as ``f32``, ``bf16`` or ``INT8, f32``; several devices of several precisions name both.
        devices: Names of the devices that compute, such as ``CPU``, whatever ``AUTO`` was asked to choose from.
    """

    precision: str
    devices: tuple[str, ...]


def compile_openvino(path: Path, precision: str, device: str) -> "ov.CompiledModel":
    """Compile an exported model, OpenVINO's or ONNX, for one image at a time.

    Args:
        path: ``model.xml`` or ``model.onnx``.
        precision: ``f32``, ``bf16``, ``f16``, or :data:`DEFAULT_PRECISION`.
        device: Device of OpenVINO, such as ``CPU``, ``GPU`` or ``AUTO:GPU,CPU``.

    Raises:
        ValueError: If the file is none that OpenVINO reads.
    """
    try:
        return _core().compile_model(path, device, _options(precision, device))
    except RuntimeError as error:
        msg = f"OpenVINO cannot load {path} on {device} in precision {precision}: {_reason(error)}"
        raise ValueError(msg) from error


def check_device(device: str, precisions: Sequence[str]) -> Computed:
    """Ask by a graph of one product whether a device computes at all, and takes these precisions.

    Args:
        device: Device of OpenVINO.
        precisions: Precisions of :data:`PRECISIONS`.

    Returns:
        What it computes in by itself.

    Raises:
        ValueError: If there is no such device here, or it refuses a precision; names the devices there are.
    """
    import openvino as ov
    from openvino import opset13

    one = opset13.parameter([1, 1], np.float32)
    graph = ov.Model([opset13.matmul(one, one, False, False)], [one])
    for precision in (*precisions, DEFAULT_PRECISION):
        try:
            compiled = _core().compile_model(graph, device, _options(precision, device))
        except RuntimeError as error:
            here = ", ".join(f"{name} ({device_name(name)})" for name in _core().available_devices)
            msg = f"OpenVINO cannot compute on {device} in precision {precision} here: {_reason(error)} It has {here}."
            raise ValueError(msg) from error
    return computed(compiled)


def computed(compiled: "ov.CompiledModel") -> Computed:
    """Ask a compiled model what it computes in, and where."""
    devices = tuple(name.strip("()") for name in _property(compiled, "EXECUTION_DEVICES") or ())
    of_device = _property(compiled, "DEVICE_PROPERTIES") or {}  # AUTO, MULTI and HETERO tell nothing of their own
    told = [_property(compiled, "INFERENCE_PRECISION_HINT")]
    if told == [None]:
        told = [of_device.get(name, {}).get("INFERENCE_PRECISION_HINT") for name in devices]
    layers = _layers(compiled)
    floats = [name for name in layers if name not in ("i8", "u8")]
    names = ["dynamic" if one is None else one.get_type_name() for one in told]
    if "dynamic" in names or not names:  # said where the accuracy mode leaves it to the graph
        names = floats[:1] or ["unknown"]
    quantized = ["INT8"] if len(floats) < len(layers) else []
    return Computed(", ".join(dict.fromkeys(quantized + names)), devices)


def device_name(device: str) -> str:
    """Return what a device calls itself, or its name in OpenVINO where it has no other."""
    try:
        return str(_core().get_property(device, "FULL_DEVICE_NAME"))
    except RuntimeError:
        return device


@cache
def _core() -> "ov.Core":
    """Return one core for the process: OpenVINO 2026.4 may end one in which several were made and dropped."""
    import openvino as ov

    return ov.Core()


def _options(precision: str, device: str) -> dict[str, Any]:
    """Return the configuration of a compilation."""
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision != DEFAULT_PRECISION:
        options["INFERENCE_PRECISION_HINT"] = precision
    if device.startswith("AUTO"):
        options["ENABLE_STARTUP_FALLBACK"] = False  # else the processor answers first, in a precision of its own
    return options


def _property(compiled: "ov.CompiledModel", name: str) -> Any:
    """Return a property, None where the device does not tell."""
    try:
        return compiled.get_property(name)
    except RuntimeError:
        return None


def _layers(compiled: "ov.CompiledModel") -> list[str]:
    """Return the precisions of the layers that multiply, the most frequent first; none where it is not told."""
    try:
        layers = [layer.get_rt_info() for layer in compiled.get_runtime_model().get_ops()]
    except RuntimeError:
        return []
    told = (
        layer["runtimePrecision"].astype(str)
        for layer in layers
        if "layerType" in layer and "runtimePrecision" in layer and layer["layerType"].astype(str) in MULTIPLYING
    )
    return [name for name, _ in Counter(told).most_common()]


def _reason(error: Exception) -> str:
    """Return the last sentence of an error of OpenVINO, behind the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
