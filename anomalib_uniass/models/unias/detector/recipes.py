# SPDX-License-Identifier: Apache-2.0
"""What a recipe is made of, and in which order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from anomalib_uniass.models.unias.detector.clusters import Clusters
from anomalib_uniass.models.unias.detector.detector import Detector
from anomalib_uniass.models.unias.detector.directions import Directions
from anomalib_uniass.models.unias.detector.distances import CosineDistances, WhitenedDistances
from anomalib_uniass.models.unias.detector.evenness import Evenness
from anomalib_uniass.models.unias.detector.guided_filter import GuidedFilter
from anomalib_uniass.models.unias.detector.image_score import standard_deviation, top_of_coarse_levels
from anomalib_uniass.models.unias.detector.residual import COARSE_LEVELS
from anomalib_uniass.models.unias.detector.segmentation_head import SegmentationHead
from anomalib_uniass.models.unias.detector.whitening import Whitening

RecipeName = Literal["paper", "best"]


def paper(channels: Sequence[int], image_size: tuple[int, int]) -> Detector:
    """Return the detector of the paper: the product of cosine distances, scored by its standard deviation.

    Args:
        channels: Channels C_j of the levels, coarse to fine.
        image_size: Height H and width W of the image.
    """
    return Detector(CosineDistances(image_size, levels=len(channels)), score=standard_deviation)


def best(channels: Sequence[int], image_size: tuple[int, int]) -> Detector:
    """Return the best detector that we know. MODEL_CARD.md says what each part brings.

    Args:
        channels: Channels C_j of the levels, coarse to fine.
        image_size: Height H and width W of the image.
    """
    return Detector(
        clusters=Clusters(channels[0]),
        distances=WhitenedDistances(
            image_size, whitening=Whitening(channels), directions=Directions(channels[:COARSE_LEVELS])
        ),
        parts={
            "segmentation_head": SegmentationHead(channels, image_size=image_size),
            "guided_filter": GuidedFilter(),
            "evenness": Evenness(levels=len(channels)),
        },
        score=top_of_coarse_levels,
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the network learns, and what its reconstruction is compared by."""

    standardize: bool
    """Standardise the backbone's features per channel, for the network and the squared error."""
    low_frequencies: bool
    """Reconstruct the low frequencies of the features instead of the features themselves."""
    detector: Callable[[Sequence[int], tuple[int, int]], Detector]
    """Makes the detector of the channels, coarse to fine, and the image size."""


RECIPES: dict[RecipeName, Recipe] = {
    "paper": Recipe(standardize=False, low_frequencies=True, detector=paper),
    "best": Recipe(standardize=True, low_frequencies=False, detector=best),
}
