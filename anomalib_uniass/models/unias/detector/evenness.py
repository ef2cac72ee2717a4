# SPDX-License-Identifier: Apache-2.0
"""Evenness: maps of different images become more alike (recipe `best`, not in the paper)."""

from torch import Tensor

from anomalib_uniass.models.unias.detector.parts import Part
from anomalib_uniass.models.unias.detector.residual import Residual

EVENNESS = 1 / 4
"""How far maps go from as they are, 0, to maps of one root mean square, 1."""

SMALLEST = 1e-5
"""Distance below which a map is of no defect, whatever its highest value."""


class Evenness(Part):
    """Divide the map of each image by the fourth root of its root mean square, as a product of distances.

    Otherwise what surrounds a strong defect of one image outranks the weak defects of all others. Divided by all of it,
    good images would rank as high as defective ones. With tiles each tile counts as an image.

    Args:
        levels: Number of levels, whose geometric mean the distances are.
    """

    def __init__(self, *, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, distance: Tensor, residual: Residual) -> Tensor:
        """Return the distances, evened out."""
        del residual
        order = 2 * self.levels  # squares of products
        highest = distance.amax(dim=(1, 2, 3), keepdim=True).clamp_min(SMALLEST)  # powers of small numbers vanish
        mean = highest * (distance / highest).pow(order).mean(dim=(1, 2, 3), keepdim=True) ** (1 / order)
        return distance / mean.clamp_min(SMALLEST) ** EVENNESS
