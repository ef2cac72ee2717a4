# SPDX-License-Identifier: Apache-2.0
"""Attention and its dropout against PyTorch's own."""

import pytest
import torch
from torch import Tensor, nn

from anomalib_uniass.acceleration.attention import CPUMultiheadAttention
from anomalib_uniass.acceleration.dropout import Dropout
from anomalib_uniass.layers.neighbor_mask import neighbor_mask


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), inputs))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(7, 1001, 31, requires_grad=True)  # no multiple of the numbers in a draw
    y = Dropout(p)(x)
    values = y.unique()
    assert values.tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    deviation = (p * (1 - p) / y.numel()) ** 0.5
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4 * deviation)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())
    dropped = (y == 0).float().flatten()
    for lag in (1, 2, 3, 4):  # the numbers of a draw are independent
        both = (dropped[lag:] * dropped[:-lag]).mean().item()
        assert both == pytest.approx(p**2, abs=4 * p / y.numel() ** 0.5)


def test_dropout_follows_the_seed_and_is_nothing_out_of_training() -> None:
    x, dropout = torch.randn(3, 50), Dropout(0.3)
    first, second = (dropout(x) for _ in range(2) if torch.manual_seed(3))
    assert torch.equal(first, second)
    assert not torch.equal(dropout(x), second)
    assert Dropout(0.0)(x) is x
    assert dropout.eval()(x) is x
    assert str(dropout) == "Dropout(p=0.3)"
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"\[0, 1\), got {p}"):
            Dropout(p)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_pytorch_s(training: bool, masked: bool) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(256, 4, batch_first=True)
    nn.init.normal_(plain.in_proj_bias)
    attention = CPUMultiheadAttention(plain).train(training)
    assert attention.state_dict().keys() == plain.state_dict().keys()
    inputs = [torch.randn(2, 80, 256, requires_grad=True) for _ in range(3)]
    mask = neighbor_mask(8, 10) if masked else None
    y, expected = (module(*inputs, attn_mask=mask, need_weights=False)[0] for module in (attention, plain))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(y, *inputs), gradients(expected, *inputs), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_attention_weights_are_dropped_in_training() -> None:
    torch.manual_seed(0)
    attention = CPUMultiheadAttention(nn.MultiheadAttention(16, 2, dropout=0.4, batch_first=True))
    tokens = torch.randn(1, 6, 16).expand(4000, -1, -1)
    with torch.no_grad():
        samples = attention(tokens, tokens, tokens, attn_mask=None, need_weights=False)[0]
        few = tokens[:1]
        expected = attention.eval()(few, few, few, attn_mask=None, need_weights=False)[0][0]
    torch.testing.assert_close(samples.mean(0), expected, rtol=0, atol=0.03)  # dropout keeps the mean
    assert samples.std(0).min() > 0.01
