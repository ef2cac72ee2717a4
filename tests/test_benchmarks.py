# SPDX-License-Identifier: Apache-2.0
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from numpy.typing import NDArray

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.acceleration import REWRITES
from tests.helpers.datasets import make_mvtec_layout

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPEED = BENCHMARKS / "speed.py"
RATIOS = {"torch_folded", "openvino_f32", "openvino_bf16", "openvino_int8", "train_step_folded", "train_memory"}


def test_demo_decides_by_the_threshold_of_the_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    demo = importlib.import_module("demo")
    thresholds = {"image": {"brick": 0.5, "solar_mono": 0.246}, "pixel": {"brick": 0.5, "solar_mono": 0.3}}
    (tmp_path / "category_thresholds.json").write_text(json.dumps(thresholds))
    model = tmp_path / "model.xml"
    expected = "defective, score 0.476 in [0, 1], threshold of solar_mono 0.246"
    assert demo.decision(0.476, model, "solar_mono") == expected
    assert demo.decision(0.476, model, "brick").startswith("good, ")
    assert demo.decision(0.246, model, "solar_mono").startswith("good, ")  # as everywhere, above it is defective


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux only")
def test_speed_benchmark_writes_ratios_of_everything_it_measures(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    data = make_mvtec_layout(tmp_path / "data", ["box"])
    model = UniAS("resnet18", pre_trained=False, image_size=(128, 128), hidden_dim=32, feedforward_dim=32)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    engine.fit(model, datamodule=Unified(root=data, train_batch_size=4, num_workers=0))

    options = ("--repeats", "1", "--threads", "1", "--output", str(tmp_path))
    run_python(str(SPEED), "--quick", *options, "--trained", str(engine.best_model_path), str(data))
    results = json.loads((tmp_path / "speed.json").read_text())

    assert set(results["summary"]) == RATIOS
    for key, ratio in results["summary"].items():
        # A CPU without bfloat16 may refuse it; everything else runs anywhere.
        assert (key == "openvino_bf16" and ratio is None) or (math.isfinite(ratio) and ratio > 0), results["skipped"]

    exact = [row for row in results["inference"] if "float32" in row["variant"]]
    # Batch 1 and 8; plain, each rewrite alone, all of them, OpenVINO with any and with a fixed shape; the trained one.
    assert len(exact) == 2 * (4 + len(REWRITES) + 1)
    assert all(row["map_difference"] < 1e-4 for row in exact if not row["variant"].startswith("trained"))
    assert results["training"]["largest_relative_loss_difference"]["UniAS accelerated, float32"] < 1e-3
    assert {row["variant"] for row in results["train_memory"]} >= {
        f"UniAS with {name} alone, float32" for name in REWRITES
    }

    whole = {row["variant"]: row["gflop"] for row in results["operations"]["rows"] if row["part"] == "all"}
    assert whole["UniAS accelerated, float32"] < whole["UniAS plain, float32"]
    assert all(row["gflop"] > 0 for row in results["operations"]["rows"] if row["part"] in ("pixel_decoder", "decoder"))
    report = (tmp_path / "speed.md").read_text()
    assert all(key in report for key in RATIOS)
    assert "What bounds the rest" in report


def test_accuracy_summary_is_the_mean_over_seeds_of_means_over_categories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    report, means = importlib.import_module("accuracy_report"), importlib.import_module("inspection_means")
    names = ["ballscrew", "magtile", "pavement", "pcb", "solar_mono", "solar_poly3", "coins", "brick", "gravel"]

    def run(value: float) -> dict[str, Any]:
        """A run whose metrics are `value`, a point more for each category."""
        metrics = {name: dict.fromkeys(means.METRICS, value + i / 100) for i, name in enumerate(names)}
        return {"categories": metrics, "means": means.group_means(metrics)}

    models = {"best_0": run(0.3), "best_1": run(0.4), "patchcore_0": run(0.2)}
    summary = report.summary(models)
    assert summary["best_all"] == summary["best_all_AUPRO"] == 39
    assert summary["patchcore_real_image_AUROC"] == 21.5
    assert summary["best_development_DSC"] == 35 + (1 + 3 + 4 + 6 + 7) / 5
    assert summary["best_held_back_pixel_AP"] == 35 + (0 + 2 + 5 + 8) / 4
    rows = {(row["model"], row["group"]): row for row in report.comparison(models)}
    assert rows["best", "all"]["pixel_F1Max"] == "39.0 ± 7.1"
    assert rows["patchcore", "all"]["pixel_F1Max"] == "24.0"

    (tmp_path / "elpv.json").write_text(
        json.dumps({"summary": {"best_own_pooled": 90.5, "best_own_within_modules": 87.1}})
    )
    demo = {"means": {"all": {"pixel_AP": 60.5}}}
    whole = report.Report(tmp_path / "a", {"models": models, "demo": {"demo_0": demo}}).summary()
    assert whole["elpv_all_image_AUROC"] == 90.5 and whole["elpv_within_image_AUROC"] == 87.1
    assert whole["demo_pixel_AP"] == 60.5 and whole["fast_all_pixel_AP"] == 39

    (tmp_path / "old.json").write_text(json.dumps({"models": {"best_0": run(0.3) | {"means": {}}}}))
    assert report.Report.load(tmp_path / "old").rows("models")["best_0"]["means"]["all"]["AUPRO"] == 34


def test_accuracy_says_which_training_a_section_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    accuracy, report = importlib.import_module("accuracy"), importlib.import_module("accuracy_report")
    study = accuracy.Study(root=tmp_path, work=tmp_path, report=report.Report(tmp_path / "a", {}), deadline=0)
    run = accuracy.Run(name="best_0", model=UniAS, epochs=12)
    study.compare_maps(run)
    (tmp_path / "best_0").mkdir()
    torch.save({"epoch": 10}, tmp_path / "best_0" / "model.ckpt")
    study.compare_maps(run)
    assert capsys.readouterr().out.count("maps needs best_0") == 2
    torch.save({"epoch": 11}, tmp_path / "best_0" / "model.ckpt")
    assert study.is_trained(run, "maps")
    assert not accuracy.Run(name="short", model=UniAS, epochs=1).has_ended({})  # no checkpoint


@pytest.fixture(scope="module")
def elpv() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("elpv")


@pytest.fixture(scope="module")
def solar_cells() -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.str_]]:
    return pytest.importorskip("elpv_dataset.utils").load_dataset()


def test_solar_split_uses_sure_labels_and_whole_modules(elpv: ModuleType, solar_cells: Any) -> None:
    _, probabilities, wafers = solar_cells
    assert [module.first for module in elpv.MODULES[1:]] == [module.end for module in elpv.MODULES[:-1]]
    for module in elpv.MODULES:
        assert set(wafers[module.first : module.end]) == {module.category.partition("_")[0]}

    cells = elpv.split(probabilities)
    assert {probabilities[cell.index] for cell in cells if cell.folder == "test/defect"} == {1}
    assert {probabilities[cell.index] for cell in cells if cell.folder != "test/defect"} == {0}
    sides = {cell.index: cell.folder.partition("/")[0] for cell in cells}
    assert len(sides) == len(cells)
    for module in elpv.MODULES:
        used = {sides[index] for index in range(module.first, module.end) if index in sides}
        assert used == ({module.side} if module.side != "none" else set())
    assert [tuple(row.values()) for row in elpv.count(cells)] == [
        ("mono_3", 355, 174, 229),
        ("poly_2", 149, 55, 111),
        ("poly_3", 447, 269, 201),
    ]


def test_solar_layouts_have_the_busbars_they_are_named_after(elpv: ModuleType, solar_cells: Any) -> None:
    images = solar_cells[0]
    rows = np.arange(20, 280)  # without the cells' edges
    for module in elpv.MODULES:
        cells = images[module.first : module.end]
        profile = np.median(np.median(cells, axis=2) / np.maximum(np.median(cells, axis=(1, 2)), 1)[:, None], axis=0)
        profile = np.convolve(profile, np.full(5, 0.2), "same")
        around = np.array([np.median(profile[max(0, row - 15) : row + 16]) for row in rows])
        dark = np.concatenate([[False], profile[rows] < 0.96 * around])
        assert np.count_nonzero(dark[1:] & ~dark[:-1]) == int(module.category[-1]), module


def test_no_poly_cell_was_photographed_for_both_sides_of_the_solar_split(elpv: ModuleType, solar_cells: Any) -> None:
    gaussian = pytest.importorskip("scipy.ndimage").gaussian_filter
    images, probabilities, _ = solar_cells
    small = images.reshape(-1, 75, 4, 75, 4).mean((2, 4))
    small /= np.maximum(np.median(small, axis=(1, 2)), 1)[:, None, None]
    grain = (gaussian(small, (0, 1, 1)) - gaussian(small, (0, 5, 5)))[:, 6:69, 6:69]
    for module in elpv.MODULES:  # what its cells share is no grain
        grain[module.first : module.end] -= np.median(grain[module.first : module.end], axis=0)
    grain = grain.clip(-0.15, 0.15)
    grain -= grain.mean(1, keepdims=True)
    grain -= grain.mean(2, keepdims=True)
    grain /= np.linalg.norm(grain, axis=(1, 2), keepdims=True)

    again = np.einsum("nhw,nhw->n", grain[1734:1784], grain[2276:2326])
    assert again.min() > 0.85  # the check finds the module that is there twice
    cells = [cell for cell in elpv.split(probabilities) if cell.module.category.startswith("poly")]
    train = grain[[cell.index for cell in cells if cell.folder == "train/good"]]
    test = grain[[cell.index for cell in cells if cell.folder != "train/good"]]
    for rows, columns in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        turned = test[:, ::rows, ::columns].reshape(len(test), -1)
        assert (turned @ train.reshape(len(train), -1).T).max() < 0.65


def test_solar_baselines_before_and_after_scaling(elpv: ModuleType, solar_cells: Any) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    images, probabilities, _ = solar_cells
    cells = elpv.split(probabilities)
    baselines = elpv.brightness_baselines(images, cells)
    assert all(len(scores) == sum(cell.folder != "train/good" for cell in cells) for scores in baselines.values())
    tables = [elpv.evaluate(scores, cells) for scores in baselines.values()]
    mono = [cell for cell in cells if cell.module.category == "mono_3" and cell.folder != "train/good"]
    expected = metrics.roc_auc_score(
        [cell.folder == "test/defect" for cell in mono], [-images[cell.index].mean() for cell in mono]
    )
    assert tables[0]["mono_3"]["pooled"] == pytest.approx(expected)
    assert tables[1]["mean"]["pooled"] < tables[0]["mean"]["pooled"]
    assert np.median(elpv.scale(images[cells[0].index])) == elpv.MEDIAN_GREY
    assert elpv.scale(np.zeros((4, 4), np.uint8)).max() == 0


def test_solar_auroc_within_modules_does_not_reward_telling_modules_apart(elpv: ModuleType) -> None:
    modules = [elpv.Module(0, 4, "mono_3", "test"), elpv.Module(4, 8, "mono_3", "test")]
    folders = ["test/good", "test/good", "test/good", "test/defect"], ["test/good", *["test/defect"] * 3]
    cells = [elpv.Cell(m.first + i, m, f) for m, own in zip(modules, folders, strict=True) for i, f in enumerate(own)]
    table = elpv.evaluate({cell.index: float(cell.module is modules[1]) for cell in cells}, cells)
    assert table["mono_3"] == table["mean"] == {"pooled": 0.75, "within_modules": 0.5}
    table = elpv.evaluate({cell.index: float(cell.folder == "test/defect") for cell in cells}, cells)
    assert table["mean"] == {"pooled": 1.0, "within_modules": 1.0}


def test_solar_cells_are_written_scaled_and_alone(elpv: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    images = np.full((2, 6, 6), 50, np.uint8)
    module = elpv.Module(0, 2, "mono_3", "test")
    cells = [elpv.Cell(0, module, "test/good"), elpv.Cell(1, module, "test/defect")]
    elpv.prepare(images, cells, tmp_path)
    with Image.open(tmp_path / "mono_3" / "test" / "defect" / "0001.png") as image:
        assert np.asarray(image).tolist() == np.full((6, 6), elpv.MEDIAN_GREY).tolist()
    with pytest.raises(ValueError, match="another split"):
        elpv.prepare(images, cells[:1], tmp_path)


def test_solar_split_refuses_another_dataset_and_takes_fewer_cells(elpv: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected the 2624 cells"):
        elpv.split(np.zeros(10))
    probabilities = np.tile([0.0, 1.0, 1 / 3], 875)[:2624]
    assert all(
        0 < row[name] <= 5
        for row in elpv.count(elpv.split(probabilities, per_folder=5))
        for name in row
        if name != "category"
    )
