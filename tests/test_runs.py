# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, however it ends, and what a run that goes on does with it."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import openvino
import pandas as pd
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli.cli import main
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_uniass import BoundedPatchcore, UniAD, UniAS, Unified
from anomalib_uniass.data.presets import MVTEC_CATEGORIES
from anomalib_uniass.deploy import export as exporting
from tests.helpers.datasets import make_mvtec_layout

CONFIGS = Path(__file__).parents[1] / "configs"
TINY: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128), "seed": 0}
SMALL: dict[str, Any] = {**TINY, "hidden_dim": 32, "feedforward_dim": 32, "learning_rate": 1e-3, "visualizer": False}
BATCHES = 3
"""Batches of an epoch: ten training images in batches of four."""

Model = UniAS | UniAD | BoundedPatchcore


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec_layout(tmp_path_factory.mktemp("runs") / "parts", ["bolt", "cap"], train=6, good=2, defective=1)


def data(root: Path, **arguments: Any) -> Unified:
    return Unified(root=root, **{"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0} | arguments)


def engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **arguments)


def checkpoint_of(run: Engine) -> dict[str, Any]:
    return torch.load(str(run.best_model_path), weights_only=True)


def check_thresholds(path: Path | str, root: Path, folder: Path, model_class: type[UniAS | UniAD] = UniAS) -> None:
    """Compare the thresholds in a checkpoint with those that a validation of its weights gives."""
    model = model_class.load_from_checkpoint(path, visualizer=False)
    stored = model.post_processor.calibration
    assert stored is not None and set(stored["image"]) == {"bolt", "cap"}
    engine(folder / "again").validate(model, datamodule=data(root))
    assert model.post_processor.calibration["image"] == pytest.approx(stored["image"], rel=1e-5)
    assert model.post_processor.calibration["pixel"] == pytest.approx(stored["pixel"], rel=1e-5)


ENDINGS: dict[str, tuple[dict[str, Any], int, int]] = {  # trainer arguments, epoch and steps of the last weights
    "fewer epochs than between validations": ({"max_epochs": 3, "check_val_every_n_epoch": 20}, 2, 9),
    "epochs that are not divisible": ({"max_epochs": 3, "check_val_every_n_epoch": 2}, 2, 9),
    "epochs that are divisible": ({"max_epochs": 2, "check_val_every_n_epoch": 2}, 1, 6),
    "every epoch": ({"max_epochs": 2}, 1, 6),
    "steps within an epoch": ({"max_steps": 4, "max_epochs": -1}, 1, 4),
    "steps within the first epoch": ({"max_steps": 2, "check_val_every_n_epoch": 4}, 0, 2),
    "batches between validations": ({"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 4}, 1, 6),
    "time": ({"max_epochs": -1, "max_time": timedelta(milliseconds=1), "check_val_every_n_epoch": 9}, 0, 1),
    "accumulated gradients": ({"max_epochs": 3, "check_val_every_n_epoch": 2, "accumulate_grad_batches": 2}, 2, 6),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_finished_run_leaves_its_last_weights_with_their_thresholds(ending: str, root: Path, tmp_path: Path) -> None:
    arguments, epoch, steps = ENDINGS[ending]
    run, model = engine(tmp_path, **arguments), UniAS(**SMALL)
    run.fit(model, datamodule=data(root))
    checkpoint = checkpoint_of(run)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (epoch, steps)
    torch.testing.assert_close(checkpoint["state_dict"], model.state_dict(), rtol=0, atol=0, equal_nan=True)
    check_thresholds(run.best_model_path, root, tmp_path)


@pytest.mark.parametrize("model_class", [UniAD, BoundedPatchcore])
def test_other_models_leave_a_checkpoint_too(model_class: type[Model], root: Path, tmp_path: Path) -> None:
    arguments = {"max_patches": 100, "coreset_size": 10, **TINY} if model_class is BoundedPatchcore else SMALL
    model = model_class(**arguments)
    run = engine(tmp_path, max_epochs=1, check_val_every_n_epoch=3)
    run.fit(model, datamodule=data(root))
    assert checkpoint_of(run)["epoch"] == 0
    if model_class is UniAD:
        check_thresholds(run.best_model_path, root, tmp_path, UniAD)
    else:
        assert not checkpoint_of(run)["state_dict"]["post_processor._image_threshold"].isnan()


def test_early_stopping_on_a_training_metric_leaves_the_last_weights(root: Path, tmp_path: Path) -> None:
    """It stops after all hooks of the epoch's end."""
    stop = EarlyStopping("train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    run, model = engine(tmp_path, max_epochs=5, check_val_every_n_epoch=3, callbacks=[stop]), UniAS(**SMALL)
    run.fit(model, datamodule=data(root))
    assert checkpoint_of(run)["global_step"] == BATCHES
    check_thresholds(run.best_model_path, root, tmp_path)
    longer = engine(tmp_path, max_epochs=2)
    longer.fit(UniAS(**SMALL), datamodule=data(root), ckpt_path=run.best_model_path)
    assert (checkpoint_of(longer)["epoch"], checkpoint_of(longer)["global_step"]) == (1, 2 * BATCHES)


@pytest.mark.parametrize("ending", ["length", "validation"])
def test_statistics_of_the_last_weights_come_before_thresholds_and_checkpoint(
    ending: str, root: Path, tmp_path: Path
) -> None:
    """Also where a validation ends the run: it is repeated with the statistics."""
    stop = [EarlyStopping("val_loss", min_delta=1e9, patience=1)] if ending == "validation" else []
    run, model = engine(tmp_path, max_epochs=5 if stop else 2, callbacks=stop), UniAS(**SMALL, recipe="best")
    run.fit(model, datamodule=data(root))
    assert checkpoint_of(run)["global_step"] == 2 * BATCHES
    saved = UniAS.load_from_checkpoint(run.best_model_path).model.detector.distances.whitening
    assert saved is not None and saved.fitted
    assert torch.equal(saved.whitening_0, model.model.detector.distances.whitening.whitening_0)
    check_thresholds(run.best_model_path, root, tmp_path)


def test_best_checkpoint_by_validation_loss_sees_the_last_weights(root: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val_loss", save_top_k=-1)
    run = engine(tmp_path, max_epochs=3, check_val_every_n_epoch=2, callbacks=[best])
    run.fit(UniAS(**SMALL), datamodule=data(root))
    assert sorted(torch.load(path)["epoch"] for path in best.best_k_models) == [1, 2]
    assert best.best_model_score == min(best.best_k_models.values())


def test_interrupted_run_keeps_what_its_last_validation_saved(root: Path, tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2 * BATCHES + 1:
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    run = engine(tmp_path, max_epochs=4, check_val_every_n_epoch=2, callbacks=[Interrupt()])
    try:
        with pytest.raises(SystemExit) as error:
            run.fit(UniAS(**SMALL), datamodule=data(root))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert error.value.code == 1
    assert checkpoint_of(run)["global_step"] == 2 * BATCHES
    check_thresholds(run.best_model_path, root, tmp_path)


# --- Runs that go on -------------------------------------------------------------------------------------------------


class Kill(Callback):
    """Ends the process as an operating system without memory does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    model_class: type[UniAS | UniAD],
    folder: Path,
    root: Path,
    *,
    every: int,
    workers: int = 0,
    tile_size: int | None = None,
    **fit: Any,
) -> Engine:
    """Train four epochs from a seed."""
    ours = {"recipe": "best"} if model_class is UniAS else {}
    model = model_class(**SMALL, lr_schedule="onecycle", tile_size=tile_size, **ours)
    seed_everything(fit.pop("seed", 7), verbose=False)
    callbacks = [Kill(fit.pop("kill"))] if "kill" in fit else []
    run = engine(folder, max_epochs=4, check_val_every_n_epoch=every, callbacks=callbacks)
    run.fit(model, datamodule=data(root, hflip=["bolt", "cap"], num_workers=workers), **fit)
    return run


def train_in_one_thread(*arguments: Any, **named: Any) -> None:
    """What a process of its own does: it starts with as many threads as there are processors."""
    torch.set_num_threads(1)
    train(*arguments, **named)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come in the same order in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
@pytest.mark.parametrize(
    ("model_class", "every", "workers", "tile_size"),
    [
        pytest.param(UniAS, 1, 0, None, marks=pytest.mark.slow),
        (UniAS, 2, 0, None),
        pytest.param(UniAD, 2, 1, None, marks=pytest.mark.slow),
        pytest.param(UniAS, 2, 0, 24, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_weights_and_metrics_of_one_that_was_not(
    model_class: type[UniAS | UniAD],
    every: int,
    workers: int,
    tile_size: int | None,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Order, augmentation, tiles, jitter and dropout are drawn as if it had not stopped."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(CONFIGS.parent)])  # the new process finds this file by it
    arguments: dict[str, Any] = {"every": every, "workers": workers, "tile_size": tile_size}
    process = multiprocessing.get_context("spawn").Process(  # a fork of a process that has trained cannot train
        target=train_in_one_thread, args=(model_class, tmp_path, root), kwargs=arguments | {"kill": 3 * BATCHES + 2}
    )
    process.start()
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL
    (checkpoint,) = {path.resolve() for path in tmp_path.rglob("*.ckpt")}
    assert torch.load(checkpoint)["global_step"] == (3 if every == 1 else 2) * BATCHES
    resumed = train(model_class, tmp_path / "b", root, ckpt_path=checkpoint, seed=8, **arguments)
    whole = train(model_class, tmp_path / "a", root, **arguments)
    assert checkpoint_of(resumed)["epoch"] == checkpoint_of(whole)["epoch"] == 3
    assert resumed.trainer.global_step == whole.trainer.global_step == 4 * BATCHES
    expected, actual = whole.model.state_dict(), resumed.model.state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert resumed.model.post_processor.calibration == whole.model.post_processor.calibration
    tables = [run.test(datamodule=data(root))[0] for run in (resumed, whole)]
    assert tables[0] == pytest.approx(tables[1], nan_ok=True)


@pytest.mark.parametrize(
    "ending",
    [
        "epochs that are not divisible",
        *(pytest.param(ending, marks=pytest.mark.slow) for ending in ("steps within an epoch", "time")),
    ],
)
def test_a_run_goes_on_after_the_checkpoint_of_its_end(ending: str, root: Path, tmp_path: Path) -> None:
    arguments, epoch, steps = ENDINGS[ending]
    run = engine(tmp_path, **arguments)
    run.fit(UniAS(**SMALL), datamodule=data(root))
    seen: list[tuple[int, int]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.current_epoch, trainer.global_step))

    longer = engine(tmp_path, max_epochs=epoch + 3, check_val_every_n_epoch=5, callbacks=[Watch()])
    longer.fit(UniAS(**SMALL), datamodule=data(root), ckpt_path=run.best_model_path)
    wanted = [(epoch + 1 + i // BATCHES, steps + i) for i in range(2 * BATCHES)]
    assert seen == wanted
    assert (checkpoint_of(longer)["epoch"], checkpoint_of(longer)["global_step"]) == (epoch + 2, steps + 2 * BATCHES)
    check_thresholds(longer.best_model_path, root, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "trainer", "message"),
    [
        (
            {},
            {"max_epochs": 3},
            "checkpoint has 6 steps, this run wants 9 .3 epochs of 3 batches.*start a new training",
        ),
        ({}, {"max_epochs": 1}, "checkpoint has 6 steps, this run wants 3 "),
        ({}, {"max_epochs": 2, "batch": 2}, "checkpoint has 6 steps, this run wants 10 .2 epochs of 5 batches"),
        ({}, {"max_epochs": -1}, "onecycle' needs the length of the run, got max_epochs=-1"),
        ({"lr_schedule": "step"}, {"max_epochs": 2}, "lr_schedule: checkpoint onecycle, model step"),
        ({"learning_rate": 1e-4}, {"max_epochs": 2}, "learning_rate: checkpoint 0.001, model 0.0001"),
        ({"weight_decay": 0.1, "lr_step_epochs": 2}, {"max_epochs": 2}, "lr_step_epochs: checkpoint 400.*weight_decay"),
    ],
)
def test_a_run_that_goes_on_otherwise_is_refused_before_its_first_step(
    arguments: dict[str, Any], trainer: dict[str, int], message: str, onecycle: Path, root: Path, tmp_path: Path
) -> None:
    trainer = dict(trainer)
    images = data(root, train_batch_size=trainer.pop("batch", 4))
    run = engine(tmp_path, **trainer)
    with pytest.raises(ValueError, match=message):
        run.fit(UniAS(**SMALL | {"lr_schedule": "onecycle"} | arguments), datamodule=images, ckpt_path=onecycle)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.fixture(scope="module")
def onecycle(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = engine(tmp_path_factory.mktemp("onecycle"), max_epochs=2)
    run.fit(UniAS(**SMALL, lr_schedule="onecycle"), datamodule=data(root))
    return Path(str(run.best_model_path))


def test_a_new_training_starts_from_weights_with_any_schedule(onecycle: Path, root: Path, tmp_path: Path) -> None:
    """As the refusal advises."""
    model = UniAS.load_from_checkpoint(onecycle, lr_schedule="step", learning_rate=1e-4, visualizer=False)
    before = model.model.norm.weight.clone()
    run = engine(tmp_path, max_epochs=3, check_val_every_n_epoch=4)
    run.fit(model, datamodule=data(root))
    assert run.trainer.global_step == 3 * BATCHES
    assert 0 < (model.model.norm.weight - before).abs().max() < 3 * BATCHES * 1e-4 * 1.1


# --- Files that are whole or not there -------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_by_a_whole_one_or_not_at_all(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves it from another file system, by a copy that can fail half-way."""
    run = engine(tmp_path, max_epochs=1)
    run.fit(UniAS(**SMALL), datamodule=data(root))
    good = Path(str(run.best_model_path)).read_bytes()

    def half(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[: len(good) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "move", half)
    with pytest.raises(OSError, match=r"cannot write .*model\.ckpt.*No space left"):
        run.trainer.save_checkpoint(run.best_model_path)
    assert Path(str(run.best_model_path)).read_bytes() == good
    assert [path.name for path in Path(str(run.best_model_path)).parent.iterdir()] == ["model.ckpt"]


# --- Validation loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [UniAS, UniAD])
def test_validation_loss_is_the_loss_of_the_good_validation_images(
    model_class: type[UniAS | UniAD], root: Path, tmp_path: Path
) -> None:
    """Over batches of unequal size, anomalous images left out, jitter and dropout off; features are computed once."""
    images = data(root, val_split_mode="same_as_test", eval_batch_size=4)
    model = model_class(**SMALL)
    calls = []
    model.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    run = engine(tmp_path)
    (metrics,) = run.validate(model, datamodule=images)
    assert len(calls) == 2  # six images in two batches
    good = [item for item in images.val_data if not item.gt_label]
    assert len(good) == 4
    batch = model.pre_processor.transform(torch.stack([item.image for item in good]))
    expected = float(model.loss(*model.model.eval().reconstruct(batch)))
    assert metrics["val_loss"] == pytest.approx(expected, rel=1e-4)


def test_callbacks_of_a_configuration_watch_the_validation_loss(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate that rounds away never improves it: the training stops after two validations without progress."""
    monkeypatch.chdir(tmp_path)
    watch = {"monitor": "val_loss", "mode": "min"}
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": watch | {"patience": 2}},
        {"class_path": "anomalib.callbacks.ModelCheckpoint", "init_args": watch | {"dirpath": "best", "filename": "m"}},
    ]
    init_args = {**SMALL, "image_size": [128, 128], "learning_rate": 1e-30}
    config = {
        "model": {"class_path": "UniAS", "init_args": init_args},
        "data": {"class_path": "Unified", "init_args": {"root": str(root), "num_workers": 0}},
        "trainer": {
            "max_epochs": 9,
            "accelerator": "cpu",
            "callbacks": callbacks,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "log"}},
        },
    }
    Path("config.yaml").write_text(json.dumps(config))  # JSON is YAML
    monkeypatch.setattr(sys, "argv", ["anomalib", "fit", "--config", "config.yaml"])
    main()
    (checkpoint,) = Path("best").iterdir()
    assert torch.load(checkpoint)["epoch"] == 0
    losses = pd.read_csv(next(Path("log").rglob("metrics.csv")))["val_loss"].dropna()
    assert len(losses) == 3 and losses.nunique() == 1


# --- Runs without thresholds -----------------------------------------------------------------------------------------


@pytest.fixture
def anomalib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command line and gives what it printed, in one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "2000")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["anomalib", *arguments])
        main()
        printed = capsys.readouterr()
        return " ".join((printed.out + printed.err).split())

    return run


SMALL_CLI = [f"--model.{name}={value}" for name, value in SMALL.items() if name not in ("image_size", "visualizer")]


def test_shipped_configuration_for_three_epochs_leaves_a_checkpoint_with_thresholds(
    anomalib: Callable[..., str], tmp_path: Path
) -> None:
    make_mvtec_layout(tmp_path / "mvtec", MVTEC_CATEGORIES, train=3, good=1, defective=1)
    shorter = ["--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--data.num_workers=0", "--data.root=mvtec"]
    small = [*SMALL_CLI, "--model.image_size=[128,128]"]
    anomalib("fit", "--config", str(CONFIGS / "mvtec.yaml"), *shorter, *small)
    checkpoint = torch.load(tmp_path / "results/UniAS/mvtec/v0/weights/lightning/model.ckpt")
    assert checkpoint["epoch"] == 2
    assert set(checkpoint["anomalib_post_processor_config"]["calibration"]["image"]) == set(MVTEC_CATEGORIES)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_without_validation_all_commands_say_that_there_are_no_thresholds(
    every: int, root: Path, anomalib: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ["--model", "UniAS", *SMALL_CLI, "--model.image_size", "[128, 128]"]
    images = ["--data", "Unified", "--data.root", str(root), "--data.num_workers", "0"]
    trainer = [f"--trainer.check_val_every_n_epoch={every}", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    said = "There are no thresholds for bolt, cap: scores and maps stay raw, and predicted labels and masks are left"
    advice = "train with some of every category (not with limit_val_batches=0)"
    printed = anomalib("train", *model, *images, *trainer, "--trainer.limit_val_batches", "0")
    assert said in printed and advice in printed
    assert caplog.text.count(said) == 2  # after training and in the test, which gives its table nevertheless
    checkpoint = str(tmp_path / "results/UniAS/parts/latest/weights/lightning/model.ckpt")
    assert torch.load(checkpoint)["global_step"] == 1
    assert said in anomalib("test", *model, *images, "--trainer.accelerator=cpu", "--ckpt_path", checkpoint)
    folder = ["--data", str(root / "bolt" / "test"), "--ckpt_path", checkpoint]
    assert said in anomalib("predict", *model, *folder)
    if every == 1:
        export = ["--model.pre_trained", "false", "--export_type", "torch", "--export_root", "."]
        assert said in anomalib("export", "--model", "UniAS", "--ckpt_path", checkpoint, *export)
        assert not list(tmp_path.rglob("category_thresholds.json"))


def test_what_is_predicted_without_thresholds_is_raw_and_decides_nothing(root: Path, tmp_path: Path) -> None:
    model = UniAS(**SMALL)
    batches = engine(tmp_path).predict(model, datamodule=data(root))
    (image,) = batches[0].image[:1].split(1)
    raw = model.model.eval()(image)
    torch.testing.assert_close(batches[0].pred_score[:1], raw.pred_score)
    torch.testing.assert_close(batches[0].anomaly_map[:1], raw.anomaly_map[:, 0])
    assert all(batch.pred_label is None and batch.pred_mask is None for batch in batches)


def test_a_category_without_good_validation_images_is_named_with_what_holds_for_it(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data(root)
    monkeypatch.setattr(images, "setup", partial(without_validation_of, "cap", images))
    model = UniAS(**SMALL)
    run = engine(tmp_path, max_epochs=1)
    said = (
        "There are no thresholds for cap: the highest of the others hold, that of bolt for images and that of bolt for "
    )
    for do in (
        lambda: run.fit(model, datamodule=images),
        lambda: run.test(model, datamodule=images),
        lambda: run.predict(model, datamodule=images),
        lambda: run.predict(UniAS.load_from_checkpoint(run.best_model_path, visualizer=False), data_path=root / "cap"),
        lambda: model.to_torch(tmp_path),
    ):
        caplog.clear()
        do()
        assert caplog.text.count(said) == 1


def without_validation_of(category: str, images: Unified, stage: str | None = None) -> None:
    """Set up a datamodule and take the validation images of a category away."""
    Unified.setup(images, stage)
    samples = images.val_data.samples
    images.val_data = images.val_data.subsample(samples.index[samples["category"] != category].tolist())


def test_validation_of_anomalous_images_alone_leaves_no_thresholds_and_says_so(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data(root, val_split_mode="same_as_test")

    def setup(stage: str | None = None) -> None:
        Unified.setup(images, stage)
        samples = images.val_data.samples
        images.val_data = images.val_data.subsample(samples.index[samples["label_index"] == 1].tolist())

    monkeypatch.setattr(images, "setup", setup)
    model = UniAS(**SMALL)
    run = engine(tmp_path, max_epochs=1)
    run.fit(model, datamodule=images)
    assert "There are no thresholds for bolt, cap" in caplog.text
    assert "val_loss" not in run.trainer.callback_metrics
    assert model.post_processor.calibration is None


def test_anomalibs_thresholds_are_missed_as_well(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = UniAS(**SMALL, post_processor=PostProcessor())
    run = engine(tmp_path, max_epochs=1, limit_val_batches=0)
    said = "There are no thresholds for any category: anomalib compares raw scores and maps with 0.5"
    for do in (
        lambda: run.fit(model, datamodule=data(root)),
        lambda: run.test(model, datamodule=data(root)),
        lambda: run.predict(model, datamodule=data(root)),
        lambda: model.to_torch(tmp_path),
    ):
        caplog.clear()
        do()
        assert caplog.text.count(said) == 1


def test_without_post_processor_nothing_is_decided_and_nothing_missed(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = UniAS(**SMALL, post_processor=False)
    run = engine(tmp_path, max_epochs=1)
    run.fit(model, datamodule=data(root))
    (results,) = run.test(model, datamodule=data(root))
    assert results["image_AUROC"] >= 0 and "There are no thresholds" not in caplog.text


def test_thresholds_of_other_weights_are_told(onecycle: Path, root: Path, tmp_path: Path, caplog: Any) -> None:
    """A training goes on without a validation set: the thresholds are of the weights that it began with."""
    model = UniAS.load_from_checkpoint(onecycle, lr_schedule="step", visualizer=False)
    engine(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, datamodule=data(root))
    assert "The thresholds are of an earlier validation" in caplog.text


def test_a_diverged_model_is_told_and_sets_no_thresholds(root: Path, tmp_path: Path, caplog: Any) -> None:
    """A training would have stopped before, see test_interrupted_runs.py."""
    model, run = UniAS(**SMALL), engine(tmp_path)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    run.validate(model, datamodule=data(root))
    assert "2 images of the validation have scores or maps that are not finite" in caplog.text
    assert "There are no thresholds for bolt, cap" in caplog.text
    run.predict(model, datamodule=data(root))
    assert "6 images of the prediction have scores or maps that are not finite" in caplog.text


# --- Exports ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(onecycle: Path) -> UniAS:
    return UniAS.load_from_checkpoint(onecycle, visualizer=False)


def test_a_failing_export_leaves_the_earlier_one(
    trained: UniAS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained.to_torch(tmp_path)
    (path.parent / "notes.txt").write_text("of the user")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def half(obj: Any, f: Path) -> None:
        Path(f).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        trained.to_torch(tmp_path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_an_export_that_fails_at_its_thresholds_leaves_the_earlier_one(
    kind: str, trained: UniAS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model itself is written by then."""

    def convert(self: UniAS, root: Path, *args: Any, **kwargs: Any) -> Path:
        folder = Path(root) / "weights" / kind
        folder.mkdir(parents=True)
        for name in ("model.xml", "model.bin"):
            (folder / name).write_text("new")
        return folder / "model.xml"

    def fail(*args: Any) -> None:
        raise RuntimeError("no room")

    folder = tmp_path / "weights" / kind
    folder.mkdir(parents=True)
    for name in ("model.xml", "model.bin", "category_thresholds.json"):
        (folder / name).write_text("old")
    monkeypatch.setattr(AnomalibModule, f"to_{kind}", convert)
    monkeypatch.setattr(exporting, "_set_openvino_info", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "replace_text", fail)
        with pytest.raises(RuntimeError, match="no room"):
            getattr(trained, f"to_{kind}")(tmp_path)
    assert {file.read_text() for file in folder.iterdir()} == {"old"}
    assert getattr(trained, f"to_{kind}")(tmp_path) == folder / "model.xml"
    assert "old" not in {file.read_text() for file in folder.iterdir()}
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("below", ["", "weights", "weights/torch"])
def test_an_export_below_a_file_names_it(below: str, trained: UniAS, tmp_path: Path) -> None:
    file = tmp_path / "out" / below
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("in the way")
    with pytest.raises(OSError, match=rf"Cannot write the exported model to {tmp_path}/out.*Give a folder"):
        trained.to_torch(tmp_path / "out")
    assert file.read_text() == "in the way"


def test_memory_bank_is_exported_whole_and_not_without_a_bank(root: Path, tmp_path: Path) -> None:
    model = BoundedPatchcore(**TINY, max_patches=100, coreset_size=10, visualizer=False)
    with pytest.raises(ValueError, match="Expected a fitted BoundedPatchcore to export"):
        model.to_torch(tmp_path)
    engine(tmp_path).fit(model, datamodule=data(root))
    path = model.to_torch(tmp_path / "out")
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


@pytest.mark.slow
def test_a_model_without_thresholds_is_exported_without_decisions(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = UniAS(**SMALL)
    engine(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, datamodule=data(root))
    caplog.clear()
    path = model.to_openvino(tmp_path)
    assert caplog.text.count("There are no thresholds for bolt, cap") == 1
    assert [file.name for file in path.parent.iterdir() if file.suffix == ".json"] == []
    network = openvino.Core().read_model(path)
    assert {name for output in network.outputs for name in output.names} == {"anomaly_map", "pred_score"}
    image = torch.rand(1, 3, 128, 128)
    outputs = openvino.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image.numpy())
    raw = model.eval()(image)
    assert raw.pred_label is None and model.post_processor.enable_thresholding
    assert outputs["pred_score"].item() == pytest.approx(raw.pred_score.item(), rel=1e-3)
