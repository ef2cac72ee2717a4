# SPDX-License-Identifier: Apache-2.0
"""Whitening by the reconstruction's errors against NumPy."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.models.unias.anomaly_map import AnomalyMapGenerator
from anomalib_uniass.models.unias.torch_model import UniASModel
from anomalib_uniass.models.unias.whitening import MOMENTUM, ErrorWhitening

CHANNELS = 6
TINY: dict[str, Any] = {
    "backbone": "resnet18",
    "pre_trained": False,
    "image_size": (128, 128),
    "hidden_dim": 32,
    "feedforward_dim": 32,
}


def training_step(seed: int) -> tuple[Tensor, Tensor]:
    """Return a reconstruction and a target whose errors are correlated and large in one direction."""
    generator = torch.Generator().manual_seed(seed)
    target, error = torch.randn(2, 3, CHANNELS, 5, 4, generator=generator)
    mixing = torch.eye(CHANNELS)
    mixing[0] = 3.0
    return target + torch.einsum("dc,bchw->bdhw", mixing, error), target


def numpy_covariance(reconstruction: Tensor, target: Tensor) -> np.ndarray:
    error = (reconstruction - target).double().numpy().transpose(1, 0, 2, 3).reshape(CHANNELS, -1)
    return error @ error.T / error.shape[1]


def test_matrix_is_the_inverse_root_of_the_shrunk_mean_covariance() -> None:
    whitening = ErrorWhitening(CHANNELS)
    steps = [training_step(seed) for seed in range(5)]
    for step in steps:
        whitening.update(*step)
    covariance = np.mean([numpy_covariance(*step) for step in steps], axis=0)
    shrunk = (covariance + np.trace(covariance) / CHANNELS * np.eye(CHANNELS)) / 2
    matrix = whitening.eval().matrix[:, :, 0, 0].double().numpy()
    np.testing.assert_allclose(matrix @ shrunk @ matrix, np.eye(CHANNELS), atol=1e-5)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)


def test_old_steps_are_forgotten() -> None:
    whitening = ErrorWhitening(CHANNELS)
    for _ in range(round(1 / MOMENTUM)):
        whitening.update(*training_step(0))
    first = numpy_covariance(*training_step(0))
    np.testing.assert_allclose(whitening.covariance, first, rtol=1e-4, atol=1e-4)
    whitening.update(*training_step(1))
    moved = (1 - MOMENTUM) * first + MOMENTUM * numpy_covariance(*training_step(1))
    np.testing.assert_allclose(whitening.covariance, moved, rtol=1e-4, atol=1e-4)


def test_constants_follow_updates_and_loading() -> None:
    whitening, x = ErrorWhitening(CHANNELS).eval(), training_step(1)[1]
    whitening.update(*training_step(0))
    after = whitening(x)
    assert not torch.allclose(after, x)
    for assign in (False, True):
        copy = ErrorWhitening(CHANNELS).eval()
        assert torch.equal(copy(x), x)  # of no step yet
        copy.load_state_dict(whitening.state_dict(), assign=assign)
        torch.testing.assert_close(copy(x), after)


def test_level_map_compares_whitened_features() -> None:
    generator = AnomalyMapGenerator((64, 64), levels=1, whitened_channels=[CHANNELS])
    reconstruction, target = (F.interpolate(x, size=32) for x in training_step(0))
    generator.observe([reconstruction], [target])
    (actual,) = generator.eval().level_maps([reconstruction], [target])
    covariance = numpy_covariance(reconstruction, target)
    precision = np.linalg.inv((covariance + np.trace(covariance) / CHANNELS * np.eye(CHANNELS)) / 2)

    def product(a: Tensor, b: Tensor) -> np.ndarray:
        return np.einsum("bchw,cd,bdhw->bhw", a.double().numpy(), precision, b.double().numpy())

    norms = np.sqrt(product(reconstruction, reconstruction) * product(target, target))
    distance = torch.from_numpy(1 - product(reconstruction, target) / norms)[:, None].float()
    torch.testing.assert_close(actual, generator.blurs[0](distance), rtol=1e-4, atol=1e-5)


def test_only_training_moves_the_statistics_and_only_the_map_uses_them() -> None:
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    plain, whitened = UniASModel(**TINY).eval(), UniASModel(**TINY, whiten_errors=True).eval()
    statistics = {name for name in whitened.state_dict() if name.startswith("anomaly_map.whitenings.")}
    assert set(whitened.state_dict()) - set(plain.state_dict()) == statistics != set()
    whitened.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(whitened(images).anomaly_map, plain(images).anomaly_map)
    before = {name: whitened.state_dict()[name].clone() for name in statistics}
    whitened.train().reconstruct(images)
    whitened.eval()
    assert not any(torch.equal(before[name], whitened.state_dict()[name]) for name in statistics)
    before = {name: whitened.state_dict()[name].clone() for name in statistics}
    expected, actual = plain.reconstruct(images), whitened.reconstruct(images)
    assert all(torch.equal(before[name], whitened.state_dict()[name]) for name in statistics)
    for a, b in zip(expected.reconstructions, actual.reconstructions, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(whitened(images).anomaly_map, plain(images).anomaly_map, rtol=0.01)
