# SPDX-License-Identifier: Apache-2.0
"""What the parts of a detector see of an image."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Levels = Sequence[Tensor]
"""Tensors of the levels, coarse to fine: features ``(B, C_j, H_j, W_j)``."""

COARSE_LEVELS = 2
"""Levels that are compared whatever the image; their strides of 16 and 8 are those of memory banks."""


class Residual(NamedTuple):
    """Images, their features as they are and as they were reconstructed."""

    image: Tensor
    """Normalised images ``(B, 3, H, W)``."""
    reconstructions: Levels
    """Reconstructed features."""
    targets: Levels
    """What they should be."""
    clusters: Tensor | None = None
    """Cluster of each image, ``(B,)``; None where the detector has no clusters."""


def clusters_of(residual: Residual) -> Tensor:
    """Return the cluster of each image, ``(B,)``.

    Raises:
        ValueError: If the detector has no clusters.
    """
    if residual.clusters is None:
        msg = "This part needs the clusters of the images: give the detector `clusters`."
        raise ValueError(msg)
    return residual.clusters
