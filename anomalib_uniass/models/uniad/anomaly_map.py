# SPDX-License-Identifier: Apache-2.0
"""Anomaly map: Euclidean distance between the features and their reconstruction."""

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.precision import full_precision, widen

SCORE_WINDOW = 16


class AnomalyMapGenerator(nn.Module):
    """Compare a reconstruction with its target: ``(B, C, h, w) x 2 -> (B, 1, H, W)``.

    In float32 at least, whatever precision autocast gave the features.

    Args:
        image_size: Height H and width W of the map.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the distance over channels at the input's size; non-negative."""
        with full_precision(target):
            distance = (widen(reconstruction) - widen(target)).square().sum(dim=1, keepdim=True).sqrt()
            return F.interpolate(distance, size=self.image_size, mode="bilinear", align_corners=True)


def image_score(anomaly_map: Tensor) -> Tensor:
    """Reduce an anomaly map to the highest mean of a 16x16 window, as the release does: ``(B, 1, H, W) -> (B,)``."""
    with full_precision(anomaly_map):
        return F.avg_pool2d(widen(anomaly_map), kernel_size=SCORE_WINDOW, stride=1).amax(dim=(1, 2, 3))
