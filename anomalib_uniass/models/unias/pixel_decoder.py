# SPDX-License-Identifier: Apache-2.0
"""Pixel decoder: a feature pyramid network with a transformer encoder on its deepest level."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.position_encoding import sine_position_encoding_2d
from anomalib_uniass.components.recomputation import recompute
from anomalib_uniass.components.transformer import EncoderLayer

NORM_GROUPS = 32


class FPNPixelDecoder(nn.Module):
    """Fuse the pyramid top-down: ``[(B, C_i, H_i, W_i)] fine to coarse -> [(B, D, H_i, W_i)] coarse to fine``.

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
        super().__init__()
        *fine, deepest = in_channels
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
        return self.fuse(list, self.encode(deepest), *fine)

    def encode(self, deepest: Tensor) -> Tensor:
        """Return y4, the encoded deepest level: ``(B, C_4, h, w) -> (B, D, h, w)``."""
        x = self.input_proj(deepest)
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, D)
        for layer in self.encoder:
            tokens = layer(tokens, position=self.position)
        return F.relu(self.deepest_conv(tokens.transpose(1, 2).unflatten(2, x.shape[-2:])))

    def fuse(self, use: Callable[[list[Tensor]], list[Tensor]], y: Tensor, *fine: Tensor) -> list[Tensor]:
        """Go from y4 down through the other levels; images do not depend on each other.

        Args:
            use: What is done with the memory y4, y3, y2, y1. If it begins with cheap operators or a convolution, y1,
                the largest map by far, need not be kept for the backward pass.
            y: The encoded deepest level y4.
            fine: The inputs of the other levels, fine to coarse.

        Returns:
            What `use` makes of the memory.
        """
        levels = zip(self.lateral_convs, self.output_convs, reversed(fine), strict=True)
        *lower, last = cast("Iterable[tuple[nn.Module, nn.Sequential, Tensor]]", levels)
        memory = [y]
        for lateral_conv, output_conv, x in lower:
            memory.append(output_conv[1:](recompute(_fuse, lateral_conv, output_conv[0], x, memory[-1])))
        lateral_conv, output_conv, x = last
        fused = recompute(_fuse, lateral_conv, output_conv[0], x, memory[-1])
        return recompute(_normalize_and_use, output_conv[1:], use, memory, fused)


def _fuse(lateral_conv: nn.Module, conv: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    upsampled = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return conv(upsampled.add_(lateral_conv(x)))


def _normalize_and_use(
    norm: nn.Module, use: Callable[[list[Tensor]], list[Tensor]], memory: list[Tensor], fused: Tensor
) -> list[Tensor]:
    return use([*memory, norm(fused)])
