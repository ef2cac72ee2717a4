# SPDX-License-Identifier: Apache-2.0
"""What errors good images have, by kind of image (not in the paper; off by default)."""

from collections.abc import Iterable, Sequence

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.execution import full_precision, widen
from anomalib_uniass.components.folding import FoldingModule

WINDOW = 100
"""Images of a kind over which the moving averages run."""

PRIOR = 50
"""Images of a kind that weigh as much as the mean over all kinds."""

SHRINKAGE = 0.5
"""Weight of the identity in a covariance."""

COARSE_LEVELS = 2
"""Levels that are compared in any case; their strides of 16 and 8 are those of memory banks."""

EXPLAINED = 0.25
"""Share of the variance that the reconstruction must explain on a finer level."""


class ErrorStatistics(FoldingModule):
    """Statistics of the reconstruction's errors on good images, for every kind of image.

    A kind is a prototype of k-means: images belong to the nearest one by the mean of their coarsest features. So no
    category is asked for, neither in training nor later. The statistics say two things to the anomaly map:

    - Which directions say little. What cannot be predicted of a good surface, its grain for one, is an error of every
      good image. With S the covariance of a kind's errors, shrunk towards that of all kinds and then half-way to a
      multiple of the identity, features are multiplied by S^(-1/2) before they are compared.
    - Which levels say little. Where the reconstruction explains less than a quarter of the variance of a kind's
      features on a fine level, that level and the finer ones are left out.

    Args:
        channels: Channels C_j of the levels, coarse to fine.
        prototypes: Number of kinds K.
    """

    scale: Tensor
    centers: Tensor
    images: Tensor
    fitted: Tensor
    exponents: Tensor

    def __init__(self, channels: Sequence[int], *, prototypes: int) -> None:
        if prototypes < 1:
            msg = f"prototypes must not be negative, got {prototypes}."
            raise ValueError(msg)
        super().__init__(constants=[*(f"whitening_{level}" for level in range(len(channels))), "exponents"])
        self.levels = len(channels)
        self.register_buffer("scale", torch.ones(channels[0]))
        self.register_buffer("centers", torch.zeros(prototypes, channels[0]))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("images", torch.zeros(prototypes))
        for level, c in enumerate(channels):
            self.register_buffer(f"covariance_{level}", torch.eye(c).repeat(prototypes, 1, 1))
            self.register_buffer(f"mean_{level}", torch.zeros(prototypes, c))
            self.register_buffer(f"square_{level}", torch.zeros(prototypes))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Find the prototypes.

        Args:
            batches: Coarsest features of the training set, ``(B, C, h, w)`` each.

        Raises:
            ValueError: If there is no batch.
        """
        descriptors = [features.mean((2, 3)).cpu() for features in batches]
        if not descriptors:
            msg = "Prototypes need at least one batch of training images, got none."
            raise ValueError(msg)
        points = torch.cat(descriptors)
        scale = points.std(dim=0, correction=0).clamp_min(1e-6)
        points = points / scale
        count = min(len(self.centers), len(points.unique(dim=0)))
        found = KMeans(n_clusters=count, n_init=4, random_state=0).fit(points.numpy()).cluster_centers_
        self.scale.copy_(scale)
        self.centers.copy_(torch.from_numpy(found[:1]))  # of too few images: copies, which argmin passes over
        self.centers[:count] = torch.from_numpy(found).to(self.centers)
        self.fitted.fill_(True)

    def kinds(self, coarsest: Tensor) -> Tensor:
        """Return the nearest prototype of coarsest features: ``(B, C, h, w) -> (B,)``."""
        centers = widen(self.centers)
        with full_precision(coarsest):
            points = widen(coarsest).mean((2, 3)).to(centers.dtype) / self.scale
            return (centers.square().sum(1) - 2 * points @ centers.T).argmin(dim=1)

    @torch.no_grad()
    def update(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Take in a training step: the mean over all images of a kind at first, a moving one later."""
        members = F.one_hot(self.kinds(targets[0]), len(self.centers)).T.float()  # (K, B)
        count = members.sum(dim=1)
        self.images += count
        rate = (count / self.images.clamp(1, WINDOW)).clamp_max(1)
        share = members / count.clamp_min(1)[:, None]
        with torch.autocast(share.device.type, enabled=False):
            for level, (reconstruction, target) in enumerate(zip(reconstructions, targets, strict=True)):
                error, feature = (reconstruction - target).float().flatten(2), target.float().flatten(2)
                statistics = {
                    "covariance": error @ error.mT / error.shape[2],
                    "mean": feature.mean(dim=2),
                    "square": feature.square().sum(dim=1).mean(dim=1),
                }
                for name, values in statistics.items():
                    running = self.get_buffer(f"{name}_{level}")
                    now = torch.einsum("kb,b...->k...", share, values)
                    running += torch.einsum("k,k...->k...", rate, now - running)

    def whiten(self, level: int, features: Tensor, kinds: Tensor) -> Tensor:
        """Multiply features of a level by S^(-1/2) of their kinds: ``(B, C_j, H, W), (B,) -> (B, C_j, H, W)``."""
        matrices = widen(self.get_buffer(f"whitening_{level}")[kinds])
        with full_precision(features):
            return (matrices @ features.flatten(2).to(matrices.dtype)).unflatten(2, features.shape[2:])

    def fold(self) -> tuple[Tensor, ...]:
        """Return S^(-1/2) of every level, ``(K, C_j, C_j)``, and the exponents of the levels' distances, ``(K, L)``.

        The exponents are 1 if all levels are compared; of fewer ones each counts for more, so that maps stay alike.
        """
        own = (self.images / (self.images + PRIOR)).view(-1, 1, 1)
        weights = (self.images + 1e-6).view(-1, 1, 1)
        matrices, open_levels = [], [torch.ones_like(self.images)]
        for level in range(self.levels):
            covariance = self.get_buffer(f"covariance_{level}")
            mean = (covariance * weights).sum(dim=0) / weights.sum()
            variances, directions = torch.linalg.eigh(torch.lerp(mean, covariance, own).double().cpu())
            shrunk = variances.lerp(variances.mean(dim=1, keepdim=True), SHRINKAGE)
            matrices.append(((directions * shrunk.rsqrt()[:, None]) @ directions.mT).to(covariance))
            if level:
                variance = self.get_buffer(f"square_{level}") - self.get_buffer(f"mean_{level}").square().sum(dim=1)
                explained = 1 - covariance.diagonal(dim1=1, dim2=2).sum(dim=1) / variance
                passes = (explained >= EXPLAINED) | (level < COARSE_LEVELS)
                open_levels.append(open_levels[-1] * passes)
        compared = torch.stack(open_levels, dim=1)
        return *matrices, compared * self.levels / compared.sum(dim=1, keepdim=True)
