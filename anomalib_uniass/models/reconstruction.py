# SPDX-License-Identifier: Apache-2.0
"""What the reconstruction models of this package share as anomalib models."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, cast

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

from anomalib_uniass.components.distribution import keep_constants_local
from anomalib_uniass.components.pre_processor import AntialiasedPreProcessor
from anomalib_uniass.components.recomputation import recomputation
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.models.export import ExportMixin
from anomalib_uniass.prediction import PredictionMixin

logger = logging.getLogger(__name__)

GRADIENT_CLIP = 0.1
STATISTICS_BATCHES = 100

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
"""What the trainer may compute in: anomalib's batches hold float32 images, whatever the weights are."""

LRSchedule = Literal["step", "onecycle"]


class ReconstructionMixin(PredictionMixin, ExportMixin):
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
        return [CategoryMetricsCallback(), *super().configure_callbacks()]

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

    def setup(self, stage: str) -> None:
        """Refuse precisions that have weights of another type than the images; spare a distributed run the constants.

        Raises:
            ValueError: If the trainer's precision is not one of `PRECISIONS`.
        """
        super().setup(stage)
        if (precision := str(self.trainer.precision)) not in PRECISIONS:
            msg = (
                f"{type(self).__name__} takes the trainer's precision {', '.join(PRECISIONS)}, got {precision}: its "
                "images are float32, so the weights must be. Mixed precision has the speed of the half one: "
                "--trainer.precision bf16-mixed (precision of Engine)."
            )
            raise ValueError(msg)
        if self.trainer.world_size > 1:
            keep_constants_local(self, frozen=[self.model.backbone])

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
            ValueError: If the pre-processor makes images of another size.
        """
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


def parse_image_size(image_size: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) as plain integers, from whatever sequence YAML made of them."""
    if isinstance(image_size, str) or len(image_size) != 2:
        msg = f"image_size must be (height, width), got {image_size!r}."
        raise ValueError(msg)
    return int(image_size[0]), int(image_size[1])


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Reject a misspelt choice where no command line has: in Python, or in a benchmark's YAML.

    Raises:
        ValueError: If `value` is not among the `known`.
    """
    if value not in known:
        msg = f"{name} must be one of {', '.join(known)}, got {value!r}."
        raise ValueError(msg)


def _plain(value: Any) -> Any:
    """Make sequences comparable: a YAML file gives a list where the constructor makes a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
