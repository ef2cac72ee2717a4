# SPDX-License-Identifier: Apache-2.0
"""Reproducible initial weights, and random numbers that go on where a run stopped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


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


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that training draws from, on the CPU and on a device.

    Args:
        device: Device of the model.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the generators to what :func:`random_states` returned.

    Args:
        states: States by kind of device.
        device: Device of the model.
    """
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
