# SPDX-License-Identifier: Apache-2.0
"""How far features are from their reconstruction: a distance of every level, and their product."""

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.gaussian_blur import GaussianBlur2d
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.detector.directions import Directions
from anomalib_uniass.models.unias.detector.parts import Fitted, Training
from anomalib_uniass.models.unias.detector.residual import COARSE_LEVELS, Levels, Residual, clusters_of
from anomalib_uniass.models.unias.detector.whitening import Whitening


class CosineDistances(nn.Module):
    """Cosine distance of every level and their product, as in the paper.

    In float32 at least, whatever precision autocast gave the features: products of four small distances do not exist
    in float16, and a map of bfloat16 has few values.

    Args:
        image_size: Height H and width W of the final map; the levels are fused at half of it.
        levels: Number of levels, counted from the coarsest; the paper's four or fewer.
    """

    def __init__(self, image_size: tuple[int, int], *, levels: int = 4) -> None:
        super().__init__()
        height, width = image_size
        self.fusion_size = (height // 2, width // 2)
        # Coarse to fine, as in the release: the finer the level, the wider its blur.
        self.blurs = nn.ModuleList(GaussianBlur2d(sigma=k / 3, kernel_size=k) for k in (3, 5, 7, 9)[:levels])

    def forward(self, residual: Residual) -> list[Tensor]:
        """Return the blurred distance of every level, ``(B, 1, H / 2, W / 2)`` each, coarse to fine, in [0, 2]."""
        with full_precision(residual.targets[0]):
            distances = self.compare(residual)
            maps = [F.interpolate(x, size=self.fusion_size, mode="bilinear", align_corners=False) for x in distances]
            return [blur(level_map) for blur, level_map in zip(self.blurs, maps, strict=True)]

    def compare(self, residual: Residual) -> list[Tensor]:
        """Return the distance of every level, ``(B, 1, H_j, W_j)`` each."""
        pairs = zip(residual.reconstructions, residual.targets, strict=True)
        return [cosine_distance(widen(x), widen(y)) for x, y in pairs]

    def fuse(self, level_maps: Levels, residual: Residual) -> Tensor:
        """Return the product of the level maps at the size of the image, ``(B, 1, H, W)``."""
        fused = reduce(torch.mul, self.weigh([widen(m) for m in level_maps], residual))  # m4 * m3 * m2 * m1
        with full_precision(fused):
            return F.interpolate(fused, scale_factor=2.0, mode="bilinear", align_corners=True)

    def weigh(self, level_maps: list[Tensor], residual: Residual) -> list[Tensor]:
        """Return the level maps as they enter the product: as they are."""
        del residual
        return level_maps


class WhitenedDistances(CosineDistances, Fitted):
    """Distances by what errors good images of the same cluster have (recipe `best`, not in the paper).

    Args:
        image_size: As of :class:`CosineDistances`.
        whitening: Which directions and levels say little.
        directions: Which errors are known, on the coarse levels; None takes all alike.
    """

    def __init__(
        self, image_size: tuple[int, int], *, whitening: Whitening, directions: Directions | None = None
    ) -> None:
        super().__init__(image_size, levels=whitening.levels)
        self.whitening = whitening
        self.directions = directions

    def compare(self, residual: Residual) -> list[Tensor]:
        """Return the distance of every level, ``(B, 1, H_j, W_j)`` each, less where errors are known."""
        clusters, distances = clusters_of(residual), []
        for level, pair in enumerate(zip(residual.reconstructions, residual.targets, strict=True)):
            x, y = (self.whitening(level, widen(features), clusters) for features in pair)
            distance = cosine_distance(x, y)
            if self.directions is not None:
                distance = self.directions(level, distance, y - x, clusters)
            distances.append(distance)
        return distances

    def weigh(self, level_maps: list[Tensor], residual: Residual) -> list[Tensor]:
        """Return the level maps to the power of how much their level says."""
        exponents = self.whitening.exponents[clusters_of(residual)].T[:, :, None, None, None]
        return [m.clamp_min(0) ** exponent for m, exponent in zip(level_maps, exponents, strict=True)]

    def fit(self, training: Training) -> None:
        """Take the statistics of the errors, then their directions in the whitened space."""
        self.whitening.fit(training.residuals())
        if self.directions is not None:
            self.directions.fit(map(self._whitened_errors, training.residuals()))

    def _whitened_errors(self, residual: Residual) -> tuple[list[Tensor], Tensor]:
        """Return the whitened errors of the coarse levels, and the clusters."""
        clusters = clusters_of(residual)
        pairs = list(zip(residual.reconstructions, residual.targets, strict=True))[:COARSE_LEVELS]
        return [self.whitening(level, target - r, clusters) for level, (r, target) in enumerate(pairs)], clusters

    def reset(self) -> None:
        """Forget statistics and directions."""
        self.whitening.reset()
        if self.directions is not None:
            self.directions.reset()

    def lack(self) -> str:
        """Say that there are no statistics."""
        if self.whitening.fitted:
            return ""
        return (
            "These weights have no statistics of their errors: they are taken when a training ends, and this one did "
            "not. All errors weigh alike."
        )


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return one minus the cosine over the channels: ``(B, C, H, W) x 2 -> (B, 1, H, W)``, in [0, 2].

    As half the squared distance of the directions, which is the same and keeps its digits where they nearly agree: a
    cosine in bfloat16, as exported models may compute it, has steps of 0.004 below 1.
    """
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1, keepdim=True) / 2
