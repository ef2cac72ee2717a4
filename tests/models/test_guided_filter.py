# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_uniass.models.unias.detector.guided_filter import EPSILON, RADIUS, follow_edges, guided_filter


def by_least_squares(x: np.ndarray, guide: np.ndarray) -> np.ndarray:
    """Ridge regression in every window, window by window: minimise the sum of (a g + b - x)² + epsilon a²."""
    height, width = x.shape
    fits = np.empty((height, width, 2))
    windows = {
        (i, j): (slice(max(0, i - RADIUS), i + RADIUS + 1), slice(max(0, j - RADIUS), j + RADIUS + 1))
        for i in range(height)
        for j in range(width)
    }
    for place, window in windows.items():
        g, values = guide[window].ravel(), x[window].ravel()
        design = np.vstack([np.stack([g, np.ones_like(g)], axis=1), [[np.sqrt(EPSILON * g.size), 0]]])
        fits[place] = np.linalg.lstsq(design, np.append(values, 0), rcond=None)[0]
    mean = {place: fits[window].reshape(-1, 2).mean(axis=0) for place, window in windows.items()}
    return np.array([[mean[i, j] @ (guide[i, j], 1) for j in range(width)] for i in range(height)])


@pytest.mark.parametrize("size", [(16, 32), (7, 40), (5, 5)])
def test_is_a_regression_in_every_window(size: tuple[int, int]) -> None:
    """Windows that reach over the border, and over both, count what lies within."""
    generator = torch.Generator().manual_seed(0)
    x, guide = (torch.randn(2, 1, *size, generator=generator) for _ in range(2))
    found = guided_filter(x, guide)
    for index in range(2):
        expected = by_least_squares(x[index, 0].double().numpy(), guide[index, 0].double().numpy())
        np.testing.assert_allclose(found[index, 0].numpy(), expected, atol=2e-5)


def square(side: int, size: int = 64) -> Tensor:
    """Return ones in a square in the middle of zeros, (1, 1, size, size)."""
    start = (size - side) // 2
    mask = torch.zeros(1, 1, size, size)
    mask[..., start : start + side, start : start + side] = 1
    return mask


def test_a_map_wider_than_the_defect_follows_its_outline() -> None:
    defect, wide = square(12), square(20) * 0.5
    image = (0.3 + 0.1 * defect).expand(-1, 3, -1, -1)
    found = follow_edges(wide, image)
    inside, halo = defect.bool(), (wide > 0) & ~defect.bool()
    assert found[inside].min() > found[halo].max()
    assert found[inside].mean() - found[halo].mean() > 0.15


def test_a_flat_image_only_smooths() -> None:
    wide = square(28)  # wider than two windows
    found = follow_edges(wide, torch.full((1, 3, 64, 64), 0.3))
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 0, 32, 32].item(), 1.0)
    torch.testing.assert_close(found.mean(), wide.mean(), rtol=1e-4, atol=0)  # far from the border nothing is lost
    assert torch.equal(follow_edges(wide * 0, torch.zeros(1, 3, 64, 64)), wide * 0)


def test_brightness_and_contrast_of_the_image_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    anomaly_map, image = torch.rand(2, 1, 32, 32, generator=generator), torch.randn(2, 3, 32, 32, generator=generator)
    expected = follow_edges(anomaly_map, image)
    torch.testing.assert_close(follow_edges(anomaly_map, 0.01 * image - 3), expected, rtol=1e-3, atol=1e-5)
    assert expected.min() >= 0
    one = follow_edges(anomaly_map[1:], image[1:])  # images of a batch do not matter to each other
    torch.testing.assert_close(one, expected[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_and_variances_are_taken_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    anomaly_map = torch.rand(1, 1, 32, 32, generator=generator) * 1e-6
    image = torch.randn(1, 3, 32, 32, generator=generator).to(dtype)
    with torch.autocast("cpu", dtype):
        found = follow_edges(anomaly_map, image)
    assert found.dtype == torch.float32
    assert torch.equal(found, follow_edges(anomaly_map, image.float()))
