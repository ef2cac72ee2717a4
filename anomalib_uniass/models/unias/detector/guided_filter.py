# SPDX-License-Identifier: Apache-2.0
"""Guided filter: lets the anomaly map end where the image has an edge (recipe `best`, not in the paper)."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.precision import full_precision, widen
from anomalib_uniass.models.unias.detector.parts import Part
from anomalib_uniass.models.unias.detector.residual import Residual

RADIUS = 6
"""Pixels from the middle of a window to its border: a window is about as wide as a token."""

EPSILON = 0.01
"""Variance of the image, in that of all its pixels, below which a window counts as flat."""


class GuidedFilter(Part):
    """Filter the map by its image.

    The coarse levels see a defect some pixels wider than it is. Within a window the map becomes a linear function of
    the image's grey (He, Sun and Tang, TPAMI 2013, eq. 5 to 8), so that it falls where the image changes; where the
    image is flat the map is smoothed. It is the geometric mean of the levels, which a strong defect does not rule.
    """

    def forward(self, distance: Tensor, residual: Residual) -> Tensor:
        """Return the filtered map."""
        return follow_edges(distance, residual.image)


def follow_edges(distance: Tensor, image: Tensor) -> Tensor:
    """Return the map ``(B, 1, H, W)``, none negative, filtered by its normalised image ``(B, 3, H, W)``."""
    with full_precision(image):
        grey = widen(image).mean(dim=1, keepdim=True)
        variance, mean = torch.var_mean(grey, dim=(2, 3), keepdim=True, correction=0)
        guide = (grey - mean) / variance.clamp_min(1e-6).sqrt()
        return guided_filter(distance, guide).clamp_min(0)


def guided_filter(x: Tensor, guide: Tensor) -> Tensor:
    """Fit x by the guide in the window around every pixel, and average the fits that a pixel is in.

    Args:
        x: What is filtered, ``(B, 1, H, W)``.
        guide: What it follows, likewise, of a standard deviation near one.
    """
    mean_x, mean_guide, mean_product, mean_square = _window_means(torch.cat([x, guide, x * guide, guide.square()], 1))
    slope = (mean_product - mean_x * mean_guide) / (mean_square - mean_guide.square() + EPSILON)
    offset = mean_x - slope * mean_guide
    slope, offset = _window_means(torch.cat([slope, offset], dim=1))
    return slope * guide + offset


def _window_means(maps: Tensor) -> tuple[Tensor, ...]:
    """Return the mean over the window around every pixel, as far as it lies within: a map ``(B, 1, H, W)`` each."""
    size = 2 * RADIUS + 1
    rows = F.avg_pool2d(maps, (size, 1), stride=1, padding=(RADIUS, 0), count_include_pad=False)
    means = F.avg_pool2d(rows, (1, size), stride=1, padding=(0, RADIUS), count_include_pad=False)
    return means.split(1, dim=1)
