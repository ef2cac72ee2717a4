# SPDX-License-Identifier: Apache-2.0
"""Which directions errors on good images take, by cluster of images (recipe `best`, not in the paper)."""

from collections.abc import Iterable, Sequence

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.detector.clusters import CLUSTERS

DIRECTIONS = 1024
"""Directions that are kept of a cluster and level."""

SAMPLES = 8192
"""Errors of a cluster and level that they are found from, at most."""

ITERATIONS = 10


class Directions(nn.Module):
    """Directions of the whitened errors on good images, found by k-means for every cluster of images.

    Grain, joints and reflections are predicted badly on every image, but always in the same ways: their errors are
    large and well known. Those of a defect are large and new. So the distance of a coarse level becomes the geometric
    mean of itself and of how new the error's direction is.

    Keeps every distance until :meth:`fit` has seen the training set.

    Args:
        channels: Channels C_j of the coarse levels, the coarsest first.
        clusters: Number of clusters K.
    """

    fitted: Tensor

    def __init__(self, channels: Sequence[int], *, clusters: int = CLUSTERS) -> None:
        super().__init__()
        self.levels = len(channels)
        self.register_buffer("fitted", torch.tensor(False))
        for level, c in enumerate(channels):
            self.register_buffer(f"directions_{level}", torch.zeros(clusters, DIRECTIONS, c))

    def forward(self, level: int, distance: Tensor, error: Tensor, clusters: Tensor) -> Tensor:
        """Return the distance of a level, less where the error is a known one.

        Args:
            level: Level, 0 the coarsest.
            distance: Its distances, ``(B, 1, H, W)``.
            error: Its whitened errors, ``(B, C_j, H, W)``.
            clusters: Cluster of each image, ``(B,)``.
        """
        if level >= self.levels:
            return distance
        directions = widen(self.get_buffer(f"directions_{level}")[clusters])  # (B, 1024, C_j)
        with full_precision(error):
            similarity = directions @ F.normalize(error.to(directions.dtype), dim=1).flatten(2)  # (B, 1024, HW)
            novelty = 1 - similarity.amax(dim=1, keepdim=True).unflatten(2, error.shape[2:])
            return torch.where(self.fitted, (distance * novelty).clamp_min(0).sqrt(), distance)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Find the directions; in a distributed run of the images of all processes.

        Args:
            batches: Whitened errors of good images ``[(B, C_j, H_j, W_j)]`` and the images' clusters ``(B,)``.
        """
        books = [self.get_buffer(f"directions_{level}") for level in range(self.levels)]
        samples = [[torch.empty(0, book.shape[2]) for _ in book] for book in books]
        for errors, clusters in batches:
            for of_level, error in zip(samples, errors, strict=True):
                units = F.normalize(error, dim=1).flatten(2).mT.cpu()  # (B, HW, C_j)
                for cluster in clusters.unique().tolist():
                    new = units[clusters.cpu() == cluster].flatten(0, 1)
                    of_level[cluster] = _sample(torch.cat([of_level[cluster], new]))
        for book, shares in zip(books, zip(*of_all_processes(samples), strict=True), strict=True):
            book.zero_()  # of an earlier training
            for cluster, of_processes in enumerate(zip(*shares, strict=True)):
                if len(units := _sample(torch.cat(of_processes))):
                    book[cluster] = _directions(units).to(book)
            # k-means rounds differently with every order of its threads: all processes take what the first one found.
            book.copy_(of_all_processes(book.cpu())[0])
        self.fitted.fill_(True)

    def reset(self) -> None:
        """Know no directions again."""
        self.fitted.fill_(False)


def _sample(units: Tensor) -> Tensor:
    """Return some of the vectors ``(n, C)``, at random but the same ones whatever order they came in."""
    keys = (1e4 * units.sum(dim=1)).remainder(1)  # digits that say nothing
    return units[keys.argsort()[:SAMPLES]]


def _directions(units: Tensor) -> Tensor:
    """Return the directions ``(1024, C)`` that unit vectors ``(n, C)`` gather around; of few vectors all, repeated."""
    units = units.unique(dim=0)  # in order, too
    if len(units) <= DIRECTIONS:
        return units[torch.arange(DIRECTIONS) % len(units)]
    starts = units[torch.linspace(0, len(units) - 1, DIRECTIONS).round().long()]
    with threadpool_limits(1, user_api="openmp"):  # several add up in any order, and round otherwise every time
        means = KMeans(DIRECTIONS, init=starts.numpy(), n_init=1, max_iter=ITERATIONS).fit(units.numpy())
    return F.normalize(torch.from_numpy(means.cluster_centers_), dim=1)
