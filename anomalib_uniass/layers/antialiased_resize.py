# SPDX-License-Identifier: Apache-2.0
"""Antialiased resize of matrix products alone, which every runtime has."""

import torch
from torch import Tensor


def antialiased_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``(B, C, H, W)`` bilinearly with antialiasing, as torchvision does, by matrix products alone."""
    exporting = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    if not exporting and tuple(x.shape[-2:]) == tuple(size):
        return x
    rows = _triangle_filter(x[0, 0, :, 0], size[0])
    columns = _triangle_filter(x[0, 0, 0, :], size[1])
    return rows @ x @ columns.T


def _triangle_filter(axis: Tensor, size: int) -> Tensor:
    """Return the weights ``(size, n)`` that resample an axis of n pixels; tensors only, for n may be symbolic.

    Whole numbers up to the division: positions such as 300.5 do not exist in bfloat16, which OpenVINO computes in by
    itself on many CPUs. Between 0 and 1 before they are summed, for sums of the whole numbers are beyond float16.
    """
    ordinals = torch.ones_like(axis, dtype=torch.int64).cumsum(0)
    count = ordinals[-1]
    centers = count * (2 * torch.arange(size, device=axis.device) + 1)
    distances = (size * (2 * ordinals - 1) - centers[:, None]).abs()  # in units of half a pixel over `size`
    height = 2 * count.clamp_min(size)
    weights = (height - distances).clamp_min(0).to(axis.dtype) / height.to(axis.dtype)
    return weights / weights.sum(dim=1, keepdim=True)
