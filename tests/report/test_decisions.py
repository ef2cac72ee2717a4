# SPDX-License-Identifier: Apache-2.0
"""Decisions of a test: counts, intervals and F1 against scipy and scikit-learn, and what a run of any model leaves."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.engine import Engine
from scipy.stats import binomtest
from sklearn.metrics import f1_score, precision_score, recall_score

from anomalib_uniass import Unified
from anomalib_uniass.distribution import joined
from anomalib_uniass.report.decisions import (
    Decision,
    _pixel_counts,
    clopper_pearson,
    decision_table,
    format_decisions,
)
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import tiny_padim


@pytest.mark.parametrize(("count", "of"), [(0, 3), (3, 3), (1, 20), (7, 12), (50, 180)])
def test_interval_is_the_exact_one(count: int, of: int) -> None:
    expected = binomtest(count, of).proportion_ci(confidence_level=0.95, method="exact")
    assert clopper_pearson(count, of) == pytest.approx((expected.low, expected.high))


def test_interval_of_nothing_is_undefined() -> None:
    assert all(map(math.isnan, clopper_pearson(0, 0)))


def drawn(rng: np.random.Generator, category: str, images: int) -> tuple[list[Decision], np.ndarray, np.ndarray]:
    truth, marked = rng.random((2, images, 1, 8, 8)) < 0.3
    truth[: images // 2] = False
    counts = _pixel_counts(torch.from_numpy(marked), torch.from_numpy(truth), count=images)
    rows = [
        Decision(f"{category}/{i}.png", category, bool(truth[i].any()), bool(rng.random() < 0.5), *counts[i])
        for i in range(images)
    ]
    return rows, truth.ravel(), marked.ravel()


def test_shares_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    parts = {category: drawn(rng, category, 12) for category in ("bolt", "cap")}
    decisions = [row for rows, _, _ in parts.values() for row in rows]
    table = decision_table(decisions, {"bolt": 0.8, "cap": 0.9, "mean": 0.85})
    for category, (rows, truth, marked) in parts.items():
        row = table[category]
        labels, flags = ([getattr(each, name) for each in rows] for name in ("is_defective", "is_flagged"))
        assert row["recall"] == pytest.approx(recall_score(labels, flags))
        assert row["false_alarm_rate"] == pytest.approx(np.mean(np.array(flags)[~np.array(labels)]))
        assert row["pixel_precision"] == pytest.approx(precision_score(truth, marked))
        assert row["pixel_recall"] == pytest.approx(recall_score(truth, marked))
        assert row["pixel_F1"] == pytest.approx(f1_score(truth, marked))
    mean = table["mean"]
    assert list(table) == ["bolt", "cap", "mean"]
    assert (mean["good"], mean["defective"]) == (12, 12)
    assert mean["recall"] == pytest.approx(np.mean([table[c]["recall"] for c in parts]))
    assert mean["pixel_F1_over_F1Max"] == pytest.approx(mean["pixel_F1"] / 0.85)


def test_good_images_alone_and_labels_alone_leave_undefined_shares() -> None:
    good = [Decision("", "bolt", False, i == 0, 0, 0, 0) for i in range(4)]
    row = decision_table(good, {})["bolt"]
    assert (row["false_alarms"], row["good"], row["found"], row["defective"]) == (1, 4, 0, 0)
    assert all(math.isnan(row[key]) for key in ("recall", "pixel_F1", "pixel_precision", "pixel_F1_over_F1Max"))
    assert format_decisions({"bolt": row}).row_count == 1


def test_images_that_a_sampler_repeats_count_once_and_images_without_path_always() -> None:
    first = [Decision("a", "bolt", False, False, 0, 0, 0), Decision("", "bolt", False, False, 0, 0, 0)]
    second = [Decision("b", "bolt", True, True, 1, 0, 0), Decision("a", "bolt", False, False, 0, 0, 0), first[1]]
    assert [each.path for each in joined([first, second])] == ["a", "", "b", ""]


def test_any_model_leaves_its_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as anomalib's own predictions say."""
    root = make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=6, good=2, defective=2, image_size=64)
    data = Unified(root=root, num_workers=0, val_split_mode="same_as_test")
    engine = Engine(default_root_dir=tmp_path / "run", max_epochs=1, logger=False, accelerator="cpu")
    model = tiny_padim(visualizer=False)
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data, verbose=False)
    (path,) = {path.resolve() for path in (tmp_path / "run").rglob("decisions.csv")}
    table = pd.read_csv(path).set_index("category")
    batches = engine.predict(model, dataloaders=data.test_dataloader(), return_predictions=True) or []
    flags = torch.cat([batch.pred_label.flatten() for batch in batches])
    labels = torch.cat([batch.gt_label.flatten() for batch in batches])
    assert list(table.index) == ["bolt", "cap", "mean"]
    assert table.loc["mean", "found"] == int((flags & labels.bool()).sum())
    assert table.loc["mean", "false_alarms"] == int((flags & ~labels.bool()).sum())
    assert table.loc["mean", "good"] == table.loc["mean", "defective"] == 4
    assert 0 <= table.loc["mean", "pixel_F1"] <= table.loc["mean", "pixel_F1Max"] + 1e-6
    assert "Decisions at the model's own thresholds" in capsys.readouterr().out
