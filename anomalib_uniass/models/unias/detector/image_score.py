# SPDX-License-Identifier: Apache-2.0
"""One score for an image."""

import torch
from torch import Tensor

from anomalib_uniass.layers.precision import widen
from anomalib_uniass.models.unias.detector.residual import COARSE_LEVELS, Levels

TOP_SHARE = 0.003
"""Share of the pixels whose mean is the score in recipe `best`."""


def standard_deviation(anomaly_map: Tensor, level_maps: Levels) -> Tensor:
    """Return the standard deviation over the pixels, as the release's evaluation does: ``(B, 1, H, W) -> (B,)``.

    Args:
        anomaly_map: Raw anomaly maps.
        level_maps: Not looked at.
    """
    del level_maps
    return widen(anomaly_map).flatten(1).std(dim=1)


def top_of_coarse_levels(anomaly_map: Tensor, level_maps: Levels) -> Tensor:
    """Return the mean of the highest pixels of the coarse levels' product (recipe `best`, not in the paper).

    Fine levels and the segmentation head outline a defect, but say less of whether there is one.

    Args:
        anomaly_map: Not looked at.
        level_maps: Distances of the levels ``(B, 1, H, W)``, coarse to fine.

    Returns:
        ``(B,)``, in the units of a product of all levels.
    """
    del anomaly_map
    coarse = torch.stack(list(level_maps[:COARSE_LEVELS])).prod(dim=0)
    return top(coarse ** (len(level_maps) // COARSE_LEVELS))


def top(anomaly_map: Tensor) -> Tensor:
    """Return the mean over the highest 0.3 % of the pixels, one at least: ``(B, 1, H, W) -> (B,)``."""
    pixels = widen(anomaly_map).flatten(1)
    return torch.topk(pixels, max(1, round(TOP_SHARE * pixels.shape[1])), dim=1).values.mean(dim=1)
