# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category at a chosen false-positive rate, from good images alone."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from anomalib_uniass.arguments import check_number

BINS_PER_OCTAVE = 64
OCTAVES = (-48, 16)
"""Powers of two between which map histograms tell values apart; their bins are 1.1 % wide."""

_BINS = BINS_PER_OCTAVE * (OCTAVES[1] - OCTAVES[0])
_SMALLEST = 2.0 ** OCTAVES[0]


def check_rate(name: str, rate: float) -> float:
    """Return a false-positive rate.

    Raises:
        ValueError: If it does not lie between 0 and 1 (exclusive).
    """
    check_number(f"{name} (a false-positive rate)", rate, above=0, below=1)
    return float(rate)


def images_needed(rate: float) -> int:
    """Return how many good images of a category show a rate: among n, one more exceeds all with chance 1 / (n + 1)."""
    return math.ceil(round(1 / rate - 1, 9))


def image_thresholds(scores: Mapping[str, Tensor], rate: float) -> dict[str, float]:
    """Return the score of each category that a new good image exceeds with a chance of `rate`.

    With :func:`images_needed` images a category's threshold is the score of rank ceil((n + 1)(1 - rate)) among its
    own n, as in conformal prediction: were its images exchangeable, the expected rate would be at most the asked one.
    With fewer it is the highest of its own scores, or more if the other categories say so: the score which, as a
    factor on the geometric mean of a category's other scores, that share of all images exceeds. This takes the spread
    of the logarithms, not their mean, to be the same in all categories.

    Args:
        scores: Scores ``(n,)`` of good images by category, at least 0.
        rate: False-positive rate per image, in (0, 1).
    """
    logarithms = {category: values.double().clamp_min(_SMALLEST).log() for category, values in scores.items()}
    excess = torch.cat([_excess_over_the_others(values) for values in logarithms.values()])
    thresholds = {category: _conformal_quantile(values, rate) for category, values in scores.items()}
    for category, values in scores.items():
        if len(values) < images_needed(rate) and len(excess):
            borrowed = math.exp(float(logarithms[category].mean()) + _conformal_quantile(excess, rate))
            thresholds[category] = max(thresholds[category], borrowed)
    return thresholds


def map_histograms(maps: Tensor) -> Tensor:
    """Count the values of each map in logarithmic bins: ``(B, ...) -> (B, bins)``.

    Args:
        maps: Anomaly maps, at least 0.
    """
    octave = maps.flatten(1).float().clamp_min(_SMALLEST).log2() - OCTAVES[0]
    bins = (octave * BINS_PER_OCTAVE).clamp_max(_BINS - 1).long()  # floating point may be infinite
    return torch.stack([torch.bincount(row, minlength=_BINS) for row in bins])


def pixel_thresholds(histograms: Mapping[str, Tensor], rate: float) -> dict[str, float]:
    """Return the map value of each category that a share `rate` of the pixels of new good images exceeds.

    It is the quantile of all pixels of the category, rounded up to the next bin, times one factor for all categories.
    Pixels of one image belong together, so a quantile of few images is exceeded too often in others; the factor is what
    makes the quantiles right for images they were not taken from, each left out in turn.

    Args:
        histograms: :func:`map_histograms` of good images, ``(n, bins)`` by category.
        rate: False-positive rate per pixel, in (0, 1).
    """
    shifted = torch.zeros(2 * _BINS, dtype=torch.long)
    for images in histograms.values():
        if len(images) > 1:
            for image, others in zip(images, images.sum(0) - images, strict=True):
                start = _BINS - _quantile_bin(others, rate)
                shifted[start : start + _BINS] += image
    shift = max(0, _quantile_bin(shifted, rate) - _BINS) if shifted.any() else 0
    return {
        category: 2.0 ** ((_quantile_bin(images.sum(0), rate) + shift + 1) / BINS_PER_OCTAVE + OCTAVES[0])
        for category, images in histograms.items()
    }


def _excess_over_the_others(values: Tensor) -> Tensor:
    """Return each value less the mean of the others, ``(n,)``; nothing of a single one, which has no others."""
    others = len(values) - 1
    return values - (values.sum() - values) / others if others else values[:0]


def _conformal_quantile(values: Tensor, rate: float) -> float:
    """Return the value of rank ceil((n + 1)(1 - rate)), or the highest if there are too few."""
    rank = math.ceil(round((len(values) + 1) * (1 - rate), 9))
    return float(values.sort().values[min(rank, len(values)) - 1])


def _quantile_bin(histogram: Tensor, rate: float) -> int:
    """Return the lowest bin that at most a share `rate` of the counts lies above."""
    above = histogram.sum() - histogram.cumsum(0)
    return int((above <= rate * histogram.sum()).int().argmax())
