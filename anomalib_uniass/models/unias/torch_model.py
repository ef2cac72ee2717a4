# SPDX-License-Identifier: Apache-2.0
"""UniAS as a plain PyTorch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.layers.feature_jitter import FeatureJitter
from anomalib_uniass.layers.gaussian_split import GaussianFrequencySplit
from anomalib_uniass.layers.mgg_cnn import MultiGranularityGatedCNN
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.layers.standardization import FeatureStandardization
from anomalib_uniass.layers.tiling import TiledModel
from anomalib_uniass.layers.token_grid import check_image_size, token_grid
from anomalib_uniass.models.unias.decoder import HEADS, SpatialChannelDecoder
from anomalib_uniass.models.unias.detector.recipes import RECIPES, RecipeName
from anomalib_uniass.models.unias.detector.residual import Residual
from anomalib_uniass.models.unias.heads import ReconstructionHead
from anomalib_uniass.models.unias.pixel_decoder import NORM_GROUPS, FPNPixelDecoder
from anomalib_uniass.models.unias.queries import GatedQueryGenerator
from anomalib_uniass.models.unias.source_embedding import SourceEmbedding


class Reconstruction(NamedTuple):
    """Reconstructed features and what they should be, ``[(B, C_j, H_j, W_j)]`` each, coarse to fine."""

    reconstructions: list[Tensor]
    targets: list[Tensor]
    stds: list[Tensor] | None = None
    """Standard deviations ``(1, C_j, 1, 1)`` in which the loss measures errors; None takes them as they are."""

    def of(self, images: Tensor) -> "Reconstruction":
        """Return the part of some images of the batch, given by their indices ``(n,)``."""
        return self._replace(
            reconstructions=[x[images] for x in self.reconstructions], targets=[x[images] for x in self.targets]
        )


class UniASModel(TiledModel):
    """UniAS: one reconstruction network for all categories (Ma et al., WACV 2025).

    ``(B, 3, H, W) -> anomaly map (B, 1, H, W), image score (B,)``. B batch, C channels, H W size, N = H * W / 256
    tokens, D = `hidden_dim`.

    Args:
        backbone: timm name of the frozen backbone (strides 2, 4, 8, 16).
        pre_trained: Load ImageNet weights of the backbone.
        weights: Weights file or installed weights package instead of timm's hub.
        image_size: Height and width of the input, multiples of 16, fixed at construction.
        hidden_dim: Width D, a multiple of 32.
        feedforward_dim: Width of every feed-forward layer.
        channel_branch: Run the channel branch of the decoder (the release's VisA configuration does not).
        jitter_scale: Strength of the feature jitter in training.
        jitter_probability: Chance of the jitter per level and batch.
        recipe: The model of the ``paper``, or the ``best`` that we know; ``detector/recipes.py`` says what they are
            made of.
        seed: Seed of the initial weights; leaves torch's global generator alone. None draws from the latter.

    Raises:
        ValueError: If sizes do not fit together; the message says which.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] = (224, 224),
        hidden_dim: int = 256,
        feedforward_dim: int = 2048,
        channel_branch: bool = True,
        jitter_scale: float = 20.0,
        jitter_probability: float = 0.5,
        recipe: RecipeName = "paper",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        grid_size = _validate_sizes(image_size, hidden_dim=hidden_dim, channel_branch=channel_branch)
        self.image_size = image_size
        self.grid_size = grid_size
        self.low_frequencies = RECIPES[recipe].low_frequencies

        with seeded(seed):
            self.backbone = FeaturePyramid(backbone, pre_trained=pre_trained, weights=weights, image_size=image_size)
            channels = self.backbone.channels  # fine to coarse
            self.standardization = FeatureStandardization(channels) if RECIPES[recipe].standardize else None
            levels = len(channels)
            self.frequency_split = GaussianFrequencySplit()
            self.jitter = FeatureJitter(scale=jitter_scale, probability=jitter_probability)
            self.pixel_decoder = FPNPixelDecoder(
                [2 * c for c in channels],
                hidden_dim=hidden_dim,
                feedforward_dim=feedforward_dim,
                grid_size=grid_size,
            )
            self.source_embedding = SourceEmbedding(hidden_dim, levels=levels)
            self.query_generator = GatedQueryGenerator(hidden_dim, grid_size=grid_size)
            self.decoder = SpatialChannelDecoder(
                hidden_dim,
                feedforward_dim=feedforward_dim,
                grid_size=grid_size,
                levels=levels,
                channel_branch=channel_branch,
            )
            self.norm = nn.LayerNorm(hidden_dim)
            self.heads = nn.ModuleList(
                ReconstructionHead(hidden_dim, c, scale=2**level) for level, c in enumerate(reversed(channels))
            )
            self._reset_parameters()
            self.detector = RECIPES[recipe].detector(channels[::-1], image_size)
        self.register_load_state_dict_pre_hook(_rename_keys_of_0_2)

    def _reset_parameters(self) -> None:
        """Initialise as the release does; pixel decoder, source embedding and heads look after themselves."""
        xavier = (MultiGranularityGatedCNN, nn.MultiheadAttention, nn.Linear, nn.Embedding)
        for part in (self.query_generator, self.decoder):
            for module in part.modules():
                if isinstance(module, xavier):
                    for parameter in module.parameters():
                        if parameter.ndim > 1:
                            nn.init.xavier_uniform_(parameter)

    def reconstruct(self, image: Tensor) -> Reconstruction:
        """Reconstruct the backbone features of an image.

        Args:
            image: Normalised images ``(B, 3, H, W)``.

        Returns:
            Reconstructions and targets, coarse to fine.

        Raises:
            ValueError: If the images have another size than the model was built for.
        """
        check_image_size(image, self.image_size)
        return self.reconstruct_features(self.backbone(image))

    def reconstruct_features(self, features: Sequence[Tensor]) -> Reconstruction:
        """Reconstruct backbone features.

        Args:
            features: The backbone's taps ``[(B, C_i, H_i, W_i)]``, fine to coarse.

        Returns:
            Reconstructions and targets, coarse to fine.
        """
        standardization = self.standardization
        low_frequencies, inputs = self.frequency_split(
            features if standardization is None else standardization(features)
        )
        inputs = [self.jitter(x) for x in inputs]

        deepest, sources = self.embed(inputs)  # coarse to fine from here on
        tokens = self.decoder(self.query_generator(deepest), sources)
        maps = [self.norm(t).mT.unflatten(2, deepest.shape[-2:]) for t in tokens]  # (B, D, h, w)
        reconstructions = [head(x) for head, x in zip(self.heads, maps, strict=True)]

        # Back in the backbone's own space, where directions mean what they do in the paper.
        restore = list if standardization is None else standardization.restore
        targets = restore(low_frequencies) if self.low_frequencies else list(features)
        stds = None if standardization is None else standardization.stds[::-1]
        return Reconstruction(restore(reconstructions[::-1])[::-1], targets[::-1], stds)

    def embed(self, inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode the pixels and embed what comes of it.

        Args:
            inputs: Decoder inputs ``[(B, 2 C_i, H_i, W_i)]``, fine to coarse.

        Returns:
            The deepest memory map ``(B, D, h, w)`` and the source tokens ``[(B, N, D)]``, coarse to fine.
        """
        memory = self.pixel_decoder(inputs)
        return memory[0], self.source_embedding(memory)

    @torch.no_grad()
    def forward(self, image: Tensor) -> InferenceBatch:
        """Detect anomalies.

        Args:
            image: Normalised images ``(B, 3, H, W)``, of any size with a ``tiling``.

        Returns:
            Raw anomaly map ``(B, 1, H, W)`` and raw image score ``(B,)``; higher is more anomalous.
        """
        return self.by_tiles(image, lambda tiles: self.detect(self.reconstruct(tiles), tiles))

    @torch.no_grad()
    def detect(self, reconstruction: Reconstruction, image: Tensor) -> InferenceBatch:
        """Return raw anomaly map ``(B, 1, H, W)`` and raw image score ``(B,)`` of a reconstruction.

        Args:
            reconstruction: What :meth:`reconstruct` makes of the image.
            image: Normalised images ``(B, 3, H, W)``.
        """
        return self.detector(self.residual(reconstruction, image))

    def residual(self, reconstruction: Reconstruction, image: Tensor) -> Residual:
        """Return what the detector sees of normalised images ``(B, 3, H, W)`` and their reconstruction."""
        return self.detector.residual(image, reconstruction.reconstructions, reconstruction.targets)


OLD_KEYS = {
    "anomaly_map.whitening.scale": "detector.clusters.scale",
    "anomaly_map.whitening.centers": "detector.clusters.centers",
    "anomaly_map.whitening.directions.": "detector.distances.directions.",
    "anomaly_map.whitening.": "detector.distances.whitening.",
    "segmentation_head.": "detector.parts.segmentation_head.",
}
"""Beginnings of the names that version 0.2.0 gave to parts of the detector, and those of today."""


def _rename_keys_of_0_2(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let checkpoints of version 0.2.0 load."""
    del module, args
    for key in list(state_dict):
        for old, new in OLD_KEYS.items():
            if key.startswith(prefix + old):
                state_dict[prefix + new + key.removeprefix(prefix + old)] = state_dict.pop(key)
                break


def _validate_sizes(image_size: tuple[int, int], *, hidden_dim: int, channel_branch: bool) -> tuple[int, int]:
    """Return the token grid, or say which size is at fault."""
    grid_size = token_grid(image_size)
    if hidden_dim < NORM_GROUPS or hidden_dim % NORM_GROUPS:
        msg = f"hidden_dim must be a multiple of {NORM_GROUPS} (group norm), got {hidden_dim}."
        raise ValueError(msg)
    tokens = grid_size[0] * grid_size[1]
    if channel_branch and tokens % HEADS:
        msg = (
            f"The channel branch splits the {grid_size[0]}x{grid_size[1]} = {tokens} tokens over {HEADS} heads, which "
            f"does not come out even for image_size={image_size}. Take a size with an even number of 32-pixel steps, "
            "such as (224, 224) or (256, 256), or channel_branch=False."
        )
        raise ValueError(msg)
    return grid_size
