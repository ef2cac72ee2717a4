# SPDX-License-Identifier: Apache-2.0
"""Reconstruction loss: mean squared error plus cosine distance, summed over the levels."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CosineTerm = Literal["distance", "release"]


class ReconstructionLoss(nn.Module):
    """``weight * sum_j [MSE(r_j, t_j) + mean(1 - cos(r_j, t_j))]`` -> scalar.

    Args:
        weight: Weight of the sum; the release takes 10 for MVTec AD and 1 for VisA.
        cosine_term: ``distance``, the paper's ``1 - cos``; or ``release``, the ``+ cos`` of the official code, a slip
            of sign that rewards dissimilar directions, to reproduce its numbers.
    """

    def __init__(
        self,
        *,
        weight: float = 10.0,
        cosine_term: CosineTerm = "distance",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.cosine_term = cosine_term

    def forward(
        self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor], stds: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Compare reconstructions with targets.

        Args:
            reconstructions: Reconstructed features ``[(B, C_i, H_i, W_i)]``.
            targets: What they should be, of the same order and shapes.
            stds: What the squared errors of a channel are measured in, ``[(1, C_i, 1, 1)]``; None takes them as
                they are. The cosine compares reconstruction and target as they are in any case.
        """
        scales = [None] * len(targets) if stds is None else stds
        levels = [self._level(*level) for level in zip(reconstructions, targets, scales, strict=True)]
        return self.weight * sum(levels[1:], start=levels[0])

    def _level(self, reconstruction: Tensor, target: Tensor, std: Tensor | None) -> Tensor:
        similarity = F.cosine_similarity(reconstruction, target, dim=1).mean()
        cosine = 1 - similarity if self.cosine_term == "distance" else similarity
        if std is not None:
            reconstruction, target = reconstruction / std, target / std
        return F.mse_loss(reconstruction, target) + cosine
