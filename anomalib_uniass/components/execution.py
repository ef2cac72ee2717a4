# SPDX-License-Identifier: Apache-2.0
"""How operators run here and now."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def runs_eagerly() -> bool:
    """Tell whether operators run as they are called, and are not compiled or exported."""
    return not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """Return a context without the autocast of a tensor's device; none is entered where there is no autocast.

    Args:
        like: A tensor of the device. Tensors that autocast made stay in low precision: :func:`widen` them.
    """
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def widen(x: Tensor) -> Tensor:
    """Return a tensor in float32 at least: float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def runs_on_cpu(x: Tensor) -> bool:
    """Tell whether operators on a tensor run on a CPU, as they are called."""
    return x.is_cpu and runs_eagerly()
