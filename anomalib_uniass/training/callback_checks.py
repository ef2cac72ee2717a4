# SPDX-License-Identifier: Apache-2.0
"""Callbacks of Lightning that would change a model behind its back."""

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning, StochasticWeightAveraging, WeightAveraging


def check_callbacks(callbacks: Iterable[Callback], *, accelerated: bool, has_statistics: bool) -> None:
    """Refuse callbacks that a model cannot be trained with, before the training.

    ``EMAWeightAveraging``, and ``WeightAveraging`` with ``use_buffers=False``, work with the paper's modules.

    Args:
        callbacks: Callbacks of the trainer.
        accelerated: Whether modules are rewritten by :mod:`anomalib_uniass.acceleration`.
        has_statistics: Whether the model takes statistics when its training begins and ends.

    Raises:
        ValueError: If there is such a callback; the message says what to do.
    """
    for callback in callbacks:
        if reason := _reason(callback, accelerated=accelerated, has_statistics=has_statistics):
            msg = f"The callback {type(callback).__name__} does not work with this model: {reason}"
            raise ValueError(msg)


def _reason(callback: Callback, *, accelerated: bool, has_statistics: bool) -> str:
    """Return why a callback is refused, and the way out; empty if it is not."""
    if isinstance(callback, WeightAveraging) and has_statistics:
        return (
            "it averages weights and buffers, and recipe='best' takes statistics of the last weights, not of their "
            "average. Leave it out, or train with recipe='paper' and accelerate=False."
        )
    if isinstance(callback, WeightAveraging) and accelerated:
        return (
            "it exchanges all buffers of two copies, and accelerated modules have some in evaluation alone. Train with "
            "accelerate=False (--model.accelerate false); the weights fit an accelerated model later."
        )
    if isinstance(callback, WeightAveraging) and callback._use_buffers and "avg_fn" not in callback._kwargs:
        return (
            "by its mean it averages buffers of truth values too, which torch does not do. Give it use_buffers=False, "
            "or take EMAWeightAveraging."
        )
    if isinstance(callback, StochasticWeightAveraging):
        return (
            "it resets the batch norms of the frozen backbone. Leave it out; WeightAveraging averages weights without "
            "that (with accelerate=False)."
        )
    if isinstance(callback, ModelPruning):
        return "it prunes the frozen backbone, and renames weights in checkpoints. Leave it out."
    if isinstance(callback, LearningRateFinder) and has_statistics:
        return (
            "it tries its steps before the features are standardised, as recipe='best' does when the training begins. "
            "Leave it out, and set learning_rate."
        )
    return ""
