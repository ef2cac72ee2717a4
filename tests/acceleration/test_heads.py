# SPDX-License-Identifier: Apache-2.0
"""The folded head against the plain form, which is the release's (test_unias_parity.py)."""

import copy

import pytest
import torch

from anomalib_uniass.models.unias.heads import ReconstructionHead

SIZES = [
    pytest.param((14, 14), 8, 32, 24, id="square-112"),
    pytest.param((14, 10), 4, 64, 32, id="portrait-56x40"),
    pytest.param((8, 16), 2, 32, 56, id="landscape-16x32"),
    pytest.param((9, 8), 1, 32, 40, id="no-upsampling"),
]


def make_head(grid: tuple[int, int], scale: int, width: int, channels: int) -> tuple[ReconstructionHead, torch.Tensor]:
    torch.manual_seed(0)
    head = ReconstructionHead(width, channels, grid_size=grid, scale=scale)
    return head, torch.randn(2, width, *grid)


@pytest.mark.parametrize(("grid", "scale", "width", "channels"), SIZES)
def test_folded_equals_plain_up_to_the_border(grid: tuple[int, int], scale: int, width: int, channels: int) -> None:
    head, x = make_head(grid, scale, width, channels)
    plain, folded = head.plain(x), head.folded(x, *head.fold())
    assert (plain - folded).abs().max() / plain.abs().max() < 1e-5


@pytest.mark.parametrize(("grid", "scale", "width", "channels"), SIZES)
def test_gradients_flow_through_the_fold(grid: tuple[int, int], scale: int, width: int, channels: int) -> None:
    head, x = make_head(grid, scale, width, channels)
    x.requires_grad_()
    target = torch.randn_like(head.plain(x))
    variables = [*head.convs.parameters(), x]
    plain = torch.autograd.grad((head.plain(x) - target).square().mean(), variables)
    folded = torch.autograd.grad((head.folded(x, *head.fold()) - target).square().mean(), variables)
    for a, b in zip(plain, folded, strict=True):
        assert (a - b).norm() / a.norm() < 1e-4


def test_only_13_of_the_27_tap_triples_differ() -> None:
    head, _ = make_head((14, 14), 8, 64, 24)
    assert head.rows.matrices.shape == (13, 112, 14)


def test_inference_uses_constants_that_follow_the_parameters() -> None:
    head, x = make_head((14, 14), 8, 64, 24)
    assert head.state_dict().keys() == {f"convs.{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    head.eval()
    assert head.folded_weight is not None
    other, _ = make_head((14, 14), 8, 64, 24)
    with torch.no_grad():
        other.convs[0].weight.mul_(2)
        head.load_state_dict(other.state_dict())
        torch.testing.assert_close(head(x), other.plain(x), rtol=1e-4, atol=1e-5)
        head.convs[2].bias.add_(1)  # in place, without any call that announces it
        torch.testing.assert_close(head(x), head.plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(head)(x), head.plain(x), rtol=1e-4, atol=1e-5)
        for scale in (2, 3):
            weights = {name: value * scale for name, value in other.state_dict().items()}
            head.load_state_dict(weights, assign=True)
            torch.testing.assert_close(head(x), head.plain(x), rtol=1e-4, atol=1e-3)


def test_training_chooses_by_cost_and_learns_the_same() -> None:
    """Twenty steps with the folded and with the plain form give the same losses."""
    head, x = make_head((14, 14), 8, 64, 24)
    x = x.repeat(8, 1, 1, 1)
    reference = copy.deepcopy(head)
    target = torch.randn(16, 24, 112, 112)
    losses: dict[str, list[float]] = {"folded": [], "plain": []}
    for name, module, forward in (("folded", head, head), ("plain", reference, reference.plain)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (forward(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["folded"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["folded"] != losses["plain"]  # the folded form was in fact used
