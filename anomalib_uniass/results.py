# SPDX-License-Identifier: Apache-2.0
"""Where the results of a run lie: in a folder without any, so that no run overwrites what another left.

anomalib gives every training a folder ``vN`` of its own and lets the link ``latest`` point to the last. A test or a
prediction gets the folder of the last training, or ``latest`` itself where there was none, whatever lies in it. Here

* a folder that has no results yet takes those of the run: the test at the end of ``train`` lies beside its weights;
* beside a training's results those of later runs have ``test/vN`` and ``predict/vN`` in its folder, so that ``latest``
  goes on to point to the weights;
* where there was no training every run has a ``vN`` of its own, and ``latest`` points to the last.

The folder is the trainer's ``default_root_dir`` during the run, which everything that writes asks for.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_uniass.text import one_line

logger = logging.getLogger(__name__)

LATEST = "latest"
WEIGHTS = "weights"
PREDICTIONS = "predictions.csv"
CONFIG = "config.yaml"
"""Saved by anomalib's command before a run has done anything."""

_RESULTS = ("metrics", "images", PREDICTIONS)
_VERSION = re.compile(r"v(\d+)")


class RunFolder(Callback):
    """Give a test or prediction a folder without results, and remove one in which a run has left nothing.

    A training that is refused before its first step leaves no folder either, and ``latest`` points to the training
    before it again. In a distributed run all processes have the folder of the first.
    """

    def __init__(self) -> None:
        self._base: str | None = None
        self._made: Path | None = None
        self._has_trained = False

    def open(self, trainer: Trainer) -> None:
        """Choose the folder, and make it: on the first process, before anything is written."""
        kind = trainer.state.fn
        if self._base is not None or kind not in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            return
        self._base = trainer.default_root_dir
        if "://" in self._base:  # object storage has no links
            return
        base = Path(self._base)
        try:
            folder = _free_folder(base, str(kind.value))
        except OSError as error:
            # What lies there must not be overwritten: whoever writes tells that it cannot.
            folder = base / str(kind.value) / "v"
            logger.warning("The results of this run cannot be kept, a folder for them cannot be made: %s", error)
        if folder != base:
            self._made = folder
            _set_folder(trainer, str(folder))
            logger.info("Results of this run: %s", one_line(str(folder)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let all processes have the folder of the first."""
        del pl_module
        self._has_trained = False
        own = trainer.default_root_dir
        self._base = self._base or own
        agreed = trainer.strategy.broadcast(own)
        _set_folder(trainer, agreed)
        if stage != "fit":
            return
        if own != agreed:  # anomalib made one for every process, and `latest` points to the last
            with suppress(OSError):
                Path(own).rmdir()
        elif trainer.is_global_zero and _is_version(Path(own)) and Path(own).is_dir():
            _point_latest_to(Path(own))

    def on_train_batch_start(self, *_arguments: Any) -> None:
        """Note that there is something to lose."""
        self._has_trained = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the folder of a training that never began, and of a run that left nothing."""
        del exception
        if trainer.state.fn == TrainerFn.FITTING and not self._has_trained:
            self._made = Path(trainer.default_root_dir)
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the folder of a run that left nothing, and go back to the training's."""
        del pl_module, stage
        folder, base = Path(trainer.default_root_dir), self._base
        if trainer.is_global_zero and self._made is not None and _is_version(self._made):
            with suppress(OSError):
                _discard(self._made)
        if base is not None and folder.parent.parent == Path(base):
            _set_folder(trainer, base)
        self._base = self._made = None


def run_folder(trainer: Trainer) -> RunFolder:
    """Return the callback of a trainer that keeps runs apart; it gets one if it has none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
    found = next((callback for callback in callbacks if isinstance(callback, RunFolder)), None)
    if found is None:
        callbacks.append(found := RunFolder())
    return found


def _set_folder(trainer: Trainer, folder: str) -> None:
    """Set the folder that everything is written to; Lightning has no public way once the trainer is made."""
    if trainer.default_root_dir != folder:
        trainer._default_root_dir = folder  # type: ignore[attr-defined]  # Lightning's connector sets it


def _free_folder(folder: Path, kind: str) -> Path:
    """Return a folder without results, made if it is new.

    Args:
        folder: The trainer's, of which ``latest`` was resolved if it is a link.
        kind: ``test`` or ``predict``.

    Raises:
        OSError: If it cannot be made.
    """
    has_training = (folder / WEIGHTS).exists()
    if folder.name == LATEST and not has_training:
        if folder.is_dir():  # results of a version before 0.3, which were no versions
            folder.rename(_next_version(folder.parent))
        return _new_version(folder.parent)
    if not any((folder / name).exists() for name in _RESULTS):
        return folder
    return _new_version(folder / kind if has_training or not _is_version(folder) else folder.parent)


def _is_version(folder: Path) -> bool:
    return _VERSION.fullmatch(folder.name) is not None


def _versions(parent: Path) -> list[Path]:
    """Return the versions in a folder by their number."""
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := _VERSION.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _next_version(parent: Path) -> Path:
    taken = _versions(parent)
    return parent / (f"v{int(taken[-1].name[1:]) + 1}" if taken else "v0")


def _new_version(parent: Path) -> Path:
    """Make the next version in a folder, to which ``latest`` points."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = _next_version(parent)
        with suppress(FileExistsError):  # another run has just made it
            folder.mkdir()
            _point_latest_to(folder)
            return folder


def _point_latest_to(folder: Path) -> None:
    """Let ``latest`` point to a folder by its name, which holds wherever all of them are moved or mounted."""
    latest, draft = folder.with_name(LATEST), folder.with_name(f".{LATEST}-{folder.name}")
    if latest.exists() and not latest.is_symlink():
        return  # made by anomalib where there are no links; it takes the highest number there
    with suppress(OSError):
        draft.unlink(missing_ok=True)
        draft.symlink_to(folder.name, target_is_directory=True)
        draft.replace(latest)


def _discard(folder: Path) -> None:
    """Remove a version in which nothing is, and let ``latest`` point to the training, or run, before it."""
    parent, latest = folder.parent, folder.with_name(LATEST)
    was_latest = latest.is_symlink() and latest.resolve() == folder.resolve()
    if not {path.name for path in folder.iterdir()} - {CONFIG}:
        (folder / CONFIG).unlink(missing_ok=True)
        folder.rmdir()
    elif (folder / WEIGHTS).exists() or any((folder / name).exists() for name in _RESULTS):
        return
    others = [version for version in _versions(parent) if version != folder]
    if was_latest and others:
        _point_latest_to(([version for version in others if (version / WEIGHTS).exists()] or others)[-1])
    elif was_latest and not folder.exists():
        latest.unlink()
        parent.rmdir()  # ours alone, if nothing else is in it
