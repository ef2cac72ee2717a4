# SPDX-License-Identifier: Apache-2.0
"""Distances, parts and score, one after the other."""

from collections.abc import Callable, Mapping

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_uniass.models.unias.detector.clusters import Clusters
from anomalib_uniass.models.unias.detector.distances import CosineDistances
from anomalib_uniass.models.unias.detector.parts import Fitted, Part
from anomalib_uniass.models.unias.detector.residual import Levels, Residual

Score = Callable[[Tensor, Levels], Tensor]
"""Anomaly map ``(B, 1, H, W)`` and level maps -> score ``(B,)``."""


class Detector(nn.Module):
    """Make anomaly map and score of a residual; which parts there are is told by :mod:`.recipes`.

    Args:
        distances: Distance of every level, and their product.
        score: Makes the image score of the map and the level maps.
        parts: What comes between product and map, by name, in this order.
        clusters: Finds the kind of an image, for parts that ask for it; None where none does.
    """

    def __init__(
        self,
        distances: CosineDistances,
        *,
        score: Score,
        parts: Mapping[str, Part] | None = None,
        clusters: Clusters | None = None,
    ) -> None:
        super().__init__()
        self.clusters = clusters
        self.distances = distances
        self.parts = nn.ModuleDict(parts or {})
        self.score = score

    def residual(self, image: Tensor, reconstructions: Levels, targets: Levels) -> Residual:
        """Return what the parts see of images ``(B, 3, H, W)``."""
        clusters = None if self.clusters is None else self.clusters(targets[0])
        return Residual(image, reconstructions, targets, clusters)

    def forward(self, residual: Residual) -> InferenceBatch:
        """Return raw anomaly map ``(B, 1, H, W)``, a product of four distances, and raw image score ``(B,)``."""
        level_maps = self.distances(residual)  # (B, 1, H / 2, W / 2) each
        anomaly_map = self.distances.fuse(level_maps, residual)  # (B, 1, H, W)
        if self.parts:
            distance = anomaly_map.clamp_min(0) ** (1 / len(level_maps))  # the geometric mean of the levels
            for part in self.parts.values():
                distance = part(distance, residual)
            anomaly_map = distance ** len(level_maps)
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=self.score(anomaly_map, level_maps))

    # --- At the end of a training ---

    def parts_to_fit(self) -> list[Fitted]:
        """Return what is fitted to the trained network, in this order: each may ask those before it."""
        return [module for module in self.modules() if isinstance(module, Fitted)]

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was fitted to other weights."""
        for part in self.parts_to_fit():
            part.reset()

    def lacks(self) -> list[str]:
        """Say what weights miss whose training did not end."""
        return [lack for part in self.parts_to_fit() if (lack := part.lack())]
