# SPDX-License-Identifier: Apache-2.0
"""How large the checkpoints of a model get, said before the first is written."""

import logging

from torch import nn

logger = logging.getLogger(__name__)

LARGE = 200_000_000
"""Bytes from which on a checkpoint's size is said."""


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of a checkpoint of a training with AdamW: all weights, and two moments of those that train."""
    weights = sum(value.nbytes for value in model.state_dict().values())
    return weights + 2 * sum(value.nbytes for value in model.parameters() if value.requires_grad)


def say_large_checkpoints(model: nn.Module) -> None:
    """Say how large the checkpoints get, if they are, and what makes them so."""
    if (size := checkpoint_bytes(model)) < LARGE:
        return
    parts = {name: sum(value.nbytes for value in part.state_dict().values()) for name, part in model.named_children()}
    name = max(parts, key=lambda part: parts[part])
    logger.info(
        "A checkpoint of this training takes about %.0f MB, most of it in %s (%.0f MB); while one is written an "
        "earlier one lies beside it. A backbone of fewer channels or recipe: paper makes smaller ones.",
        size / 1e6, name, parts[name] / 1e6,
    )  # fmt: skip
