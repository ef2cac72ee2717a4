# SPDX-License-Identifier: Apache-2.0
"""Reconstruction heads: tokens back to the features of one backbone level."""

from torch import Tensor, nn


class ReconstructionHead(nn.Module):
    """Upsample bilinearly and convolve three times: ``(B, D, h, w) -> (B, C, scale * h, scale * w)``.

    The convolutions pad with zeros and have no activation between them, as in the release.

    Args:
        hidden_dim: Width D of the tokens.
        out_channels: Channels C of the backbone level.
        scale: Upsampling factor.
    """

    def __init__(self, hidden_dim: int, out_channels: int, *, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.upsample = nn.Upsample(scale_factor=float(scale), mode="bilinear", align_corners=True)
        self.convs = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1),
            nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1),
            nn.Conv2d(hidden_dim, out_channels, kernel_size=3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Reconstruct the features of the level from the tokens, viewed as maps."""
        return self.convs(self.upsample(maps))
