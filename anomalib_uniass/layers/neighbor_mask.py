# SPDX-License-Identifier: Apache-2.0
"""Neighbour mask: the rest of the image must explain a token (You et al., UniAD, NeurIPS 2022)."""

import torch
from torch import Tensor


def neighbor_mask(height: int, width: int, *, radius: int = 3) -> Tensor:
    """Return the mask that hides the square window around every token from its attention.

    Args:
        height: Rows of the token grid.
        width: Columns of the token grid.
        radius: The window spans ``2 * radius + 1`` tokens an axis, centre included.

    Returns:
        Boolean mask ``(N, N)``, N = height * width, row = query, in :class:`torch.nn.MultiheadAttention`'s sense:
        True = may NOT attend.

    Raises:
        ValueError: If the window hides every key of some token.
    """
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    mask = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    if mask.all(dim=1).any():
        window = 2 * radius + 1
        msg = (
            f"The {window}x{window} neighbour mask hides the whole {height}x{width} token grid from some token: "
            f"a side of the image must be larger than {16 * window} pixels."
        )
        raise ValueError(msg)
    return mask
