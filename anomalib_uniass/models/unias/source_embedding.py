# SPDX-License-Identifier: Apache-2.0
"""Source embedding: what the decoder's blocks attend to, one set of tokens a level."""

from collections.abc import Sequence

from torch import Tensor, nn


class SourceEmbedding(nn.Module):
    """Embed every memory level on the token grid: ``[(B, D, H_j, W_j)] -> [(B, N, D)]``, coarse to fine.

    Args:
        hidden_dim: Width D; an even number.
        levels: Number of levels; level j is 2^j times as large as the token grid.
    """

    def __init__(self, hidden_dim: int, *, levels: int) -> None:
        super().__init__()
        widths = [hidden_dim, *(hidden_dim * (level + 1) // 2 for level in range(1, levels))]
        self.patch_embeds = nn.ModuleList([nn.Identity()])
        for level in range(1, levels):
            patch = 2**level
            self.patch_embeds.append(nn.Conv2d(hidden_dim, widths[level], kernel_size=patch, stride=patch))
        self.projections = nn.ModuleList(nn.Conv2d(width, hidden_dim, kernel_size=1) for width in widths)
        self.level_embedding = nn.Embedding(levels, hidden_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for projection in self.projections:
            nn.init.kaiming_uniform_(projection.weight, a=1)  # type: ignore[arg-type]  # of a convolution
            nn.init.zeros_(projection.bias)  # type: ignore[arg-type]

    def forward(self, memory: Sequence[Tensor]) -> list[Tensor]:
        """Cut into patches, project, add the level embedding."""
        sources = []
        layers = zip(self.patch_embeds, self.projections, self.level_embedding.weight, memory, strict=True)
        for patch_embed, project, level, y in layers:
            x = project(patch_embed(y))  # (B, D, h, w)
            sources.append(x.flatten(2).mT + level)  # (B, N, D)
        return sources
