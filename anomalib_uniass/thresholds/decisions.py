# SPDX-License-Identifier: Apache-2.0
"""The thresholds that predicted labels and masks come from, for any post-processor of anomalib."""

from typing import NamedTuple

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor


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


def are_finite(predictions: ImageBatch | InferenceBatch) -> Tensor | None:
    """Tell which images have a finite score and a finite map, as far as they have them: ``(B,)``, None without both."""
    parts = [values for values in (predictions.pred_score, predictions.anomaly_map) if values is not None]
    if not parts:
        return None
    finite = [values.reshape(values.shape[0], -1).isfinite().all(dim=1) for values in parts]
    return finite[0] if len(finite) == 1 else finite[0] & finite[1]


def or_infinite(values: Tensor, finite: Tensor, divisor: Tensor | None = None) -> Tensor:
    """Return values, or their quotients, that are infinite where `finite` is false, in every format of exported graphs.

    A division by zero instead of a choice of infinity: files in half precision have no such constant.
    """
    divisor = torch.ones_like(values) if divisor is None else divisor
    return torch.where(finite, values, torch.ones_like(values)) / torch.where(
        finite, divisor, torch.zeros_like(divisor)
    )


def never_good(found: InferenceBatch, finite: Tensor) -> InferenceBatch:
    """Return predictions in which images that are not finite have infinite scores and maps, and are defective.

    Args:
        found: Predictions of B images.
        finite: Whether an image was finite, ``(B,)``.
    """

    def of(values: Tensor) -> Tensor:
        return finite.reshape(-1, *[1] * (values.ndim - 1))

    score, label, anomaly_map, mask = found.pred_score, found.pred_label, found.anomaly_map, found.pred_mask
    return InferenceBatch(
        pred_score=None if score is None else or_infinite(score, of(score)),
        pred_label=None if label is None else label | ~of(label),
        anomaly_map=None if anomaly_map is None else or_infinite(anomaly_map, of(anomaly_map)),
        pred_mask=None if mask is None else mask | ~of(mask),
    )
