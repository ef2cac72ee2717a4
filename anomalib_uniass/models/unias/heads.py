# SPDX-License-Identifier: Apache-2.0
"""Reconstruction heads: tokens back to the features of one backbone level."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.folding import FOLD_GAIN, FoldingModule
from anomalib_uniass.models.unias.head_folding import (
    AxisOperators,
    apply_folded,
    fold_biases,
    fold_weights,
    folded_cost,
    folding_cost,
    plain_cost,
)


class ReconstructionHead(FoldingModule):
    """Upsample and convolve three times: ``(B, D, h, w) -> (B, C, h * scale, w * scale)``.

    Bilinear upsampling (``align_corners=True``), then three 3x3 convolutions with zero padding and no activation
    between them. That is one linear map, which is folded (:mod:`~anomalib_uniass.models.unias.head_folding`) wherever
    this takes less than half of the multiply-adds. In training the weights are folded once a step, which pays for
    large maps and batches; for inference they are folded once and kept as constants.

    Args:
        hidden_dim: Width D of the tokens.
        out_channels: Channels C of the backbone level.
        grid_size: Height h and width w.
        scale: Upsampling factor.
    """

    folded_weight: Tensor
    folded_bias: Tensor

    def __init__(self, hidden_dim: int, out_channels: int, *, grid_size: tuple[int, int], scale: int) -> None:
        super().__init__(constants=("folded_weight", "folded_bias"))
        self.scale = scale
        self.convs = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1),
            nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1),
            nn.Conv2d(hidden_dim, out_channels, kernel_size=3, padding=1),
        )
        self.rows, self.columns = (AxisOperators(size, scale=scale) for size in grid_size)
        sizes = (hidden_dim, out_channels, self.rows, self.columns)
        self._plain_cost, self._folded_cost = plain_cost(*sizes), folded_cost(*sizes)
        self._folding_cost = folding_cost(hidden_dim, out_channels)
        self.folds_ahead = FOLD_GAIN * self._folded_cost < self._plain_cost

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct the features of the level, by the cheaper form."""
        if torch.is_grad_enabled():
            images = len(x)  # they share the cost of folding the weights of this step
            if FOLD_GAIN * (self._folding_cost + images * self._folded_cost) < images * self._plain_cost:
                return self.folded(x, *self.fold())
        elif self.folds_ahead:
            return self.folded(x, *self.folded_ahead())
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Compute the head as it is written in the paper."""
        return self.convs(F.interpolate(x, scale_factor=float(self.scale), mode="bilinear", align_corners=True))

    def folded(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute the head with folded weights."""
        return apply_folded(x, weight, bias, rows=self.rows.matrices, columns=self.columns.matrices)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Fold weights and biases, differentiably and in full precision."""
        w1, b1, w2, b2, w3, b3 = self.convs.parameters()
        with torch.autocast(w1.device.type, enabled=False):
            weights, biases = (w1, w2, w3), (b1, b2, b3)
            return fold_weights(weights, self.rows, self.columns), fold_biases(weights, biases, self.rows, self.columns)
