# SPDX-License-Identifier: Apache-2.0
"""Uniform sample of a stream of patches, and the coreset of such a sample."""

import torch
from torch import Tensor


class PatchSample:
    """Uniform random sample, without replacement, of all patches that were added: never more than `size` of them.

    Every patch draws a number in [0, 1), and the patches with the highest ones stay.

    Args:
        size: Most patches to keep.
        seed: Seed of the draw.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        self.size = size
        self.patches: Tensor | None = None
        self._draws = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, patches: Tensor) -> None:
        """Take part of ``(P, C)`` patches in, and let as many older ones go."""
        self._draws = torch.cat([self._draws, torch.rand(len(patches), generator=self._generator)])
        kept = self._draws.topk(min(self.size, len(self._draws)), sorted=False).indices
        everything = patches if self.patches is None else torch.cat([self.patches, patches])
        self._draws, self.patches = self._draws[kept], everything[kept.to(patches.device)]


def k_center_greedy(patches: Tensor, size: int) -> Tensor:
    """Choose patches such that every patch lies close to a chosen one: ``(P, C) -> (size,)`` indices.

    Starts with the first patch and takes again and again the one that is farthest from all chosen ones (Sener and
    Savarese, ICLR 2018), as anomalib's ``KCenterGreedy`` does. That one copies all patches in every step, which
    fragments the heap of glibc by gigabytes; this allocates ``(P,)`` numbers. Distances are exact, not of random
    projections.

    Args:
        patches: Features ``(P, C)``.
        size: Number of patches to choose, from 1 to P.
    """
    chosen = torch.zeros(size, dtype=torch.long, device=patches.device)
    squares = torch.linalg.vector_norm(patches, dim=1).square()
    nearest = torch.full_like(squares, torch.inf)
    for i in range(1, size):
        center = chosen[i - 1]
        nearest = torch.minimum(nearest, squares - 2 * (patches @ patches[center]) + squares[center])
        nearest[center] = -torch.inf  # rounding must not make it the farthest
        chosen[i] = nearest.argmax()
    return chosen
