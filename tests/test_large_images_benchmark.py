# SPDX-License-Identifier: Apache-2.0
"""The pieces of ``benchmarks/large_images.py`` by hand: photographs, defects and what is counted."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from PIL import Image
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    pytest.importorskip("skimage")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("large_images")


def test_training_and_test_sheets_share_no_pixel(study: ModuleType) -> None:
    from skimage import data

    rng = np.random.default_rng(0)
    make = study.texture("brick")
    sheets = {side: make(side, rng) for side in ("train", "test")}
    assert all(sheet.shape == (1024, 1024) for sheet in sheets.values())
    photo = data.brick()
    assert photo[:, :307].shape[1] + photo[:, 307:].shape[1] == 512
    # Mirrored pieces of their side alone: of each side's own brightness, up to the lamp.
    assert abs(sheets["train"].mean() / photo[:, :307].mean() - 1) < 0.08
    assert abs(sheets["test"].mean() / photo[:, 307:].mean() - 1) < 0.08


def test_modules_hold_each_cell_once_and_of_their_side(study: ModuleType) -> None:
    pytest.importorskip("elpv_dataset")
    _, numbers = study.solar_cells()
    assert not {*numbers["train", 0]} & {*numbers["test", 0], *numbers["test", 1]}
    module = study.modules()("train", np.random.default_rng(0))
    assert module.shape == (1800, 3000)
    cells = [module[300 * r : 300 * r + 300, 300 * c : 300 * c + 300].tobytes() for r in range(6) for c in range(10)]
    assert len({*cells}) == 60


def test_masks_are_what_was_drawn(study: ModuleType) -> None:
    photo = np.full((1024, 1024), 128, np.uint8)
    image, mask = study.with_small_defects(photo, np.random.default_rng(0))
    assert set(np.unique(mask)) == {0, 255}
    changed = np.abs(image.astype(int) - photo)
    assert changed[mask == 255].min() >= 10 and changed[mask == 0].max() <= 10
    sides = [side for side, _ in study.highest_of_defects(torch.zeros(1024, 1024), torch.from_numpy(mask > 0))]
    assert len(sides) == 4 and min(sides) >= 6 and max(sides) < 64


def test_recall_real_cells_and_seams_by_hand(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A predictor that sees brightness: what it finds is known."""
    monkeypatch.setattr(study, "CELL", 100)
    root, real = tmp_path / "photographs", tmp_path / "real"
    good, bad, mask = (np.zeros((300, 400), np.uint8) for _ in range(3))
    good[5, 5] = 90  # the highest good pixel
    for value, side, place in ((200, 10, 20), (80, 12, 60), (250, 20, 120), (255, 40, 200)):
        bad[place : place + side, place : place + side] = value
        mask[place : place + side, place : place + side] = 255
    study.save(good, root / "sheet/test/good/0.png")
    study.save(bad, root / "sheet/test/small/0.png")
    study.save(mask, root / "sheet/ground_truth/small/0_mask.png")
    cells = np.zeros((300, 400), np.uint8)
    cells[150, 250] = 200
    study.save(cells, real / "0.png")
    (real / "defective_cells.json").write_text(json.dumps({"0.png": [6]}))

    def predict(image: Tensor) -> InferenceBatch:
        return InferenceBatch(anomaly_map=image[:, :1], pred_score=image.amax((1, 2, 3)))

    found = study.evaluate(predict, root)
    assert found["recall"] == {"recall_8_16": 50, "recall_16_32": 100, "recall_32_64": 100}
    assert found["real_cells_AUROC"] == 100
    assert found["categories"]["mean"]["image_AUROC"] == 100
    assert found["categories"]["sheet"]["pixel_AP"] > 99

    def with_step(image: Tensor) -> InferenceBatch:  # between the second tile and what the first one ends with
        stepped = torch.zeros_like(image[:, :1])
        stepped[..., 400 - 256 :] = 3
        stepped[..., 10:] += 1
        return InferenceBatch(anomaly_map=stepped, pred_score=image.amax((1, 2, 3)))

    Image.fromarray(good).save(root / "sheet/test/good/0.png")
    assert study.seam_step(with_step, root) == pytest.approx(3)


def test_summary_is_flat(study: ModuleType) -> None:
    row = dict.fromkeys(study.METRICS, 12.3456)
    part = {"categories": {"mean": row}, "recall": {"recall_16_32": 50.0}, "real_cells_AUROC": 90.0}
    flat = study.summary({"tiled": part, "cost": {"peak_gb_5000x4000": 1.234, "seam_step": 1.0} | dict.fromkeys(
        ("cost_per_tile_apart", "export_max_abs_diff"), 1e-6)})  # fmt: skip
    assert flat["tiled_pixel_AP"] == 12.35 and flat["recall_16_32_tiled"] == 50
    assert flat["peak_gb_5000x4000"] == 1.23 and flat["export_max_abs_diff"] == 1e-6
