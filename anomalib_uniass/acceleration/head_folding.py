# SPDX-License-Identifier: Apache-2.0
"""The algebra that folds a reconstruction head into one linear map, exactly.

A head is bilinear upsampling and three 3x3 convolutions without activation: linear, and separable over the axes. With
U the 1-D interpolation matrix and P_k the 1-D shift by k in {-1, 0, 1} with zero fill, one axis of a triple of taps
(a, b, c) of the first, second and third convolution acts as ``P_c P_b P_a U``. Of the 27 triples only 13 act
differently, because what a zero border cuts off depends only on how far the path wanders. Hence

    out = sum over groups g, h of  A_g (W_gh x) A_h^T,    W_gh = sum of W3[c] W2[b] W1[a] over the triples in g and h:

a 1x1 convolution at the low resolution, then one small matrix product per axis.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

TAPS = 3


class AxisOperators:
    """How the taps of a head act along one axis of n low-resolution and S = n * scale high-resolution positions.

    Args:
        size: Positions n.
        scale: Upsampling factor.

    Attributes:
        groups: Group of every triple (a, b, c), c running fastest: ``(27,)``.
        matrices: The distinct matrices A_g, in double precision as all that follows: ``(G, S, n)``.
        pair_ones: ``P_c P_b 1``, what the borders leave of a constant: ``(9, S)``, c running fastest.
        ones: ``P_c 1``: ``(3, S)``.
    """

    def __init__(self, size: int, *, scale: int) -> None:
        identity = torch.eye(size, dtype=torch.float64)
        upsampling = F.interpolate(identity[None], size=size * scale, mode="linear", align_corners=True)[0].T  # (S, n)
        constant = torch.ones(size * scale, 1, dtype=torch.float64)
        self.matrices, self.groups = torch.unique(_shift_repeatedly(upsampling, 3), dim=0, return_inverse=True)
        self.pair_ones = _shift_repeatedly(constant, 2).squeeze(2)
        self.ones = _shift_repeatedly(constant, 1).squeeze(2)


def _shift_repeatedly(x: Tensor, times: int) -> Tensor:
    """Return ``P_k x`` for every combination of shifts, the last one running fastest: ``(S, n) -> (3^times, S, n)``."""
    paths = x[None]
    for _ in range(times):
        padded = F.pad(paths, (0, 0, 1, 1))
        paths = torch.stack([padded[:, tap : tap + len(x)] for tap in range(TAPS)], dim=1).flatten(0, 1)
    return paths


def fold_weights(weights: tuple[Tensor, Tensor, Tensor], rows: AxisOperators, columns: AxisOperators) -> Tensor:
    """Compose three convolution kernels ``(M, D, 3, 3), (M, M, 3, 3), (C, M, 3, 3)`` into W: ``(C * G * H, D, 1, 1)``.

    G and H are the numbers of groups of the rows and of the columns.
    """
    first, second, third = weights
    outer = _compose_outer(second, third)  # (C, M, by, bx, cy, cx)
    paths = torch.einsum("onefgh,ndyx->odyegxfh", outer, first)  # (C, D, ay, by, cy, ax, bx, cx)
    channels, inputs = paths.shape[:2]
    paths = paths.reshape(channels * inputs, TAPS**3, TAPS**3)
    by_row = _group_matrix(rows, paths)
    by_column = _group_matrix(columns, paths)
    folded = by_row.T @ paths @ by_column  # (C * D, G, H)
    return folded.view(channels, inputs, -1).transpose(1, 2).reshape(-1, inputs, 1, 1)


def fold_biases(
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    rows: AxisOperators,
    columns: AxisOperators,
) -> Tensor:
    """Return what the biases ``(M,), (M,), (C,)`` add to the output: ``(C, S, T)``.

    The inner biases pass through the zero borders of the convolutions behind them. In memory the channels come last, as
    in the features, to which cosines compare the result.
    """
    _, second, third = weights
    outer = _compose_outer(second, third).permute(0, 1, 2, 4, 3, 5)  # (C, M, by, cy, bx, cx)
    pair = torch.einsum("ompq,m->opq", outer.flatten(4).flatten(2, 3), biases[0])  # (C, 9, 9)
    single = torch.einsum("omyx,m->oyx", third, biases[1])  # (C, 3, 3)
    row_pairs, column_pairs, row_ones, column_ones = (
        ones.to(pair) for ones in (rows.pair_ones, columns.pair_ones, rows.ones, columns.ones)
    )
    maps = row_pairs.T @ pair @ column_pairs + row_ones.T @ single @ column_ones + biases[2][:, None, None]
    return maps.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def apply_folded(x: Tensor, weight: Tensor, bias: Tensor, *, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a folded head: ``(B, D, n, m) -> (B, C, S, T)``.

    Args:
        x: Low-resolution maps.
        weight: W of :func:`fold_weights`.
        bias: Map of :func:`fold_biases`.
        rows: Matrices A_g of the rows ``(G, S, n)``.
        columns: Matrices A_h of the columns ``(H, T, m)``.
    """
    (g, _, n), (h, _, m) = rows.shape, columns.shape
    grouped = F.conv2d(x, weight).view(-1, len(bias), g, h, n, m)
    by_row = grouped.transpose(3, 4).reshape(-1, len(bias), g * n, h * m)
    maps = rows.transpose(0, 1).flatten(1) @ (by_row @ columns.transpose(1, 2).flatten(0, 1))
    return bias + maps  # in the layout of the bias


def plain_cost(in_channels: int, out_channels: int, rows: AxisOperators, columns: AxisOperators) -> int:
    """Multiply-adds of upsampling's three convolutions for one image."""
    pixels = rows.matrices.shape[1] * columns.matrices.shape[1]
    return pixels * TAPS**2 * in_channels * (2 * in_channels + out_channels)


def folded_cost(in_channels: int, out_channels: int, rows: AxisOperators, columns: AxisOperators) -> int:
    """Multiply-adds of the folded form for one image."""
    (g, s, n), (h, t, m) = rows.matrices.shape, columns.matrices.shape
    return out_channels * (g * h * in_channels * n * m + g * n * h * m * t + s * g * n * t)


def _compose_outer(second: Tensor, third: Tensor) -> Tensor:
    return torch.einsum("omgh,mnef->onefgh", third, second)


def _group_matrix(axis: AxisOperators, like: Tensor) -> Tensor:
    """Return the indicator matrix (27, G) that sums the triples of a group."""
    return F.one_hot(axis.groups, len(axis.matrices)).to(like)
