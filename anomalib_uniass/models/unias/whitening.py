# SPDX-License-Identifier: Apache-2.0
"""Whitening by the reconstruction's own errors (not in the paper; off by default)."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.folding import FoldingModule

MOMENTUM = 0.01  # about the last hundred steps
SHRINKAGE = 0.5


class ErrorWhitening(FoldingModule):
    """Shorten the directions in which good images are reconstructed badly: ``(B, C, H, W) -> (B, C, H, W)``.

    What cannot be predicted of a good surface, its grain for one, is an error of every good image. Errors in those
    directions say little, small ones in other directions much. With S the covariance of the errors, shrunk half-way to
    a multiple of the identity (as Ledoit and Wolf do, by a fixed share), features are multiplied by S^(-1/2). The
    identity, up to a factor, until training has gone a step.

    Args:
        channels: Channels C of the level.
    """

    covariance: Tensor
    steps: Tensor
    matrix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(constants=("matrix",))
        self.register_buffer("covariance", torch.eye(channels))
        self.register_buffer("steps", torch.tensor(0.0))

    @torch.no_grad()
    def update(self, reconstruction: Tensor, target: Tensor) -> None:
        """Take in the errors of a training step: the mean over all steps at first, a moving one later."""
        error = (reconstruction - target).float().transpose(0, 1).flatten(1)  # (C, B * H * W)
        self.steps += 1
        with torch.autocast(error.device.type, enabled=False):
            self.covariance.lerp_(error @ error.T / error.shape[1], (1 / self.steps).clamp_min(MOMENTUM))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten."""
        self.fold_ahead()
        return F.conv2d(x, self.matrix)

    def fold(self) -> tuple[Tensor]:
        """Return S^(-1/2) as the weight of a 1x1 convolution, ``(C, C, 1, 1)``."""
        variances, directions = torch.linalg.eigh(self.covariance.double().cpu())  # not every device has float64
        shrunk = variances.lerp(variances.mean(), SHRINKAGE)
        root = (directions * shrunk.rsqrt()) @ directions.T
        return (root[:, :, None, None].to(self.covariance),)
