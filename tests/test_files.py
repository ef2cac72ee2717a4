# SPDX-License-Identifier: Apache-2.0
"""Files are replaced whole or left as they were, whoever writes them, and what cannot be written says so."""

import errno
import io
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from anomalib.engine import Engine
from matplotlib.figure import Figure

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.deploy.export import write_thresholds
from anomalib_uniass.files import LOCK, replace_text, replacing
from anomalib_uniass.metrics import write_table
from anomalib_uniass.metrics.category_metrics import COUNTS
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.report.comparison import ComparisonCallback, write_comparison
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.sample_data import write_small_sample

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def half_written(path: Path) -> None:
    path.write_text("half")
    raise DISK_FULL


@pytest.mark.parametrize("before", [None, "earlier"])
def test_failure_in_the_middle_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "table.csv"
    if before is not None:
        path.write_text(before)
    message = r"cannot write .*table\.csv.*No space left on device"
    with pytest.raises(OSError, match=message) as caught, replacing(path) as draft:
        half_written(draft)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(KeyboardInterrupt), replacing(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("table.csv", before)] if before else [])


def test_success_replaces_the_file_and_keeps_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    replace_text(tmp_path / "new", "ä")
    replace_text(tmp_path / "new", "ö")
    assert (tmp_path / "new").read_text(encoding="utf-8") == "ö"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"cannot write .*file/table\.csv"):
        replace_text(tmp_path / "file" / "table.csv", "")


def test_errors_without_a_number_are_told_too(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"cannot write .*image\.png.*: broken encoder"),
        replacing(tmp_path / "image.png"),
    ):
        msg = "broken encoder"
        raise OSError(msg)


# --- Those that write ------------------------------------------------------------------------------------------------


def rows(value: float) -> dict[str, dict[str, float]]:
    row = dict.fromkeys(METRICS, value) | dict.fromkeys(COUNTS, 2)
    return {"bolt": row, "mean": row}


def save_table(folder: Path, value: float) -> None:
    write_table(rows(value), folder, model="M", datamodule=None, map_size=None)


def save_comparison(folder: Path, value: float) -> None:
    (folder / "models").mkdir(exist_ok=True)
    costs = dict.fromkeys(("parameters", "trainable_parameters", "fit_seconds", "test_seconds"), 1)
    figures = {"model": "M", "settings": "", "tested": 0, **costs, "table": rows(value)}
    (folder / "models" / "M.json").write_text(json.dumps(figures))
    write_comparison(folder)


def save_thresholds(folder: Path, value: float) -> None:
    post_processor = CategoryThresholdPostProcessor()
    post_processor.calibration = {"image": {"bolt": value}, "pixel": {"bolt": value}}
    post_processor._image_threshold.fill_(1)
    post_processor._pixel_threshold.fill_(1)
    write_thresholds(post_processor, folder)


COMPARISON = {"table.csv", "table.md", "per_category.csv", "pixel_AP.png", "report.html"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("save", "owner", "writer", "names"),
    [
        (save_table, Path, "open", {"per_category.csv", "per_category.json"}),
        (save_comparison, Path, "open", COMPARISON),
        (save_comparison, pd.DataFrame, "to_csv", COMPARISON),
        (save_comparison, Figure, "savefig", COMPARISON),
        (save_thresholds, Path, "open", {"category_thresholds.json"}),
    ],
)
def test_full_disk_leaves_earlier_results(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path, float], None],
    owner: type,
    writer: str,
    names: set[str],
) -> None:
    save(tmp_path, 0.5)
    before = contents(tmp_path)
    assert before.keys() == names
    write, failed = getattr(owner, writer), []

    def full(self: Any, *arguments: Any, **options: Any) -> Any:
        """Write half of it to whatever place was asked for, then fail; leave the figures of the models alone."""
        path = Path(self if owner is Path else arguments[0])
        if "M.json" in path.name or (owner is Path and "w" not in (*arguments, *options.values(), "r")):
            return write(self, *arguments, **options)
        failed.append(path)
        with io.open(path, "wb") as file:  # noqa: UP020  # Path's own may be the one that fails
            file.write(b"half")
        raise DISK_FULL

    monkeypatch.setattr(owner, writer, full)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device"):
        save(tmp_path, math.nan if save is save_table else 0.25)
    monkeypatch.undo()
    assert failed
    now = contents(tmp_path)
    assert now.keys() == names
    assert now[failed[0].name] == before[failed[0].name]
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "models"]


def test_sample_dataset_on_a_full_disk_names_its_folder_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise DISK_FULL

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match=r"cannot write .*inspection.*No space left on device"):
        write_small_sample(tmp_path / "inspection")
    assert not list(tmp_path.iterdir())


def test_comparison_that_cannot_be_written_fails_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders are there, but no file can be made in them; permissions do not stop root, so a stub does."""

    def read_only(*_arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(options["dir"]))

    monkeypatch.setattr("anomalib_uniass.report.comparison.TemporaryDirectory", read_only)
    trainer: Any = type("Trainer", (), {"is_global_zero": True})
    with pytest.raises(PermissionError, match=str(tmp_path)):
        ComparisonCallback(tmp_path).setup(trainer, trainer, "fit")


def test_broken_figures_of_a_model_are_named(tmp_path: Path) -> None:
    save_comparison(tmp_path, 0.5)
    (tmp_path / "models" / "N.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"N\.json holds no figures of a model .*delete it"):
        write_comparison(tmp_path)


# --- Drafts of killed writers ----------------------------------------------------------------------------------------


def stay_in_the_middle(path: Path, is_writing: Any) -> None:
    with replacing(path) as draft:
        draft.write_text("half")
        is_writing.set()
        time.sleep(600)


@contextmanager
def writer_of(path: Path) -> Iterator[Any]:
    """Start a process that stays in the middle of writing a file."""
    context = multiprocessing.get_context("fork")
    is_writing = context.Event()
    writer = context.Process(target=stay_in_the_middle, args=(path, is_writing))
    writer.start()
    try:
        assert is_writing.wait(timeout=60)
        yield writer
    finally:
        writer.kill()
        writer.join()


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
def test_the_next_write_removes_the_draft_of_a_killed_writer_and_of_no_living_one(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with writer_of(path) as killed:
        killed.kill()
    (left,) = tmp_path.iterdir()
    os.utime(left / LOCK, (0, 0))  # a lock younger than a tenth of a second may be about to be taken
    with writer_of(path):
        (living,) = tmp_path.iterdir()
        replace_text(path, "whole")
        assert sorted(tmp_path.iterdir()) == sorted([path, living])
        assert (living / "model.ckpt").read_text() == "half"
    os.utime(living / LOCK, (0, 0))
    replace_text(path, "again")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "again"


def test_what_only_looks_like_a_draft_stays(tmp_path: Path) -> None:
    """Folders of the user's, drafts of other files, and fresh ones without a lock."""
    theirs = tmp_path / ".model.ckpt-abcd1234"
    other = tmp_path / ".last.ckpt-abcd1234"
    fresh = tmp_path / ".model.ckpt-efgh5678"
    for folder, name in ((theirs, "notes.txt"), (other, "last.ckpt"), (fresh, "model.ckpt")):
        folder.mkdir()
        (folder / name).touch()
    for folder in (theirs, other):
        os.utime(folder, (0, 0))
    replace_text(tmp_path / "model.ckpt", "whole")
    assert all(folder.exists() for folder in (theirs, other, fresh))
    os.utime(fresh, (0, 0))  # one of version 0.2
    replace_text(tmp_path / "model.ckpt", "whole")
    assert theirs.exists() and other.exists() and not fresh.exists()


def test_a_run_removes_what_killed_runs_before_left(tmp_path: Path) -> None:
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], train=3, good=1, defective=1)
    left = [
        tmp_path / "results" / "UniAS" / "parts" / run / folder / f".{name}-abcd1234"
        for run in ("v0", "v7")
        for folder, name in (("weights/lightning", "model.ckpt"), ("metrics", "per_category.csv"), ("", "page.html"))
    ]
    for draft in left:
        draft.mkdir(parents=True)
        (draft / draft.name[1:-9]).touch()
        os.utime(draft, (0, 0))
    (tmp_path / "results" / "UniAS" / "parts" / "latest").symlink_to("v7")
    small = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128), "hidden_dim": 32}
    model = UniAS(**small, feedforward_dim=32, visualizer=False)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 1, "limit_val_batches": 0}
    Engine(default_root_dir=tmp_path / "results", **quiet).fit(model, datamodule=Unified(root=root, num_workers=0))
    assert not any(draft.exists() for draft in left)
