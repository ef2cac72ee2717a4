# SPDX-License-Identifier: Apache-2.0
"""A training that draws the same random numbers every time."""

import logging
import random
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.seed import isolate_rng

from anomalib_uniass.arguments import LARGEST_SEED

logger = logging.getLogger(__name__)


class SeededTraining(Callback):
    """Draw everything that a training draws from a seed: order, augmentation, tiles, jitter, dropout, in all workers.

    The generators of torch, NumPy and Python are seeded when a training begins, and put back to where they were when it
    ends, so that what comes after it draws as if it had not been. Each process of a distributed run has its own seed.

    Args:
        seed: The seed; None leaves the generators alone.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self._generators = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Seed the generators before a training, or say that anomalib's own option does not."""
        del pl_module
        if stage != "fit":
            return
        if self.seed is None:
            _warn_of_seed_everything(trainer)
            return
        self._generators.enter_context(isolate_rng())
        seed = (self.seed + trainer.global_rank) % (LARGEST_SEED + 1)
        random.seed(seed)
        np.random.seed(seed)  # a user's augmentation may draw from the global one
        torch.manual_seed(seed)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the generators back."""
        del trainer, pl_module, stage
        self._generators.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the generators back."""
        del trainer, pl_module, exception
        self._generators.close()


def _warn_of_seed_everything(trainer: Trainer) -> None:
    """Say that anomalib reads ``--seed_everything`` and does nothing with it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):  # the command line adds it
            given: Any = callback.config.get("seed_everything")
            if isinstance(given, int) and not isinstance(given, bool) and trainer.is_global_zero:
                logger.warning(
                    "--seed_everything %d has no effect: anomalib reads it and does nothing with it. To repeat a run "
                    "give the model a seed: --model.seed %d.",
                    given,
                    given,
                )
