# SPDX-License-Identifier: Apache-2.0
"""Training memory: what is cheap to compute again is not kept for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_recomputes = False


def recompute(function: Callable[..., T], *inputs: object) -> T:
    """Call a function; within :func:`recomputation`, do not keep its intermediate results for the backward pass.

    They are computed again there, with the same random numbers, up to the last tensor that the backward pass needs. A
    function that ends in a convolution or a matrix product, behind operators that are cheap, therefore costs these
    operators alone, and its results and gradients are the same to the last bit.

    Args:
        function: What to compute.
        inputs: Its inputs, the only tensors that are kept.
    """
    return checkpoint(function, *inputs, use_reentrant=False) if recomputes() else function(*inputs)


def recomputes() -> bool:
    """Tell whether activations would be kept for a backward pass, and are to be computed again instead."""
    return torch.is_grad_enabled() and _recomputes


@contextmanager
def recomputation(enabled: bool = True) -> Iterator[None]:
    """Compute again in the backward pass what is cheap, for all that is computed within.

    Args:
        enabled: False keeps all activations, as PyTorch does by itself.
    """
    global _recomputes
    before, _recomputes = _recomputes, enabled
    try:
        yield
    finally:
        _recomputes = before
