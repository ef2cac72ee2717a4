# SPDX-License-Identifier: Apache-2.0
"""A memory bank that looks for alike images first: the strongest peer without training that we know.

As in RAD (anomalib 2.7 has it on DINOv3 alone): the training images that are most alike by their mean features are
retrieved, and each patch is compared with their patches at the same place and beside it. So a bank of many categories
does not compare bricks with solar cells, nor the middle of a part with its rim. All patches are kept.
"""

from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass import BoundedPatchcore
from anomalib_uniass.models.unias.detector.guided_filter import follow_edges

ALIKE = 16
"""Retrieved images of a test image, chosen of 4, 16 and 48 on the development part."""


class RetrievalBank(BoundedPatchcore):
    """Patchcore on the same backbone and levels, with retrieval before it compares."""

    guided = False

    def __init__(self, backbone: str, *, weights: str | None, visualizer: bool, evaluator: bool) -> None:
        super().__init__(backbone, weights=weights, visualizer=visualizer, evaluator=evaluator)
        self.model = RetrievalModel(self.model, guided=self.guided)  # type: ignore[assignment]

    def on_fit_start(self) -> None:
        """Begin with an empty bank."""
        self.model.embeddings.clear()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep what the model has kept."""

    def fit(self) -> None:
        """Make the bank of all images."""
        self.model.fit()


class GuidedBank(RetrievalBank):
    """The same with the guided filter of UniAS's recipe `best` behind its maps, which helps any map."""

    guided = True


class RetrievalModel(nn.Module):
    """``(B, 3, H, W) -> anomaly map (B, 1, H, W), image score (B,)``.

    Args:
        patchcore: anomalib's model, whose patches and maps these are.
        guided: Whether the maps end where the images have edges.
    """

    def __init__(self, patchcore: nn.Module, *, guided: bool) -> None:
        super().__init__()
        self.patchcore: Any = patchcore
        self.guided = guided
        self.embeddings: list[Tensor] = []
        self.register_buffer("memory_bank", torch.empty(0))
        self.register_buffer("scale", torch.empty(0))

    def embed(self, image: Tensor) -> Tensor:
        """Return the patches ``(B, C, h, w)``."""
        features = self.patchcore.feature_extractor(image)
        return self.patchcore.generate_embedding(
            {name: self.patchcore.feature_pooler(feature) for name, feature in features.items()}
        )

    def fit(self) -> None:
        """Make the bank ``(images, C, h, w)`` of what was seen in training mode."""
        self.memory_bank = torch.cat(self.embeddings)
        self.scale = self.memory_bank.mean((2, 3)).std(dim=0)
        self.embeddings.clear()

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor | InferenceBatch:
        """Keep the patches in training, else compare them."""
        patches = self.embed(image)
        if self.training:
            self.embeddings.append(patches)
            return patches
        distances = torch.stack([self.distances(one) for one in patches])[:, None]
        anomaly_map = self.patchcore.anomaly_map_generator(distances, image.shape[-2:])
        if self.guided:
            anomaly_map = follow_edges(anomaly_map, image)
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=distances.amax(dim=(1, 2, 3)))

    def distances(self, patches: Tensor) -> Tensor:
        """Return the distance of each patch of an image to the nearest one: ``(C, h, w) -> (h, w)``."""
        height, width = patches.shape[1:]
        descriptors = F.normalize(self.memory_bank.mean((2, 3)) / self.scale, dim=1)
        own = F.normalize(patches.mean((1, 2)) / self.scale, dim=0)
        alike = self.memory_bank[(descriptors @ own).topk(min(ALIKE, len(descriptors))).indices]
        around = F.pad(alike, (1, 1, 1, 1), mode="replicate")
        places = [around[:, :, row : row + height, column : column + width] for row in range(3) for column in range(3)]
        squares = [(place - patches).square().sum(dim=1).amin(dim=0) for place in places]
        return torch.stack(squares).amin(dim=0).sqrt()
