# SPDX-License-Identifier: Apache-2.0
"""Dropout that does not wait for its random numbers on a CPU."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

STEPS = 2**16
PER_DRAW = 4  # 16-bit numbers in the 64 bits of a draw


class Dropout(nn.Module):
    """Zero elements with probability p in training and scale the others by ``1 / (1 - p)``: any shape, kept.

    PyTorch's serial generator on a CPU takes a whole draw and double precision for every element, and training waits
    for it. Here an element takes 16 bits, and p is rounded to a multiple of 1 / 65,536. On other devices this is
    PyTorch's own dropout.

    Args:
        p: Probability, in [0, 1).

    Raises:
        ValueError: If `p` lies outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            msg = f"dropout needs a probability in [0, 1), got {p}."
            raise ValueError(msg)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with some elements dropped, or `x` itself out of training."""
        dropped = round(self.p * STEPS)
        if not self.training or not dropped:
            return x
        if not x.is_cpu:
            return F.dropout(x, self.p)
        draws = torch.empty(math.ceil(x.numel() / PER_DRAW), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - STEPS // 2
        return x * kept.to(x.dtype).mul_(STEPS / (STEPS - dropped))

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"
