# SPDX-License-Identifier: Apache-2.0
"""Gaussian frequency split of the backbone features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomalib_uniass.layers.gaussian_blur import GaussianBlur2d


class GaussianFrequencySplit(nn.Module):
    """Split features into low and high frequencies: ``[(B, C_i, H_i, W_i)] -> targets, inputs``.

    With G a 3x3 Gaussian blur of sigma 1, the reconstruction target of a level is ``G(f)`` and the decoder's input
    ``[G(f), f - G(f)]``: the network sees everything, but has to reconstruct the low frequencies only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blur = GaussianBlur2d(kernel_size=3, sigma=1.0)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return targets ``(B, C_i, H_i, W_i)`` and inputs ``(B, 2 C_i, H_i, W_i)`` in the order given."""
        low = [self.blur(feature) for feature in features]
        inputs = [torch.cat([g, f - g], dim=1) for g, f in zip(low, features, strict=True)]
        return low, inputs
