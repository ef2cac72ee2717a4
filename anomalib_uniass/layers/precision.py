# SPDX-License-Identifier: Apache-2.0
"""Full precision whatever the autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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
