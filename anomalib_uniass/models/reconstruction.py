# SPDX-License-Identifier: Apache-2.0
"""What the reconstruction models of this package share as anomalib models."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_uniass.arguments import check_choice, check_flag, check_number, check_seed, check_text, check_whole
from anomalib_uniass.components.pre_processor import AntialiasedPreProcessor
from anomalib_uniass.components.recomputation import recomputation
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.models.export import ExportMixin

logger = logging.getLogger(__name__)

GRADIENT_CLIP = 0.1
STATISTICS_BATCHES = 100

LRSchedule = Literal["step", "onecycle"]


class ReconstructionMixin(ExportMixin):
    """Training, checkpoints and export of a frozen backbone with a trainable reconstruction network.

    Expects of the class it is mixed into: ``self.model`` with ``backbone``, ``standardization`` and ``reconstruct``;
    ``self.loss`` that takes what ``reconstruct`` returns; and the constructor arguments ``learning_rate``,
    ``weight_decay``, ``lr_schedule``, ``lr_step_epochs``, ``max_epochs``, ``pre_trained`` and ``weights``.
    """

    model: Any
    recompute_activations = False
    """Whether training computes cheap activations again in the backward pass instead of keeping them."""
    architecture: ClassVar[tuple[str, ...]]
    """Constructor arguments that a checkpoint must agree with."""

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> PreProcessor:
        """Return resize and normalisation.

        Args:
            image_size: Height and width to resize to, 224 x 224 by default.
            mean: Normalisation mean, RGB in [0, 1]; ImageNet's by default.
            std: Normalisation standard deviation, likewise.
        """
        resize = Resize(image_size or (224, 224), antialias=True)
        return AntialiasedPreProcessor(Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    def configure_callbacks(self) -> Sequence[Callback]:
        """Put the per-category metrics before anomalib's callbacks: they need maps that are not normalised yet."""
        callbacks = super().configure_callbacks()
        return [CategoryMetricsCallback(), *(callbacks if isinstance(callbacks, Sequence) else [callbacks])]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the chosen schedule."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"]
        )
        if self.hparams["lr_schedule"] == "step":
            step = StepLR(optimizer, step_size=self.hparams["lr_step_epochs"], gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": "epoch"}}
        steps = int(self.trainer.estimated_stepping_batches)
        one_cycle = OneCycleLR(optimizer, max_lr=self.hparams["learning_rate"], total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Take the statistics of the backbone features before the first epoch, unless a checkpoint brought them."""
        standardization = self.model.standardization
        if standardization is None or standardization.fitted:
            return
        logger.info("Standardising backbone features over up to %d training batches.", STATISTICS_BATCHES)
        standardization.fit(islice(self._training_features(), STATISTICS_BATCHES))

    def _training_features(self) -> Iterator[list[Tensor]]:
        """Yield backbone features of the training set, in the trainer's batches."""
        datamodule = getattr(self.trainer, "datamodule", None)
        loader: Any = (
            self.trainer.fit_loop._data_source.instance if datamodule is None else datamodule.train_dataloader()
        )
        for batch in loader:
            image = batch.image.to(self.device)
            if isinstance(self.pre_processor, PreProcessor) and self.pre_processor.transform is not None:
                image = self.pre_processor.transform(image)
            yield self.model.backbone(image)

    def complete_pre_processor(self, choice: PreProcessor | bool, image_size: tuple[int, int]) -> None:
        """Make the default pre-processor with the backbone's statistics; refuse one that resizes to something else.

        Args:
            choice: The constructor's argument.
            image_size: Height and width the model works at.

        Raises:
            TypeError: If `choice` is something else.
            ValueError: If the pre-processor makes images of another size.
        """
        if not isinstance(choice, bool | PreProcessor):
            msg = f"pre_processor must be a PreProcessor, true or false, got {choice!r}."
            raise TypeError(msg)
        if choice is True:
            pyramid = self.model.backbone
            self.pre_processor = self.configure_pre_processor(image_size, mean=pyramid.mean, std=pyramid.std)
        if self.pre_processor is not None and self.input_size not in (None, image_size):
            msg = f"The pre-processor makes images of size {tuple(self.input_size)}, but image_size is {image_size}."
            raise ValueError(msg)

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Reconstruct a batch of good images ``(B, 3, H, W)`` and return the loss."""
        del args, kwargs  # the trainer's batch index is not needed
        image = cast("Tensor", batch.image)
        with recomputation(self.recompute_activations):
            loss = self.loss(*self.model.reconstruct(image))
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(image))
        return {"loss": loss}

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Add anomaly map and score to a batch, for anomalib's thresholds."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that win over the trainer's: gradient clipping, and `max_epochs` if it was given."""
        arguments: dict[str, Any] = {"gradient_clip_val": GRADIENT_CLIP, "num_sanity_val_steps": 0}
        if self.hparams["max_epochs"] is not None:
            arguments["max_epochs"] = self.hparams["max_epochs"]
        return arguments

    @property
    def learning_type(self) -> LearningType:
        """One-class: good images only."""
        return LearningType.ONE_CLASS

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture before its weights fail to fit.

        Raises:
            ValueError: If an architecture argument differs; the message lists them.
        """
        saved = checkpoint.get("hyper_parameters", {})
        differences = [
            f"{name}: checkpoint {_plain(saved[name])}, model {_plain(self.hparams[name])}"
            for name in self.architecture
            if name in saved and _plain(saved[name]) != _plain(self.hparams[name])
        ]
        if differences:
            msg = f"The checkpoint was trained with another configuration ({'; '.join(differences)}). Set the same."
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> AnomalibModule:  # type: ignore[override]
        """Load a model from a checkpoint; the checkpoint holds the backbone, so nothing is downloaded.

        Arguments as for :meth:`anomalib.models.AnomalibModule.load_from_checkpoint`.
        """
        kwargs.setdefault("pre_trained", False)
        kwargs.setdefault("weights", None)
        return super().load_from_checkpoint(*args, **kwargs)


def check_arguments(
    *,
    backbone: object,
    pre_trained: object,
    feedforward_dim: object,
    jitter_scale: object,
    jitter_probability: object,
    standardize_features: object,
    learning_rate: object,
    weight_decay: object,
    lr_schedule: object,
    lr_step_epochs: object,
    max_epochs: object,
    seed: object,
) -> None:
    """Refuse arguments of both models that are out of range, before anything is built.

    Raises:
        ValueError: If one of them is; the message names it and says what was expected.
    """
    check_text("backbone", backbone)
    check_flag("pre_trained", pre_trained)
    check_whole("feedforward_dim", feedforward_dim, at_least=1)
    check_number("jitter_scale", jitter_scale, at_least=0)
    check_number("jitter_probability", jitter_probability, at_least=0, at_most=1)
    check_flag("standardize_features", standardize_features)
    check_number("learning_rate", learning_rate, above=0)
    check_number("weight_decay", weight_decay, at_least=0)
    check_choice("lr_schedule", lr_schedule, get_args(LRSchedule))
    check_whole("lr_step_epochs", lr_step_epochs, at_least=1)
    if max_epochs is not None:
        check_whole("max_epochs", max_epochs, at_least=1)
    if seed is not None:
        check_seed(seed)


def _plain(value: Any) -> Any:
    """Make sequences comparable: a YAML file gives a list where the constructor makes a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
