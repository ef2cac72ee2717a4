# SPDX-License-Identifier: Apache-2.0
"""What a training leaves behind, however it ends."""

from typing import TYPE_CHECKING

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor

from anomalib_uniass.components.checkpoint_io import WholeCheckpointIO
from anomalib_uniass.components.post_processor import CategoryThresholdPostProcessor, missing_thresholds, warn

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only


class CompleteRunMixin(Base):
    """A training that ends by itself leaves a checkpoint of its last weights, with thresholds from these weights.

    anomalib's checkpoint callback and thresholds do their work at the end of a validation. Where the last epoch has
    none (``check_val_every_n_epoch`` does not divide ``max_epochs``, ``max_steps`` or ``max_time`` end the training
    within an epoch, …) one more is run after it. Without a validation set the checkpoint is saved nevertheless, and a
    warning says that it has no thresholds. A run that is interrupted or fails keeps what was saved at its last
    validation.
    """

    _validated_batch: int | None = None
    """Training batch after which the weights were validated."""

    def setup(self, stage: str) -> None:
        """Make checkpoints whole or not at all, unless the user brought a writer of checkpoints."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = WholeCheckpointIO(strategy.checkpoint_io.extra_safe_globals)
        self._validated_batch = None

    def on_validation_start(self) -> None:
        """Note which weights are validated."""
        super().on_validation_start()
        self._validated_batch = self.trainer.fit_loop.total_batch_idx

    def on_train_epoch_end(self) -> None:
        """Validate the last weights, if this is the last epoch and its validation did not."""
        super().on_train_epoch_end()
        if self._training_ends():
            self._validate_last_weights()

    def on_train_end(self) -> None:
        """Validate the last weights, if a callback stopped the training after its last epoch ended."""
        super().on_train_end()
        self._validate_last_weights()

    def _training_ends(self) -> bool:
        """Tell whether the trainer stops after the current epoch, at whose end it is."""
        trainer = self.trainer
        epochs, steps = trainer.current_epoch + 1, trainer.global_step
        can_stop = epochs >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        return (
            (trainer.should_stop and can_stop)
            or 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= epochs
            or 0 <= trainer.max_steps <= steps
        )

    def _validate_last_weights(self) -> None:
        """Validate as the training loop does, which brings thresholds and checkpoint, unless it has been done."""
        trainer = self.trainer
        if self._validated_batch == trainer.fit_loop.total_batch_idx:
            return
        if trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        if self._validated_batch != trainer.fit_loop.total_batch_idx:  # there is nothing to validate with
            self._validated_batch = trainer.fit_loop.total_batch_idx
            for callback in trainer.checkpoint_callbacks:
                callback.on_validation_end(trainer, self)

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
