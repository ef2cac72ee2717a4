# SPDX-License-Identifier: Apache-2.0
"""The source embedding's two convolutions of a level as one: there is no activation between them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.constants import Folded
from anomalib_uniass.models.unias.source_embedding import SourceEmbedding


class FoldedSourceEmbedding(Folded):
    """A source embedding of one convolution a level: ``[(B, D, H_j, W_j)] -> [(B, N, D)]``, coarse to fine.

    Args:
        plain: The source embedding.
    """

    def __init__(self, plain: SourceEmbedding) -> None:
        self.fine = range(1, len(plain.projections))
        super().__init__([f"folded_{name}_{level}" for level in self.fine for name in ("weight", "bias")])
        self.patch_embeds, self.projections = plain.patch_embeds, plain.projections
        self.level_embedding = plain.level_embedding

    def forward(self, memory: Sequence[Tensor]) -> list[Tensor]:
        """Cut into patches and project, add the level embedding."""
        coarsest, *fine = memory
        maps = [self.projections[0](coarsest)]  # (B, D, h, w)
        folded = self.folded()
        for y, weight, bias in zip(fine, folded[::2], folded[1::2], strict=True):
            maps.append(F.conv2d(y, weight, bias, stride=weight.shape[2:]))
        return [x.flatten(2).mT + level for x, level in zip(maps, self.level_embedding.weight, strict=True)]

    def fold(self) -> tuple[Tensor, ...]:
        """Fold the projection of each fine level into its patch embedding."""
        folded: list[Tensor] = []
        for level in self.fine:
            patch_embed, projection = (cast("nn.Conv2d", m[level]) for m in (self.patch_embeds, self.projections))
            matrix = projection.weight.flatten(1)  # (D, w)
            kernel = patch_embed.weight.permute(0, 2, 3, 1)  # (w, p, p, D)
            with torch.autocast(matrix.device.type, enabled=False):
                weight = (matrix @ kernel.flatten(1)).unflatten(1, kernel.shape[1:]).permute(0, 3, 1, 2)
                folded += [weight, matrix @ cast("Tensor", patch_embed.bias) + cast("Tensor", projection.bias)]
        return tuple(folded)
