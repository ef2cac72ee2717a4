# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category at a chosen false-positive rate, from good images alone.

New images, which the model has not learned from, are few; the training images are many, but the model knows them. So
the new images tell where the scores of a category lie, and the training images how they spread and how their tail
looks: of good images that are new the logarithms of the scores spread as those of training images do, only higher.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from anomalib_uniass.arguments import check_number
from anomalib_uniass.thresholds.good_images import SMALLEST, TAIL_RATES

PRIOR = 5
"""Training images that the usual spread of all categories counts for beside a category's own."""

CLIPPED = 1.5
"""Spreads beyond which an image pulls the location of its category no further (Huber, 1964)."""

OUTLIER = 6.0
"""Spreads above the location beyond which an image is none of its category's good ones."""


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


def image_thresholds(
    new: Mapping[str, Tensor], rate: float, *, learned: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the score of each category that a new good image exceeds with a chance of `rate`.

    With :func:`images_needed` images a category's threshold is the score of rank ceil((n + 1)(1 - rate)) among its
    own n, as in conformal prediction: were its images exchangeable, the expected rate would be at most the asked one.
    With fewer the logarithms of the scores are taken for normal: their location is that of the new images, their spread
    that of the training images. An outlier (:func:`outliers`) moves neither, nor the thresholds of other categories.

    Args:
        new: Scores ``(n,)`` of good images by category that the model did not learn from, at least 0.
        rate: False-positive rate per image, in (0, 1).
        learned: Scores of training images likewise. Without them the spread is that of the new images of all
            categories.
    """
    thresholds = {}
    for category, (values, location, spread) in _located(new, learned or {}).items():
        usual = values[values <= location + OUTLIER * spread]
        if len(usual) >= images_needed(rate):
            log = _conformal_quantile(usual, rate)
        else:
            log = location + _normal_quantile(1 - rate) * spread * math.sqrt(1 + 1 / len(values))
        thresholds[category] = math.exp(log)
    return thresholds


def pixel_thresholds(
    new: Mapping[str, Tensor], rate: float, *, learned: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return the map value of each category that a share `rate` of the pixels of new good images exceeds.

    It is the quantile of the pixels of all training images of the category, times how much higher the maps of new
    images are there. Without training images it is that of the new images.

    Args:
        new: Quantiles ``(n, T)`` at `TAIL_RATES` of the maps of good images by category.
        rate: False-positive rate per pixel, in (0, 1).
        learned: Those of training images likewise.
    """
    learned = learned or {}
    known = {category: _at(tails, rate) for category, tails in learned.items()}
    at = _located({category: _at(tails, rate) for category, tails in new.items()}, known)
    thresholds = {}
    for category, tails in new.items():
        shift = 0.0 if category not in learned else at[category].location - _median(known[category].log())
        thresholds[category] = _pooled_quantile(learned.get(category, tails), rate) * math.exp(shift)
    return thresholds


def outliers(scores: Mapping[str, Tensor], *, learned: Mapping[str, Tensor] | None = None) -> dict[str, list[int]]:
    """Return the rows of images with far higher scores than the others of their category; arguments as above."""
    return {
        category: (values > location + OUTLIER * spread).nonzero().flatten().tolist()
        for category, (values, location, spread) in _located(scores, learned or {}).items()
    }


class _Located(NamedTuple):
    """Logarithms of values ``(n,)``, their location, and the spread of those like them."""

    logs: Tensor
    location: float
    spread: float


def _located(new: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> dict[str, _Located]:
    logs = _logarithms(new)
    spreads = _spreads(logs, _logarithms(learned))
    return {
        category: _Located(values, _location(values, spreads[category]), spreads[category])
        for category, values in logs.items()
    }


def _pooled_quantile(tails: Tensor, rate: float) -> float:
    """Return the value that a share `rate` of the pixels of all maps exceeds, of their quantiles ``(n, T)``."""
    logs = tails.double().clamp_min(SMALLEST).log()
    low, high = float(logs.min()), float(logs.max())
    for _ in range(60):  # halves the interval each time
        middle = (low + high) / 2
        low, high = (middle, high) if _shares_above(logs, middle).mean() > rate else (low, middle)
    return math.exp(high)


def _shares_above(logs: Tensor, value: float) -> Tensor:
    """Return which share of the pixels of maps exceeds a value, of the logarithms of their quantiles ``(n, T)``."""
    above = (logs <= value).sum(dim=1)  # the first quantile above it: they rise along the row
    after = above.clamp(1, logs.shape[1] - 1)
    low, high = (logs.gather(1, place[:, None]).squeeze(1) for place in (after - 1, after))
    share = ((value - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    between = TAIL_RATES[after - 1] * (TAIL_RATES[after] / TAIL_RATES[after - 1]) ** share
    return torch.where(above == logs.shape[1], torch.zeros_like(between), between)


def _at(tails: Tensor, rate: float) -> Tensor:
    """Return the quantiles ``(n,)`` of maps at a rate, between the kept ones ``(n, T)``."""
    place = min(-2 * math.log2(rate), len(TAIL_RATES) - 1.0)
    low, share = int(place), place - int(place)
    logs = tails.double().clamp_min(SMALLEST).log()
    return torch.lerp(logs[:, low], logs[:, min(low + 1, len(TAIL_RATES) - 1)], share).exp()


def _logarithms(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {category: values.double().clamp_min(SMALLEST).log() for category, values in scores.items()}


def _spreads(new: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the spread of the logarithms of each category of new images."""
    own = {category: _upper_spread(values) for category, values in learned.items() if len(values) > 1}
    if not own:
        # Of pairs, for few images have no centre; in each category first, for a bad image is in many pairs of its own.
        apart = [_median(torch.pdist(values[:, None])) for values in new.values() if len(values) > 1]
        common = _median(torch.tensor(apart)) / (math.sqrt(2) * _normal_quantile(0.75)) if apart else 0.0
        return dict.fromkeys(new, common)
    common = _median(torch.tensor(list(own.values())))
    return {
        category: math.sqrt((count * own.get(category, common) ** 2 + PRIOR * common**2) / (count + PRIOR))
        for category in new
        for count in [len(learned.get(category, ()))]
    }


def _location(values: Tensor, spread: float) -> float:
    """Return the mean of values ``(n,)`` from which none pulls further than `CLIPPED` spreads."""
    location = values.median() if len(values) % 2 else values.quantile(0.5)
    for _ in range(20):
        location = location + (values - location).clamp(-CLIPPED * spread, CLIPPED * spread).mean()
    return float(location)


def _upper_spread(values: Tensor) -> float:
    """Return the standard deviation of the normal distribution with the median and the upper tenth of the values.

    Thresholds lie in the upper tail, and images that the model has learned by heart fill the lower one.
    """
    return float((values.quantile(0.9) - values.quantile(0.5)) / _normal_quantile(0.9))


def _normal_quantile(share: float) -> float:
    return float(Normal(0.0, 1.0).icdf(torch.tensor(share, dtype=torch.float64)))


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5))


def _conformal_quantile(values: Tensor, rate: float) -> float:
    """Return the value of rank ceil((n + 1)(1 - rate)), or the highest if there are too few."""
    rank = math.ceil(round((len(values) + 1) * (1 - rate), 9))
    return float(values.sort().values[min(rank, len(values)) - 1])
