# SPDX-License-Identifier: Apache-2.0
"""Fusion by summands against the plain form, which is the release's (test_unias_parity.py)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.upsampled_conv import fold_upsampling, upsampled_conv2d
from anomalib_uniass.models.unias.pixel_decoder import FPNPixelDecoder, affine_of_norm

GRID = (5, 3)
CHANNELS = (8, 12, 40, 24)  # fine to coarse; at width 64 the two finest levels are computed by summands


def make_decoder(channels: tuple[int, ...] = CHANNELS, width: int = 64) -> tuple[FPNPixelDecoder, list[Tensor]]:
    torch.manual_seed(0)
    decoder = FPNPixelDecoder(channels, hidden_dim=width, feedforward_dim=32, grid_size=GRID, dropout=0.0)
    for norm in (lateral[1] for lateral in decoder.lateral_convs):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    sizes = [[side * 2**level for side in GRID] for level in reversed(range(len(channels)))]
    return decoder, [torch.randn(2, c, *size) + 1 for c, size in zip(channels, sizes, strict=True)]


def compute_plain(decoder: FPNPixelDecoder, inputs: list[Tensor]) -> list[Tensor]:
    *fine, deepest = inputs
    return decoder.fuse(list, {}, decoder.encode(deepest), *fine)


@pytest.mark.parametrize("size", [(7, 4), (1, 3)])
def test_convolution_of_an_upsampled_map(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), weight, padding=1)
    folded = upsampled_conv2d(x, *fold_upsampling(weight))
    torch.testing.assert_close(folded, plain, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(folded, (x, weight), towards), torch.autograd.grad(plain, (x, weight), towards), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_summands_equal_the_sum_in_values_and_gradients() -> None:
    decoder, inputs = make_decoder()
    assert decoder.folded(inputs[0]).keys() == {1, 2}  # counted from the coarsest of the fine levels
    plain, apart = compute_plain(decoder, inputs), decoder(inputs)
    for a, b in zip(plain, apart, strict=True):
        assert (a - b).abs().max() / a.abs().max() < 1e-5
    weights = [torch.randn_like(a) for a in plain]
    variables = dict(decoder.named_parameters())
    gradients = [torch.autograd.grad(y, list(variables.values()), weights) for y in (plain, apart)]
    for name, a, b in zip(variables, *gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6, name


def test_group_norm_from_mean_and_covariance() -> None:
    decoder, (x, *_) = make_decoder()
    projection, norm = decoder.lateral_convs[-1]
    x = x + 30  # a large mean, whose rounding the variance must not feel
    scale, shift = affine_of_norm(projection, norm, x)
    projected = projection(x)
    applied = scale[..., None, None] * projected + shift[..., None, None]
    torch.testing.assert_close(applied, norm(projected), rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(affine_of_norm(projection, norm, x)[0], scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float64, 1e-12)])
def test_models_of_another_precision(dtype: torch.dtype, tolerance: float) -> None:
    decoder, inputs = make_decoder()
    decoder, inputs = decoder.to(dtype).eval(), [x.to(dtype) for x in inputs]
    with torch.no_grad():
        plain, apart = compute_plain(decoder, inputs), decoder(inputs)
    for a, b in zip(plain, apart, strict=True):
        assert b.dtype == dtype
        assert (a - b).norm() < tolerance * a.norm()


def test_inference_uses_constants_that_follow_the_parameters() -> None:
    decoder, inputs = make_decoder()
    assert not any(name.startswith("folded") for name in decoder.state_dict())
    decoder.eval()
    assert decoder.folded_weight_2.shape == (64, 64, 3, 3)
    with torch.no_grad():
        decoder.output_convs[2][0].weight[:, 3:] *= 2  # in place, without any call that announces it
        for a, b in zip(decoder(inputs), compute_plain(decoder, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "width", "levels"),
    [
        pytest.param((48, 64, 112, 320), 256, {1, 2}, id="EfficientNet-B4"),
        pytest.param((32, 48, 80, 224), 256, {1, 2}, id="EfficientNet-lite0"),
        pytest.param((32, 48, 80, 224), 64, set(), id="narrow"),
    ],
)
def test_levels_are_computed_by_summands_where_it_saves_half(
    channels: tuple[int, ...], width: int, levels: set[int]
) -> None:
    decoder, inputs = make_decoder(channels, width)
    assert decoder.folded(inputs[0]).keys() == levels
    assert not decoder.folded(inputs[0].to("meta"))  # other devices convolve the sum
