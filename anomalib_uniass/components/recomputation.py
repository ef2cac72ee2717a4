# SPDX-License-Identifier: Apache-2.0
"""Training memory: what is cheap to compute again is not kept for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_keep_activations = False


def recompute(function: Callable[..., T], *inputs: object) -> T:
    """Call a function, and compute its intermediate results again in the backward pass instead of keeping them.

    The repetition has the same random numbers, and stops at the last tensor that the backward pass needs. A function
    that ends in a convolution or a matrix product, behind operators that are cheap, therefore costs these operators
    alone, and its results and gradients are the same to the last bit.

    Args:
        function: What to compute.
        inputs: Its inputs, the only tensors that are kept.
    """
    return checkpoint(function, *inputs, use_reentrant=False) if saves_memory() else function(*inputs)


def saves_memory() -> bool:
    """Tell whether activations would be kept for a backward pass, and are to be spared."""
    return torch.is_grad_enabled() and not _keep_activations


@contextmanager
def keep_activations() -> Iterator[None]:
    """Keep all activations of what is computed within: the reference for tests and benchmarks."""
    global _keep_activations
    _keep_activations = True
    try:
        yield
    finally:
        _keep_activations = False
