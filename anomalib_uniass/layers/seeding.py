# SPDX-License-Identifier: Apache-2.0
"""Reproducible initial weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seeded generator inside the context and leave torch's global one alone outside.

    Args:
        seed: Seed; None draws from the global generator.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
