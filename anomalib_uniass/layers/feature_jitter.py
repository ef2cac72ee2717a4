# SPDX-License-Identifier: Apache-2.0
"""Feature jitter: noise that keeps a reconstruction network from learning the identity."""

import torch
from torch import Tensor, nn


class FeatureJitter(nn.Module):
    """Add Gaussian noise in proportion to the feature's norm, in training only: ``(B, C, H, W) -> (B, C, H, W)``.

    ``x + z * ||x||_2 / C * scale`` with the norm over channels and z standard normal
    (You et al., UniAD, NeurIPS 2022; UniAS draws it per level for half of the batches).

    Args:
        scale: Strength of the noise.
        probability: Chance that a call adds noise, in [0, 1].

    Raises:
        ValueError: If `scale` is negative or `probability` lies outside [0, 1].
    """

    def __init__(self, *, scale: float = 20.0, probability: float = 0.5) -> None:
        super().__init__()
        if scale < 0 or not 0 <= probability <= 1:
            msg = f"jitter needs scale >= 0 and probability in [0, 1], got scale={scale}, probability={probability}."
            raise ValueError(msg)
        self.scale = scale
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with noise, or `x` itself."""
        if not self.training or torch.rand(()) >= self.probability:
            return x
        norm = x.norm(dim=1, keepdim=True) / x.shape[1]
        return x + torch.randn_like(x) * norm * self.scale
