# SPDX-License-Identifier: Apache-2.0
"""What a training leaves behind, however it ends."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_uniass.logs import QuietRun, install_log_filters
from anomalib_uniass.models.checkpoint_io import WholeCheckpointIO
from anomalib_uniass.report.summary import RunSummary
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor, missing_thresholds, warn

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only


class CompleteRunMixin(Base):
    """A training that ends by itself leaves a checkpoint of its last weights, with thresholds from these weights.

    anomalib's checkpoint callback and thresholds do their work at the end of a validation. Where the last epoch has
    none (``check_val_every_n_epoch`` does not divide ``max_epochs``, ``max_steps`` or ``max_time`` end the training
    within an epoch, …) one more is run after it. What a model takes of the training set with its last weights
    (:meth:`take_statistics`) comes before. Without a validation set the checkpoint is saved nevertheless, and a
    warning says that it has no thresholds. A run that is interrupted or fails keeps what was saved at its last
    validation.
    """

    _validated_batch: int | None = None
    """Training batch after which the weights were validated."""
    _completed_batch: int | None = None
    """Training batch after which the last weights were completed."""

    def take_statistics(self) -> bool:
        """Take what a model needs of the training set and its last weights, and tell whether that changed the model."""
        return False

    def configure_callbacks(self) -> Sequence[Callback]:
        """Let the last lines of a run come from here, and the others come once."""
        install_log_filters(self)
        callbacks = super().configure_callbacks()
        return [QuietRun(), *(callbacks if isinstance(callbacks, Sequence) else [callbacks]), RunSummary()]

    def setup(self, stage: str) -> None:
        """Make checkpoints whole or not at all, unless the user brought a writer of checkpoints."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = WholeCheckpointIO(strategy.checkpoint_io.extra_safe_globals)
        self._validated_batch = self._completed_batch = None

    def on_validation_start(self) -> None:
        """Complete the weights, if they are the last."""
        super().on_validation_start()
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_batch = self.trainer.fit_loop.total_batch_idx
        if self._validated_batch != self._completed_batch and self._training_ends():
            self.take_statistics()
            self._completed_batch = self._validated_batch

    def on_train_epoch_end(self) -> None:
        """Complete the last weights, if this is the last epoch and no validation did."""
        super().on_train_epoch_end()
        if self._training_ends():
            self._complete_last_weights()

    def on_train_end(self) -> None:
        """Complete the last weights, if a callback stopped the training after its last epoch ended."""
        super().on_train_end()
        self._complete_last_weights()

    def _training_ends(self) -> bool:
        """Tell whether the trainer stops after the current batch, at whose end it is."""
        trainer = self.trainer
        epochs, steps = trainer.current_epoch + trainer.is_last_batch, trainer.global_step
        can_stop = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        return (
            (trainer.should_stop and can_stop)
            or 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= epochs
            or 0 <= trainer.max_steps <= steps
        )

    def _complete_last_weights(self) -> None:
        """Validate as the training loop does, which brings thresholds and checkpoint, unless it has been done."""
        trainer = self.trainer
        if self._completed_batch == trainer.fit_loop.total_batch_idx:
            return
        self._completed_batch = trainer.fit_loop.total_batch_idx
        if not self.take_statistics() and self._validated_batch == self._completed_batch:
            return
        for callback in trainer.checkpoint_callbacks:
            callback._last_global_step_saved = 0  # type: ignore[attr-defined]  # they save a step once, and what belongs to it has just changed
        validation = trainer.fit_loop.epoch_loop.val_loop
        if trainer.enable_validation:
            trainer.validating = True
            validation.run()
            trainer.training = True
        if not trainer.enable_validation or validation.skip:  # there is nothing to validate with
            for callback in trainer.checkpoint_callbacks:
                callback.on_validation_end(trainer, self)
        for callback in trainer.checkpoint_callbacks:  # some save at the end of an epoch, which may be over
            callback.on_train_epoch_end(trainer, self)

    def on_fit_end(self) -> None:
        """Say that anomalib's own post-processor has no thresholds; that of this package says it by itself."""
        super().on_fit_end()
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
