# SPDX-License-Identifier: Apache-2.0
"""What errors good images have, by cluster of images (recipe `best`, not in the paper)."""

from collections.abc import Iterable, Sequence

import torch
from sklearn.cluster import KMeans
from sklearn.covariance import shrunk_covariance
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.residual_directions import ResidualDirections

CLUSTERS = 16
"""Clusters of images. More of them than categories will do; those of few images look like the mean of all."""

PRIOR = 3
"""Images of a cluster that weigh as much as the mean over all clusters."""

SHRINKAGE = 0.5
"""Weight of the identity in a covariance."""

COARSE_LEVELS = 2
"""Levels that are compared in any case; their strides of 16 and 8 are those of memory banks."""

EXPLAINED = 0.3
"""Share of the variance of training images that the reconstruction must explain on a finer level."""

Levels = Sequence[Tensor]
"""Features ``(B, C_j, H_j, W_j)`` of the levels, coarse to fine."""


class ResidualWhitening(nn.Module):
    """Statistics of the reconstruction's errors on good images, for every cluster of images.

    Images belong to the cluster of k-means that is nearest by the mean of their coarsest features. So no category is
    asked for, neither in training nor later. The statistics say three things to the anomaly map:

    - Which directions say little. What cannot be predicted of a good surface, its grain for one, is an error of every
      good image. With S the covariance of a cluster's errors, shrunk towards that of all clusters and then half-way to
      a multiple of the identity, features are multiplied by S^(-1/2) before they are compared.
    - Which levels say little. Where the reconstruction explains less than three tenths of the variance of a cluster's
      features on a fine level, that level and the finer ones are left out.
    - Which errors are known: :class:`~anomalib_uniass.models.unias.residual_directions.ResidualDirections`.

    The identity until :meth:`fit_clusters`, :meth:`fit` and :meth:`fit_directions` have seen the training set.

    Args:
        channels: Channels C_j of the levels, coarse to fine.
        clusters: Number of clusters K.
    """

    scale: Tensor
    centers: Tensor
    fitted: Tensor
    exponents: Tensor

    def __init__(self, channels: Sequence[int], *, clusters: int = CLUSTERS) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels[0]))
        self.register_buffer("centers", torch.zeros(clusters, channels[0]))
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("exponents", torch.ones(clusters, len(channels)))
        for level, c in enumerate(channels):
            self.register_buffer(f"whitening_{level}", torch.eye(c).repeat(clusters, 1, 1))
        self.directions = ResidualDirections(channels[:COARSE_LEVELS], clusters=clusters)

    @torch.no_grad()
    def fit_clusters(self, coarsest: Iterable[Tensor]) -> None:
        """Find the clusters; in a distributed run of the images of all processes.

        Args:
            coarsest: Coarsest features of the training set, ``(B, C, h, w)`` each.

        Raises:
            ValueError: If there is no batch.
        """
        points = [widen(features).mean((2, 3)).cpu() for features in coarsest]
        gathered = [batch for part in of_all_processes(points) for batch in part]
        if not gathered:
            msg = "Clusters need at least one batch of training images, got none."
            raise ValueError(msg)
        descriptors = torch.cat(gathered)  # (images, C)
        descriptors = descriptors[descriptors[:, 0].argsort()]  # k-means should not depend on the order of images
        scale = descriptors.std(dim=0, correction=0).clamp_min(1e-6)
        descriptors = descriptors / scale
        count = min(len(self.centers), len(descriptors.unique(dim=0)))
        found = KMeans(n_clusters=count, n_init=4, random_state=0).fit(descriptors.numpy()).cluster_centers_
        self.scale.copy_(scale)
        self.centers.copy_(torch.from_numpy(found[:1]))  # of too few images: copies, which argmin passes over
        self.centers[:count] = torch.from_numpy(found).to(self.centers)

    def clusters(self, coarsest: Tensor) -> Tensor:
        """Return the cluster of each image by its coarsest features: ``(B, C, h, w) -> (B,)``."""
        centers = widen(self.centers)
        with full_precision(coarsest):
            points = widen(coarsest).mean((2, 3)).to(centers.dtype) / self.scale
            return (centers.square().sum(1) - 2 * points @ centers.T).argmin(dim=1)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Levels, Levels]]) -> None:
        """Take the statistics of the errors; in a distributed run of the images of all processes.

        Args:
            batches: Reconstructions and targets of good images, by the trained network in evaluation mode.

        Raises:
            ValueError: If there is no image.
        """
        moments = _Moments(self)
        for reconstructions, targets in batches:
            moments.add(self.clusters(targets[0]), reconstructions, targets)
        moments.reduce()
        if not moments.images.sum():
            msg = "Statistics of the errors need at least one training image, got none."
            raise ValueError(msg)
        compared = [torch.ones_like(moments.images)]
        for level in range(self.exponents.shape[1]):
            covariance, variance = moments.statistics(level)  # (K, C, C), (K,)
            whitening = self.get_buffer(f"whitening_{level}")
            whitening.copy_(_inverse_root(_shrink(covariance, moments.images)))
            if level:
                explained = 1 - covariance.diagonal(dim1=1, dim2=2).sum(dim=1) / variance
                compared.append(compared[-1] * ((explained >= EXPLAINED) | (level < COARSE_LEVELS)))
        passes = torch.stack(compared, dim=1)
        # Of fewer levels each counts for more, so that maps stay alike.
        self.exponents.copy_(passes * passes.shape[1] / passes.sum(dim=1, keepdim=True))
        self.fitted.fill_(True)

    def fit_directions(self, batches: Iterable[tuple[Levels, Levels]]) -> None:
        """Find the directions that whitened errors take; in a distributed run of the images of all processes.

        Args:
            batches: As of :meth:`fit`, which comes before.
        """
        self.directions.fit(self._whitened_errors(reconstructions, targets) for reconstructions, targets in batches)

    def _whitened_errors(self, reconstructions: Levels, targets: Levels) -> tuple[list[Tensor], Tensor]:
        """Return the whitened errors of the coarse levels, and the clusters."""
        clusters = self.clusters(targets[0])
        pairs = list(zip(reconstructions, targets, strict=True))[:COARSE_LEVELS]
        return [self.whiten(level, target - r, clusters) for level, (r, target) in enumerate(pairs)], clusters

    def whiten(self, level: int, features: Tensor, clusters: Tensor) -> Tensor:
        """Multiply features of a level by S^(-1/2) of their clusters: ``(B, C_j, H, W), (B,) -> (B, C_j, H, W)``."""
        matrices = widen(self.get_buffer(f"whitening_{level}")[clusters])
        with full_precision(features):
            return (matrices @ features.flatten(2).to(matrices.dtype)).unflatten(2, features.shape[2:])


class _Moments:
    """Sums over the images of each cluster, in double precision on the CPU."""

    def __init__(self, whitening: ResidualWhitening) -> None:
        clusters, levels = whitening.exponents.shape
        sizes = [whitening.get_buffer(f"whitening_{level}").shape[-1] for level in range(levels)]
        self.images = torch.zeros(clusters, dtype=torch.float64)
        self.error_products = [torch.zeros(clusters, c, c, dtype=torch.float64) for c in sizes]
        self.features = [torch.zeros(clusters, c, dtype=torch.float64) for c in sizes]
        self.squares = [torch.zeros(clusters, dtype=torch.float64) for _ in sizes]

    def add(self, clusters: Tensor, reconstructions: Levels, targets: Levels) -> None:
        """Add a batch of images, each its mean over positions."""
        members = F.one_hot(clusters.cpu(), len(self.images)).T.double()  # (K, B)
        self.images += members.sum(dim=1)
        for level, (reconstruction, target) in enumerate(zip(reconstructions, targets, strict=True)):
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
    return torch.stack([torch.from_numpy(shrunk_covariance(one.numpy(), shrinkage=SHRINKAGE)) for one in mixed])


def _inverse_root(covariance: Tensor) -> Tensor:
    """Return S^(-1/2) of covariances ``(K, C, C)``."""
    variances, directions = torch.linalg.eigh(covariance)
    return (directions * variances.rsqrt()[:, None]) @ directions.mT
