# SPDX-License-Identifier: Apache-2.0
"""Any name that a file system allows can be written, read back, and is no formula."""

import ast
import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.files import replace_text
from anomalib_uniass.metrics import format_table, write_table
from anomalib_uniass.metrics.category_metrics import COUNTS
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.prediction import PathVisualizer
from anomalib_uniass.report.comparison import write_comparison
from anomalib_uniass.text import cell, one_line, storable
from tests.helpers.datasets import make_mvtec_layout
from tests.report.test_pages import page_of
from tests.test_predict import SMALL, engine, pictures, rows

LATIN = os.fsdecode(b"Gr\xf6\xdfe")  # as an archive of long ago names it
STRANGE = [LATIN, "two\nlines", "quote\"d, 'twice'", "50 %", "#1", "\x1b[31mred", "a\tb", "\u202egnp.exe", "$x_", "|"]


def path_of(text: str) -> str:
    """Find the path of a cell, as the documentation says."""
    name = re.sub(r"\\udc(..)", lambda match: chr(0xDC00 + int(match[1], 16)), text)
    return name[1:] if re.match(r"'[=+\-@\t\r\n＝＋－＠]", name) else name  # noqa: RUF001


# --- The texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STRANGE, "größe", "部品", "=1+1", "-5 °C", "'quoted", "\\udc"])
def test_a_cell_leads_back_to_its_text(name: str) -> None:
    assert storable(name).encode("utf-8")
    file = io.StringIO()
    csv.writer(file).writerow([cell(name), -0.5])
    ((text, number),) = csv.reader(io.StringIO(file.getvalue()))
    assert path_of(text) == name
    assert number == "-0.5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("＝1", "'＝1"),  # noqa: RUF001
        ("a=1", "a=1"),
        ("", ""),
        (" -1", " -1"),
        ("'=1", "'=1"),
    ],
)
def test_what_looks_like_a_formula_has_an_apostrophe(text: str, expected: str) -> None:
    assert cell(text) == expected


@pytest.mark.parametrize("name", STRANGE)
def test_one_line_is_printable_and_says_what_it_was(name: str) -> None:
    line = one_line(name)
    assert line.isprintable()
    assert line == name if name.isprintable() else ast.literal_eval(f'"""{line}"""') == name
    assert one_line(name, "ascii").isascii()


def test_texts_that_are_not_utf_8_are_written(tmp_path: Path) -> None:
    replace_text(tmp_path / "page", LATIN)
    assert (tmp_path / "page").read_text(encoding="utf-8") == "Gr\\udcf6\\udcdfe"


# --- What is written -------------------------------------------------------------------------------------------------


def table_of(categories: list[str]) -> dict[str, dict[str, float]]:
    row = dict.fromkeys(METRICS, 0.5) | dict.fromkeys(COUNTS, 2)
    return dict.fromkeys([*categories, "mean"], row)


def test_table_of_strange_categories(tmp_path: Path) -> None:
    names = [*STRANGE, "=1+1"]
    for path in write_table(table_of(names), tmp_path, model="M", datamodule=None, map_size=None):
        assert path.read_bytes().decode("utf-8")
    read = pd.read_csv(tmp_path / "per_category.csv")
    assert [path_of(name) for name in read["category"]] == [*names, "mean"]
    assert list(json.loads((tmp_path / "per_category.json").read_text())["categories"]) == [*map(storable, names)]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_table_on_a_terminal_of_any_encoding(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=200)
    console.print(format_table(table_of([*STRANGE, "部品", "größe"]), encoding=console.encoding))
    stream.flush()
    printed = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "\x1b[31m" not in printed
    assert "Gr\\udcf6" in printed
    assert ("部品" if encoding == "utf-8" else "\\u90e8\\u54c1") in printed
    assert ("größe" if encoding != "ascii" else "gr\\xf6\\xdfe") in printed


@pytest.mark.parametrize("name", STRANGE)
def test_page_of_a_strange_category(name: str, tmp_path: Path) -> None:
    page = page_of(tmp_path, [name])
    assert page.count("<img") == 5


def test_comparison_of_strange_categories_and_settings(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    costs = dict.fromkeys(("parameters", "trainable_parameters", "fit_seconds", "test_seconds"), 1)
    found = {
        name: {"good": [0.1], "defective": [0.9], "threshold": 0.5, "curve": [(0.5, 0.9)], "pictures": {}}
        for name in STRANGE
    }
    figures = {"model": "=M", "settings": "-1", "tested": 0, **costs, "table": table_of(STRANGE), "findings": found}
    (tmp_path / "models/M.json").write_text(json.dumps(figures))
    write_comparison(tmp_path)
    per_category = pd.read_csv(tmp_path / "per_category.csv")
    assert [path_of(name) for name in per_category["category"]] == STRANGE
    row = pd.read_csv(tmp_path / "table.csv").iloc[0]
    assert (row["model"], row["settings"], row["parameters"]) == ("'=M", "'-1", 1)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<section>") == len(STRANGE)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow names of UTF-8 alone")
def test_files_and_categories_that_are_not_utf_8(tmp_path: Path) -> None:
    """Training, test and prediction of an old archive; every row and picture leads back to its file."""
    root = make_mvtec_layout(tmp_path / "parts", [LATIN, "bolt"], (96, 144), train=5)
    for number, name in enumerate((f"{LATIN}.png", 'a\n"b" = 50 %, #1.png')):
        (root / LATIN / "test/good" / f"00{number}.png").rename(root / LATIN / "test/good" / name)
    data = Unified(root=root, train_batch_size=4, eval_batch_size=2, num_workers=0, val_split_ratio=0.4)
    run, model = engine(tmp_path / "run", max_epochs=1), UniAS(**SMALL)
    run.train(model, datamodule=data)
    folder = Path(run.trainer.default_root_dir)
    assert [path_of(name) for name in pd.read_csv(folder / "metrics/per_category.csv")["category"]] == [
        *sorted([LATIN, "bolt"]),
        "mean",
    ]
    assert "Gr\\udcf6" in (folder / "metrics/report.html").read_text(encoding="utf-8")
    images = {path.relative_to(root).as_posix() for path in root.glob("*/test/*/*.png")}
    assert pictures(folder) == images
    shutil.copytree(root / LATIN / "test", tmp_path / "incoming")  # anomalib takes printable names alone for it
    run.predict(model, data_path=tmp_path / "incoming")
    table = {path_of(path) for path in rows(folder / "predict/v0")}
    assert table == pictures(folder / "predict/v0")
    assert {f"{LATIN}/test/{path}" for path in table} == {name for name in images if name.startswith("Gr")}


def test_long_names_have_pictures(tmp_path: Path) -> None:
    visualizer = PathVisualizer()
    visualizer._folder, visualizer._written = tmp_path, {}
    names = [f"{'ä' * 124}{end}.psd" for end in "ab"]  # 253 bytes, which a picture's ending would make 257
    drawn = [visualizer._name(str(tmp_path / name)) for name in names]
    assert len(set(drawn)) == 2
    for path in drawn:
        (tmp_path / path).touch()
        assert path.suffix == ".png"


def test_negative_scores_stay_numbers(tmp_path: Path) -> None:
    """Without thresholds a score may be any number."""
    from anomalib_uniass.prediction import PredictionTable
    from anomalib_uniass.prediction.table import Row

    table = PredictionTable()
    table._rows = {"a": Row("-a.png", "=b", "-1.5", "", "", "", "")}
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    table.on_predict_epoch_end(trainer, None)  # type: ignore[arg-type]
    read = pd.read_csv(tmp_path / "predictions.csv")
    assert read[["path", "category", "score"]].to_numpy().tolist() == [["'-a.png", "'=b", -1.5]]
