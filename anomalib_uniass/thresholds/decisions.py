# SPDX-License-Identifier: Apache-2.0
"""The thresholds that predicted labels and masks come from, for any post-processor of anomalib."""

from typing import NamedTuple

import numpy as np
from anomalib.post_processing import PostProcessor


class DecisionThresholds(NamedTuple):
    """Thresholds of normalised scores and maps, None where there is none."""

    image: np.float32 | None
    mask: np.float32 | None


def decision_thresholds(post_processor: object) -> DecisionThresholds:
    """Return the thresholds of a post-processor; none of anything else."""
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return DecisionThresholds(None, None)
    normalized = (post_processor.normalized_image_threshold, post_processor.normalized_pixel_threshold)
    raw = (post_processor.image_threshold, post_processor.pixel_threshold)
    return DecisionThresholds(
        *(None if own.isnan() else np.float32(value.item()) for own, value in zip(raw, normalized, strict=True))
    )
