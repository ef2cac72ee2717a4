# SPDX-License-Identifier: Apache-2.0
"""Results of one run never cost those of another, and a full disk or a missing image costs what depends on it alone."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.prediction import PathVisualizer
from anomalib_uniass.report.comparison import ComparisonCallback
from anomalib_uniass.results import RunFolder
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import tiny_padim
from tests.test_cli import Anomalib, anomalib
from tests.test_predict import CPU, MODEL, SMALL, engine, pictures, rows

__all__ = ["anomalib"]  # the fixture

DATA = ["--data", "Unified", "--data.root", "parts", "--data.num_workers", "0", "--data.val_split_ratio", "0.4"]
SHORT = [*CPU, "--trainer.max_epochs", "1", "--data.train_batch_size", "4"]
CHECKPOINT = "weights/lightning/model.ckpt"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and the results of a training with its test."""
    folder = tmp_path_factory.mktemp("training")
    root = make_mvtec_layout(folder / "parts", ["bolt", "cap"], (96, 144), train=5)
    data = Unified(root=root, train_batch_size=4, eval_batch_size=2, num_workers=0, val_split_ratio=0.4)
    engine(folder / "results", max_epochs=1).train(UniAS(**SMALL), datamodule=data)
    return folder


@pytest.fixture
def project(training: Path, tmp_path: Path) -> Path:
    """A copy of that folder, which a test may change."""
    shutil.copytree(training, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def datamodule(project: Path) -> Unified:
    return Unified(root=project / "parts", train_batch_size=4, eval_batch_size=2, num_workers=0, val_split_ratio=0.4)


@pytest.fixture
def model(project: Path) -> UniAS:
    return UniAS.load_from_checkpoint(project / "results/UniAS/parts/v0" / CHECKPOINT)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- A folder for each run -------------------------------------------------------------------------------------------


def test_a_test_and_a_prediction_leave_the_training_as_it_is(anomalib: Anomalib, project: Path) -> None:
    run = project / "results/UniAS/parts"
    before = contents(run / "v0")
    assert {"metrics/report.html", "metrics/per_category.csv", CHECKPOINT} <= before.keys()
    checkpoint = ["--ckpt_path", f"results/UniAS/parts/latest/{CHECKPOINT}"]
    for _ in range(2):
        anomalib("test", *MODEL, *CPU, *DATA, *checkpoint)
        anomalib("predict", *MODEL, *CPU, *DATA, *checkpoint)
    after = contents(run / "v0")
    assert {name: after[name] for name in before} == before
    for version in ("v0", "v1", "latest"):
        assert {"metrics/report.html", "metrics/per_category.json", "config.yaml"} <= contents(
            run / "v0/test" / version
        ).keys()
        assert len(pictures(run / "v0/test" / version)) == 8
        assert len(rows(run / "v0/predict" / version)) == 8
    assert sorted(path.name for path in run.iterdir()) == ["latest", "v0"]
    assert (run / "latest" / CHECKPOINT).is_file()


def test_predictions_of_folders_are_versions_and_latest_is_the_last(anomalib: Anomalib, project: Path) -> None:
    checkpoint = ["--ckpt_path", f"results/UniAS/parts/latest/{CHECKPOINT}", "--model.visualizer", "false"]
    run = project / "results/UniAS"
    for count, folder in enumerate(("bolt/test/good", "cap/test", "cap/test/good")):
        anomalib("predict", *MODEL, *CPU, "--data", f"parts/{folder}", *checkpoint)
        assert len(rows(run / "latest")) == len(rows(run / f"v{count}")) == (2, 4, 2)[count]
    assert [len(rows(run / f"v{count}")) for count in range(3)] == [2, 4, 2]


def test_predictions_of_an_earlier_version_are_kept(model: UniAS, project: Path) -> None:
    """Until 0.2 all predictions of folders lay in a folder `latest`."""
    old = project / "results/UniAS/latest"
    old.mkdir()
    (old / "predictions.csv").write_text("old")
    engine(project / "results").predict(model, data_path=project / "parts/cap/test")
    assert (project / "results/UniAS/v0/predictions.csv").read_text() == "old"
    assert old.readlink() == Path("v1")
    assert len(rows(old)) == 4


def test_runs_of_one_engine_are_kept_apart(model: UniAS, datamodule: Unified, tmp_path: Path) -> None:
    run = engine(tmp_path / "own", max_epochs=1)
    run.fit(model, datamodule=datamodule)
    folder = Path(run.trainer.default_root_dir)
    for _ in range(3):
        run.test(model, datamodule=datamodule, verbose=False)
        run.predict(model, data_path=datamodule.root / "cap/test")
    assert Path(run.trainer.default_root_dir) == folder
    assert sorted(folder.rglob("report.html")) == sorted(
        folder / place / "metrics/report.html" for place in ("", "test/v0", "test/v1")
    )
    assert sorted(folder.rglob("predictions.csv")) == sorted(
        folder / place / "predictions.csv" for place in ("predict/v0", "predict/v1", "predict/v2")
    )
    run.export(model, "torch")
    assert (folder / "weights/torch/model.pt").is_file()


def test_tests_of_other_models_are_kept_apart(datamodule: Unified, tmp_path: Path) -> None:
    model, run = tiny_padim(visualizer=False), engine(tmp_path / "own", max_epochs=1)
    run.fit(model, datamodule=datamodule)
    run.test(model, datamodule=datamodule, verbose=False)
    folder = Path(run.trainer.default_root_dir)
    before = contents(folder / "metrics")
    for again in (run, engine(tmp_path / "own")):
        again.test(model, datamodule=datamodule, verbose=False)
    assert contents(folder / "metrics") == before
    assert len([*folder.glob("test/v?/metrics/report.html")]) == 2


def test_plain_folder_of_a_trainer_of_lightning(model: UniAS, datamodule: Unified, tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path / "plain", accelerator="cpu", logger=False, enable_progress_bar=False)
    for _ in range(2):
        trainer.test(model, datamodule=datamodule, verbose=False)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["images", "metrics", "test"]
    assert (tmp_path / "plain/test/v0/metrics/report.html").is_file()


def test_a_name_that_another_run_has_just_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two predictions that start at once have a folder each."""
    make, taken = Path.mkdir, []

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name == "v0" and not taken:
            taken.append(self)
            make(self)
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.PREDICTING), default_root_dir=str(tmp_path / "UniAS/latest")
    )
    RunFolder().open(trainer)
    assert taken
    assert trainer._default_root_dir == str(tmp_path / "UniAS/v1")


def test_results_can_be_moved(training: Path, project: Path) -> None:
    """`latest` is a link to a name beside it, whatever the folder above is called and mounted as."""
    assert (training / "results/UniAS/parts/latest").readlink() == Path("v0")
    (project / "results").rename(project / "elsewhere")
    assert (project / "elsewhere/UniAS/parts/latest" / CHECKPOINT).is_file()


@pytest.mark.slow
def test_two_processes_train_in_one_folder(project: Path) -> None:
    """anomalib makes one for each of them, and lets `latest` point to that of the last."""
    command = [sys.executable, "-m", "anomalib_uniass", "train", *MODEL, *DATA, "--data.train_batch_size", "2"]
    processes = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run(
        [*command, *processes, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"],
        cwd=project, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=400,
    )  # fmt: skip
    run = project / "results/UniAS/parts"
    assert sorted(path.name for path in run.iterdir()) == ["latest", "v0", "v1"]
    assert (run / "latest").readlink() == Path("v1")
    assert (run / "latest" / CHECKPOINT).is_file()
    assert len(pictures(run / "v1")) == 8


# --- Runs that leave nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--trainer.precision", "64-true"], "precision"),
        (["--ckpt_path", "results/UniAS/parts/latest/" + CHECKPOINT, "--model.feedforward_dim", "64"], "feedforward"),
        (["--ckpt_path", "results/nowhere.ckpt"], "nowhere"),
        (["--data.root", "nowhere"], "nowhere"),
    ],
)
def test_a_refused_training_leaves_latest_where_it_was(
    wrong: list[str], message: str, anomalib: Anomalib, project: Path
) -> None:
    run = project / "results/UniAS/parts"
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        anomalib("fit", *MODEL, *SHORT, *DATA, *wrong)
    assert (run / "latest").readlink() == Path("v0")
    assert (run / "latest" / CHECKPOINT).is_file()
    assert sorted(path.name for path in run.iterdir()) == ["latest", "v0"]


def test_a_refused_first_training_leaves_no_folder(model: UniAS, datamodule: Unified, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision"):
        engine(tmp_path / "own", max_epochs=1, precision="64-true").fit(model, datamodule=datamodule)
    assert not (tmp_path / "own/UniAS/parts").exists()


class Fail(Callback):
    """Ends a training in its first step."""

    def on_train_batch_end(self, *_arguments: object) -> None:
        msg = "in the first step"
        raise RuntimeError(msg)


def test_a_training_that_failed_after_its_start_keeps_latest(model: UniAS, datamodule: Unified, project: Path) -> None:
    """To go on from the checkpoint of the training before it would be another run."""
    with pytest.raises(RuntimeError, match="in the first step"):
        engine(project / "results", max_epochs=1, callbacks=[Fail()]).fit(model, datamodule=datamodule)
    assert (project / "results/UniAS/parts/latest").readlink() == Path("v1")


def test_a_refused_prediction_leaves_no_folder(anomalib: Anomalib, project: Path) -> None:
    checkpoint = ["--ckpt_path", f"results/UniAS/parts/latest/{CHECKPOINT}", "--model.visualizer", "false"]
    anomalib("predict", *MODEL, *CPU, "--data", "parts/cap/test/good", *checkpoint)
    before = contents(project / "results")
    (project / "parts/cap/test/good/000.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="000"):
        anomalib("predict", *MODEL, *CPU, "--data", "parts/cap/test/good", *checkpoint)
    assert contents(project / "results") == before
    assert (project / "results/UniAS/latest").readlink() == Path("v0")
    assert not (project / "results/UniAS/v1").exists()


# --- Full disks and missing images -----------------------------------------------------------------------------------


def full(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def save_half(image: Any, path: Path, *_arguments: object, **_options: object) -> None:
    del image
    full(path)


class Lose(Callback):
    """Removes a test image, or breaks it, after it was scored; pictures are drawn later."""

    def __init__(self, name: str, content: bytes | None) -> None:
        self.name, self.content = name, content

    def on_test_batch_start(self, trainer: Trainer, module: Any, batch: ImageBatch, *_arguments: object) -> None:
        del trainer, module
        for path in map(Path, batch.image_path or []):
            if path.as_posix().endswith(self.name):
                path.unlink() if self.content is None else path.write_bytes(self.content)

    on_predict_batch_start = on_test_batch_start


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nbroken"], ids=["gone", "empty", "broken"])
def test_an_image_that_is_lost_during_the_test_costs_its_pictures(
    content: bytes | None, model: UniAS, datamodule: Unified, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = engine(tmp_path / "own", callbacks=[Lose("cap/test/square/001.png", content)])
    (results,) = run.test(model, datamodule=datamodule, verbose=False)
    folder = Path(run.trainer.default_root_dir)
    assert results["mean_pixel_AP"] > 0
    assert {"metrics/per_category.csv", "metrics/per_category.json", "metrics/report.html"} <= contents(folder).keys()
    assert len(pictures(folder)) == 7
    assert re.search(r"No picture of .*cap/test/square/001\.png", caplog.text)
    assert re.search(r"No picture on the page of .*cap/test/square/001\.png", caplog.text)
    page = (folder / "metrics/report.html").read_text()
    assert "cap/test/square/000.png" in page.replace("test/square/000.png", "cap/test/square/000.png")
    assert page.count("<img") > 0


def test_an_image_that_is_lost_before_it_is_read_costs_no_table_of_the_others(
    model: UniAS,
    datamodule: Unified,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names it; a table without it must not look like that of the whole test."""

    class LoseTheLast(Callback):
        def on_test_start(self, *_arguments: object) -> None:
            Path(datamodule.test_data.samples["image_path"].iloc[6]).unlink()  # in the last of four batches

    run = engine(tmp_path / "own", callbacks=[LoseTheLast()])
    with pytest.raises(RuntimeError, match=r"Cannot read image .*cap/test/square/000\.png"):
        run.test(model, datamodule=datamodule, verbose=False)
    metrics = tmp_path / "own/UniAS/parts/latest/metrics"
    assert [path.name for path in metrics.iterdir()] == ["incomplete"]
    report = json.loads((metrics / "incomplete/per_category.json").read_text())
    assert {name: row["n_images"] for name, row in report["categories"].items()} == {"bolt": 4, "cap": 2}
    assert "The test ended early. The table of the first 6 images" in caplog.text
    assert "per category" in capsys.readouterr().out


def test_an_image_that_is_lost_during_a_prediction_has_a_row(
    model: UniAS, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = engine(tmp_path / "own", callbacks=[Lose("square/001.png", b"broken")])
    run.predict(model, data_path=project / "parts/cap/test")
    folder = Path(run.trainer.default_root_dir)
    assert rows(folder)["square/001.png"]["regions"] == ""
    assert rows(folder)["square/001.png"]["label"] != ""
    assert len(rows(folder)) == 4
    assert len(pictures(folder)) == 3
    assert re.search(r"No regions of .*square/001\.png", caplog.text)


def test_a_prediction_that_ends_early_leaves_its_rows(
    model: UniAS, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupt(Callback):
        def on_predict_batch_end(self, *arguments: Any) -> None:
            if arguments[4] == 2:
                raise KeyboardInterrupt

    own = model.configure_callbacks
    model.configure_callbacks = lambda: [*own(), Interrupt()]  # type: ignore[method-assign]
    run = engine(tmp_path / "own")
    with pytest.raises(SystemExit):
        run.predict(model, data_path=project / "parts/cap/test")
    assert len(rows(tmp_path / "own/UniAS/latest")) == 3
    assert "ended early, after 3 images" in caplog.text


def test_a_disk_that_is_full_during_the_test_costs_the_pictures(
    model: UniAS,
    datamodule: Unified,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("PIL.Image.Image.save", save_half)
    monkeypatch.setattr("anomalib_uniass.report.callback.picture", lambda *_arguments, **_named: "data:")
    run = engine(tmp_path / "own")
    run.test(model, datamodule=datamodule, verbose=False)
    folder = Path(run.trainer.default_root_dir)
    assert {"metrics/per_category.csv", "metrics/report.html"} <= contents(folder).keys()
    assert pictures(folder) == set()
    assert caplog.text.count("No space left on device") == 5
    assert "No picture of 8 files in all" in caplog.text


def test_a_full_disk_takes_no_table_from_the_terminal(
    model: UniAS,
    datamodule: Unified,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing at all can be written, the comparison included; all of it is told by name."""
    datamodule.comparison = tmp_path / "comparison"
    ComparisonCallback(datamodule.comparison).setup(
        SimpleNamespace(is_global_zero=True),  # type: ignore[arg-type]
        model,  # type: ignore[arg-type]
        "test",
    )
    run = engine(tmp_path / "own")
    monkeypatch.setattr("anomalib_uniass.files.TemporaryDirectory", full)
    monkeypatch.setattr("PIL.Image.Image.save", save_half)
    (results,) = run.test(model, datamodule=datamodule, verbose=False)
    assert f"{100 * results['mean_pixel_AP']:.2f}" in capsys.readouterr().out
    for file in ("per_category.csv", "report.html", "The comparison lacks this test"):
        assert file in caplog.text


def test_pictures_leave_room_for_what_counts_more(
    model: UniAS,
    datamodule: Unified,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk gets full after three pictures: it is not filled to its end with more of them."""
    free = iter([10**9] * 3)
    usage = lambda _path: SimpleNamespace(total=10**12, free=next(free, 10**7))  # noqa: E731
    monkeypatch.setattr("anomalib_uniass.prediction.visualizer.shutil.disk_usage", usage)
    run = engine(tmp_path / "own")
    run.test(model, datamodule=datamodule, verbose=False)
    folder = Path(run.trainer.default_root_dir)
    assert len(pictures(folder)) == 3
    assert "metrics/report.html" in contents(folder)
    assert "only 10 MB are free" in caplog.text


def test_drives_that_tell_no_size_have_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "anomalib_uniass.prediction.visualizer.shutil.disk_usage", lambda _path: SimpleNamespace(total=0, free=0)
    )
    visualizer = PathVisualizer(fields=["image"], overlay_fields=[])
    trainer: Any = SimpleNamespace(
        predicting=True, predict_dataloaders=[], test_dataloaders=[], callbacks=[], default_root_dir=tmp_path
    )
    visualizer.on_predict_start(trainer, None)  # type: ignore[arg-type]
    make_mvtec_layout(tmp_path / "parts", ["bolt"], train=1)
    path = str(tmp_path / "parts/bolt/test/good/000.png")
    batch = ImageBatch(image=torch.zeros(1, 3, 64, 64), image_path=[path], pred_score=torch.zeros(1))
    visualizer.on_predict_batch_end(trainer, None, None, batch, 0)  # type: ignore[arg-type]
    visualizer.on_predict_end(trainer, None)  # type: ignore[arg-type]
    assert len(pictures(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a disk")
def test_a_real_disk_that_fills(model: UniAS, datamodule: Unified, tmp_path: Path) -> None:
    """Four megabytes take no picture, but the table."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        run = engine(disk)
        run.test(model, datamodule=datamodule, verbose=False)
        folder = Path(run.trainer.default_root_dir)
        assert {"metrics/per_category.csv", "metrics/report.html"} <= contents(folder).keys()
        assert pictures(folder) == set()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
