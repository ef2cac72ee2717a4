# SPDX-License-Identifier: Apache-2.0
"""Pixel decoder: a feature pyramid network with a transformer encoder on its deepest level."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.execution import runs_on_cpu
from anomalib_uniass.components.folding import FOLD_GAIN, FoldingModule
from anomalib_uniass.components.position_encoding import sine_position_encoding_2d
from anomalib_uniass.components.recomputation import recompute
from anomalib_uniass.components.transformer import EncoderLayer
from anomalib_uniass.components.upsampled_conv import fold_upsampling, upsampled_conv2d

NORM_GROUPS = 32

Folded = Mapping[int, tuple[Tensor, Tensor]]
"""Weights of :func:`~anomalib_uniass.components.upsampled_conv.fold_upsampling` by the fine level, coarse to fine."""


class FPNPixelDecoder(FoldingModule):
    """Fuse the pyramid top-down: ``[(B, C_i, H_i, W_i)] fine to coarse -> [(B, D, H_i, W_i)] coarse to fine``.

    The 3x3 convolution of a level acts on the sum of the upsampled level below and a lateral map. Both are linear but
    for the lateral map's group norm, which is affine once its statistics are known, and these follow from mean and
    covariance of the level's input. On a CPU the convolution is therefore computed of either summand by itself wherever
    this takes at most half of the multiply-adds: of the lower level before it is upsampled, of the input before it is
    projected to D channels.

    Args:
        in_channels: Channels of the inputs, fine to coarse; two at least.
        hidden_dim: Width D, a multiple of 32.
        feedforward_dim: Width of the encoder's feed-forward layers.
        grid_size: Height and width of the deepest level.
        heads: Attention heads of the encoder.
        depth: Encoder layers on the deepest level.
        dropout: Dropout of the encoder.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        hidden_dim: int,
        feedforward_dim: int,
        grid_size: tuple[int, int],
        heads: int = 4,
        depth: int = 3,
        dropout: float = 0.1,
    ) -> None:
        *fine, deepest = in_channels
        levels_apart = [
            level
            for level, channels in enumerate(reversed(fine))
            if FOLD_GAIN * (hidden_dim / 4 + channels) <= hidden_dim  # times 9 D for every pixel of the level
        ]
        super().__init__([f"folded_{kind}_{level}" for level in levels_apart for kind in ("weight", "borders")])
        self._levels_apart = levels_apart
        self.folds_ahead = bool(levels_apart)
        self.input_proj = nn.Conv2d(deepest, hidden_dim, kernel_size=1)
        self.encoder = nn.ModuleList(
            EncoderLayer(hidden_dim, heads=heads, feedforward_dim=feedforward_dim, dropout=dropout)
            for _ in range(depth)
        )
        self.register_buffer("position", sine_position_encoding_2d(*grid_size, hidden_dim), persistent=False)
        self.deepest_conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, bias=False)
        self.lateral_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, hidden_dim, 1, bias=False), nn.GroupNorm(NORM_GROUPS, hidden_dim))
            for channels in reversed(fine)
        )
        self.output_convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, hidden_dim),
                nn.ReLU(inplace=True),
            )
            for _ in fine
        )
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the memory y4, y3, y2, y1, coarse to fine."""
        *fine, deepest = inputs
        return self.fuse(list, self.folded(deepest), self.encode(deepest), *fine)

    def encode(self, deepest: Tensor) -> Tensor:
        """Return y4, the encoded deepest level: ``(B, C_4, h, w) -> (B, D, h, w)``."""
        x = self.input_proj(deepest)
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, D)
        for layer in self.encoder:
            tokens = layer(tokens, position=self.position)
        return F.relu(self.deepest_conv(tokens.transpose(1, 2).unflatten(2, x.shape[-2:])))

    def folded(self, x: Tensor) -> Folded:
        """Return the folded weights of the levels that are computed by summands on the device of a tensor."""
        if not runs_on_cpu(x):
            return {}
        folded = self.fold() if torch.is_grad_enabled() else self.folded_ahead()
        weights_and_borders = zip(folded[::2], folded[1::2], strict=True)
        return dict(zip(self._levels_apart, weights_and_borders, strict=True))

    def fold(self) -> tuple[Tensor, ...]:
        """Fold upsampling into the convolutions of the levels that are computed by summands."""
        convs = (cast("nn.Sequential", self.output_convs[level])[0] for level in self._levels_apart)
        return tuple(folded for conv in convs for folded in fold_upsampling(cast("Tensor", conv.weight)))

    def fuse(
        self, use: Callable[[list[Tensor]], list[Tensor]], folded: Folded, y: Tensor, *fine: Tensor
    ) -> list[Tensor]:
        """Go from y4 down through the other levels; images do not depend on each other.

        Args:
            use: What is done with the memory y4, y3, y2, y1. If it begins with cheap operators or a convolution, y1,
                the largest map by far, need not be kept for the backward pass.
            folded: What :meth:`folded` returns, or nothing to compute all levels as they are written in the paper.
            y: The encoded deepest level y4.
            fine: The inputs of the other levels, fine to coarse.

        Returns:
            What `use` makes of the memory.
        """
        memory = [y]
        levels = zip(self.lateral_convs, self.output_convs, reversed(fine), strict=True)
        for level, (lateral, output_conv, x) in enumerate(
            cast("Iterable[tuple[nn.Sequential, nn.Sequential, Tensor]]", levels)
        ):
            if level in folded:
                fused = _fuse_by_summands(lateral, cast("nn.Conv2d", output_conv[0]), folded[level], x, memory[-1])
            else:
                fused = recompute(_fuse, lateral, output_conv[0], x, memory[-1])
            if level == len(fine) - 1:
                break
            memory.append(output_conv[1:](fused))
        return recompute(_normalize_and_use, output_conv[1:], use, memory, fused)


def _fuse(lateral: nn.Module, conv: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    upsampled = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return conv(upsampled.add_(lateral(x)))


def _fuse_by_summands(
    lateral: nn.Sequential, conv: nn.Conv2d, folded: tuple[Tensor, Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Compute the same, the convolution of either summand by itself."""
    projection, norm = cast("tuple[nn.Conv2d, nn.GroupNorm]", tuple(lateral))
    scale, shift = affine_of_norm(projection, norm, x)
    # Upsampling keeps constants: the shift is added where the map is small.
    upsampled = upsampled_conv2d(y + shift.to(y.dtype)[..., None, None], *folded)
    matrix = projection.weight.flatten(1)
    matrices = scale.to(matrix.dtype)[..., None] * matrix  # (B, D, C): every image has its own
    kernel = conv.weight.permute(0, 2, 3, 1)  # (D, 3, 3, D), as it lies in memory
    kernels = (kernel.flatten(0, 2) @ matrices).unflatten(1, kernel.shape[:3])  # (B, D, 3, 3, C)
    maps = F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1).permute(0, 3, 1, 2), padding=1, groups=len(x))
    return upsampled.add_(maps.view_as(upsampled))


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


def _normalize_and_use(
    norm: nn.Module, use: Callable[[list[Tensor]], list[Tensor]], memory: list[Tensor], fused: Tensor
) -> list[Tensor]:
    return use([*memory, norm(fused)])
