# SPDX-License-Identifier: Apache-2.0
"""Levels of the pixel decoder by summands against the plain ones, which are the release's (test_unias_parity.py)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.pixel_decoder import FoldedFPNLevel, affine_of_norm, fold_level
from anomalib_uniass.acceleration.upsampled_conv import fold_upsampling, upsampled_conv2d
from anomalib_uniass.models.unias.pixel_decoder import FPNLevel


def make_level(channels: int = 12, width: int = 64) -> tuple[FPNLevel, Tensor, Tensor]:
    """Return a level, its input and the memory below."""
    torch.manual_seed(0)
    level = FPNLevel(channels, width)
    for norm in (level.lateral_norm, level.output_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return level, torch.randn(2, channels, 10, 6) + 1, torch.randn(2, width, 5, 3)


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
    level, x, below = make_level()
    variables = [*level.parameters(), x.requires_grad_(), below.requires_grad_()]
    plain, apart = level(x, below), FoldedFPNLevel(level)(x, below)
    assert (plain - apart).abs().max() / plain.abs().max() < 1e-5
    towards = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, variables, towards) for y in (plain, apart)), strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6


def test_group_norm_from_mean_and_covariance() -> None:
    level, x, _ = make_level()
    x = x + 30  # a large mean, whose rounding the variance must not feel
    scale, shift = affine_of_norm(level.lateral_conv, level.lateral_norm, x)
    projected = level.lateral_conv(x)
    applied = scale[..., None, None] * projected + shift[..., None, None]
    torch.testing.assert_close(applied, level.lateral_norm(projected), rtol=1e-4, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(affine_of_norm(level.lateral_conv, level.lateral_norm, x)[0], scale)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float64, 1e-12)])
def test_models_of_another_precision(dtype: torch.dtype, tolerance: float) -> None:
    level, x, below = make_level()
    level, x, below = level.to(dtype).eval(), x.to(dtype), below.to(dtype)
    with torch.no_grad():
        plain, apart = level(x, below), FoldedFPNLevel(level).eval()(x, below)
    assert apart.dtype == dtype
    assert (plain - apart).norm() < tolerance * plain.norm()


@pytest.mark.parametrize(
    ("channels", "width", "folds"),
    [
        pytest.param(48, 256, True, id="EfficientNet-B4, level 1"),
        pytest.param(64, 256, True, id="EfficientNet-B4, level 2"),
        pytest.param(112, 256, False, id="EfficientNet-B4, level 3"),
        pytest.param(32, 64, False, id="narrow"),
    ],
)
def test_levels_are_computed_by_summands_where_it_saves_half(channels: int, width: int, folds: bool) -> None:
    level = FPNLevel(channels, width)
    assert (fold_level(level) is not level) == folds


def test_other_devices_convolve_the_sum() -> None:
    level, x, below = make_level()
    fused = FoldedFPNLevel(level).to("meta").fuse(x.to("meta"), below.to("meta"))
    assert fused.shape == (2, 64, 10, 6)
