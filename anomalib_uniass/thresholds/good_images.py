# SPDX-License-Identifier: Apache-2.0
"""What validation keeps of good images, and which of them set no thresholds."""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.logs import warn
from anomalib_uniass.text import some

ROUNDING = torch.finfo(torch.float32).eps
"""Share of a usual score below which a score is rounding alone: the model reproduces that image to the last digit."""


class GoodImage(NamedTuple):
    """What validation keeps of a good image: its path or "", its score and the histogram of its map."""

    path: str
    score: float
    histogram: Tensor


def join(good: dict[str, list[GoodImage]]) -> dict[str, list[GoodImage]]:
    """Join what the processes of a distributed run kept, without images that an earlier process has too.

    The sampler repeats images until every process has equally many; a process by itself gets no repeats.
    """
    joined: dict[str, list[GoodImage]] = defaultdict(list)
    seen: set[str] = set()
    for part in of_all_processes(dict(good)):
        for category, images in part.items():
            joined[category] += [image for image in images if image.path not in seen]
        seen |= {image.path for images in part.values() for image in images if image.path}
    return dict(joined)


def without_rounding(good: dict[str, list[GoodImage]]) -> dict[str, list[GoodImage]]:
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
