# SPDX-License-Identifier: Apache-2.0
"""How far a long run is, in lines: for files and logs, where no progress bar can be drawn."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30


class ProgressLines(Callback):
    """Say after an epoch how far the training is, unless a terminal shows a progress bar.

    At most one line in half a minute, and one after the last epoch.
    """

    def __init__(self) -> None:
        self._first_epoch = 0
        self._start = self._said = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a run that goes on has not done its first epochs now."""
        del pl_module
        self._first_epoch, self._start, self._said = trainer.current_epoch, time.monotonic(), -float("inf")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how far it is."""
        del pl_module
        now, epoch = time.monotonic(), trainer.current_epoch + 1
        is_last = epoch == trainer.max_epochs
        if sys.stdout.isatty() or (now - self._said < SECONDS_BETWEEN_LINES and not is_last):
            return
        self._said = now
        an_epoch = (now - self._start) / (epoch - self._first_epoch)
        loss = trainer.callback_metrics.get("train_loss")
        of, left = "", ""
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            of, left = f" of {trainer.max_epochs}", f", {duration((trainer.max_epochs - epoch) * an_epoch)} left"
        rank_zero_info(
            f"Epoch {epoch}{of}: {'' if loss is None else f'train_loss {float(loss):.4g}, '}"
            f"{duration(an_epoch)} an epoch{left}"
        )


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
