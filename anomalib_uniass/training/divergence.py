# SPDX-License-Identifier: Apache-2.0
"""Trainings that diverge: noticed at once, and before their weights replace good ones."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

STEPS_BETWEEN_LOOKS = 50
"""Steps after which the losses are looked at where a look waits for a device, or for other processes."""


class LossWatch:
    """Notes the first training loss that is not finite, without waiting for the device in every step."""

    def __init__(self) -> None:
        self._step: Tensor | None = None  # of the first bad loss, -1 so far

    def look(self, loss: Tensor, trainer: Trainer) -> None:
        """Take note of a step's loss, and raise an error if one was not finite.

        On a CPU alone that is in the same step; else within `STEPS_BETWEEN_LOOKS`, for all processes together.

        Args:
            loss: The loss, a single number.
            trainer: The trainer.

        Raises:
            FloatingPointError: If a loss was not finite; the message says what to do.
        """
        step = trainer.global_step
        if self._step is None:
            self._step = torch.full((), -1, device=loss.device)
        self._step = torch.where((self._step < 0) & ~loss.detach().isfinite(), step, self._step)
        if (loss.is_cpu and trainer.world_size == 1) or step % STEPS_BETWEEN_LOOKS == 0:
            self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Raise an error if a loss was not finite, in any process."""
        step = -1 if self._step is None else int(self._step)
        if trainer.strategy.reduce_boolean_decision(step >= 0, all=False):
            where = f"at step {step}" if step >= 0 else "in another process"
            raise FloatingPointError(diverged(f"The training loss is not finite {where}", trainer, first=step == 0))


def check_finite(weights: Iterable[Tensor], trainer: Trainer) -> None:
    """Refuse weights that are not finite.

    Args:
        weights: Parameters of one device.
        trainer: The trainer.

    Raises:
        FloatingPointError: If a number is not finite; the message says what to do.
    """
    finite = [weight.detach().isfinite().all() for weight in weights]
    if finite and not bool(torch.stack(finite).all()):
        raise FloatingPointError(diverged(f"Weights are not finite at step {trainer.global_step}", trainer))


def diverged(what: str, trainer: Trainer, *, first: bool = False) -> str:
    """Say that a training diverged, at which learning rate, what is left of it, and what to do.

    Args:
        what: What is not finite, and where; begins the message.
        trainer: The trainer.
        first: Whether no step was taken before.
    """
    rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else float("nan")
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    kept = f"The last checkpoint, {path}, is of before and stays." if path else "There is no checkpoint yet."
    cause = "The training diverged"
    advice = f"Train with a lower learning_rate (--model.learning_rate {rate / 10:.0e})"
    if first:
        cause = "No step was taken before"
        advice = "Look at the images and at the backbone's weights: they give features that are not finite"
    precision = str(trainer.precision)
    other = "" if precision == "32-true" else f", or without --trainer.precision {precision}"
    return f"{what} (epoch {trainer.current_epoch}, learning rate {rate:.3g}). {cause}. {kept} {advice}{other}."
