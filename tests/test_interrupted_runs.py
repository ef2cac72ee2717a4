# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, asked to end, or diverge: what they leave, how they end, and how they go on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli.cli import main
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from anomalib_uniass import UniAD, UniAS, Unified
from anomalib_uniass.models.patchcore import lightning_model as patchcore
from anomalib_uniass.models.unias.detector.segmentation_head import SegmentationHead
from anomalib_uniass.models.unias.detector.whitening import Whitening
from anomalib_uniass.training.last_weights import ENDED
from tests.helpers.datasets import make_mvtec_layout

REPOSITORY = Path(__file__).parents[1]
TINY: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128), "seed": 0}
SMALL: dict[str, Any] = {**TINY, "hidden_dim": 32, "feedforward_dim": 32, "learning_rate": 1e-3, "visualizer": False}
BATCHES = 3
"""Batches of an epoch: ten training images in batches of four."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec_layout(tmp_path_factory.mktemp("runs") / "parts", ["bolt", "cap"], train=6, good=2, defective=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Sums come in the same order in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data(root: Path, **arguments: Any) -> Unified:
    ours = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "hflip": ["bolt", "cap"]}
    return Unified(root=root, **ours | arguments)


def engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **arguments)


class Steps(Callback):
    """Counts the batches that a run trains."""

    count = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.count += 1


# --- Killed after the last step --------------------------------------------------------------------------------------


def early(metric: str, **arguments: Any) -> EarlyStopping:
    return EarlyStopping(metric, min_delta=1e9, **arguments)


ENDINGS: dict[str, tuple[dict[str, Any], Callable[[], list[Callback]]]] = {
    "epoch with a validation": ({"max_epochs": 2}, list),
    "epoch without one": ({"max_epochs": 3, "check_val_every_n_epoch": 2}, list),
    "no validation before": ({"max_epochs": 1, "check_val_every_n_epoch": 9}, list),
    "steps within an epoch": ({"max_epochs": -1, "max_steps": 4}, list),
    "least epochs": ({"max_epochs": 2, "min_epochs": 2}, list),
    "time": ({"max_epochs": -1, "max_time": timedelta(milliseconds=1), "check_val_every_n_epoch": 9}, list),
    "stopped by a validation": ({"max_epochs": 5}, lambda: [early("val_loss", patience=1)]),
    "stopped by an epoch": (
        {"max_epochs": 5, "check_val_every_n_epoch": 3},
        lambda: [early("train_loss", patience=1, check_on_train_epoch_end=True)],
    ),
    "no images to validate": ({"max_epochs": 1, "limit_val_batches": 0}, list),
    "checkpoints of other epochs": (
        {"max_epochs": 3},
        lambda: [ModelCheckpoint(filename="{epoch}", save_top_k=-1, every_n_epochs=2)],
    ),
    "checkpoint named by its epoch": ({"max_epochs": 2}, lambda: [ModelCheckpoint(filename="{epoch}")]),
    "the best checkpoint": ({"max_epochs": 2}, lambda: [ModelCheckpoint(monitor="val_loss", mode="max")]),
    "weights alone": ({"max_epochs": 1}, lambda: [ModelCheckpoint(save_weights_only=True)]),
}
FAST = ("epoch without one", "steps within an epoch", "stopped by a validation", "the best checkpoint")
"""Those of each kind (length, steps, stop, checkpoints of other weights) that are quick enough for every change."""


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


class Quick(UniAS):
    """Takes statistics in no time, of which all depends: the weights, the images and the random numbers."""

    def has_statistics(self) -> bool:
        return True

    @torch.no_grad()
    def take_statistics(self) -> bool:
        training = self.model.training
        self.model.eval()
        image = next(self.random_training_images(1, size=2))
        self.model.norm.bias.add_(0.1 * torch.rand(()) + self.model.reconstruct(image).reconstructions[0].mean())
        self.model.train(training)
        self.finish()
        return True

    def finish(self) -> None:
        """Do nothing more, unless a test does."""


def train(
    folder: Path, root: Path, ending: str, model_class: type[UniAS] = Quick, **fit: Any
) -> tuple[Engine, UniAS, Steps]:
    arguments, callbacks = ENDINGS[ending]
    steps, model = Steps(), model_class(**SMALL, recipe="paper" if model_class is Quick else "best")
    extra = callbacks()
    for callback in extra:
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = str(folder / "kept")
    run = engine(folder, **arguments | fit.pop("trainer", {}), callbacks=[steps, *extra])
    run.fit(model, datamodule=data(root), **fit)
    return run, model, steps


def kept(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(path) for path in folder.rglob("*.ckpt") if not path.parents[2].is_symlink()]


def by_step(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["global_step"])


@pytest.mark.parametrize(
    ("ending", "model_class"),
    [
        *(pytest.param(ending, Quick, marks=[] if ending in FAST else pytest.mark.slow) for ending in ENDINGS),
        pytest.param("epoch without one", UniAS, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_after_its_last_step_goes_on_there(
    ending: str, model_class: type[UniAS], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the statistics' last part; it ends as one that was not killed, without a step."""
    _, whole, _ = train(tmp_path / "whole", root, ending, model_class)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*((Quick, "finish") if model_class is Quick else (SegmentationHead, "fit")), kill)
        train(tmp_path / "killed", root, ending, model_class)
    (path,) = [
        path
        for path in (tmp_path / "killed").rglob("*.ckpt")
        if ENDED in torch.load(path) and not path.parents[2].is_symlink()
    ]
    _, resumed, steps = train(tmp_path / "resumed", root, ending, model_class, ckpt_path=path)
    assert steps.count == 0
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert resumed.post_processor.calibration == whole.post_processor.calibration
    expected, actual = (max(kept(tmp_path / run), key=by_step) for run in ("whole", "resumed"))
    assert actual["global_step"] == expected["global_step"]
    if ending != "the best checkpoint":  # of one file's epoch or the other's, by which is the best
        assert actual["epoch"] == expected["epoch"]
    torch.testing.assert_close(actual["state_dict"], whole.state_dict(), rtol=0, atol=0, equal_nan=True)
    left = [*kept(tmp_path / "whole"), *kept(tmp_path / "resumed")]
    assert not any(ENDED in checkpoint for checkpoint in left)


@pytest.mark.parametrize(
    "ending",
    [
        "epoch without one",
        *(
            pytest.param(ending, marks=pytest.mark.slow)
            for ending in ("epoch with a validation", "steps within an epoch")
        ),
    ],
)
def test_a_longer_run_trains_on_from_an_ended_training(
    ending: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Quick, "finish", kill)
        train(tmp_path / "killed", root, ending)
    path = next(path for path in (tmp_path / "killed").rglob("model.ckpt") if not path.parents[2].is_symlink())
    before = torch.load(path)
    epochs = before["epoch"] + 2
    longer = {"max_epochs": epochs, "max_steps": -1}
    run, _, steps = train(tmp_path / "longer", root, ending, ckpt_path=path, trainer=longer)
    assert steps.count == BATCHES
    assert run.trainer.global_step == before["global_step"] + BATCHES
    after = torch.load(str(run.best_model_path))
    assert after["global_step"] == before["global_step"] + BATCHES and ENDED not in after


def run_in_process(target: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


@pytest.fixture
def spawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that starts a function of this file in a process of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(REPOSITORY)])  # it finds this file by it
    return run_in_process


def train_until_killed(folder: Path, root: Path) -> None:
    torch.set_num_threads(1)
    SegmentationHead.fit = lambda *_args, **_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    train(folder, root, "epoch without one", UniAS)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_process_killed_in_its_segmentation_head_leaves_its_last_weights(
    spawn: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    process = spawn(train_until_killed, tmp_path / "killed", root)
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL
    (path,) = {path.resolve() for path in (tmp_path / "killed").rglob("*.ckpt")}
    assert path.name == "model.ckpt"
    assert torch.load(path)["global_step"] == 3 * BATCHES


# --- Asked to end ----------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[type, str, str]] = {  # where a run is when the signal comes, and the command
    "training": (UniAS, "training_step", "fit"),
    "standardisation": (UniAS, "training_batches", "fit"),
    "statistics": (Whitening, "fit", "train"),
    "segmentation head": (SegmentationHead, "fit", "fit"),
    "memory bank": (patchcore, "k_center_greedy", "fit"),  # type: ignore[dict-item]
    "test": (UniAS, "test_step", "train"),
    "prediction": (UniAS, "predict_step", "predict"),
}
FAST_PLACES = ("training", "segmentation head", "test")


def wait_in(place: str, started: Path, arguments: list[str]) -> None:
    """Run the stock command, and stay somewhere until a signal comes: in a batch of a training not longer than that."""
    torch.set_num_threads(1)
    owner, name, command = PLACES[place]
    original = getattr(owner, name)

    def wait(*args: Any, **kwargs: Any) -> Any:
        started.touch()
        for _ in range(20 if place == "training" else 1200):
            time.sleep(0.05)
        return original(*args, **kwargs)

    setattr(owner, name, wait)
    sys.argv = ["anomalib", command, *arguments]
    os.chdir(started.parent)
    main()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[] if place in FAST_PLACES else pytest.mark.slow) for place in PLACES]
)
def test_sigterm_ends_a_command_at_once_and_not_as_a_success(
    place: str, spawn: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    model = "BoundedPatchcore" if place == "memory bank" else "UniAS"
    ours = {**(TINY if model == "BoundedPatchcore" else SMALL), "image_size": "[128,128]"}
    if model == "UniAS":
        ours["recipe"] = "best"
    arguments = ["--model", model, *[f"--model.{key}={value}" for key, value in ours.items() if key != "visualizer"]]
    if place == "prediction":
        arguments += ["--data", str(root / "bolt" / "test")]
    else:
        arguments += ["--data", "Unified", "--data.root", str(root), "--data.num_workers", "0"]
        arguments += ["--data.train_batch_size", "4", "--trainer.max_epochs=1"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    started = tmp_path / "started"
    process = spawn(wait_in, place, started, arguments)
    deadline = time.monotonic() + 200
    while not started.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert started.exists()
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=30)
    # Before the first epoch Lightning has not taken the signal over, and Python ends by it.
    assert process.exitcode == (-signal.SIGTERM if place == "standardisation" else 143)
    checkpoints = {path.resolve() for path in tmp_path.rglob("*.ckpt")}
    assert len(checkpoints) == (place in ("statistics", "segmentation head", "test"))
    assert all(torch.load(path)["global_step"] == BATCHES for path in checkpoints)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.parametrize("place", ["segmentation head", "test"])
def test_the_users_handler_is_called_and_put_back(
    place: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, _ = PLACES[place]
    monkeypatch.setattr(owner, name, lambda *_args, **_: os.kill(os.getpid(), signal.SIGTERM))
    calls: list[int] = []

    def requeue(number: int, frame: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGTERM, requeue)
    try:
        run = engine(tmp_path, max_epochs=1)
        with pytest.raises(SystemExit) as ended:
            run.train(UniAS(**SMALL, recipe="best" if place != "test" else "paper"), datamodule=data(root))
        assert ended.value.code == 143
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is requeue
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_no_handler_is_left_after_a_run(root: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run, model = engine(tmp_path, max_epochs=1), UniAS(**SMALL, recipe="best")
    run.train(model, datamodule=data(root))
    run.validate(model, datamodule=data(root))
    run.predict(model, data_path=root / "bolt" / "test")
    assert signal.getsignal(signal.SIGTERM) == before


# --- Diverged --------------------------------------------------------------------------------------------------------


class Spoil(Callback):
    """Makes weights not finite after a step."""

    def __init__(self, step: int, value: float = float("nan")) -> None:
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            weight = next(parameter for parameter in module.model.parameters() if parameter.requires_grad)
            torch.nn.init.constant_(weight, self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("model_class", [UniAS, UniAD])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    model_class: type[UniAS | UniAD], value: float, root: Path, tmp_path: Path
) -> None:
    steps = Steps()
    run = engine(tmp_path, max_epochs=4, callbacks=[steps, Spoil(BATCHES + 1, value)])
    message = (
        rf"training loss is not finite at step {BATCHES + 1} \(epoch 1, learning rate 0.001\).*"
        r"model\.ckpt, is of before and stays.*--model.learning_rate 1e-04"
    )
    with pytest.raises(FloatingPointError, match=message):
        run.fit(model_class(**SMALL), datamodule=data(root))
    assert steps.count == BATCHES + 2
    checkpoint = torch.load(str(run.best_model_path))
    assert checkpoint["global_step"] == BATCHES
    assert all(weight.isfinite().all() for name, weight in checkpoint["state_dict"].items() if "norm." in name)


@pytest.mark.parametrize("recipe", ["paper", "best"])
@pytest.mark.parametrize("every", [1, 5])
def test_weights_that_diverge_in_the_last_step_are_not_saved(
    every: int, recipe: str, root: Path, tmp_path: Path
) -> None:
    """No loss shows it: none is computed with them."""
    run = engine(tmp_path, max_epochs=2, check_val_every_n_epoch=every, callbacks=[Spoil(2 * BATCHES)])
    with pytest.raises(FloatingPointError, match=rf"Weights are not finite at step {2 * BATCHES} .*learning_rate"):
        run.fit(UniAS(**SMALL, recipe=recipe), datamodule=data(root))
    checkpoints = {path.resolve() for path in tmp_path.rglob("*.ckpt")}
    assert {torch.load(path)["global_step"] for path in checkpoints} == ({BATCHES} if every == 1 else set())


def test_checkpoints_of_steps_are_of_finite_weights(root: Path, tmp_path: Path) -> None:
    """They are saved before the next loss is seen."""
    often = ModelCheckpoint(dirpath=tmp_path / "often", every_n_train_steps=1)
    run = engine(tmp_path, max_epochs=2, callbacks=[Spoil(2), often])
    with pytest.raises(FloatingPointError, match="Weights are not finite at step 2"):
        run.fit(UniAS(**SMALL), datamodule=data(root))
    (path,) = (tmp_path / "often").iterdir()
    assert torch.load(path)["global_step"] == 1


def test_a_first_loss_that_is_not_finite_is_not_put_down_to_the_learning_rate(root: Path, tmp_path: Path) -> None:
    model = UniAS(**SMALL)
    torch.nn.init.constant_(next(model.model.backbone.parameters()), float("nan"))
    with pytest.raises(FloatingPointError, match=r"at step 0 .*No step was taken before.*no checkpoint.*backbone"):
        engine(tmp_path, max_epochs=2).fit(model, datamodule=data(root))


def test_losses_are_looked_at_now_and_then_where_a_look_costs(root: Path, tmp_path: Path) -> None:
    """As on a GPU: at the end of the epoch at the latest."""
    steps = Steps()
    run = engine(tmp_path, max_epochs=4, callbacks=[steps, Spoil(BATCHES + 1)])
    model = UniAS(**SMALL)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match=f"at step {BATCHES + 1} "):
        patch.setattr(torch.Tensor, "is_cpu", False)
        run.fit(model, datamodule=data(root))
    assert steps.count == 2 * BATCHES
    assert torch.load(str(run.best_model_path))["global_step"] == BATCHES


@pytest.mark.parametrize("learning_rate", [1e3, 1e30])
def test_a_huge_learning_rate_ends_in_a_plain_error_or_finite_weights(
    learning_rate: float, root: Path, tmp_path: Path
) -> None:
    model = UniAS(**SMALL | {"learning_rate": learning_rate}, recipe="best")
    run = engine(tmp_path, max_epochs=2)
    try:
        run.fit(model, datamodule=data(root))
    except FloatingPointError as error:
        assert "learning_rate" in str(error)
    checkpoints = {path.resolve() for path in tmp_path.rglob("*.ckpt")}
    for path in checkpoints:
        state = torch.load(path)["state_dict"]
        assert all(value.isfinite().all() for name, value in state.items() if name.startswith("model."))


# --- Callbacks that change weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        (WeightAveraging, {}, "WeightAveraging does not work .*buffers.*accelerate=False"),
        (EMAWeightAveraging, {}, "EMAWeightAveraging does not work .*accelerate=False"),
        (WeightAveraging, {"accelerate": False}, "WeightAveraging does not work .*use_buffers=False"),
        (EMAWeightAveraging, {"recipe": "best", "accelerate": False}, "EMAWeightAveraging .*recipe='paper'"),
        (lambda: StochasticWeightAveraging(1e-3), {}, "StochasticWeightAveraging does not work .*batch norms"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), {}, "ModelPruning does not work .*frozen backbone"),
        (LearningRateFinder, {"recipe": "best"}, "LearningRateFinder does not work .*standardised"),
    ],
)
def test_callbacks_that_cannot_work_are_refused_before_the_training(
    callback: Callable[[], Callback], arguments: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    run = engine(tmp_path, max_epochs=1, callbacks=[callback()])
    with pytest.raises(ValueError, match=message):
        run.fit(UniAS(**SMALL | arguments), datamodule=data(root))


def mean(weights: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(weights).mean(dim=0)


def moving_mean(weights: list[torch.Tensor]) -> torch.Tensor:
    average = weights[0]
    for weight in weights[1:]:
        average = 0.5 * average + 0.5 * weight
    return average


@pytest.mark.parametrize(
    ("model_class", "callback", "expected"),
    [
        (UniAS, lambda: WeightAveraging(use_buffers=False), mean),
        (UniAS, lambda: EMAWeightAveraging(decay=0.5), moving_mean),
        (UniAD, lambda: EMAWeightAveraging(decay=0.5), moving_mean),
    ],
)
def test_weights_are_averaged_with_plain_modules(
    model_class: type[UniAS | UniAD],
    callback: Callable[[], Callback],
    expected: Callable[[list[torch.Tensor]], torch.Tensor],
    root: Path,
    tmp_path: Path,
) -> None:
    """The checkpoint holds the average of the weights after each step, and thresholds of it."""
    seen: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append(weight_of(module).detach().clone())

    def weight_of(module: Any) -> torch.Tensor:
        return next(parameter for parameter in module.model.parameters() if parameter.requires_grad)

    model = model_class(**SMALL | ({"accelerate": False} if model_class is UniAS else {}))
    run = engine(tmp_path, max_epochs=2, callbacks=[callback(), Watch()])
    run.fit(model, datamodule=data(root))
    assert len(seen) == 2 * BATCHES
    torch.testing.assert_close(weight_of(model), expected(seen))
    loaded = model_class.load_from_checkpoint(run.best_model_path, visualizer=False)
    torch.testing.assert_close(weight_of(loaded), expected(seen))
    stored = loaded.post_processor.calibration["image"]
    engine(tmp_path / "again").validate(loaded, datamodule=data(root))
    assert loaded.post_processor.calibration["image"] == pytest.approx(stored, rel=1e-4)


def test_a_learning_rate_is_looked_for_without_ending_the_training(root: Path, tmp_path: Path) -> None:
    """The trial of its steps is no training: nothing is completed, saved or called diverged."""
    find = LearningRateFinder(max_lr=1e12, num_training_steps=8, early_stop_threshold=None)
    run, model = engine(tmp_path, max_epochs=1, callbacks=[find]), UniAS(**SMALL)
    run.fit(model, datamodule=data(root))
    assert find.optimal_lr is not None
    assert run.trainer.global_step == BATCHES
    assert torch.load(str(run.best_model_path))["global_step"] == BATCHES


# --- Repeated --------------------------------------------------------------------------------------------------------


def command(root: Path, folder: Path, **model: Any) -> list[str]:
    """Return a command line that trains a small model with all that is drawn at random."""
    ours = {**SMALL, "image_size": "[128,128]", "recipe": "best", **model}
    named = [f"--model.{key}={value}" for key, value in ours.items() if key != "visualizer" and value is not None]
    images = ["--data", "Unified", f"--data.root={root}", "--data.train_batch_size=4", "--data.hflip=[bolt,cap]"]
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return ["anomalib", "fit", "--model", "UniAS", *named, *images, *trainer, f"--default_root_dir={folder}"]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = {path.resolve() for path in folder.rglob("*.ckpt")}
    return torch.load(path)["state_dict"]


def test_a_command_with_a_seed_repeats_its_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn before, and what is drawn after it is as if it had not been."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(ord(name))
        np.random.seed(ord(name))
        before = torch.get_rng_state()
        monkeypatch.setattr(sys, "argv", [*command(root, tmp_path / name, seed=seed), "--data.num_workers=1"])
        main()
        assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (weights_in(tmp_path / name) for name in "abc")
    torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    assert any(not torch.equal(c[name], a[name]) for name in a)


@pytest.mark.slow
def test_a_command_in_several_threads_repeats_its_weights(root: Path, tmp_path: Path) -> None:
    """In processes of their own, with other hashes."""
    for name in "ab":
        subprocess.run(
            [
                sys.executable,
                "-m",
                "anomalib.cli.cli",
                *command(root, tmp_path / name, seed=3)[1:],
                "--data.num_workers=2",
            ],
            env=os.environ | {"OMP_NUM_THREADS": "3", "PYTHONHASHSEED": str(ord(name))},
            cwd=tmp_path,
            check=True,
        )
    torch.testing.assert_close(weights_in(tmp_path / "b"), weights_in(tmp_path / "a"), rtol=0, atol=0, equal_nan=True)


def test_a_seeded_run_that_fails_puts_the_generators_back(root: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with pytest.raises(FloatingPointError):
        engine(tmp_path, max_epochs=2, callbacks=[Spoil(1)]).fit(UniAS(**SMALL), datamodule=data(root))
    assert torch.equal(torch.get_rng_state(), before)


def test_anomalibs_option_is_said_to_do_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for option, said in ((["--seed_everything", "42"], 1), ([], 0)):
        caplog.clear()
        monkeypatch.setattr(
            sys, "argv", [*command(root, tmp_path, seed=None, recipe="paper"), "--data.num_workers=0", *option]
        )
        main()
        assert caplog.text.count("--seed_everything 42 has no effect") == said
        assert caplog.text.count("--model.seed 42") == said
