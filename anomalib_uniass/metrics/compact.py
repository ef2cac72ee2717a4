# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps kept small: anomalous pixels as they are, normal ones counted in bins of 0.1 %.

For photographs of many megapixels, and for test sets of 100,000 images. A normal pixel counts below or above a
threshold by its bin; within the bin of the threshold pixels count as if they lay evenly. Average precision, AUROC and
AUPRO agree with the exact ones to 1e-4, F1 to 1e-3 (``tests/metrics/test_compact.py``); so does DSC but where two
thresholds are nearly as good.
"""

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_uniass.metrics.functional import PixelRanking, check_finite, label_regions, ranked_curve

_SHIFT = 13
"""Bits of a float32 that a bin leaves out: 10 of its mantissa stay, so that a bin is 0.05 to 0.1 % wide."""


class CompactMap(NamedTuple):
    """Anomaly map and mask of an image.

    Attributes:
        positives: Scores ``(P,)`` of the anomalous pixels, float32.
        regions: Number ``(P,)`` of the region that each belongs to, from 0, int32.
        bins: Bins ``(b,)`` of the normal pixels, ascending, int32.
        counts: Normal pixels ``(b,)`` in each, int32.
    """

    positives: Tensor
    regions: Tensor
    bins: Tensor
    counts: Tensor


def compress(anomaly_map: Tensor, gt_mask: Tensor) -> CompactMap:
    """Make a map compact.

    Args:
        anomaly_map: ``(H, W)`` scores on the CPU, float32.
        gt_mask: ``(H, W)`` bool mask.

    Raises:
        ValueError: If a score is not finite.
    """
    check_finite(anomaly_map, "anomaly_map")
    bins, counts = (_keys(anomaly_map[~gt_mask]) >> _SHIFT).unique(return_counts=True)
    return CompactMap(
        anomaly_map[gt_mask], label_regions(gt_mask[None])[0][gt_mask] - 1, bins.to(torch.int32), counts.to(torch.int32)
    )


def rank_compact(maps: Sequence[CompactMap]) -> PixelRanking:
    """Rank the pixels of the images of a category, see :func:`~.functional.rank_pixels`."""
    bins, where = torch.cat([image.bins for image in maps]).unique(return_inverse=True)
    counts = torch.zeros(len(bins), dtype=torch.float64)
    counts.index_add_(0, where, torch.cat([image.counts for image in maps]).double())
    curve = ranked_curve(
        torch.cat([image.positives for image in maps]),
        partial(_at_least, bins, counts),
        num_negatives=int(counts.sum()),
    )
    return PixelRanking(curve, _regions(maps), partial(_dice, maps))


def _regions(maps: Sequence[CompactMap]) -> Tensor:
    """Number the regions of all images through, from 0: one number for each anomalous pixel, ``(P,)``."""
    regions, first = [], 0
    for image in maps:
        regions.append(image.regions + first)
        first += int(image.regions.max()) + 1 if len(image.regions) else 0
    return torch.cat(regions)


def _dice(maps: Sequence[CompactMap], threshold: float) -> float:
    """Return the mean over images of the Dice coefficient, see :func:`~.functional.dice_score`."""
    dice = []
    for image in maps:
        overlap = int((image.positives >= threshold).sum())
        above = _at_least(image.bins, image.counts.double(), torch.tensor([threshold]))
        area = overlap + round(float(above)) + len(image.positives)
        dice.append(2 * overlap / area if area else 1.0)
    return fmean(dice)


def _keys(scores: Tensor) -> Tensor:
    """Return whole numbers in the order of float32 scores: their bits, mirrored below zero."""
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _at_least(bins: Tensor, counts: Tensor, thresholds: Tensor) -> Tensor:
    """Return how many counted pixels are at least as high as each threshold: ``(b,), (b,), (K,) -> (K,)``."""
    keys = _keys(thresholds)
    place = torch.searchsorted(bins, (keys >> _SHIFT).to(bins.dtype))
    above = torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])  # from each bin on
    found = torch.cat([bins, bins.new_full((1,), torch.iinfo(bins.dtype).max)])[place] == keys >> _SHIFT
    share = (keys & ((1 << _SHIFT) - 1)).double() / (1 << _SHIFT)  # of the bin that lies below the threshold
    inside = torch.cat([counts, counts.new_zeros(1)])[place]
    return above[place] - torch.where(found, share * inside, 0.0)
