# SPDX-License-Identifier: Apache-2.0
"""A prediction of many photographs needs the memory of one: results are written and let go."""

import logging
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_uniass import UniAS
from anomalib_uniass.prediction import PredictionTable
from tests.test_cli import Anomalib, anomalib
from tests.test_predict import CPU, MODEL, SMALL, engine, pictures, rows

__all__ = ["anomalib"]  # the fixture

TILES = ["--model.tile_size", "[128, 128]"]
SCRIPT = """
import resource
import sys
from anomalib_uniass.__main__ import main
sys.argv[0] = "anomalib-uniass"
main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def photographs(folder: Path, count: int, width: int, height: int) -> Path:
    """Make photographs with names of their own; their content is the same."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0000.jpg")
    for number in range(1, count):
        shutil.copy(folder / "0000.jpg", folder / f"{number:04}.jpg")
    return folder


class Alive:
    """Counts the maps that are in memory at the end of each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        self._maps: list[weakref.ref[Any]] = []
        end = PredictionTable.on_predict_batch_end

        def counted(table: PredictionTable, trainer: Any, module: Any, outputs: Any, *arguments: Any) -> None:
            self._maps += [weakref.ref(outputs.anomaly_map), weakref.ref(outputs.image)]
            end(table, trainer, module, outputs, *arguments)
            self.counts.append(sum(reference() is not None for reference in self._maps))

        monkeypatch.setattr(PredictionTable, "on_predict_batch_end", counted)


@pytest.mark.parametrize("asked", [[], ["--return_predictions", "true"]])
def test_command_keeps_no_batch(
    asked: list[str], anomalib: Anomalib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs(tmp_path / "photographs", 12, 160, 144)
    alive = Alive(monkeypatch)
    anomalib("predict", *MODEL, *CPU, *TILES, "--data", "photographs", *asked)
    assert len(alive.counts) == len(rows(tmp_path / "results/UniAS/latest")) == 12
    assert len(pictures(tmp_path / "results/UniAS/latest")) == 12
    assert max(alive.counts) <= 4, "more than the batch of now and the one before"


@pytest.mark.parametrize("wanted", [None, True, False])
def test_python_has_all_predictions_unless_it_does_not_want_them(
    wanted: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What they will take is said after the first."""
    monkeypatch.setattr("anomalib_uniass.prediction.table.MUCH_MEMORY", 4_000_000)
    folder = photographs(tmp_path / "photographs", 12, 160, 144)
    alive, run = Alive(monkeypatch), engine(tmp_path / "run")
    model = UniAS(**SMALL, tile_size=(128, 128), visualizer=False)
    with caplog.at_level(logging.WARNING):
        found = run.predict(model, data_path=folder, return_predictions=wanted)
    assert len(rows(tmp_path / "run/UniAS/latest")) == 12
    if wanted is False:
        assert found is None
        assert max(alive.counts) <= 4
        assert "return_predictions" not in caplog.text
    else:
        assert [tuple(batch.anomaly_map.shape[-2:]) for batch in found] == [(144, 160)] * 12
        assert all(batch.image is not None for batch in found)
        assert caplog.text.count("return_predictions=False") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB there")
def test_memory_is_flat_over_200_photographs(tmp_path: Path) -> None:
    """Kept, each of 640 x 480 pixels would take 5 MB: image and map of float32, and the mask."""
    tiles = ["--model.tile_size", "[256, 256]"]
    peaks = {}
    for count in (20, 200):
        place = tmp_path / str(count)
        place.mkdir()
        photographs(place / "photographs", count, 640, 480)
        command = [sys.executable, "-c", SCRIPT, "predict", *MODEL, *CPU, *tiles, "--data", "photographs"]
        done = subprocess.run(
            command,
            cwd=place,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        peaks[count] = int(done.stdout.split()[-1]) / 1000
        assert len(rows(place / "results/UniAS/latest")) == len(pictures(place / "results/UniAS/latest")) == count
    print(f"Peak in MB by photographs: {peaks}")
    assert peaks[200] - peaks[20] < 180 * 5 / 5, peaks
