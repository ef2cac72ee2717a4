# SPDX-License-Identifier: Apache-2.0
"""The pixel decoder's convolutions of a sum, computed of either summand by itself.

The 3x3 convolution of a level acts on the sum of the upsampled level below and a lateral map. Both are linear but for
the lateral map's group norm, which is affine once its statistics are known, and these follow from mean and covariance
of the level's input. So the convolution may act on the lower level before it is upsampled, and on the input before it
is projected to D channels.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.constants import Folded, runs_on_cpu
from anomalib_uniass.acceleration.upsampled_conv import fold_upsampling, upsampled_conv2d
from anomalib_uniass.models.unias.pixel_decoder import FPNLevel

FOLD_GAIN = 2
"""Factor of multiply-adds that summands apart must save."""


class FoldedFPNLevel(Folded):
    """A level of the pixel decoder, its convolution of either summand by itself.

    On a CPU by PyTorch alone: exported graphs keep the convolution of the sum, which takes batches of any size.

    Args:
        plain: The level.
    """

    def __init__(self, plain: FPNLevel) -> None:
        super().__init__(("folded_weight", "folded_borders"))
        self.lateral_conv, self.lateral_norm = plain.lateral_conv, plain.lateral_norm
        self.output_conv, self.output_norm = plain.output_conv, plain.output_norm

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        """Return the memory of the level: ``(B, C, H, W), (B, D, H / 2, W / 2) -> (B, D, H, W)``."""
        return self.activate(self.fuse(x, below))

    def fuse(self, x: Tensor, below: Tensor) -> Tensor:
        """Convolve the upsampled map and the lateral one apart, and add."""
        if not runs_on_cpu(x):
            return FPNLevel.fuse(cast("FPNLevel", self), x, below)
        scale, shift = affine_of_norm(self.lateral_conv, self.lateral_norm, x)
        # Upsampling keeps constants: the shift is added where the map is small.
        upsampled = upsampled_conv2d(below + shift.to(below.dtype)[..., None, None], *self.folded())
        matrix = self.lateral_conv.weight.flatten(1)
        matrices = scale.to(matrix.dtype)[..., None] * matrix  # (B, D, C): every image has its own
        kernel = self.output_conv.weight.permute(0, 2, 3, 1)  # (D, 3, 3, D), as it lies in memory
        kernels = (kernel.flatten(0, 2) @ matrices).unflatten(1, kernel.shape[:3])  # (B, D, 3, 3, C)
        maps = F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1).permute(0, 3, 1, 2), padding=1, groups=len(x))
        return upsampled.add_(maps.view_as(upsampled))

    def activate(self, fused: Tensor) -> Tensor:
        """Normalise and rectify, in place: the backward pass of the norm wants its input alone."""
        return self.output_norm(fused).relu_()

    def fold(self) -> tuple[Tensor, Tensor]:
        """Fold upsampling into the convolution."""
        return fold_upsampling(self.output_conv.weight)


def fold_level(plain: FPNLevel) -> nn.Module:
    """Return the folded level, or the level itself where that saves less than half of the multiply-adds."""
    width, channels = plain.lateral_conv.weight.shape[:2]
    saves = FOLD_GAIN * (width / 4 + channels) <= width  # times 9 D for every pixel of the level
    return FoldedFPNLevel(plain) if saves else plain


def affine_of_norm(projection: nn.Conv2d, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return how a group norm acts on a projected map, from mean and covariance of the map alone.

    Args:
        projection: 1x1 convolution without bias, C to D channels.
        norm: Group norm of its output.
        x: Map ``(B, C, H, W)``.

    Returns:
        Scale and shift ``(B, D)``, in single precision at least:
        ``norm(projection(x)) = scale * projection(x) + shift``.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        matrix, weight, bias = (p.to(precise) for p in (projection.weight.flatten(1), norm.weight, norm.bias))
        pixels = x.to(precise).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
        mean = pixels.mean(dim=1, keepdim=True)
        centred = pixels - mean
        covariance = centred.mT @ centred / pixels.shape[1]
        moments = ((mean @ matrix.T)[:, 0], ((matrix @ covariance) * matrix).sum(dim=2))  # of the channels, (B, D)
        means, variances = (moment.unflatten(1, (norm.num_groups, -1)) for moment in moments)
        group_mean = means.mean(dim=2, keepdim=True)
        group_variance = (variances + (means - group_mean).square()).mean(dim=2, keepdim=True)
        scale = weight.view_as(means[0]) * (group_variance + norm.eps).rsqrt()
        shift = bias.view_as(means[0]) - scale * group_mean
        return scale.flatten(1), shift.flatten(1)
