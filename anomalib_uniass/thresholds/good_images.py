# SPDX-License-Identifier: Apache-2.0
"""What is kept of good images to take thresholds from, and which of them set none."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_uniass.distribution import joined, of_all_processes
from anomalib_uniass.logs import warn
from anomalib_uniass.text import some

ROUNDING = torch.finfo(torch.float32).eps
"""Share of a usual score below which a score is rounding alone: the model reproduces that image to the last digit."""

SMALLEST = 2.0**-100
"""Least score or map value that logarithms tell from zero."""

TAIL_RATES = 2.0 ** -torch.arange(0, 17.5, 0.5, dtype=torch.float64)
"""Shares of the pixels of a map above its kept quantiles: all, 71 %, half, … one of 130,000."""


class GoodImage(NamedTuple):
    """What is kept of a good image: its path or "", its score and the quantiles of its map at `TAIL_RATES`."""

    path: str
    score: float
    tail: Tensor


GoodImages = dict[str, list[GoodImage]]
"""Good images by category."""


Columns = dict[str, Tensor]
"""The same as columns: scores ``(n,)`` under ``image``, tails of the maps ``(n, T)`` under ``pixel``."""


def columns(good: GoodImages) -> dict[str, Columns]:
    """Return good images as checkpoints keep them, which is without their paths."""
    return {
        category: {
            "image": torch.tensor([image.score for image in images], dtype=torch.float64),
            "pixel": torch.stack([image.tail for image in images]),
        }
        for category, images in good.items()
    }


def of_level(good: Mapping[str, Columns], level: str) -> dict[str, Tensor]:
    """Return one of the columns, ``image`` or ``pixel``, by category."""
    return {category: images[level] for category, images in good.items()}


def map_tails(maps: Tensor) -> Tensor:
    """Return the values that shares of the pixels of each map exceed: ``(B, ...) -> (B, T)``, see `TAIL_RATES`.

    Args:
        maps: Anomaly maps, at least 0.
    """
    ordered = maps.flatten(1).float().sort(dim=1, descending=True).values
    rows = (TAIL_RATES * ordered.shape[1]).long().clamp_max(ordered.shape[1] - 1)
    return ordered[:, rows.to(ordered.device)]


def join(good: GoodImages) -> GoodImages:
    """Join what the processes of a distributed run kept, each image once."""
    parts = of_all_processes(dict(good))
    categories = dict.fromkeys(category for part in parts for category in part)
    return {category: joined(part.get(category, []) for part in parts) for category in categories}


def without_rounding(good: GoodImages) -> GoodImages:
    """Leave out images whose scores are nothing beside those of the others, and name them.

    Float32 cannot tell a score below its rounding of a usual one (that a tenth of all exceed) from zero. Good images
    that are new to a model leave scores over some orders of magnitude; one that it was trained on in a copy may leave
    none, and every good image exceeds a threshold that it sets.
    """
    scores = [image.score for images in good.values() for image in images]
    least = ROUNDING * float(torch.tensor(scores).quantile(0.9)) if scores else 0.0
    refused = [image.path for images in good.values() for image in images if image.score < least]
    if refused:
        warn(
            f"{len(refused)} good images of the validation have scores below {least:.1e}, which is rounding beside the "
            f"usual ones: {some(sorted(refused))}. They set no thresholds, for every good image would exceed them. "
            "The model knows these images: take copies of them out of the training images."
        )
    kept = {category: [image for image in images if image.score >= least] for category, images in good.items()}
    return {category: images for category, images in kept.items() if images}
