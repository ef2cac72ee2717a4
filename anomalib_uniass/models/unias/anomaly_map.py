# SPDX-License-Identifier: Apache-2.0
"""Anomaly map: cosine distances of the levels, fused by their product."""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.gaussian_blur import GaussianBlur2d
from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.residual_whitening import ResidualWhitening

ImageScore = Literal["std", "max", "top"]

TOP_SHARE = 0.003
"""Share of the pixels whose mean is the score of an image in recipe `best`."""

EVENNESS = 1 / 4
"""How far recipe `best` goes from maps as they are, 0, to maps of one root mean square, 1."""


class AnomalyMapGenerator(nn.Module):
    """Compare reconstructions with their targets: ``[(B, C_i, H_i, W_i)] x 2 -> (B, 1, H, W)``.

    In float32 at least, whatever precision autocast gave the features: products of four small distances do not exist
    in float16, and a map of bfloat16 has few values.

    Args:
        image_size: Height and width of the final map; the levels are fused at half of it.
        levels: Number of levels, counted from the coarsest; the paper's four or fewer.
        whitening: Statistics of the errors on good images, to compare by; None, as in the paper, compares features as
            they are and all levels alike.
    """

    def __init__(
        self, image_size: tuple[int, int], *, levels: int = 4, whitening: ResidualWhitening | None = None
    ) -> None:
        super().__init__()
        height, width = image_size
        self.fusion_size = (height // 2, width // 2)
        # Coarse to fine, as in the release: the finer the level, the wider its blur.
        self.blurs = nn.ModuleList(GaussianBlur2d(sigma=k / 3, kernel_size=k) for k in (3, 5, 7, 9)[:levels])
        self.whitening = whitening

    def level_maps(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the blurred cosine distance of every level, ``(B, 1, H / 2, W / 2)`` each, in [0, 2].

        Args:
            reconstructions: Reconstructed features, coarse to fine.
            targets: Their targets, coarse to fine.
        """
        with full_precision(targets[0]):
            distances = self._distances([widen(x) for x in reconstructions], [widen(x) for x in targets])
            maps = [F.interpolate(x, size=self.fusion_size, mode="bilinear", align_corners=False) for x in distances]
            return [blur(level_map) for blur, level_map in zip(self.blurs, maps, strict=True)]

    def _distances(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the cosine distance of every level, ``(B, 1, H_i, W_i)`` each, by the statistics if there are any."""
        pairs = zip(reconstructions, targets, strict=True)
        if (whitening := self.whitening) is None:
            return [cosine_distance(x, y) for x, y in pairs]
        clusters, distances = whitening.clusters(targets[0]), []
        for level, pair in enumerate(pairs):
            x, y = (whitening.whiten(level, features, clusters) for features in pair)
            distances.append(whitening.directions(level, cosine_distance(x, y), y - x, clusters))
        return distances

    def fuse(self, maps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the product of the level maps, ``(B, 1, H, W)``, of those that say something of the image."""
        maps = [widen(m) for m in maps]
        if self.whitening is not None:
            exponents = self.whitening.exponents[self.whitening.clusters(targets[0])].T[:, :, None, None, None]
            maps = [m.clamp_min(0) ** exponent for m, exponent in zip(maps, exponents, strict=True)]
        fused = reduce(torch.mul, maps)  # m4 * m3 * m2 * m1
        with full_precision(fused):
            return F.interpolate(fused, scale_factor=2.0, mode="bilinear", align_corners=True)

    def forward(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the fused level maps at the input's size."""
        return self.fuse(self.level_maps(reconstructions, targets), targets)


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return one minus the cosine over the channels: ``(B, C, H, W) x 2 -> (B, 1, H, W)``, in [0, 2].

    As half the squared distance of the directions, which is the same and keeps its digits where they nearly agree: a
    cosine in bfloat16, as exported models may compute it, has steps of 0.004 below 1.
    """
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1, keepdim=True) / 2


def even_out(anomaly_map: Tensor) -> Tensor:
    """Make the maps of different images more alike: divide each by the fourth root of its root mean square.

    Otherwise what surrounds a strong defect of one image outranks the weak defects of all others. Divided by all of it,
    good images would rank as high as defective ones.

    Args:
        anomaly_map: Products of level maps, ``(B, 1, H, W)``, none negative.
    """
    energy = anomaly_map.square().mean(dim=(1, 2, 3), keepdim=True)
    return anomaly_map / energy.clamp_min(torch.finfo(energy.dtype).tiny) ** (EVENNESS / 2)


def image_score(anomaly_map: Tensor, *, reduction: ImageScore = "std", top_share: float = TOP_SHARE) -> Tensor:
    """Reduce an anomaly map to one score per image: ``(B, 1, H, W) -> (B,)``.

    Args:
        anomaly_map: Raw anomaly maps.
        reduction: ``std``, the standard deviation over pixels (the release's evaluation); ``max``, the maximum; or
            ``top``, the mean over the highest share of the pixels.
        top_share: That share, in (0, 1].
    """
    pixels = widen(anomaly_map).flatten(1)
    if reduction == "std":
        return pixels.std(dim=1)
    if reduction == "max":
        return pixels.amax(dim=1)
    count = max(1, round(top_share * pixels.shape[1]))
    return torch.topk(pixels, count, dim=1).values.mean(dim=1)
