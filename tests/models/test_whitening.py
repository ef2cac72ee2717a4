# SPDX-License-Identifier: Apache-2.0
"""Statistics of the reconstruction's errors against NumPy, and what the anomaly map makes of them."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.models.unias.detector.clusters import Clusters
from anomalib_uniass.models.unias.detector.directions import Directions
from anomalib_uniass.models.unias.detector.distances import CosineDistances, WhitenedDistances
from anomalib_uniass.models.unias.detector.residual import Residual
from anomalib_uniass.models.unias.detector.whitening import EXPLAINED, PRIOR, Whitening
from anomalib_uniass.models.unias.torch_model import UniASModel
from tests.models.test_unias_model import TINY

Array = NDArray[np.float64]
CHANNELS = (6, 4, 3, 3)  # coarse to fine


def kind_of_image(kind: int, images: int, *, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return reconstructions and targets of good images.

    Kinds differ in the mean of the coarsest features, in the covariance of errors, and in what is explained: level 2
    (stride 4) of kind 0 alone, level 1 (stride 2) of both.
    """
    generator = torch.Generator().manual_seed(seed)
    reconstructions, targets = [], []
    for level, channels in enumerate(CHANNELS):
        shape = (images, channels, 4 * 2**level, 3 * 2**level)
        target = torch.randn(shape, generator=generator) + 5 * kind
        mixing = torch.eye(channels)
        mixing[kind] = 2.0
        error = torch.einsum("dc,bchw->bdhw", mixing, torch.randn(shape, generator=generator))
        explained = level == 3 or (level == 2 and kind == 0)
        reconstructions.append(target + error * (0.1 if explained else 1.0))
        targets.append(target)
    return reconstructions, targets


Batches = list[tuple[list[Tensor], list[Tensor]]]


def batches() -> Batches:
    return [kind_of_image(kind, images, seed=seed) for seed in range(4) for kind, images in ((0, 3), (1, 2))]


@dataclass
class Seen:
    """A training set of these batches, as what is fitted sees it."""

    batches: Batches
    clusters: Clusters

    def coarsest(self) -> Iterator[Tensor]:
        return (targets[0] for _, targets in self.batches)

    def residuals(self) -> Iterator[Residual]:
        return (residual(pair, self.clusters) for pair in self.batches)


def residual(pair: tuple[list[Tensor], list[Tensor]], clusters: Clusters) -> Residual:
    return Residual(torch.empty(0), *pair, clusters(pair[1][0]))


def fit(batches: Batches, *, clusters: int = 2) -> tuple[WhitenedDistances, Clusters]:
    """Return distances ``(64, 48)`` with the statistics of some batches, and the clusters."""
    kinds = Clusters(CHANNELS[0], clusters=clusters)
    distances = WhitenedDistances(
        (64, 48),
        whitening=Whitening(CHANNELS, clusters=clusters),
        directions=Directions(CHANNELS[:2], clusters=clusters),
    )
    kinds.fit(Seen(batches, kinds))
    distances.whitening.fit(Seen(batches, kinds).residuals())
    return distances, kinds


def fitted() -> tuple[Whitening, Clusters, int]:
    """Return statistics of all batches, the clusters, and which of them is kind 0."""
    distances, clusters = fit(batches())
    return distances.whitening, clusters, int(clusters(kind_of_image(0, 1, seed=0)[1][0]))


def error_covariance(kind: int, level: int) -> Array:
    """Return the covariance of the errors of the batches."""
    pairs = [kind_of_image(kind, (3, 2)[kind], seed=seed) for seed in range(4)]
    error = torch.cat([(r[level] - t[level]).double() for r, t in pairs]).numpy().transpose(1, 0, 2, 3)
    error = error.reshape(CHANNELS[level], -1)
    return np.asarray(error @ error.T / error.shape[1])


@pytest.mark.parametrize("level", range(4))
def test_whitening_is_the_inverse_root_of_the_shrunk_covariance(level: int) -> None:
    whitening, _, first = fitted()
    images = {0: 12, 1: 8}
    own = {kind: error_covariance(kind, level) for kind in images}
    mean = sum(images[kind] * own[kind] for kind in images) / 20
    for kind, count in images.items():
        covariance = (count * own[kind] + PRIOR * mean) / (count + PRIOR)
        shrunk = (covariance + np.trace(covariance) / len(covariance) * np.eye(len(covariance))) / 2
        matrix = whitening.get_buffer(f"whitening_{level}")[first if kind == 0 else 1 - first].double().numpy()
        np.testing.assert_allclose(matrix @ shrunk @ matrix, np.eye(len(matrix)), atol=1e-4)


def test_fine_levels_count_where_something_is_explained() -> None:
    """Level 1 of kind 1 would pass, but level 2 before it does not."""
    whitening, _, first = fitted()
    torch.testing.assert_close(whitening.exponents[first], torch.ones(4))
    torch.testing.assert_close(whitening.exponents[1 - first], torch.tensor([2.0, 2.0, 0.0, 0.0]))
    for kind, expected in ((0, True), (1, False)):
        pairs = [kind_of_image(kind, 3, seed=seed) for seed in range(4)]
        target = torch.cat([t[2] for _, t in pairs])
        error = torch.cat([r[2] - t[2] for r, t in pairs])
        variance = target.var(dim=(0, 2, 3), correction=0).sum()
        assert bool(1 - error.square().mean(dim=(0, 2, 3)).sum() / variance >= EXPLAINED) is expected


def test_images_find_their_cluster() -> None:
    _, kinds, _ = fitted()
    clusters = torch.cat([kinds(kind_of_image(kind, 7, seed=3)[1][0]) for kind in (0, 1)])
    assert clusters[:7].unique().numel() == clusters[7:].unique().numel() == 1
    assert clusters[0] != clusters[-1]


def test_more_clusters_than_images() -> None:
    batch = kind_of_image(0, 3, seed=0)
    distances, clusters = fit([batch], clusters=8)
    assert sorted(clusters(batch[1][0]).tolist()) == [0, 1, 2]
    assert all(buffer.isfinite().all() for buffer in (*distances.buffers(), *clusters.buffers()))


def test_no_image_is_an_error() -> None:
    clusters = Clusters(CHANNELS[0], clusters=2)
    with pytest.raises(ValueError, match="at least one batch of training images, got none"):
        clusters.fit(Seen([], clusters))
    with pytest.raises(ValueError, match="at least one training image, got none"):
        Whitening(CHANNELS, clusters=2).fit([])


def test_a_detector_without_clusters_says_what_is_missing() -> None:
    distances, _ = fit(batches())
    pair = kind_of_image(0, 1, seed=0)
    with pytest.raises(ValueError, match="needs the clusters of the images"):
        distances(Residual(torch.empty(0), *pair))


def test_batches_may_come_in_another_order_and_be_cut_differently() -> None:
    whole = batches()
    halves = [
        ([r[half] for r in reconstructions], [t[half] for t in targets])
        for reconstructions, targets in reversed(whole)
        for half in (slice(1), slice(1, None))
    ]
    for expected, found in zip(fit(whole), fit(halves), strict=True):
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_statistics_are_the_identity_until_they_are_fitted_and_are_saved() -> None:
    whitening, _, _ = fitted()
    clusters, x = torch.tensor([0, 1, 1]), kind_of_image(0, 3, seed=5)[1][0]
    copy = Whitening(CHANNELS, clusters=2)
    torch.testing.assert_close(copy(0, x, clusters), x)
    assert whitening.fitted and not copy.fitted
    copy.load_state_dict(whitening.state_dict())
    assert copy.fitted
    assert torch.equal(copy(0, x, clusters), whitening(0, x, clusters))
    copy.reset()
    assert not copy.fitted
    torch.testing.assert_close(copy(0, x, clusters), x)


def test_map_is_the_product_of_whitened_distances() -> None:
    distances, clusters = fit(batches())
    distances.directions = None
    whitening, _, first = fitted()
    pairs = [kind_of_image(kind, 1, seed=7) for kind in (0, 1)]
    reconstructions, targets = ([torch.cat(level) for level in zip(*s, strict=True)] for s in zip(*pairs, strict=True))
    expected = []
    for image, kind in enumerate((first, 1 - first)):
        product = torch.ones(1, 1, 32, 24)
        for level, blur in enumerate(distances.blurs):
            matrix = whitening.get_buffer(f"whitening_{level}")[kind].double().numpy()
            precision = matrix.T @ matrix
            r, t = (x[level][image].double().numpy() for x in (reconstructions, targets))
            dot, rr, tt = (np.einsum("chw,cd,dhw->hw", a, precision, b) for a, b in ((r, t), (r, r), (t, t)))
            distance = torch.from_numpy(1 - dot / np.sqrt(rr * tt)).float()[None, None]
            level_map = blur(F.interpolate(distance, size=(32, 24), mode="bilinear"))
            product = product * level_map ** (1.0 if kind == first else (2.0, 2.0, 0.0, 0.0)[level])
        expected.append(F.interpolate(product, size=(64, 48), mode="bilinear", align_corners=True))
    images = residual((reconstructions, targets), clusters)
    torch.testing.assert_close(distances.fuse(distances(images), images), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_only_the_map_uses_the_statistics() -> None:
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    model = UniASModel(**TINY, recipe="best").eval()
    plain = deepcopy(model)
    plain.detector.distances = CosineDistances((128, 128))
    torch.testing.assert_close(model(images).anomaly_map, plain(images).anomaly_map)  # of no image yet
    reconstruction = plain.reconstruct(images)
    model.detector.distances.whitening.fit([model.residual(reconstruction, images)])
    for expected, actual in zip(reconstruction[:2], model.reconstruct(images)[:2], strict=True):
        torch.testing.assert_close(actual, expected)
    assert not torch.allclose(model(images).anomaly_map, plain(images).anomaly_map, rtol=0.01)
