# SPDX-License-Identifier: Apache-2.0
"""Which kind an image is of, without its category (recipe `best`, not in the paper)."""

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.detector.parts import Fitted, Training

CLUSTERS = 16
"""Clusters of images. More of them than categories will do; those of few images look like the mean of all."""


class Clusters(nn.Module, Fitted):
    """Find the cluster of k-means that is nearest by the mean of an image's coarsest features.

    So no category is asked for, neither in training nor later. Cluster 0 until :meth:`fit` has seen the training set.

    Args:
        channels: Channels C of the coarsest features.
        clusters: Number of clusters K.
    """

    scale: Tensor
    centers: Tensor

    def __init__(self, channels: int, *, clusters: int = CLUSTERS) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("centers", torch.zeros(clusters, channels))

    def forward(self, coarsest: Tensor) -> Tensor:
        """Return the cluster of each image by its coarsest features: ``(B, C, h, w) -> (B,)``."""
        centers = widen(self.centers)
        with full_precision(coarsest):
            points = widen(coarsest).mean((2, 3)).to(centers.dtype) / self.scale
            return (centers.square().sum(1) - 2 * points @ centers.T).argmin(dim=1)

    @torch.no_grad()
    def fit(self, training: Training) -> None:
        """Find the clusters; in a distributed run of the images of all processes.

        Raises:
            ValueError: If there is no image.
        """
        points = [widen(features).mean((2, 3)).cpu() for features in training.coarsest()]
        gathered = [batch for part in of_all_processes(points) for batch in part]
        if not gathered:
            msg = "Clusters need at least one batch of training images, got none."
            raise ValueError(msg)
        descriptors = torch.cat(gathered)  # (images, C)
        descriptors = descriptors[descriptors[:, 0].argsort()]  # k-means should not depend on the order of images
        scale = descriptors.std(dim=0, correction=0).clamp_min(1e-6)
        descriptors = descriptors / scale
        count = min(len(self.centers), len(descriptors.unique(dim=0)))
        with threadpool_limits(1, user_api="openmp"):  # several add up in any order, and round otherwise every time
            found = KMeans(n_clusters=count, n_init=4, random_state=0).fit(descriptors.numpy()).cluster_centers_
        self.scale.copy_(scale)
        self.centers.copy_(torch.from_numpy(found[:1]))  # of too few images: copies, which argmin passes over
        self.centers[:count] = torch.from_numpy(found).to(self.centers)

    def reset(self) -> None:
        """Put all images into one cluster again."""
        self.scale.fill_(1)
        self.centers.zero_()

    def lack(self) -> str:
        """Say nothing: the distances that ask for clusters do."""
        return ""
