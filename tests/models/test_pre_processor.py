# SPDX-License-Identifier: Apache-2.0
"""The exported resize against torchvision's and OpenVINO's."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_uniass.deploy.pre_processor import AntialiasedPreProcessor
from anomalib_uniass.layers.antialiased_resize import antialiased_resize

TRANSFORM = Compose([Resize((64, 96), antialias=True), Normalize([0.5] * 3, [0.25] * 3)])


@pytest.mark.parametrize(
    "size", [(64, 96), (201, 333), (40, 50), (700, 64), (1, 1), (1, 500), (500, 1), (63, 97), (1500, 2000)]
)
def test_resize_equals_torchvision_with_antialiasing(size: tuple[int, int]) -> None:
    """To rounding where torchvision computes in double precision; its weights in float32 are 1e-5 off on noise."""
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    resize = Resize((64, 96), antialias=True)
    actual = antialiased_resize(x, (64, 96))
    torch.testing.assert_close(actual.double(), resize(x.double()), atol=1e-6, rtol=0)
    torch.testing.assert_close(actual, resize(x), atol=2e-5, rtol=0)
    torch.testing.assert_close(AntialiasedPreProcessor(TRANSFORM)(x), TRANSFORM(x), atol=8e-5, rtol=0)


@pytest.mark.parametrize("pixels", [1, 2, 63, 64, 65, 300, 1023, 1024, 2000, 20_000])
@pytest.mark.parametrize("size", [64, 224, 1024])
def test_weights_are_those_of_a_triangle_between_pixel_centres(pixels: int, size: int) -> None:
    positions = np.arange(pixels) + 0.5
    scale = pixels / size
    centers = (np.arange(size)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(positions - centers) / max(scale, 1), 0, None)
    expected = weights / weights.sum(axis=1, keepdims=True)
    image = np.random.default_rng(0).standard_normal((pixels, 8))
    actual = antialiased_resize(torch.from_numpy(image)[None, None], (size, 8))[0, 0]
    np.testing.assert_allclose(actual, expected @ image, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], Path]:
    """Return a function that exports the pre-processor with some axes free."""

    @cache
    def run(dynamic_axes: tuple[int, ...]) -> Path:
        module = AntialiasedPreProcessor(TRANSFORM).eval()
        path = tmp_path_factory.mktemp("resize") / "resize.onnx"
        dynamic = {axis: torch.export.Dim(f"axis_{axis}") for axis in dynamic_axes}
        example = torch.rand(2, 3, 200, 150)
        torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
        return path

    return run


ANY_SIZE, FIXED_SIZE = (0, 2, 3), (0,)
SIZES = [(64, 96), (200, 150), (50, 300), (1, 1), (1, 300), (400, 300), (1024, 1024)]


@pytest.mark.parametrize(
    ("dynamic_axes", "sizes"),
    [(ANY_SIZE, SIZES), (FIXED_SIZE, [(200, 150)])],
    ids=["any size", "any batch, fixed size"],
)
def test_exported_graph(
    exported: Callable[[tuple[int, ...]], Path], dynamic_axes: tuple[int, ...], sizes: list[tuple[int, int]]
) -> None:
    compiled = ov.Core().compile_model(str(exported(dynamic_axes)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in sizes:
        x = torch.rand(1, 3, *size)
        np.testing.assert_allclose(compiled(x.numpy())[0], TRANSFORM(x.double()), atol=5e-6)


@pytest.mark.parametrize("size", [*SIZES, (1500, 2000), (20_000, 8), (8, 20_000)])
def test_exported_graph_in_the_precision_that_openvino_takes(
    exported: Callable[[tuple[int, ...]], Path], size: tuple[int, int]
) -> None:
    """bfloat16 where the CPU has it; pixels are then rounded to 8 bits, but come from where they should."""
    compiled = ov.Core().compile_model(str(exported(ANY_SIZE)), "CPU")
    x = smooth_image(size)
    np.testing.assert_allclose(compiled(x.numpy())[0], TRANSFORM(x.double()), atol=0.04)


@pytest.mark.slow  # on CPUs no path that OpenVINO takes by itself; 2026.4 gave zeros in one run of many
@pytest.mark.skipif("FP16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="no float16")
@pytest.mark.parametrize("size", [*SIZES, (1500, 2000), (20_000, 8), (8, 20_000)])
def test_exported_graph_in_float16(exported: Callable[[tuple[int, ...]], Path], size: tuple[int, int]) -> None:
    """What OpenVINO takes on GPUs, by itself, and on ARM."""
    compiled = ov.Core().compile_model(str(exported(ANY_SIZE)), "CPU", {"INFERENCE_PRECISION_HINT": "f16"})
    x = smooth_image(size)
    np.testing.assert_allclose(compiled(x.numpy())[0], TRANSFORM(x.double()), atol=0.01)


def smooth_image(size: tuple[int, int]) -> torch.Tensor:
    noise = torch.rand(1, 3, *(-(-length // 16) for length in size), generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=size, mode="bilinear")


def test_weights_of_large_images_fit_32_bits(exported: Callable[[tuple[int, ...]], Path]) -> None:
    """OpenVINO computes 64-bit integers in 32 bits on a CPU: an image of 20,000 pixels, and far beyond."""
    compiled = ov.Core().compile_model(str(exported(ANY_SIZE)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for pixels in (20_000, 1_000_000):
        ramp = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
        x = ramp.float()[None, None, :, None].expand(1, 3, pixels, 1)
        actual = compiled(x.contiguous().numpy())[0][0, 0, :, 0] * 0.25 + 0.5
        expected = (np.arange(64) + 0.5) / 64  # a ramp stays one, but for the triangles that its ends cut
        np.testing.assert_allclose(actual[1:-1], expected[1:-1], atol=2e-6)


def test_checkpoint_configuration_round_trip() -> None:
    other = AntialiasedPreProcessor(Compose([Resize((32, 32)), Normalize([0.0] * 3, [1.0] * 3)]))
    other.load_checkpoint_config(AntialiasedPreProcessor(TRANSFORM).checkpoint_config())
    x = torch.rand(1, 3, 120, 130)
    torch.testing.assert_close(other(x), TRANSFORM(x), atol=5e-5, rtol=0)


@pytest.mark.parametrize("transform", [Resize((64, 96)), Compose([Resize(64), Normalize([0.0], [1.0])])])
def test_other_transforms_are_refused(transform: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="takes Compose"):
        AntialiasedPreProcessor(transform)
