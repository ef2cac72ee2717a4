# SPDX-License-Identifier: Apache-2.0
"""The source embedding's two convolutions of a level as one matrix: there is no activation between them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.constants import Folded
from anomalib_uniass.models.unias.source_embedding import SourceEmbedding


class FoldedSourceEmbedding(Folded):
    """A source embedding of one matrix a level: ``[(B, D, H_j, W_j)] -> [(B, N, D)]``, coarse to fine.

    Patches do not overlap, so that their convolution is a matrix product, in which a CPU is faster.

    Args:
        plain: The source embedding.
    """

    def __init__(self, plain: SourceEmbedding) -> None:
        self.fine = range(1, len(plain.projections))
        super().__init__([f"folded_{name}_{level}" for level in self.fine for name in ("matrix", "bias")])
        self.patch_embeds, self.projections = plain.patch_embeds, plain.projections
        self.level_embedding = plain.level_embedding

    def forward(self, memory: Sequence[Tensor], folded: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Cut into patches and project, add the level embedding.

        Args:
            memory: The memory, coarse to fine.
            folded: What :meth:`folded` returns, if it was called already for other images of the same step.
        """
        coarsest, *fine = memory
        tokens = [self.projections[0](coarsest).flatten(2).mT]  # (B, N, D)
        folded = self.folded() if folded is None else folded
        for level, y, matrix, bias in zip(self.fine, fine, folded[::2], folded[1::2], strict=True):
            tokens.append(F.linear(_patches(y, 2**level), matrix, bias))
        return [x + embedding for x, embedding in zip(tokens, self.level_embedding.weight, strict=True)]

    def fold(self) -> tuple[Tensor, ...]:
        """Fold the projection of each fine level into its patch embedding: ``(D, p p D)`` and ``(D,)``."""
        folded: list[Tensor] = []
        for level in self.fine:
            patch_embed, projection = (cast("nn.Conv2d", m[level]) for m in (self.patch_embeds, self.projections))
            matrix = projection.weight.flatten(1)  # (D, w)
            kernel = patch_embed.weight.permute(0, 2, 3, 1).flatten(1)  # (w, p p D), as it lies in memory
            with torch.autocast(matrix.device.type, enabled=False):
                folded += [matrix @ kernel, matrix @ cast("Tensor", patch_embed.bias) + cast("Tensor", projection.bias)]
        return tuple(folded)


def _patches(y: Tensor, size: int) -> Tensor:
    """Cut a map into patches of p x p pixels: ``(B, D, H, W) -> (B, N, p p D)``."""
    rows = y.permute(0, 2, 3, 1).unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, h, p, w, p, D)
    return rows.transpose(2, 3).flatten(3).flatten(1, 2)
