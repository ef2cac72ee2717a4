# SPDX-License-Identifier: Apache-2.0
"""Folded heads against the plain ones, which are the release's (test_unias_parity.py)."""

import copy

import pytest
import torch
from torch import Tensor, nn

from anomalib_uniass.acceleration.heads import FoldedReconstructionHead, fold_head
from anomalib_uniass.models.unias.heads import ReconstructionHead

SIZES = [
    pytest.param((14, 14), 8, 32, 24, id="square-112"),
    pytest.param((14, 10), 4, 64, 32, id="portrait-56x40"),
    pytest.param((8, 16), 2, 32, 56, id="landscape-16x32"),
    pytest.param((9, 8), 1, 32, 40, id="no-upsampling"),
]


def make_heads(grid: tuple[int, int], scale: int, width: int, channels: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a head and its folded form, with parameters of their own, and an input."""
    torch.manual_seed(0)
    plain = ReconstructionHead(width, channels, scale=scale)
    return plain, FoldedReconstructionHead(copy.deepcopy(plain), grid_size=grid), torch.randn(2, width, *grid)


@pytest.mark.parametrize(("grid", "scale", "width", "channels"), SIZES)
def test_folded_equals_plain_up_to_the_border(grid: tuple[int, int], scale: int, width: int, channels: int) -> None:
    plain, folded, x = make_heads(grid, scale, width, channels)
    expected = plain(x)
    for mode in (True, False):
        assert (expected - folded.train(mode)(x)).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize(("grid", "scale", "width", "channels"), SIZES)
def test_gradients_flow_through_the_fold(grid: tuple[int, int], scale: int, width: int, channels: int) -> None:
    plain, folded, x = make_heads(grid, scale, width, channels)
    x.requires_grad_()
    target = torch.randn_like(plain(x))
    gradients = [
        torch.autograd.grad((head(x) - target).square().mean(), [*head.parameters(), x]) for head in (plain, folded)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() / a.norm() < 1e-4


def test_only_13_of_the_27_tap_triples_differ() -> None:
    _, folded, _ = make_heads((14, 14), 8, 64, 24)
    assert folded.rows.matrices.shape == (13, 112, 14)


@pytest.mark.parametrize(("grid", "scale", "width", "folds"), [((14, 14), 8, 64, True), ((14, 14), 1, 64, False)])
def test_heads_are_folded_where_it_saves_half(grid: tuple[int, int], scale: int, width: int, folds: bool) -> None:
    plain = ReconstructionHead(width, 24, scale=scale)
    head = fold_head(plain, grid_size=grid)
    assert (head is not plain) == folds
    assert head.state_dict().keys() == plain.state_dict().keys()
