# SPDX-License-Identifier: Apache-2.0
"""The exported resize against torchvision's and OpenVINO's."""

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_uniass.components.pre_processor import AntialiasedPreProcessor, antialiased_resize

TRANSFORM = Compose([Resize((64, 96), antialias=True), Normalize([0.5] * 3, [0.25] * 3)])


@pytest.mark.parametrize("size", [(64, 96), (201, 333), (40, 50), (700, 64)])
def test_resize_equals_torchvision_with_antialiasing(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = Resize((64, 96), antialias=True)(x)
    torch.testing.assert_close(antialiased_resize(x, (64, 96)), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(AntialiasedPreProcessor(TRANSFORM)(x), TRANSFORM(x), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("dynamic_axes", "sizes"),
    [((0, 2, 3), [(64, 96), (200, 150), (50, 300)]), ((0,), [(200, 150)])],
    ids=["any size", "any batch, fixed size"],
)
def test_exported_graph(tmp_path: Path, dynamic_axes: tuple[int, ...], sizes: list[tuple[int, int]]) -> None:
    module = AntialiasedPreProcessor(TRANSFORM).eval()
    path = tmp_path / "resize.onnx"
    dynamic = {axis: torch.export.Dim(f"axis_{axis}") for axis in dynamic_axes}
    example = torch.rand(2, 3, *sizes[0])
    torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in sizes:
        x = torch.rand(1, 3, *size)
        np.testing.assert_allclose(compiled(x.numpy())[0], TRANSFORM(x), atol=1e-4)


def test_checkpoint_configuration_round_trip() -> None:
    other = AntialiasedPreProcessor(Compose([Resize((32, 32)), Normalize([0.0] * 3, [1.0] * 3)]))
    other.load_checkpoint_config(AntialiasedPreProcessor(TRANSFORM).checkpoint_config())
    x = torch.rand(1, 3, 120, 130)
    torch.testing.assert_close(other(x), TRANSFORM(x), atol=5e-5, rtol=0)


@pytest.mark.parametrize("transform", [Resize((64, 96)), Compose([Resize(64), Normalize([0.0], [1.0])])])
def test_other_transforms_are_refused(transform: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="takes Compose"):
        AntialiasedPreProcessor(transform)
