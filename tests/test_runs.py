# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind, however it ends, and what a run that goes on does with it."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli.cli import main
from anomalib.engine import Engine
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_uniass import BoundedPatchcore, UniAD, UniAS, Unified
from anomalib_uniass.data.presets import MVTEC_CATEGORIES
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


class StopAtEpochEnd(Callback):
    """Stops after the module's own hook of the epoch's end, as Lightning's early stopping on a training metric does."""


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
