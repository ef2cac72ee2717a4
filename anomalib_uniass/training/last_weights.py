# SPDX-License-Identifier: Apache-2.0
"""What a training leaves behind, however it ends."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from anomalib_uniass.files import remove_stale_drafts
from anomalib_uniass.layers.seeding import random_states, set_random_states
from anomalib_uniass.logs import QuietRun, install_log_filters, warn
from anomalib_uniass.report.summary import RunSummary
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor, missing_thresholds
from anomalib_uniass.training.checkpoint_io import WholeCheckpointIO
from anomalib_uniass.training.seeded_training import SeededTraining
from anomalib_uniass.training.termination import TerminationCallback, ending_at_sigterm

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only

END_OF_TRAINING = "end_of_training.ckpt"
"""Checkpoint of the last weights where no checkpoint callback keeps them."""

ENDED = "ended_training"
"""Entry of a checkpoint of weights that are trained, while what belongs to them is still to be taken."""


class CompleteRunMixin(Base):
    """A training that ends by itself leaves a checkpoint of its last weights, with thresholds from these weights.

    anomalib's checkpoint callback and thresholds do their work at the end of a validation. Where the last epoch has
    none (``check_val_every_n_epoch`` does not divide ``max_epochs``, ``max_steps`` or ``max_time`` end the training
    within an epoch, …) one more is run after it. What a model takes of the training set with its last weights
    (:meth:`take_statistics`) comes before. Without a validation set the checkpoint is saved nevertheless, and a
    warning says that it has no thresholds.

    A run that is interrupted or fails keeps what was saved at its last validation. Before :meth:`take_statistics`,
    which may be long, the last weights are saved: a run that goes on from there takes the statistics, validates and
    saves, as if it had not stopped, and trains no step more. Where callbacks keep other weights alone (the best ones,
    or those of every tenth epoch) they are in `END_OF_TRAINING` beside theirs, which holds the complete model in the
    end.
    """

    is_under_way = False
    """Whether a training goes on: the trials of Lightning's tuners, which come before, are none."""
    _is_to_train = False
    _validated_batch: int | None = None
    """Training batch after which the weights were validated."""
    _completed_batch: int | None = None
    """Training batch after which the last weights were completed."""
    _ended: dict[str, Any] | None = None
    """While the last weights are completed, and in a run that goes on from there: how the training ended."""
    _limits: tuple[int | None, int, bool] | None = None
    """Epochs, steps and stop of a trainer that goes on from an ended training, until it is under way."""

    def has_statistics(self) -> bool:
        """Tell whether :meth:`take_statistics` has something to do."""
        return False

    def take_statistics(self) -> bool:
        """Take what a model needs of the training set and its last weights, and tell whether that changed the model."""
        return False

    def score_training_images(self) -> None:
        """Let the post-processor see what the last weights make of training images; nothing where it needs none."""

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add what ends a run in order and makes it repeatable; let its last lines come from here, others once."""
        install_log_filters(self)
        callbacks = super().configure_callbacks()
        callbacks = callbacks if isinstance(callbacks, Sequence) else [callbacks]
        ours = (SeededTraining(self.hparams.get("seed")), TerminationCallback(), RunSummary())
        return [QuietRun(), *callbacks, *ours]

    def setup(self, stage: str) -> None:
        """Make checkpoints whole or not at all, unless the user brought a writer of checkpoints."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = WholeCheckpointIO(strategy.checkpoint_io.extra_safe_globals)
        self._validated_batch = self._completed_batch = self._ended = self._limits = None
        self.is_under_way = False
        self._is_to_train = stage == "fit"
        if self.trainer.is_global_zero:
            for folder in _folders_of_runs(self.trainer):
                remove_stale_drafts(folder)

    # --- A run that goes on after its training -----------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell a checkpoint of an ended training that is not complete."""
        super().on_save_checkpoint(checkpoint)
        if self._ended is not None:
            checkpoint[ENDED] = self._ended

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notice a checkpoint of an ended training that is not complete."""
        super().on_load_checkpoint(checkpoint)
        if self._is_to_train:
            self._ended = checkpoint.get(ENDED)

    def on_fit_start(self) -> None:
        """Let the trainer begin although its training is over: it would skip the rest, too."""
        super().on_fit_start()
        self.is_under_way = True
        if self._ended is None:
            return
        trainer = self.trainer
        loop = trainer.fit_loop
        if loop.max_epochs is not None and 0 <= loop.max_epochs < self._ended["epoch"]:
            return  # an error, which Lightning explains
        self._limits = loop.max_epochs, loop.max_steps, trainer.should_stop
        if loop.max_epochs is not None and loop.max_epochs >= 0:
            loop.max_epochs = sys.maxsize
        if loop.max_steps >= 0:
            loop.epoch_loop.max_steps = sys.maxsize
        trainer.should_stop = False  # a timer's, whose time is over

    def on_train_start(self) -> None:
        """Complete the last weights of an ended training, unless this run is to be longer."""
        super().on_train_start()
        ended, self._ended = self._ended, None
        if self._limits is None or ended is None:
            return
        trainer, loop = self.trainer, self.trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps, trainer.should_stop = self._limits
        self._limits = None
        progress = loop.epoch_progress
        epoch, progress.current.completed = progress.current.completed, ended["epoch"]
        if not ended["stopped"] and not self._training_ends():
            progress.current.completed = epoch
            return
        rank_zero_info("The training has ended in the checkpoint; what belongs to its last weights comes now.")
        if trainer.world_size == 1:  # the checkpoint has the states of one process
            set_random_states(ended["random_states"], self.device)
        loop.epoch_loop.val_loop.restarting = False
        self._complete_last_weights(stopped=ended["stopped"])
        if progress.current.processed < progress.current.started:  # type: ignore[attr-defined]  # it was saved in the epoch's validation
            progress.increment_processed()
        trainer.should_stop = True

    # --- The end of a training ---------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Complete the weights, if they are the last."""
        if not self.is_under_way:
            super().on_validation_start()
            return
        with ending_at_sigterm(self.trainer):
            super().on_validation_start()  # chooses a memory bank
        self._validated_batch = self.trainer.fit_loop.total_batch_idx
        if self._validated_batch != self._completed_batch and self._training_ends():
            self._take_statistics(stopped=self._is_stopped())
            self._completed_batch = self._validated_batch

    def on_train_epoch_end(self) -> None:
        """Complete the last weights, if this is the last epoch and no validation did."""
        with ending_at_sigterm(self.trainer):
            super().on_train_epoch_end()
        if self._training_ends():
            self._complete_last_weights(stopped=self._is_stopped())

    def on_train_end(self) -> None:
        """Complete the last weights, if a callback stopped the training after its last epoch ended."""
        super().on_train_end()
        self._complete_last_weights(stopped=True)
        self._keep_last_weights()

    def _training_ends(self) -> bool:
        """Tell whether the trainer stops after the current batch, at whose end it is."""
        trainer = self.trainer
        return (
            self._is_stopped()
            or 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= self._epochs()
            or 0 <= trainer.max_steps <= trainer.global_step
        )

    def _is_stopped(self) -> bool:
        """Tell whether a callback ends the training before its length."""
        trainer = self.trainer
        can_stop = self._epochs() >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        return trainer.should_stop and can_stop

    def _epochs(self) -> int:
        return self.trainer.current_epoch + self.trainer.is_last_batch

    def _complete_last_weights(self, *, stopped: bool) -> None:
        """Validate as the training loop does, which brings thresholds and checkpoint, unless it has been done.

        Args:
            stopped: Whether a callback ended the training.
        """
        trainer = self.trainer
        if not self.is_under_way or self._completed_batch == trainer.fit_loop.total_batch_idx:
            return
        self._completed_batch = trainer.fit_loop.total_batch_idx
        if self._take_statistics(stopped=stopped) or self._validated_batch != self._completed_batch:
            self._validate_and_save()

    def _take_statistics(self, *, stopped: bool) -> bool:
        """Take the statistics, with a checkpoint before them; tell whether that changed the model."""
        if not self.has_statistics():
            with ending_at_sigterm(self.trainer):
                self.score_training_images()
            return False
        self._ended = {
            "epoch": self.trainer.current_epoch,
            "stopped": stopped,
            "random_states": random_states(self.device),
        }
        self._save_ended_training()
        with ending_at_sigterm(self.trainer):
            changed = self.take_statistics()
            self.score_training_images()
        self._ended = None
        return changed

    def _save_ended_training(self) -> None:
        """Save the last weights where they will be saved when they are complete."""
        trainer = self.trainer
        self._forget_saved_steps()
        for callback in _checkpoint_callbacks(trainer):
            # One that watches a metric would compare one of earlier weights, one that keeps all files save another.
            if callback.monitor is None and callback.save_top_k == 1 and not callback.save_weights_only:
                _save_by(callback, trainer, self)
        path = self._end_of_training()
        if path is not None and not self._is_last_step_saved():
            trainer.save_checkpoint(path)
        self._forget_saved_steps()

    def _keep_last_weights(self) -> None:
        """Replace the checkpoint that was saved before the statistics, where a callback did not."""
        path = self._end_of_training()
        if path is None or not self.is_under_way or not self.has_statistics():
            return
        if not self._is_last_step_saved():
            self.trainer.save_checkpoint(path)
        elif self.trainer.is_global_zero:
            path.unlink(missing_ok=True)

    def _end_of_training(self) -> Path | None:
        """Return the path of the checkpoint for which there is no callback; None where nothing is to be saved."""
        folders = [callback.dirpath for callback in _checkpoint_callbacks(self.trainer) if callback.dirpath]
        is_trial = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        return None if is_trial or not folders else Path(folders[0]) / END_OF_TRAINING

    def _is_last_step_saved(self) -> bool:
        """Tell whether a callback has a checkpoint of the last weights, from which a run can go on."""
        step = self.trainer.global_step
        return any(
            callback._last_global_step_saved == step and not callback.save_weights_only
            for callback in _checkpoint_callbacks(self.trainer)
        )

    def _forget_saved_steps(self) -> None:
        """Let callbacks save the last step again: what belongs to it has changed, and they save a step once."""
        for callback in _checkpoint_callbacks(self.trainer):
            callback._last_global_step_saved = 0

    def _validate_and_save(self) -> None:
        """Validate and save as the training loop does."""
        trainer = self.trainer
        self._forget_saved_steps()
        validation = trainer.fit_loop.epoch_loop.val_loop
        if trainer.enable_validation:
            trainer.validating = True
            validation.run()
            trainer.training = True
        for callback in trainer.checkpoint_callbacks:
            if not trainer.enable_validation or validation.skip:  # there is nothing to validate with
                callback.on_validation_end(trainer, self)
            callback.on_train_epoch_end(trainer, self)  # some save at the end of an epoch, which may be over

    def on_fit_end(self) -> None:
        """Say that anomalib's own post-processor has no thresholds; that of this package says it by itself."""
        super().on_fit_end()
        self.is_under_way = False
        self._warn_of_missing_thresholds()

    def on_test_start(self) -> None:
        """Say that anomalib's own post-processor has no thresholds; that of this package says it by itself."""
        super().on_test_start()
        self._warn_of_missing_thresholds()

    def on_predict_start(self) -> None:
        """Say that anomalib's own post-processor has no thresholds; that of this package says it by itself."""
        super().on_predict_start()
        self._warn_of_missing_thresholds()

    def _warn_of_missing_thresholds(self) -> None:
        post_processor = self.post_processor
        if isinstance(post_processor, PostProcessor) and not isinstance(post_processor, CategoryThresholdPostProcessor):
            warn(missing_thresholds(post_processor))


def _checkpoint_callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _save_by(callback: ModelCheckpoint, trainer: Trainer, module: AnomalibModule) -> None:
    """Let a callback save, whichever of its hooks does."""
    callback.on_validation_end(trainer, module)
    callback.on_train_epoch_end(trainer, module)


def _folders_of_runs(trainer: Trainer) -> Iterator[Path]:
    """Yield the folders of this run and of earlier ones that files of this package lie in, but those of pictures."""
    run = Path(trainer.default_root_dir)
    runs = run.parent.glob("v*") if re.fullmatch(r"v\d+|latest", run.name) else [run]
    for folder in runs:
        yield from (folder, folder / "metrics", folder / "weights", *folder.glob("weights/*/"))
    for callback in _checkpoint_callbacks(trainer):
        if callback.dirpath:
            yield Path(callback.dirpath)
    if trainer.ckpt_path:
        yield Path(trainer.ckpt_path).parent
