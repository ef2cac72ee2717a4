# SPDX-License-Identifier: Apache-2.0
"""Gated queries: a learned bank, gated by the deepest map of the image at hand."""

import torch
from torch import Tensor, nn

from anomalib_uniass.layers.mgg_cnn import MultiGranularityGatedCNN


class GatedQueryGenerator(nn.Module):
    """Generate the decoder's first tokens from the deepest map: ``(B, D, h, w) -> (B, N, D)``, N = h * w.

    Args:
        hidden_dim: Width D.
        grid_size: Height h and width w of the deepest level.
    """

    def __init__(self, hidden_dim: int, *, grid_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = grid_size
        self.grid_size = grid_size
        self.bank = nn.Embedding(2 * height * width, hidden_dim)
        self.feature_proj = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1)
        self.channel_gate = ChannelGate(hidden_dim)
        self.spatial_gate = SpatialGate()
        self.mgg_cnn = MultiGranularityGatedCNN(2 * hidden_dim, hidden_dim)

    def forward(self, deepest: Tensor) -> Tensor:
        """Gate the bank by channel and by position, then mix both halves with the MGG-CNN."""
        feature = self.feature_proj(deepest)
        channel = self.channel_gate(feature)[:, None]  # (B, 1, D)
        spatial = self.spatial_gate(feature).flatten(1).repeat(1, 2)[..., None]  # (B, 2N, 1)
        queries = channel * self.bank.weight + spatial * self.bank.weight  # (B, 2N, D)
        # Row-major reshape: a channel's 2N values become two maps, one for each half of the bank.
        maps = queries.mT.reshape(-1, 2 * queries.shape[2], *self.grid_size)  # (B, 2D, h, w)
        return self.mgg_cnn(maps).flatten(2).mT


class ChannelGate(nn.Module):
    """CBAM-style gate of the channels: ``(B, D, h, w) -> (B, D)`` in (0, 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Average and maximum pooling share the MLP."""
        return torch.sigmoid(self.mlp(feature.mean(dim=(2, 3))) + self.mlp(feature.amax(dim=(2, 3))))


class SpatialGate(nn.Module):
    """CBAM-style gate of the positions: ``(B, D, h, w) -> (B, h, w)`` in (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)

    def forward(self, feature: Tensor) -> Tensor:
        """Convolve the channel mean and maximum."""
        pooled = torch.stack([feature.mean(dim=1), feature.amax(dim=1)], dim=1)
        return torch.sigmoid(self.conv(pooled)).squeeze(1)
