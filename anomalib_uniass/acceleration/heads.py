# SPDX-License-Identifier: Apache-2.0
"""Reconstruction heads as one linear map each."""

from typing import cast

import torch
from torch import Tensor, nn

from anomalib_uniass.acceleration.constants import Folded
from anomalib_uniass.acceleration.head_folding import (
    AxisOperators,
    apply_folded,
    fold_biases,
    fold_weights,
    folded_cost,
    plain_cost,
)
from anomalib_uniass.models.unias.heads import ReconstructionHead

FOLD_GAIN = 2
"""Factor of multiply-adds that the folded form must save: it moves more memory for each of them than a convolution."""


class FoldedReconstructionHead(Folded):
    """A head's upsampling and convolutions, folded into one linear map: ``(B, D, h, w) -> (B, C, scale h, scale w)``.

    See :mod:`~anomalib_uniass.acceleration.head_folding`. In training the weights are folded once a step.

    Args:
        plain: The head.
        grid_size: Height h and width w.
    """

    def __init__(self, plain: ReconstructionHead, *, grid_size: tuple[int, int]) -> None:
        super().__init__(("folded_weight", "folded_bias", "row_matrices", "column_matrices"))
        self.convs = plain.convs
        self.rows, self.columns = (AxisOperators(size, scale=plain.scale) for size in grid_size)

    def forward(self, maps: Tensor) -> Tensor:
        """Reconstruct the features of the level."""
        weight, bias, rows, columns = self.folded()
        return apply_folded(maps, weight, bias, rows=rows, columns=columns)

    def fold(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fold weights and biases; the matrices of the axes come in their precision."""
        w1, b1, w2, b2, w3, b3 = self.convs.parameters()
        weights, biases = (w1, w2, w3), (b1, b2, b3)
        with torch.autocast(w1.device.type, enabled=False):
            weight = fold_weights(weights, self.rows, self.columns)
            bias = fold_biases(weights, biases, self.rows, self.columns)
        return weight, bias, self.rows.matrices.to(w1), self.columns.matrices.to(w1)


def fold_head(plain: ReconstructionHead, *, grid_size: tuple[int, int]) -> nn.Module:
    """Return the folded head, or the head itself where that saves less than half of the multiply-adds."""
    folded = FoldedReconstructionHead(plain, grid_size=grid_size)
    last = cast("nn.Conv2d", plain.convs[2])
    sizes = (last.in_channels, last.out_channels, folded.rows, folded.columns)
    return folded if FOLD_GAIN * folded_cost(*sizes) < plain_cost(*sizes) else plain
