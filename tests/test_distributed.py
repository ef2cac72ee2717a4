# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes (gloo, CPU) give what one process gives, and do not send what all of them know."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer

from anomalib_uniass import BoundedPatchcore, UniAS
from anomalib_uniass.models.unias.detector.recipes import best
from tests.helpers import distributed_run
from tests.helpers.datasets import make_mvtec_layout
from tests.models.test_whitening import Seen

COUNTS = {"brick": (5, 3), "bolt": (2, 1), "cap": (4, 2)}
"""Test images, and how many of them are anomalous: 11 in sum, which neither 2 nor 3 processes share evenly."""

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "parts"
    train = {"brick": 8, "bolt": 3, "cap": 7}  # of which 3, 1 and 3 validate
    for name, (images, anomalous) in COUNTS.items():
        make_mvtec_layout(root, [name], train=train[name], good=images - anomalous, defective=anomalous)
    return root


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Results, Path]]:
    """Return a function that runs a job in processes of its own: the results of all of them, and the run's folder."""

    def run(job: str, processes: int) -> tuple[Results, Path]:
        folder = tmp_path_factory.mktemp(f"{job}{processes}")
        script = [sys.executable, distributed_run.__file__, job, str(processes), str(root), str(folder)]
        environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
        done = subprocess.run(
            script,
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        files = [folder / f"{job}-{processes}-{rank}.json" for rank in range(processes)]
        # Process 0 does not wait for the others at its end.
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [json.loads(file.read_text()) for file in files], folder

    return run


# --- Test and validation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return distributed_run.evaluate(1, root, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_tables_and_thresholds_are_those_of_one_process(
    run: Callable[[str, int], tuple[Results, Path]], alone: dict[str, Any], processes: int
) -> None:
    """With 3 processes there are more of them than images of a category, and some have none of it."""
    results, folder = run("evaluate", processes)
    assert len(results) == processes
    for result in results:
        assert result["processes"] == processes
        assert result["tables"].keys() == alone["tables"].keys()
        for name, table in alone["tables"].items():
            # Maps differ by rounding; in compact ones a pixel at a bin's edge may so come into the next.
            close = 1e-5 if name == "UniAS by tiles" else 1e-6
            for row, values in table.items():
                assert result["tables"][name][row] == pytest.approx(values, abs=close, nan_ok=True), (name, row)
        for level in ("image", "pixel"):
            assert result["calibration"][level] == pytest.approx(alone["calibration"][level], rel=1e-6)
    table = results[0]["tables"]["UniAS"]
    assert {name: (table[name]["n_images"], table[name]["n_anomalous"]) for name in COUNTS} == COUNTS
    assert results[0]["tables"]["without masks"]["bare"]["n_images"] == 5

    assert any("Test of 11 images" in page.read_text() for page in folder.rglob("metrics/report.html"))
    comparison = pd.read_csv(folder / "comparison" / "table.csv")
    assert list(comparison["model"]) == ["UniAS", "UniAS 2", "ReverseDistillation"]
    assert list(comparison["n_images"]) == [11, 11, 11]
    assert (comparison["test_seconds"] > 0).all()


# --- Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run: Callable[[str, int], tuple[Results, Path]]) -> tuple[Results, Path]:
    return run("train", 2)


def test_constants_are_not_sent_in_every_step(trained: tuple[Results, Path]) -> None:
    (first, second), _ = trained
    assert first["sent"] and first["sent"] == second["sent"]
    for step in first["sent"]:
        assert all(name.startswith("post_processor.") for name in step)
        assert sum(step.values()) < 100


def test_processes_end_with_the_same_weights_and_constants_of_these(trained: tuple[Results, Path]) -> None:
    (first, second), _ = trained
    assert first["start"] != second["start"], "the processes should start with different weights, to see them joined"
    assert first["weights"] == second["weights"]
    assert any("folded" in name for name in first["buffers"])
    assert first["buffers"] == second["buffers"]


def test_processes_that_train_on_tiles_end_alike(trained: tuple[Results, Path]) -> None:
    (first, second), _ = trained
    states = first["state by tiles"], second["state by tiles"]
    assert states[0]["model.detector.distances.whitening.fitted"] == 1
    assert states[0] == states[1]


def test_statistics_learn_from_the_images_of_all_processes(trained: tuple[Results, Path], root: Path) -> None:
    (first, _), folder = trained
    model = UniAS.load_from_checkpoint(first["checkpoint"]).eval()
    taken = model.model.detector
    assert taken.distances.whitening.fitted
    data = distributed_run.unified(root, folder)
    data.setup()
    assert len(data.train_data) == 11
    images = [model.pre_processor.transform(data.train_data[i].image[None]) for i in range(11)]
    anew = best(model.model.backbone.channels[::-1], model.model.image_size)
    assert anew.clusters is not None and taken.clusters is not None
    with torch.no_grad():
        seen = Seen([model.model.reconstruct(image)[:2] for image in images], anew.clusters)
        anew.clusters.fit(seen)
        anew.distances.fit(seen)
        coarsest = torch.cat(list(seen.coarsest()))
    # Clusters by the images that they hold: as many as images differ in their order from k-means to k-means.
    theirs, ours = taken.clusters(coarsest), anew.clusters(coarsest)
    for name, expected in anew.state_dict().items():
        if "segmentation_head" in name:
            continue
        actual = taken.state_dict()[name]
        if expected.ndim < 2:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        elif "directions_" in name:  # k-means that rounds otherwise finds some others
            cosines = actual[theirs] @ expected[ours].mT  # (images, directions, directions)
            assert min(cosines.amax(dim=1).mean(), cosines.amax(dim=2).mean()) > 0.99
        else:
            torch.testing.assert_close(actual[theirs], expected[ours], rtol=1e-3, atol=1e-4)


def test_table_and_checkpoint_lie_in_the_folder_of_the_first_process(trained: tuple[Results, Path]) -> None:
    (first, second), folder = trained
    assert Path(first["folder"]).name == "v0"
    assert first["checkpoint"] == second["checkpoint"]
    assert Path(first["checkpoint"]).is_relative_to(first["folder"])
    (table,) = (folder / "UniAS").rglob("per_category.csv")
    assert table == Path(first["folder"], "metrics", "per_category.csv")
    assert first["table"]["mean"]["n_images"] == 11
    assert len(pd.read_csv(folder / "comparison" / "table.csv")) == 1


def test_memory_bank_is_not_fitted_by_several_processes() -> None:
    model = BoundedPatchcore(backbone="resnet18", pre_trained=False, image_size=(64, 64), visualizer=False)
    model.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=True)
    with pytest.raises(ValueError, match=r"fitted in one process.*DDPStrategy.*--trainer\.strategy auto"):
        model.setup("fit")
    model.setup("test")
