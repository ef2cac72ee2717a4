# SPDX-License-Identifier: Apache-2.0
"""Pixel decoder: a feature pyramid network with a transformer encoder on its deepest level."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.position_encoding import sine_position_encoding_2d
from anomalib_uniass.layers.transformer import EncoderLayer

NORM_GROUPS = 32
HEADS = 4
DEPTH = 3
"""Encoder layers on the deepest level."""


class FPNPixelDecoder(nn.Module):
    """Fuse the pyramid top-down: ``[(B, C_i, H_i, W_i)] fine to coarse -> [(B, D, H_i, W_i)] coarse to fine``.

    Args:
        in_channels: Channels of the inputs, fine to coarse; two at least.
        hidden_dim: Width D, a multiple of 32.
        feedforward_dim: Width of the encoder's feed-forward layers.
        grid_size: Height and width of the deepest level.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        hidden_dim: int,
        feedforward_dim: int,
        grid_size: tuple[int, int],
    ) -> None:
        *fine, deepest = in_channels
        super().__init__()
        self.input_proj = nn.Conv2d(deepest, hidden_dim, kernel_size=1)
        self.encoder = nn.ModuleList(
            EncoderLayer(hidden_dim, heads=HEADS, feedforward_dim=feedforward_dim) for _ in range(DEPTH)
        )
        self.register_buffer("position", sine_position_encoding_2d(*grid_size, hidden_dim), persistent=False)
        self.deepest_conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, bias=False)
        self.levels = nn.ModuleList(FPNLevel(channels, hidden_dim) for channels in reversed(fine))
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
        memory = [self.encode(deepest)]
        for level, x in zip(self.levels, reversed(fine), strict=True):
            memory.append(level(x, memory[-1]))
        return memory

    def encode(self, deepest: Tensor) -> Tensor:
        """Return y4, the encoded deepest level: ``(B, C_4, h, w) -> (B, D, h, w)``."""
        x = self.input_proj(deepest)
        tokens = x.flatten(2).mT  # (B, N, D)
        for layer in self.encoder:
            tokens = layer(tokens, position=self.position)
        return F.relu(self.deepest_conv(tokens.mT.unflatten(2, x.shape[-2:])))


class FPNLevel(nn.Module):
    """One step down the pyramid: ``(B, C, H, W), (B, D, H / 2, W / 2) -> (B, D, H, W)``.

    Args:
        in_channels: Channels C of the level's input.
        hidden_dim: Width D, a multiple of 32.
    """

    def __init__(self, in_channels: int, hidden_dim: int) -> None:
        super().__init__()
        self.lateral_conv = nn.Conv2d(in_channels, hidden_dim, kernel_size=1, bias=False)
        self.lateral_norm = nn.GroupNorm(NORM_GROUPS, hidden_dim)
        self.output_conv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, bias=False)
        self.output_norm = nn.GroupNorm(NORM_GROUPS, hidden_dim)

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        """Return the memory y of the level from its input and the memory of the coarser level below."""
        return self.activate(self.fuse(x, below))

    def fuse(self, x: Tensor, below: Tensor) -> Tensor:
        """Add the upsampled map and the lateral one, and convolve."""
        upsampled = F.interpolate(below, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.output_conv(upsampled + self.lateral_norm(self.lateral_conv(x)))

    def activate(self, fused: Tensor) -> Tensor:
        """Normalise and rectify."""
        return F.relu(self.output_norm(fused))
