# SPDX-License-Identifier: Apache-2.0
"""The comparison's rows and files on a stub trainer (real runs: ../test_benchmark_command.py)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from rich.console import Console

from anomalib_uniass.metrics import CategoryMetricsCallback, format_table
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.report.comparison import ComparisonCallback, write_comparison


class Small(LightningModule):
    """Six parameters, two of them trained."""

    def __init__(self, width: int = 2, names: tuple[str, ...] = ("a",)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.frozen, self.trained = torch.nn.Linear(3, 1), torch.nn.Linear(1, 1)


class Other(Small):
    pass


def trainer_of(module: Small, pixel_ap: dict[str, float], *, rank_zero: bool = True) -> Any:
    scores = CategoryMetricsCallback()
    rows = {category: dict.fromkeys(METRICS, 0.5) | {"pixel_AP": value} for category, value in pixel_ap.items()}
    rows["mean"] = dict.fromkeys(METRICS, 0.5) | {"pixel_AP": sum(pixel_ap.values()) / len(pixel_ap)}
    scores.table = {name: row | {"n_images": 4, "n_anomalous": 2} for name, row in rows.items()}
    optimizer = torch.optim.SGD(module.trained.parameters(), lr=0.1)
    return SimpleNamespace(callbacks=[scores], is_global_zero=rank_zero, optimizers=[optimizer])


def compare(
    folder: Path, module: Small, *, fit: bool = True, rank_zero: bool = True, **pixel_ap: float
) -> ComparisonCallback:
    callback, trainer = ComparisonCallback(folder), trainer_of(module, pixel_ap, rank_zero=rank_zero)
    callback.setup(trainer, module, "fit")
    if fit:
        callback.on_fit_start(trainer, module)
        callback.on_fit_end(trainer, module)
    callback.on_test_start(trainer, module)
    callback.on_test_end(trainer, module)
    return callback


def test_a_model_adds_a_row_and_another_test_of_it_replaces_the_row(tmp_path: Path) -> None:
    compare(tmp_path, Small(), bolt=0.25, cap=0.75)
    compare(tmp_path, Other(width=3), fit=False, bolt=0.5, cap=0.5)
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["model"]) == ["Small", "Other"]
    assert list(table["pixel_AP"]) == [0.5, 0.5]
    assert list(table["parameters"]) == [6, 6]
    assert table["trainable_parameters"][0] == 2
    assert table["fit_seconds"][0] >= 0
    assert table.loc[1, ["trainable_parameters", "fit_seconds"]].isna().all()  # it was only tested
    assert table["settings"].isna()[0]
    assert table["settings"][1] == "width=3"

    compare(tmp_path, Small(), bolt=0.125, cap=0.75)
    per_category = pd.read_csv(tmp_path / "per_category.csv").set_index(["model", "category"])
    assert per_category["pixel_AP"].to_dict() == {
        ("Other", "bolt"): 0.5, ("Other", "cap"): 0.5, ("Small", "bolt"): 0.125, ("Small", "cap"): 0.75,
    }  # fmt: skip


def test_a_class_with_other_settings_gets_a_row_and_bars_of_its_own(tmp_path: Path) -> None:
    for width in (2, 3, 4, 3):
        compare(tmp_path, Small(width, names=("a", "b")), bolt=0.1 * width)
    table = pd.read_csv(tmp_path / "table.csv")
    assert dict(zip(table["model"], table["settings"], strict=True)) == {
        "Small": "names=('a', 'b')",
        "Small 2": "names=('a', 'b'), width=4",
        "Small 3": "names=('a', 'b'), width=3",  # tested last
    }
    assert list(pd.read_csv(tmp_path / "per_category.csv")["pixel_AP"]) == pytest.approx([0.2, 0.4, 0.3])


def test_names_of_categories_are_no_markup(tmp_path: Path) -> None:
    names = {"x$_$": 0.25, "[v2]": 0.75, "[/bold]": 0.5}
    compare(tmp_path, Small(), **names)
    assert list(pd.read_csv(tmp_path / "per_category.csv")["category"]) == list(names)
    rows = dict.fromkeys(METRICS, 0.5) | {"n_images": 4, "n_anomalous": 2}
    console = Console(record=True, width=120)
    console.print(format_table(dict.fromkeys(names, rows)))
    printed = console.export_text()
    assert all(name in printed for name in names)


def test_table_for_reading(tmp_path: Path) -> None:
    compare(tmp_path, Small(), bolt=0.25, cap=0.5)
    compare(tmp_path, Other(), fit=False, bolt=math.nan)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2].startswith("| Small | 37.50 | 50.00 |")
    assert "| 0.00 (0.00) |" in lines[2]
    assert lines[3].startswith("| Other | - | 50.00 |")
    assert "(-) | - |" in lines[3]
    assert "- Small: defaults" in lines


def test_plot_has_bars_of_every_model(tmp_path: Path) -> None:
    compare(tmp_path, Small(), bolt=0.25, cap=0.5)
    one = Image.open(tmp_path / "pixel_AP.png").convert("RGB")
    compare(tmp_path, Other(), bolt=math.nan, cap=0.5, nut=0.1)
    two = Image.open(tmp_path / "pixel_AP.png").convert("RGB")
    blue, orange = (59, 130, 208), (224, 102, 58)
    colors = [{color: count for count, color in image.getcolors(1 << 24)} for image in (one, two)]
    assert orange not in colors[0]
    assert min(colors[0][blue], colors[1][blue], colors[1][orange]) > 1000


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    compare(tmp_path / "comparison", Small(), rank_zero=False, bolt=0.5)
    assert not (tmp_path / "comparison").exists()


def test_no_row_without_a_finished_test(tmp_path: Path) -> None:
    callback, trainer = ComparisonCallback(tmp_path), trainer_of(Small(), {"bolt": 0.5})
    trainer.callbacks[0].table = None
    callback.setup(trainer, Small(), "test")
    callback.on_test_end(trainer, Small())
    assert not (tmp_path / "table.csv").exists()


def test_folder_that_cannot_be_made_fails_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        ComparisonCallback(tmp_path / "file").setup(trainer_of(Small(), {"bolt": 0.5}), Small(), "fit")


def test_a_removed_file_removes_the_row(tmp_path: Path) -> None:
    compare(tmp_path, Small(), bolt=0.5)
    compare(tmp_path, Other(), bolt=0.5)
    removed = next((tmp_path / "models").glob("Small-*.json"))
    assert json.loads(removed.read_text())["table"]["bolt"]["pixel_AP"] == 0.5
    removed.unlink()
    write_comparison(tmp_path)
    assert list(pd.read_csv(tmp_path / "table.csv")["model"]) == ["Other"]
