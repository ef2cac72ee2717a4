# SPDX-License-Identifier: Apache-2.0
"""Properties of the metrics that hold for whatever scores and masks: ties, constants, single elements, extreme floats.

References are scikit-learn's; examples are drawn the same way in every run.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_uniass.metrics import CategoryMetrics, binary_curve, image_metrics, pixel_metrics
from anomalib_uniass.metrics.functional import METRICS, average_precision, dice_score, dice_threshold, f1_max

properties = settings(deadline=None, max_examples=150, derandomize=True)

Ranking = tuple[NDArray[Any], NDArray[np.bool_]]
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)
EXTREME = (0.0, -0.0, SMALLEST, -SMALLEST, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), LARGEST, -LARGEST)


def scores(shape: Any) -> st.SearchStrategy[NDArray[Any]]:
    """Draw scores without NaN: of any size, of few values, or of extreme ones."""
    anything = st.floats(allow_nan=False, allow_infinity=False, width=32)
    values = st.one_of(st.just(anything), st.just(st.integers(0, 2).map(float)), st.just(st.sampled_from(EXTREME)))
    dtypes = st.sampled_from([np.float32, np.float64])
    return st.tuples(dtypes, values).flatmap(lambda kind: npst.arrays(kind[0], shape, elements=kind[1]))


@st.composite
def rankings(draw: st.DrawFn, *, dimensions: int = 1, largest: int = 30) -> Ranking:
    """Draw scores and labels of one shape."""
    shape = draw(npst.array_shapes(min_dims=dimensions, max_dims=dimensions, min_side=1, max_side=largest))
    return draw(scores(shape)), draw(npst.arrays(np.bool_, shape))


ONE_CLASS = (np.zeros(1, np.float32), np.ones(1, bool))
CONSTANT = (np.full(4, 0.5), np.array([True, False, False, True]))
SIGNED_ZEROS = (np.array([0.0, -0.0, 0.0, -0.0], np.float32), np.array([True, False, False, True]))
# Precision and recall sum to 3/2 at both scores: the release takes the lower one.
TWO_BEST_THRESHOLDS = (np.array([0.9] * 2 + [0.6] * 6), np.array([True] * 4 + [False] * 4))
WHOLE_RANGE = (np.array([LARGEST, -LARGEST, 0.0], np.float32), np.array([True, False, True]))


@properties
@given(rankings())
@example(ONE_CLASS)
@example(CONSTANT)
@example(SIGNED_ZEROS)
@example(WHOLE_RANGE)
@example(TWO_BEST_THRESHOLDS)
def test_ranking_metrics_are_scikit_learns(ranking: Ranking) -> None:
    values, labels = ranking
    curve = binary_curve(torch.from_numpy(values), torch.from_numpy(labels))
    image_auroc = image_metrics(torch.from_numpy(values), torch.from_numpy(labels))["image_AUROC"]
    if labels.all() or not labels.any():
        assert math.isnan(image_auroc)
    else:
        assert image_auroc == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    if not labels.any():
        assert all(math.isnan(metric(curve)) for metric in (average_precision, f1_max, dice_threshold))
        return
    precision, recall, thresholds = precision_recall_curve(labels, values)
    assert average_precision(curve) == pytest.approx(average_precision_score(labels, values), abs=1e-12)
    with np.errstate(invalid="ignore"):  # precision and recall are both 0 above the highest anomalous score
        f1 = 2 * precision * recall / (precision + recall)
    assert f1_max(curve) == pytest.approx(np.nanmax(f1), abs=1e-12)
    # The release's rule, to the bit: a threshold decides which pixels count.
    assert dice_threshold(curve) == thresholds[np.argmax((precision + recall)[:-1])]


@properties
@given(rankings(dimensions=3, largest=5))
def test_pixel_metrics_are_scikit_learns_and_lie_between_0_and_1(ranking: Ranking) -> None:
    maps, masks = ranking
    metrics = pixel_metrics(torch.from_numpy(maps), torch.from_numpy(masks))
    if not masks.any():
        assert all(math.isnan(value) for value in metrics.values())
        return
    assert all(0 <= value <= 1 + 1e-12 for value in metrics.values() if not math.isnan(value))
    assert metrics["pixel_AP"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-12)
    if masks.all():
        assert math.isnan(metrics["pixel_AUROC"])
        assert math.isnan(metrics["AUPRO"])
    else:
        assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)
    precision, recall, thresholds = precision_recall_curve(masks.ravel(), maps.ravel())
    predicted = maps >= thresholds[np.argmax((precision + recall)[:-1])]
    sums = predicted.sum((1, 2)) + masks.sum((1, 2))
    dice = [2 * (p & m).sum() / s if s else 1 for p, m, s in zip(predicted, masks, sums, strict=True)]
    assert metrics["DSC"] == pytest.approx(np.mean(dice), abs=1e-12)


@properties
@given(rankings(dimensions=3, largest=5))
def test_pixel_metrics_depend_on_the_order_of_the_scores_alone(ranking: Ranking) -> None:
    maps, masks = ranking
    ranks = torch.from_numpy(rankdata(maps, method="dense").reshape(maps.shape).astype(np.float64))
    expected = pixel_metrics(torch.from_numpy(maps), torch.from_numpy(masks))
    assert pixel_metrics(ranks, torch.from_numpy(masks)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@properties
@given(rankings(dimensions=3, largest=5), st.randoms(use_true_random=False))
def test_pixel_metrics_do_not_depend_on_the_order_of_the_images(ranking: Ranking, random: Any) -> None:
    maps, masks = (torch.from_numpy(array) for array in ranking)
    order = random.sample(range(len(maps)), len(maps))
    expected = pixel_metrics(maps, masks)
    assert pixel_metrics(maps[order], masks[order]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@properties
@given(rankings(dimensions=3, largest=4), st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_dice_score_counts_good_images_by_whether_anything_is_predicted(ranking: Ranking, threshold: float) -> None:
    maps, _ = ranking
    good = torch.zeros(maps.shape, dtype=torch.bool)
    silent = np.mean([not (image >= threshold).any() for image in maps])
    assert dice_score(torch.from_numpy(maps), good, threshold) == pytest.approx(silent)


@properties
@given(rankings(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_a_score_that_is_not_finite_is_refused_wherever_it_stands(
    ranking: Ranking, value: float, data: st.DataObject
) -> None:
    scores, labels = ranking
    scores[data.draw(st.integers(0, len(scores) - 1))] = value
    with pytest.raises(ValueError, match=f"got 1 NaN or infinite of {len(scores)} values"):
        binary_curve(torch.from_numpy(scores), torch.from_numpy(labels))


@settings(properties, max_examples=60)
@given(
    rankings(dimensions=3, largest=6),
    st.lists(st.sampled_from(["bolt", "cap", "nut"]), min_size=6, max_size=6),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
@pytest.mark.filterwarnings("ignore")
def test_table_depends_neither_on_batches_nor_on_the_order_of_images(
    ranking: Ranking, categories: list[str], batch_size: int, random: Any
) -> None:
    maps, masks = torch.from_numpy(ranking[0]).float(), torch.from_numpy(ranking[1])
    categories = categories[: len(maps)]
    assume(len(set(categories)) > 1)

    def table(order: list[int], size: int) -> dict[str, dict[str, float]]:
        metric = CategoryMetrics(sorted(set(categories)))
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            batch, truth = maps[rows], masks[rows]
            names = [categories[row] for row in rows]
            metric.update(batch, truth, batch.flatten(1).amax(1), truth.flatten(1).any(1), names)
        return metric.compute()

    whole = table(list(range(len(maps))), len(maps))
    parts = table(random.sample(range(len(maps)), len(maps)), batch_size)
    for name, row in whole.items():
        assert parts[name] == pytest.approx(row, abs=1e-12, nan_ok=True)
    own = [row for name, row in whole.items() if name != "mean"]
    for metric in METRICS:
        defined = [row[metric] for row in own if not math.isnan(row[metric])]
        expected = np.mean(defined) if defined else math.nan
        assert whole["mean"][metric] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert whole["mean"]["n_images"] == len(maps)
