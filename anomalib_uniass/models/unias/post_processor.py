# SPDX-License-Identifier: Apache-2.0
"""anomalib's thresholds on maps that are products."""

from typing import overload

import torch
from anomalib.post_processing import PostProcessor
from torch import Tensor


class ProductMapPostProcessor(PostProcessor):
    """anomalib's post-processor on the scale of a single level map; the choice for anomalib's usual thresholds.

    One threshold for all categories is tuned for the best F1 score on the validation labels, which without anomalous
    validation images makes it the highest normal score.

    UniAS multiplies four cosine distances, so its maps span many orders of magnitude and a linear scale between their
    extremes shows the peak and nothing else. Scores, minimum, maximum and threshold are normalised as fourth roots
    instead; this changes neither the order of the scores nor which of them exceed the threshold. Raw maps, and the
    metrics per category that are computed on them, are not touched.

    Arguments as for :class:`anomalib.post_processing.PostProcessor`.
    """

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        """Normalise fourth roots to [0, 1] with the threshold at 0.5; scores of any shape, the rest scalars."""
        return PostProcessor._normalize(_root(preds), _root(norm_min), _root(norm_max), _root(threshold))


@overload
def _root(x: Tensor) -> Tensor: ...
@overload
def _root(x: None) -> None: ...
def _root(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.sqrt(torch.sqrt(x.clamp_min(0)))
