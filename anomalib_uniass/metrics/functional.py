# SPDX-License-Identifier: Apache-2.0
"""Exact segmentation metrics of one category from one ranking of its pixels.

`binary_curve` sorts once; every metric reads its counts. N = images, H W = map size, P = anomalous elements, K = their
distinct scores. All values lie in [0, 1]; a value that the data leave undefined is NaN.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cv2
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

PIXEL_METRICS = ("pixel_AP", "DSC", "pixel_F1Max", "AUPRO", "pixel_AUROC")
IMAGE_METRICS = ("image_AUROC",)
METRICS = PIXEL_METRICS + IMAGE_METRICS


class BinaryCurve(NamedTuple):
    """Exact counts of a ranking at the K distinct scores of its anomalous elements, from the highest to the lowest.

    These points lose nothing: between two of them only false positives are added, so that recall and overlap stay
    equal, precision falls and the ROC curve is horizontal.

    Attributes:
        thresholds: (K,) scores, descending, in the dtype of the scores.
        true_positives: (K,) float64 counts of anomalous elements with `score >= threshold`.
        false_positives: (K,) float64 counts of normal elements with `score >= threshold`.
        false_positives_above: (K,) float64 counts of normal elements with `score > threshold`.
        ranked_positives: (P,) int64 flat indices of the anomalous elements, by descending score.
        num_negatives: Number of normal elements.
    """

    thresholds: Tensor
    true_positives: Tensor
    false_positives: Tensor
    false_positives_above: Tensor
    ranked_positives: Tensor
    num_negatives: int

    @property
    def num_positives(self) -> int:
        """Number of anomalous elements, P."""
        return len(self.ranked_positives)


def binary_curve(scores: Tensor, target: Tensor) -> BinaryCurve:
    """Rank elements by score and count true and false positives; equal scores share one point.

    Args:
        scores: Anomaly scores of any shape on the CPU, float32 or float64, higher is more anomalous.
        target: Ground truth of the same shape, bool, True is anomalous.

    Raises:
        ValueError: If the shapes differ, nothing was given, a dtype is another or a score is not finite.
    """
    if scores.shape != target.shape or scores.numel() == 0:
        msg = f"expected scores and target of one shape, not empty; got {tuple(scores.shape)} and {tuple(target.shape)}"
        raise ValueError(msg)
    if target.dtype != torch.bool or scores.dtype not in {torch.float32, torch.float64}:
        msg = (
            f"expected float32 or float64 scores and a bool target, got {scores.dtype} and {target.dtype}; convert them"
        )
        raise ValueError(msg)
    check_finite(scores, "scores")

    scores, target = scores.flatten(), target.flatten()
    positives = target.nonzero().squeeze(1)
    negative_scores = scores[~target]
    # NumPy sorts in place and without indices: much faster than torch.sort, and none of its 12 bytes per pixel.
    negative_scores.numpy().sort()

    def negatives(thresholds: Tensor, *, right: bool = False) -> Tensor:
        return (len(negative_scores) - torch.searchsorted(negative_scores, thresholds, right=right)).double()

    return ranked_curve(
        scores[positives],
        negatives,
        partial(negatives, right=True),
        num_negatives=len(negative_scores),
        places=positives,
    )


def ranked_curve(
    positive_scores: Tensor,
    at_least: Callable[[Tensor], Tensor],
    above: Callable[[Tensor], Tensor] | None = None,
    *,
    num_negatives: int,
    places: Tensor | None = None,
) -> BinaryCurve:
    """Make the curve of some anomalous elements and of counts of the normal ones.

    Args:
        positive_scores: Scores ``(P,)`` of the anomalous elements.
        at_least: Returns how many normal elements are at least as high as each threshold: ``(K,) -> (K,)``, float64.
        above: Likewise, how many are higher; None where no normal element has the score of an anomalous one.
        num_negatives: Number of normal elements.
        places: Flat indices ``(P,)`` of the anomalous elements, None to number them through.
    """
    ranked, order = positive_scores.sort(descending=True)
    thresholds, counts = torch.unique_consecutive(ranked, return_counts=True)
    return BinaryCurve(
        thresholds=thresholds,
        true_positives=counts.cumsum(0).double(),
        false_positives=at_least(thresholds),
        false_positives_above=(above or at_least)(thresholds),
        ranked_positives=order if places is None else places[order],
        num_negatives=num_negatives,
    )


def check_finite(scores: Tensor, name: str) -> None:
    """Raise a ValueError that names `name` if one of the scores is NaN or infinite."""
    finite = torch.isfinite(scores)
    if not finite.all():
        bad = scores.numel() - int(finite.sum())
        msg = f"{name} must be finite, got {bad} NaN or infinite of {scores.numel()} values; check model and precision"
        raise ValueError(msg)


def average_precision(curve: BinaryCurve) -> float:
    """Area under the precision-recall curve as the step sum of scikit-learn's `average_precision_score`."""
    if curve.num_positives == 0:
        return math.nan
    return float((_precision(curve) * _gained(curve)).sum()) / curve.num_positives


def auroc(curve: BinaryCurve) -> float:
    """Area under the ROC curve, ties counting one half, as scikit-learn's `roc_auc_score`."""
    if curve.num_positives == 0 or curve.num_negatives == 0:
        return math.nan
    # Every anomalous element beats the normal ones below it and half of those with its score (Mann-Whitney).
    beaten = curve.num_negatives - (curve.false_positives + curve.false_positives_above) / 2
    return float((beaten * _gained(curve)).sum()) / (curve.num_positives * curve.num_negatives)


def f1_max(curve: BinaryCurve) -> float:
    """Highest F1 (micro Dice) over all thresholds."""
    if curve.num_positives == 0:
        return math.nan
    predicted = curve.true_positives + curve.false_positives
    return float((2 * curve.true_positives / (predicted + curve.num_positives)).max())


def dice_threshold(curve: BinaryCurve) -> float:
    """Threshold of the DSC in the UniAS release: the lowest score that maximises precision + recall.

    This is the first maximum over scikit-learn's `precision_recall_curve`, whose thresholds ascend.
    """
    if curve.num_positives == 0:
        return math.nan
    total = _precision(curve) + curve.true_positives / curve.num_positives
    # Scores descend here, so the lowest of several best thresholds stands last.
    best = (total == total.max()).nonzero()[-1, 0]
    return float(curve.thresholds[best])


def dice_score(anomaly_map: Tensor, gt_mask: Tensor, threshold: float) -> float:
    """Mean over images of the Dice coefficient of `anomaly_map >= threshold` (UniAS release's DSC).

    An image without anomalous pixels counts 1 if nothing is predicted in it and 0 otherwise.

    Args:
        anomaly_map: (N, H, W) scores.
        gt_mask: (N, H, W) bool masks.
        threshold: Lowest score that counts as anomalous.
    """
    predicted = anomaly_map >= threshold
    area = predicted.sum((1, 2)) + gt_mask.sum((1, 2))
    overlap = (predicted & gt_mask).sum((1, 2))
    dice = torch.where(area > 0, 2 * overlap.double() / area, 1.0)
    return float(dice.mean())


def label_regions(gt_mask: Tensor) -> Tensor:
    """Number the 8-connected regions of all masks through: (N, H, W) bool -> (N, H, W) int32, 0 = normal."""
    # anomalib's `connected_components_cpu` scans the image once more per region, and in float32.
    regions = torch.zeros(gt_mask.shape, dtype=torch.int32)
    count = 0
    for mask, region in zip(gt_mask, regions, strict=True):
        num_labels, labels = cv2.connectedComponents(mask.to(torch.uint8).numpy(), connectivity=8)
        region[mask] = torch.from_numpy(labels)[mask] + count
        count += num_labels - 1
    return regions


def aupro(curve: BinaryCurve, regions: Tensor, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    The overlap at a threshold is the mean over regions of the share of the region that is found (Bergmann et al.,
    CVPR 2019). Regions and integration agree with `anomalib.metrics.AUPRO`, which accumulates in float32.

    Args:
        curve: Ranking of the category's pixels.
        regions: Region of every element that the curve was made from, from 0; those of normal ones do not matter.
        fpr_limit: Upper bound of the false positive rate, in (0, 1].
    """
    if curve.num_positives == 0 or curve.num_negatives == 0:
        return math.nan
    region = regions.flatten()[curve.ranked_positives]
    size = torch.bincount(region).double()
    found = (1 / size)[region].cumsum(0) / len(size)
    overlap = found[curve.true_positives.long() - 1]
    before = torch.cat([overlap.new_zeros(1), overlap[:-1]])

    # The curve runs through (0, 0), both ends of the step at every threshold, and (1, 1).
    fpr = torch.stack([curve.false_positives_above, curve.false_positives], 1).flatten() / curve.num_negatives
    pro = torch.stack([before, overlap], 1).flatten()
    fpr, pro = F.pad(F.pad(fpr, (1, 0)), (0, 1), value=1.0), F.pad(F.pad(pro, (1, 0)), (0, 1), value=1.0)
    # Up to the limit, and one point past it for the linear interpolation.
    keep = int((fpr <= fpr_limit).sum()) + 1
    fpr, pro = fpr[:keep], pro[:keep]
    if fpr[-1] > fpr_limit:
        step = (fpr_limit - fpr[-2]) / (fpr[-1] - fpr[-2])
        pro[-1] = pro[-2] + step * (pro[-1] - pro[-2])
        fpr[-1] = fpr_limit
    return float(torch.trapezoid(pro, fpr)) / fpr_limit


class PixelRanking(NamedTuple):
    """The pixels of a category from the highest score to the lowest, for all that is computed of them.

    Attributes:
        curve: Ranking of the pixels.
        regions: As of :func:`aupro`.
        dice: Returns the mean Dice coefficient of the images at a threshold.
    """

    curve: BinaryCurve
    regions: Tensor
    dice: Callable[[float], float]

    def metrics(self) -> dict[str, float]:
        """Return `PIXEL_METRICS` by name, in [0, 1]; NaN where there is no anomalous (all) or no normal pixel."""
        dsc = self.dice(dice_threshold(self.curve)) if self.curve.num_positives else math.nan
        areas = average_precision(self.curve), dsc, f1_max(self.curve), aupro(self.curve, self.regions)
        return dict(zip(PIXEL_METRICS, (*areas, auroc(self.curve)), strict=True))

    def precision_recall(self) -> list[tuple[float, float]]:
        """Return points (recall, precision) to draw, a hundred at most; none without anomalous pixels."""
        if not self.curve.num_positives:
            return []
        recall = self.curve.true_positives / self.curve.num_positives
        drawn = torch.searchsorted(recall, torch.linspace(0, 1, 100, dtype=recall.dtype)).clamp_max(len(recall) - 1)
        drawn = drawn.unique()
        return list(zip(recall[drawn].tolist(), _precision(self.curve)[drawn].tolist(), strict=True))


def rank_pixels(anomaly_map: Tensor, gt_mask: Tensor) -> PixelRanking:
    """Rank the pixels of one category, in one sort.

    Args:
        anomaly_map: (N, H, W) raw scores on the CPU, floating point.
        gt_mask: (N, H, W) bool masks.

    Raises:
        ValueError: If the inputs are not (N, H, W) or for the reasons of `binary_curve`.
    """
    if anomaly_map.ndim != 3:
        msg = f"anomaly_map must have shape (N, H, W), got {tuple(anomaly_map.shape)}"
        raise ValueError(msg)
    curve = binary_curve(anomaly_map, gt_mask)
    return PixelRanking(curve, label_regions(gt_mask) - 1, partial(dice_score, anomaly_map, gt_mask))


def pixel_metrics(anomaly_map: Tensor, gt_mask: Tensor) -> dict[str, float]:
    """All pixel metrics of one category, see :func:`rank_pixels` and :meth:`PixelRanking.metrics`."""
    return rank_pixels(anomaly_map, gt_mask).metrics()


def image_metrics(pred_score: Tensor, gt_label: Tensor) -> dict[str, float]:
    """Image metrics of one category.

    Args:
        pred_score: (N,) image scores, floating point.
        gt_label: (N,) bool, True is anomalous.

    Returns:
        `IMAGE_METRICS` by name, in [0, 1]. NaN if all images are of one class.

    Raises:
        ValueError: For the reasons of `binary_curve`.
    """
    return {"image_AUROC": auroc(binary_curve(pred_score, gt_label))}


def _precision(curve: BinaryCurve) -> Tensor:
    """Precision at every threshold, (K,) float64."""
    return curve.true_positives / (curve.true_positives + curve.false_positives)


def _gained(curve: BinaryCurve) -> Tensor:
    """Anomalous elements with exactly the score of every threshold, (K,) float64."""
    return torch.diff(curve.true_positives, prepend=curve.true_positives.new_zeros(1))
