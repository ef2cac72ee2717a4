# SPDX-License-Identifier: Apache-2.0
"""Anomaly map: cosine distances of the levels, fused by their product."""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.gaussian_blur import GaussianBlur2d
from anomalib_uniass.models.unias.whitening import ErrorWhitening

ImageScore = Literal["std", "max", "top"]


class AnomalyMapGenerator(nn.Module):
    """Compare reconstructions with their targets: ``[(B, C_i, H_i, W_i)] x 2 -> (B, 1, H, W)``.

    Args:
        image_size: Height and width of the final map; the levels are fused at half of it.
        levels: Number of levels, counted from the coarsest; the paper's four or fewer.
        whitened_channels: Channels C_i, coarse to fine, to compare features that are whitened; None, as in the paper,
            compares them as they are.
    """

    def __init__(
        self, image_size: tuple[int, int], *, levels: int = 4, whitened_channels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        height, width = image_size
        self.fusion_size = (height // 2, width // 2)
        # Coarse to fine, as in the release: the finer the level, the wider its blur.
        self.blurs = nn.ModuleList(GaussianBlur2d(sigma=k / 3, kernel_size=k) for k in (3, 5, 7, 9)[:levels])
        self.whitenings = nn.ModuleList(
            [nn.Identity() for _ in self.blurs]
            if whitened_channels is None
            else [ErrorWhitening(channels) for channels in whitened_channels]
        )

    def observe(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Take in the errors of a training step, for the whitening."""
        for whitening, reconstruction, target in zip(self.whitenings, reconstructions, targets, strict=True):
            if isinstance(whitening, ErrorWhitening):
                whitening.update(reconstruction, target)

    def level_maps(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Return the blurred cosine distance of every level, ``(B, 1, H / 2, W / 2)`` each, in [0, 2].

        Args:
            reconstructions: Reconstructed features, coarse to fine.
            targets: Their targets, coarse to fine.
        """
        maps = []
        for blur, whiten, reconstruction, target in zip(
            self.blurs, self.whitenings, reconstructions, targets, strict=True
        ):
            distance = 1 - F.cosine_similarity(whiten(reconstruction), whiten(target), dim=1)[:, None]
            maps.append(blur(F.interpolate(distance, size=self.fusion_size, mode="bilinear", align_corners=False)))
        return maps

    def forward(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the product of the level maps at the input's size."""
        product = reduce(torch.mul, self.level_maps(reconstructions, targets))  # m4 * m3 * m2 * m1
        return F.interpolate(product, scale_factor=2.0, mode="bilinear", align_corners=True)


def image_score(anomaly_map: Tensor, *, reduction: ImageScore = "std", top_share: float = 0.01) -> Tensor:
    """Reduce an anomaly map to one score per image: ``(B, 1, H, W) -> (B,)``.

    Args:
        anomaly_map: Raw anomaly maps.
        reduction: ``std``, the standard deviation over pixels (the release's evaluation); ``max``, the maximum; or
            ``top``, the mean over the highest share of the pixels.
        top_share: That share, in (0, 1].
    """
    pixels = anomaly_map.flatten(1)
    if reduction == "std":
        return pixels.std(dim=1)
    if reduction == "max":
        return pixels.amax(dim=1)
    count = max(1, round(top_share * pixels.shape[1]))
    return torch.topk(pixels, count, dim=1).values.mean(dim=1)
