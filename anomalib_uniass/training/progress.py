# SPDX-License-Identifier: Apache-2.0
"""How far a long run is, in lines: for files and logs, where no progress bar can be drawn."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30


class ProgressLines(Callback):
    """Say how far the training is, unless a terminal shows a progress bar.

    A line after half a minute within an epoch, at most one in half a minute after an epoch, and one after the last.
    """

    def __init__(self) -> None:
        self._first_epoch = 0
        self._start = self._said = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a run that goes on has not done its first epochs now."""
        del pl_module
        self._first_epoch, self._start = trainer.current_epoch, time.monotonic()
        self._said = self._start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far it is within a long epoch."""
        del pl_module, outputs, batch
        batches = trainer.num_training_batches
        if (
            time.monotonic() - self._said >= SECONDS_BETWEEN_LINES
            and math.isfinite(batches)
            and batch_idx + 1 < batches
        ):
            self._say(trainer, (batch_idx + 1) / batches, f"batch {batch_idx + 1} of {batches}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how far it is."""
        del pl_module
        epoch = trainer.current_epoch
        is_due = time.monotonic() - self._said >= SECONDS_BETWEEN_LINES
        if is_due or epoch == self._first_epoch or epoch + 1 == trainer.max_epochs:
            self._say(trainer, 1, "")

    def _say(self, trainer: Trainer, share: float, where: str) -> None:
        """Say where the run is.

        Args:
            trainer: The trainer.
            share: Part of the current epoch that is done, in (0, 1].
            where: Place in it, in words; empty at its end.
        """
        if sys.stdout.isatty():
            return
        self._said = time.monotonic()
        an_epoch = (self._said - self._start) / (trainer.current_epoch - self._first_epoch + share)
        loss = trainer.callback_metrics.get("train_loss")
        parts = [where, "" if loss is None else f"train_loss {float(loss):.4g}", f"{duration(an_epoch)} an epoch"]
        of = ""
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            of = f" of {trainer.max_epochs}"
            parts.append(f"{duration((trainer.max_epochs - trainer.current_epoch - share) * an_epoch)} left")
        rank_zero_info(f"Epoch {trainer.current_epoch + 1}{of}: {', '.join(filter(None, parts))}")


def say_progress(items: Iterable[T], *, count: int, what: str) -> Iterator[T]:
    """Yield items, and say now and then how many were dealt with.

    Args:
        items: The items.
        count: Their number.
        what: What is done, such as ``Segmentation head``; begins the line.
    """
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            rank_zero_info(f"{what}: {done} of {count} batches, {duration((now - start) / done * (count - done))} left")
        yield item


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
