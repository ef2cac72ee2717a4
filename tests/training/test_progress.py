# SPDX-License-Identifier: Apache-2.0
"""Lines that say how far a run is, where no progress bar is seen."""

import logging
import re
import sys
from pathlib import Path

import pytest
from anomalib.engine import Engine

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.training import progress
from anomalib_uniass.training.progress import duration, say_progress
from tests.helpers.datasets import make_mvtec_layout

LINES = "lightning.pytorch.utilities.rank_zero"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_progress_of_batches(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LINES)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(say_progress("abcdefgh", count=8, what="Head")) == list("abcdefgh")
    # A batch takes ten seconds; a line every half a minute.
    assert [record.getMessage() for record in caplog.records] == [
        "Head: 2 of 8 batches, 90 s left",
        "Head: 5 of 8 batches, 36 s left",
    ]


def fit(folder: Path, *, batch_size: int) -> None:
    root = make_mvtec_layout(folder / "parts", ["bolt"], train=4, good=1, defective=1)
    model = UniAS(
        backbone="resnet18", pre_trained=False, image_size=(128, 32), hidden_dim=32, feedforward_dim=32,
        channel_branch=False, visualizer=False,
    )  # fmt: skip
    engine = Engine(default_root_dir=folder, accelerator="cpu", max_epochs=3, logger=False)
    engine.fit(model, datamodule=Unified(root=root, train_batch_size=batch_size, num_workers=0))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Epoch ")]


@pytest.mark.parametrize("terminal", [False, True])
def test_epochs_are_said_where_there_is_no_terminal(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LINES)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    fit(tmp_path, batch_size=4)
    said = lines(caplog)
    assert [line.split(":")[0] for line in said] == ([] if terminal else ["Epoch 1 of 3", "Epoch 3 of 3"])
    assert all("train_loss" in line and "an epoch" in line and line.endswith(" left") for line in said)


def test_a_long_epoch_is_not_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LINES)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    fit(tmp_path, batch_size=1)
    places = [re.match(r"Epoch (\d) of 3: (?:batch (\d) of 3)?", line) for line in lines(caplog)]  # one validates
    expected = [(str(epoch), batch) for epoch in (1, 2, 3) for batch in ("1", "2", None)]
    assert [place and place.groups() for place in places] == expected
