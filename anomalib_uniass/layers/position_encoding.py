# SPDX-License-Identifier: Apache-2.0
"""Two-dimensional sine position encoding."""

import math

import torch
from torch import Tensor


def sine_position_encoding_2d(height: int, width: int, channels: int, *, temperature: float = 10000.0) -> Tensor:
    """Return DETR's normalised sine encoding of an image grid, tokens in row-major order.

    Positions count from 1 and are scaled to 2 pi; half of the channels encode y (first) and half encode x
    (Carion et al., ECCV 2020).

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        channels: Channels of the encoding, a multiple of 4.
        temperature: Ratio between the longest and the shortest wavelength.

    Returns:
        Encoding ``(height * width, channels)``.
    """
    features = channels // 2
    wavelength = temperature ** (2 * (torch.arange(features) // 2) / features)

    def encode(size: int) -> Tensor:
        position = torch.arange(1, size + 1, dtype=torch.float32)
        angle = (position / (size + 1e-6) * 2 * math.pi)[:, None] / wavelength  # (size, features)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    y = encode(height)[:, None].expand(-1, width, -1)
    x = encode(width)[None].expand(height, -1, -1)
    return torch.cat([y, x], dim=2).flatten(0, 1)
