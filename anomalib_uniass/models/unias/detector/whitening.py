# SPDX-License-Identifier: Apache-2.0
"""What errors good images have, by cluster of images (recipe `best`, not in the paper)."""

from collections.abc import Iterable, Sequence

import torch
from sklearn.covariance import shrunk_covariance
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.detector.clusters import CLUSTERS
from anomalib_uniass.models.unias.detector.residual import COARSE_LEVELS, Residual, clusters_of

PRIOR = 3
"""Images of a cluster that weigh as much as the mean over all clusters."""

SHRINKAGE = 0.5
"""Weight of the identity in a covariance."""

EXPLAINED = 0.3
"""Share of the variance of training images that the reconstruction must explain on a finer level."""


class Whitening(nn.Module):
    """Statistics of the reconstruction's errors on good images, for every cluster of images.

    They say two things:

    - Which directions say little. What cannot be predicted of a good surface, its grain for one, is an error of every
      good image. With S the covariance of a cluster's errors, shrunk towards that of all clusters and then half-way to
      a multiple of the identity, features are multiplied by S^(-1/2) before they are compared.
    - Which levels say little. Where the reconstruction explains less than three tenths of the variance of a cluster's
      features on a fine level, that level and the finer ones are left out of the product (`exponents`).

    The identity until :meth:`fit` has seen the training set.

    Args:
        channels: Channels C_j of the levels, coarse to fine.
        clusters: Number of clusters K.
    """

    exponents: Tensor
    fitted: Tensor

    def __init__(self, channels: Sequence[int], *, clusters: int = CLUSTERS) -> None:
        super().__init__()
        self.levels = len(channels)
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("exponents", torch.ones(clusters, len(channels)))
        for level, c in enumerate(channels):
            self.register_buffer(f"whitening_{level}", torch.eye(c).repeat(clusters, 1, 1))

    def forward(self, level: int, features: Tensor, clusters: Tensor) -> Tensor:
        """Multiply features of a level by S^(-1/2) of their clusters: ``(B, C_j, H, W), (B,) -> (B, C_j, H, W)``."""
        matrices = widen(self._matrices(level)[clusters])
        with full_precision(features):
            return (matrices @ features.flatten(2).to(matrices.dtype)).unflatten(2, features.shape[2:])

    @torch.no_grad()
    def fit(self, residuals: Iterable[Residual]) -> None:
        """Take the statistics of the errors; in a distributed run of the images of all processes.

        Args:
            residuals: Residuals of good images, by the trained network in evaluation mode.

        Raises:
            ValueError: If there is no image.
        """
        sizes = [self._matrices(level).shape[-1] for level in range(self.levels)]
        moments = _Moments(sizes, clusters=len(self.exponents))
        for residual in residuals:
            moments.add(residual)
        moments.reduce()
        if not moments.images.sum():
            msg = "Statistics of the errors need at least one training image, got none."
            raise ValueError(msg)
        compared = [torch.ones_like(moments.images)]
        for level in range(self.levels):
            covariance, variance = moments.statistics(level)  # (K, C, C), (K,)
            self._matrices(level).copy_(_inverse_root(_shrink(covariance, moments.images)))
            if level:
                explained = 1 - covariance.diagonal(dim1=1, dim2=2).sum(dim=1) / variance
                compared.append(compared[-1] * ((explained >= EXPLAINED) | (level < COARSE_LEVELS)))
        passes = torch.stack(compared, dim=1)
        # Of fewer levels each counts for more, so that maps stay alike.
        self.exponents.copy_(passes * passes.shape[1] / passes.sum(dim=1, keepdim=True))
        self.fitted.fill_(True)

    def reset(self) -> None:
        """Become the identity again."""
        self.exponents.fill_(1)
        for level in range(self.levels):
            matrices = self._matrices(level)
            matrices.copy_(torch.eye(matrices.shape[-1]))
        self.fitted.fill_(False)

    def _matrices(self, level: int) -> Tensor:
        return self.get_buffer(f"whitening_{level}")


class _Moments:
    """Sums over the images of each cluster, in double precision on the CPU."""

    def __init__(self, sizes: Sequence[int], *, clusters: int) -> None:
        self.images = torch.zeros(clusters, dtype=torch.float64)
        self.error_products = [torch.zeros(clusters, c, c, dtype=torch.float64) for c in sizes]
        self.features = [torch.zeros(clusters, c, dtype=torch.float64) for c in sizes]
        self.squares = [torch.zeros(clusters, dtype=torch.float64) for _ in sizes]

    def add(self, residual: Residual) -> None:
        """Add a batch of images, each its mean over positions."""
        members = F.one_hot(clusters_of(residual).cpu(), len(self.images)).T.double()  # (K, B)
        self.images += members.sum(dim=1)
        for level, (reconstruction, target) in enumerate(zip(*residual[1:3], strict=True)):
            error, feature = (reconstruction - target).float().flatten(2), target.float().flatten(2)
            product = (error @ error.mT / error.shape[2]).cpu().double()  # (B, C, C)
            self.error_products[level] += torch.einsum("kb,bcd->kcd", members, product)
            self.features[level] += members @ feature.mean(dim=2).cpu().double()
            self.squares[level] += members @ feature.square().sum(dim=1).mean(dim=1).cpu().double()

    def reduce(self) -> None:
        """Add up what the processes of a distributed run have seen."""
        sums = [self.images, *self.error_products, *self.features, *self.squares]
        for total, *shares in zip(sums, *of_all_processes(sums), strict=True):
            total.copy_(torch.stack(shares).sum(dim=0))

    def statistics(self, level: int) -> tuple[Tensor, Tensor]:
        """Return covariances of the errors ``(K, C, C)`` and total variances of the features ``(K,)``."""
        images = self.images.clamp_min(1)
        mean = self.features[level] / images[:, None]
        variance = self.squares[level] / images - mean.square().sum(dim=1)
        return self.error_products[level] / images[:, None, None], variance


def _shrink(covariance: Tensor, images: Tensor) -> Tensor:
    """Shrink covariances ``(K, C, C)`` towards their mean, by the number of images, then towards the identity."""
    weights, own = images[:, None, None], (images / (images + PRIOR))[:, None, None]
    mean = (covariance * weights).sum(dim=0) / weights.sum()
    mixed = torch.lerp(mean, covariance, own)
    return torch.from_numpy(shrunk_covariance(mixed.numpy(), shrinkage=SHRINKAGE))


def _inverse_root(covariance: Tensor) -> Tensor:
    """Return S^(-1/2) of covariances ``(K, C, C)``."""
    variances, directions = torch.linalg.eigh(covariance)
    return (directions * variances.rsqrt()[:, None]) @ directions.mT
