# SPDX-License-Identifier: Apache-2.0
"""A 3x3 convolution of a bilinearly upsampled map, computed from the map before upsampling, exactly.

Upsampling by two puts zeros between the pixels and filters with (1, 3, 3, 1) / 4 along either axis. All channels are
filtered alike, so that the filter may follow the convolution, which then meets the map with the zeros: a transposed
convolution with a quarter of the multiply-adds. Only the border is treated in two ways, for the filter continues the
map by its outermost pixels and the convolution by zeros. What the continued pixels add to the outermost rows and
columns is therefore subtracted.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

FILTER = (0.25, 0.75, 0.75, 0.25)


def fold_upsampling(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Prepare a convolution's weight, differentiably.

    Args:
        weight: Weight ``(C', C, 3, 3)``.

    Returns:
        Weight of the transposed convolution ``(C, C', 3, 3)``, and those of the outermost row or column of taps at the
        top, bottom, left and right ``(4, C', C, 1, 3)``.
    """
    borders = torch.stack((weight[:, :, 0], weight[:, :, 2], weight[..., 0], weight[..., 2])).unsqueeze(3)
    transposed = weight.flip(2, 3).transpose(0, 1)
    # The layout of the maps: convolutions need not reorder them at every call.
    return (
        transposed.contiguous(memory_format=torch.channels_last),
        borders.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    )


def upsampled_conv2d(x: Tensor, transposed: Tensor, borders: Tensor) -> Tensor:
    """Return ``conv2d(upsample(x), weight, padding=1)``: ``(B, C, H, W) -> (B, C', 2H, 2W)``.

    Upsampling is bilinear with ``align_corners=False``.

    Args:
        x: Map before upsampling.
        transposed: Weight of the transposed convolution, of :func:`fold_upsampling`.
        borders: Weights of the outermost taps, likewise.
    """
    continued = F.pad(x, (1, 1, 1, 1), mode="replicate")
    spread = F.conv_transpose2d(continued, transposed, stride=2, padding=1)  # (B, C', 2H + 3, 2W + 3)
    top, bottom, left, right = borders
    return _FilterAndCut.apply(
        spread,
        F.conv2d(_upsample_edge(x[:, :, :1], continued=True), top),
        F.conv2d(_upsample_edge(x[:, :, -1:], continued=True), bottom),
        F.conv2d(_upsample_edge(x[..., :1].mT), left, padding=(0, 1)).mT,
        F.conv2d(_upsample_edge(x[..., -1:].mT), right, padding=(0, 1)).mT,
    )


def _upsample_edge(edge: Tensor, *, continued: bool = False) -> Tensor:
    """Upsample a row ``(B, C, 1, W) -> (B, C, 1, 2W)``, or to 2W + 2 with a continued pixel at either end."""
    upsampled = F.interpolate(edge, scale_factor=(1.0, 2.0), mode="bilinear")
    return F.pad(upsampled, (1, 1, 0, 0), mode="replicate") if continued else upsampled


class _FilterAndCut(torch.autograd.Function):
    """Filter a map and subtract from its borders; autograd by itself would keep and copy whole maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.kernel = kernel = _filter_like(x)
        filtered = F.conv2d(x, kernel, groups=len(kernel))
        filtered[:, :, :1] -= top
        filtered[:, :, -1:] -= bottom
        filtered[..., :1] -= left
        filtered[..., -1:] -= right
        return filtered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (g,) = gradients
        spread = F.conv2d(g, ctx.kernel, padding=3, groups=len(ctx.kernel))  # the filter is symmetric
        return spread, -g[:, :, :1], -g[:, :, -1:], -g[..., :1], -g[..., -1:]


def _filter_like(x: Tensor) -> Tensor:
    line = x.new_tensor(FILTER)
    return (line[:, None] * line).expand(x.shape[1], 1, 4, 4).contiguous(memory_format=torch.channels_last)
