# SPDX-License-Identifier: Apache-2.0
"""Directions of the errors on good images against NumPy, and what they make of distances."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.models.unias.detector import directions as module
from anomalib_uniass.models.unias.detector.directions import DIRECTIONS, Directions
from anomalib_uniass.models.unias.detector.distances import cosine_distance
from tests.models import test_whitening
from tests.models.test_whitening import CHANNELS, Batches, Seen, batches, fitted, kind_of_image, residual


def fit(pairs: Batches) -> Directions:
    whitening, clusters, _ = fitted()
    directions = Directions(CHANNELS[:2], clusters=2)
    seen = [residual(pair, clusters) for pair in pairs]
    directions.fit(
        ([whitening(i, t - r, of) for i, (r, t) in enumerate(zip(rs[:2], ts[:2], strict=True))], of)
        for _, rs, ts, of in seen
        if of is not None
    )
    return directions


def errors(level: int, pairs: Batches) -> tuple[Tensor, Tensor]:
    """Return the whitened errors ``(B, C, H, W)`` of some images and the images' clusters."""
    whitening, kinds, _ = fitted()
    reconstruction, target = (torch.cat([pair[side][level] for pair in pairs]) for side in (0, 1))
    clusters = kinds(torch.cat([targets[0] for _, targets in pairs]))
    return whitening(level, target - reconstruction, clusters), clusters


@pytest.mark.parametrize("level", [0, 1])
def test_distance_is_the_mean_of_itself_and_of_the_angle_to_the_nearest_known_error(level: int) -> None:
    """So few errors are all kept: the nearest is found among them."""
    directions = fit(batches())
    known, of_known = errors(level, batches())
    error, clusters = errors(level, [kind_of_image(kind, 2, seed=9) for kind in (0, 1)])
    distance = torch.rand(4, 1, *error.shape[2:], generator=torch.Generator().manual_seed(0))
    expected = np.empty(distance.shape)
    for image, cluster in enumerate(clusters):
        book = known[of_known == cluster].permute(0, 2, 3, 1).reshape(-1, CHANNELS[level]).double().numpy()
        assert len(book) <= DIRECTIONS
        book /= np.linalg.norm(book, axis=1, keepdims=True)
        e = error[image].double().numpy()
        novelty = 1 - np.einsum("nc,chw->nhw", book, e / np.linalg.norm(e, axis=0)).max(axis=0)
        expected[image] = np.sqrt(distance[image].numpy() * novelty)
    actual = directions(level, distance, error, clusters)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_known_errors_count_for_nothing_and_fine_levels_stay() -> None:
    directions = fit(batches())
    for level in range(4):
        error, clusters = errors(level, batches())
        distance = torch.ones(len(error), 1, *error.shape[2:])
        expected = torch.zeros_like(distance) if level < 2 else distance
        torch.testing.assert_close(directions(level, distance, error, clusters), expected, rtol=0, atol=2e-3)


def test_many_errors_are_gathered_to_few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of three directions and little noise: three means find them."""
    monkeypatch.setattr(module, "DIRECTIONS", 3)
    monkeypatch.setattr(module, "SAMPLES", 300)
    generator = torch.Generator().manual_seed(0)
    true = F.normalize(torch.randn(3, 6, generator=generator), dim=1)
    units = true[torch.randint(3, (1000,), generator=generator)] + 0.02 * torch.randn(1000, 6, generator=generator)
    sample = module._sample(F.normalize(units, dim=1))
    assert len(sample) == 300
    found = module._directions(sample)
    assert found.shape == (3, 6)
    torch.testing.assert_close((found @ true.T).amax(dim=0), torch.ones(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_order_of_the_images_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 100)  # of 144 and 96
    expected = fit(batches()).state_dict()
    for name, value in fit(batches()[::-1]).state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_distances_stay_until_directions_are_found_and_those_are_saved() -> None:
    directions, copy = fit(batches()), Directions(CHANNELS[:2], clusters=2)
    error, clusters = errors(0, batches())
    distance = torch.ones(len(error), 1, *error.shape[2:])
    assert torch.equal(copy(0, distance, error, clusters), distance)
    copy.load_state_dict(directions.state_dict())
    assert torch.equal(copy(0, distance, error, clusters), directions(0, distance, error, clusters))


def test_a_cluster_without_images_keeps_its_angles() -> None:
    _, _, first = fitted()
    directions = fit([kind_of_image(0, 3, seed=0)])
    error, clusters = errors(0, [kind_of_image(1, 2, seed=1)])
    assert (clusters != first).all()
    distance = torch.full((2, 1, *error.shape[2:]), 0.25)
    torch.testing.assert_close(directions(0, distance, error, clusters), torch.full_like(distance, 0.5))


def test_flat_images_and_a_dead_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal errors are one direction; images count alike though their first channel never errs."""
    units = torch.zeros(3000, 6)
    units[:, 3] = 1.0
    assert torch.equal(module._directions(units).unique(dim=0), units[:1])
    monkeypatch.setattr(module, "SAMPLES", 500)
    images = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    images[:, 0] = 0
    images[500:, 1] = 100  # the later half, to know it again
    sample = module._sample(F.normalize(images, dim=1))
    assert 200 < (sample[:, 1] > 0.99).sum() < 300


def test_another_training_forgets_the_directions_of_the_last() -> None:
    distances, clusters = test_whitening.fit(batches())
    first = int(clusters(kind_of_image(0, 1, seed=0)[1][0]))
    distances.fit(Seen(batches(), clusters))
    distances.fit(Seen([kind_of_image(0, 3, seed=0)], clusters))
    assert distances.directions is not None
    directions = distances.directions.get_buffer("directions_0")
    assert directions[first].any() and not directions[1 - first].any()


def test_map_is_of_the_distances_that_the_directions_leave() -> None:
    distances, clusters = test_whitening.fit(batches())
    distances.fit(Seen(batches(), clusters))
    images = residual(kind_of_image(0, 2, seed=7), clusters)
    assert images.clusters is not None and distances.directions is not None
    for level, (blur, level_map) in enumerate(zip(distances.blurs, distances(images), strict=True)):
        r, t = (distances.whitening(level, x[level], images.clusters) for x in images[1:3])
        distance = distances.directions(level, cosine_distance(r, t), t - r, images.clusters)
        torch.testing.assert_close(level_map, blur(F.interpolate(distance, size=(32, 24), mode="bilinear")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_ignore_autocast(dtype: torch.dtype) -> None:
    directions = fit(batches())
    error, clusters = errors(0, [kind_of_image(0, 2, seed=9)])
    distance = torch.ones(2, 1, *error.shape[2:])
    expected = directions(0, distance, error, clusters)
    with torch.autocast("cpu", dtype):
        assert torch.equal(directions(0, distance, error, clusters), expected)
