# SPDX-License-Identifier: Apache-2.0
"""The pure metrics against the release's numbers, scikit-learn, SciPy, anomalib and brute force."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPRO
from anomalib.metrics.aupro import _AUPRO
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from anomalib_uniass.metrics import binary_curve, dice_score, image_metrics, label_regions, pixel_metrics

PARITY = Path(__file__).parents[1] / "data" / "parity"
EIGHT_CONNECTED = np.ones((3, 3))


def random_category(seed: int, *, levels: int | None = None, share: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (5, 12, 14), on few levels if asked for ties, and masks of which the first is empty."""
    rng = np.random.default_rng(seed)
    masks = rng.random((5, 12, 14)) < share
    masks[0] = False
    scores = rng.standard_normal(masks.shape) + masks
    if levels:
        scores = np.round(scores * levels) / levels
    return torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(masks)


def brute_force_dsc(scores: np.ndarray, masks: np.ndarray) -> float:
    precision, recall, thresholds = precision_recall_curve(masks.ravel(), scores.ravel())
    threshold = thresholds[np.argmax((precision + recall)[:-1])]
    dice = []
    for score, mask in zip(scores, masks, strict=True):
        predicted = score >= threshold
        if mask.any():
            dice.append(2 * (predicted & mask).sum() / (predicted.sum() + mask.sum()))
        else:
            dice.append(0.0 if predicted.any() else 1.0)
    return float(np.mean(dice))


def brute_force_aupro(scores: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, EIGHT_CONNECTED)
        regions += [(index, labels == label) for label in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(scores)[::-1]:
        predicted = scores >= threshold
        fpr.append(predicted[~masks].mean())
        pro.append(np.mean([predicted[index][region].mean() for index, region in regions]))
    fpr_array, pro_array = np.array(fpr), np.array(pro)
    inside = fpr_array <= limit
    at_limit = np.interp(limit, fpr_array, pro_array)
    return float(np.trapezoid([*pro_array[inside], at_limit], [*fpr_array[inside], limit]) / limit)


@pytest.mark.parametrize("category", ["alpha", "beta"])
def test_release_numbers(category: str) -> None:
    data = np.load(PARITY / "metrics.npz")
    expected = json.loads((PARITY / "metrics.json").read_text())
    chosen = data["category"] == category
    maps, masks = torch.from_numpy(data["preds"][chosen]), torch.from_numpy(data["masks"][chosen]).bool()
    metrics = pixel_metrics(maps, masks)
    labels = masks.flatten(1).any(1)
    assert metrics["pixel_AP"] == pytest.approx(expected[f"{category}_ap_auc"], abs=1e-6)
    assert metrics["DSC"] == pytest.approx(expected[f"{category}_dice_auc"], abs=1e-6)
    assert metrics["pixel_AUROC"] == pytest.approx(expected[f"{category}_pixel_auc"], abs=1e-6)
    for score, key in ((maps.flatten(1).std(1), "std"), (maps.flatten(1).amax(1), "max")):
        image_auroc = image_metrics(score, labels)["image_AUROC"]
        assert image_auroc == pytest.approx(expected[f"{category}_{key}_auc"], abs=1e-6)


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("seed", range(2))
def test_references(seed: int, levels: int | None) -> None:
    maps, masks = random_category(seed, levels=levels)
    scores, target = maps.numpy().ravel(), masks.numpy().ravel()
    best_f1 = max(f1_score(target, scores >= threshold) for threshold in np.unique(scores))
    expected = {
        "pixel_AP": average_precision_score(target, scores),
        "DSC": brute_force_dsc(maps.numpy(), masks.numpy()),
        "pixel_F1Max": best_f1,
        "AUPRO": brute_force_aupro(maps.numpy(), masks.numpy()),
        "pixel_AUROC": roc_auc_score(target, scores),
    }
    assert pixel_metrics(maps, masks) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("share", "levels"), [(0.02, None), (0.3, None), (0.3, 3)])
def test_aupro_agrees_with_anomalib(share: float, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(6, 32, 32, generator=generator) < share
    maps = torch.rand(6, 32, 32, generator=generator) + 0.4 * masks
    maps = maps if levels is None else (maps * levels).round() / levels
    metric = _AUPRO(fpr_limit=0.3)
    metric.update(maps, masks)
    assert issubclass(AUPRO, _AUPRO)
    assert pixel_metrics(maps, masks)["AUPRO"] == pytest.approx(float(metric.compute()), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_maps_are_chance_level(dtype: torch.dtype) -> None:
    _, masks = random_category(0)
    maps = torch.full(masks.shape, 0.7, dtype=dtype)
    share = float(masks.double().mean())
    metrics = pixel_metrics(maps, masks)
    everything = brute_force_dsc(maps.numpy(), masks.numpy())
    expected = {"pixel_AP": share, "DSC": everything, "pixel_F1Max": 2 * share / (1 + share), "pixel_AUROC": 0.5}
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    # (0, 0) to (1, 1) in one step: the triangle up to the limit, 0.3^2 / 2, divided by 0.3.
    assert metrics["AUPRO"] == pytest.approx(0.15)


def test_perfect_and_inverted_maps() -> None:
    _, masks = random_category(3)
    assert list(pixel_metrics(masks.float(), masks).values()) == pytest.approx([1.0] * 5, abs=1e-12)
    inverted = pixel_metrics(-masks.float(), masks)
    assert (inverted["pixel_AUROC"], inverted["AUPRO"]) == (0.0, 0.0)


def test_dsc_takes_the_lowest_of_equally_good_thresholds() -> None:
    # At 0.9: precision 1 and recall 2/4. At 0.6: precision 4/8 and recall 1. Both sum to 3/2.
    maps = torch.tensor([[[0.9, 0.9, 0.6, 0.6]], [[0.6, 0.6, 0.6, 0.6]]])
    masks = torch.tensor([[[True] * 4], [[False] * 4]])
    # At 0.6 the defect is found in full (1) and the good image is predicted anomalous (0); 0.9 would give 5/6.
    assert pixel_metrics(maps, masks)["DSC"] == 0.5


def test_dice_of_good_images() -> None:
    maps = torch.tensor([[[0.1, 0.2]], [[0.1, 0.9]]])
    assert dice_score(maps, torch.zeros(2, 1, 2, dtype=torch.bool), 0.5) == 0.5


def test_regions_are_eight_connected_and_distinct_between_images() -> None:
    masks = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0]] * 3, [[1, 0, 1], [0, 0, 1], [0, 0, 0]]]).bool()
    expected = [[[1, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0]] * 3, [[2, 0, 3], [0, 0, 3], [0, 0, 0]]]
    assert label_regions(masks).tolist() == expected


def test_undefined_values_are_nan() -> None:
    maps, masks = random_category(0)
    assert all(math.isnan(value) for value in pixel_metrics(maps, torch.zeros_like(masks)).values())
    only_anomalous = pixel_metrics(maps, torch.ones_like(masks))
    assert math.isnan(only_anomalous["pixel_AUROC"])
    assert math.isnan(only_anomalous["AUPRO"])
    assert only_anomalous["pixel_AP"] == only_anomalous["DSC"] == only_anomalous["pixel_F1Max"] == 1.0
    assert math.isnan(image_metrics(torch.rand(3), torch.ones(3, dtype=torch.bool))["image_AUROC"])


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (torch.rand(2, 3), torch.zeros(3, 2, dtype=torch.bool), r"of one shape.*\(2, 3\) and \(3, 2\)"),
        (torch.rand(0), torch.zeros(0, dtype=torch.bool), "not empty"),
        (torch.rand(3), torch.zeros(3), "bool target, got torch.float32 and torch.float32"),
        (torch.rand(3).half(), torch.zeros(3, dtype=torch.bool), "float32 or float64 scores.*torch.float16"),
        (
            torch.tensor([1.0, math.nan, math.inf]),
            torch.zeros(3, dtype=torch.bool),
            "finite, got 2 NaN or infinite of 3",
        ),
    ],
)
def test_bad_input(scores: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        binary_curve(scores, target)


def test_maps_need_an_image_axis() -> None:
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        pixel_metrics(torch.rand(4, 4), torch.ones(4, 4, dtype=torch.bool))


def test_inputs_stay_as_they_are() -> None:
    maps, masks = random_category(0)
    before = maps.clone(), masks.clone()
    pixel_metrics(maps, masks)
    assert torch.equal(maps, before[0])
    assert torch.equal(masks, before[1])
