# SPDX-License-Identifier: Apache-2.0
"""UniAD as a plain PyTorch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.layers.feature_jitter import FeatureJitter
from anomalib_uniass.layers.neighbor_mask import neighbor_mask
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.layers.tiling import TiledModel
from anomalib_uniass.layers.token_grid import check_image_size, token_grid
from anomalib_uniass.layers.transformer import EncoderLayer
from anomalib_uniass.models.uniad.anomaly_map import AnomalyMapGenerator, image_score
from anomalib_uniass.models.uniad.decoder import LearnedPositionEmbedding2d, QueryDecoderLayer

HEADS = 8
DEPTH = 4


class Reconstruction(NamedTuple):
    """Reconstructed features and what they should be, ``(B, C, h, w)`` each."""

    reconstruction: Tensor
    target: Tensor

    def of(self, images: Tensor) -> "Reconstruction":
        """Return the part of some images of the batch, given by their indices ``(n,)``."""
        return Reconstruction(self.reconstruction[images], self.target[images])


class UniADModel(TiledModel):
    """UniAD: one transformer that reconstructs the features of all categories (You et al., NeurIPS 2022).

    ``(B, 3, H, W) -> anomaly map (B, 1, H, W), image score (B,)``. B batch, H W size, h w = H / 16, W / 16 token grid,
    N = h * w tokens, C channels of all taps together, D = `hidden_dim`.

    Args:
        backbone: timm name of the frozen backbone (strides 2, 4, 8, 16).
        pre_trained: Load ImageNet weights of the backbone.
        weights: Weights file or installed weights package instead of timm's hub.
        image_size: Height and width of the input, multiples of 16, fixed at construction; one of them must be larger
            than 112, or the neighbour mask hides all tokens from some token.
        hidden_dim: Width D, a multiple of 8.
        feedforward_dim: Width of every feed-forward layer.
        jitter_scale: Strength of the feature jitter in training.
        jitter_probability: Chance of the jitter per batch.
        seed: Seed of the initial weights; leaves torch's global generator alone. None draws from the latter.

    Raises:
        ValueError: If sizes do not fit together; the message says which.
    """

    neighbor_mask: Tensor

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] = (224, 224),
        hidden_dim: int = 256,
        feedforward_dim: int = 1024,
        jitter_scale: float = 20.0,
        jitter_probability: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_dim < HEADS or hidden_dim % HEADS:
            msg = f"hidden_dim must be a multiple of {HEADS} (attention heads), got {hidden_dim}."
            raise ValueError(msg)
        self.image_size = image_size
        self.grid_size = token_grid(image_size)
        height, width = self.grid_size
        self.register_buffer("neighbor_mask", neighbor_mask(height, width), persistent=False)

        with seeded(seed):
            self.backbone = FeaturePyramid(
                backbone, pre_trained=pre_trained, weights=weights, image_size=image_size, exact=False
            )
            channels = sum(self.backbone.channels)
            self.jitter = FeatureJitter(scale=jitter_scale, probability=jitter_probability)
            self.input_proj = nn.Linear(channels, hidden_dim)
            self.position = LearnedPositionEmbedding2d(self.grid_size, hidden_dim)
            self.encoder = nn.ModuleList(
                EncoderLayer(hidden_dim, heads=HEADS, feedforward_dim=feedforward_dim) for _ in range(DEPTH)
            )
            self.decoder = nn.ModuleList(
                QueryDecoderLayer(hidden_dim, tokens=height * width, heads=HEADS, feedforward_dim=feedforward_dim)
                for _ in range(DEPTH)
            )
            self.norm = nn.LayerNorm(hidden_dim)
            self.output_proj = nn.Linear(hidden_dim, channels)
            self.anomaly_map = AnomalyMapGenerator(image_size)
            self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialise as the release does; embeddings and attention inputs look after themselves."""
        for part in (self.input_proj, self.encoder, self.decoder, self.output_proj):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def reconstruct(self, image: Tensor) -> Reconstruction:
        """Reconstruct the backbone features of an image.

        Args:
            image: Normalised images ``(B, 3, H, W)``.

        Returns:
            Reconstruction and target.

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
            Reconstruction and target, all taps on the token grid.
        """
        target = self._align(features)
        tokens = self.input_proj(self.jitter(target).flatten(2).mT)  # (B, N, D)

        position = self.position()
        memory = tokens
        for layer in self.encoder:
            memory = layer(memory, position=position, mask=self.neighbor_mask)
        decoded = memory
        for layer in self.decoder:
            decoded = layer(decoded, memory, position=position, mask=self.neighbor_mask)

        reconstruction = self.output_proj(self.norm(decoded)).mT.unflatten(2, self.grid_size)  # (B, C, h, w)
        return Reconstruction(reconstruction, target)

    def _align(self, features: Sequence[Tensor]) -> Tensor:
        """Resize all taps to the token grid and concatenate them: ``[(B, C_i, H_i, W_i)] -> (B, C, h, w)``."""
        return torch.cat(
            [F.interpolate(f, size=self.grid_size, mode="bilinear", align_corners=True) for f in features], dim=1
        )

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
            image: The image itself, which UniAS looks at and UniAD does not.
        """
        del image
        anomaly_map = self.anomaly_map(*reconstruction)
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=image_score(anomaly_map))
