# SPDX-License-Identifier: Apache-2.0
"""UniAS against numbers of the official release (tests/data/parity, made by the release's own code)."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.layers.backbone_weights import match_by_order
from anomalib_uniass.layers.gaussian_split import GaussianFrequencySplit
from anomalib_uniass.models.unias.loss import ReconstructionLoss
from anomalib_uniass.models.unias.official import convert_official_state_dict, official_arguments
from anomalib_uniass.models.unias.torch_model import UniASModel

PARITY = Path(__file__).parents[1] / "data" / "parity"
CHANNELS = (24, 32, 56, 160)
CASES = ("unias_head_h32", "unias_head_h64", "unias_head_h32_spatial")


def random_array(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed % 2**32).standard_normal(shape).astype(np.float32))


def reference_state_dict(case: str, prefix: str = "") -> dict[str, Tensor]:
    """The weights that the fixture's numbers were computed with (see fill_state_dict in the fixture's README)."""
    meta = json.loads((PARITY / f"{case}.json").read_text())
    state_dict = {}
    for n, (key, shape, dtype) in enumerate(meta["keys"]):
        if dtype.startswith("int"):
            value = torch.zeros(shape, dtype=getattr(torch, dtype))
        else:
            value = random_array(tuple(shape), meta["seed"] + n)
            if key.endswith("running_var"):
                value = 0.5 + value.abs()
            elif value.ndim >= 2:
                value = value / np.float32(np.sqrt(np.prod(shape[1:])))
            elif key.endswith("weight"):
                value = 1 + 0.1 * value
            else:
                value = 0.1 * value
        state_dict[prefix + key] = value
    return state_dict


@cache
def official_state_dict(case: str) -> dict[str, Tensor]:
    return {
        **reference_state_dict("backbone_b4", "module.backbone."),
        **reference_state_dict(case, "module.sem_seg_head."),
    }


@cache
def load_case(case: str) -> tuple[UniASModel, list[Tensor], dict[str, np.ndarray], dict[str, int]]:
    meta = json.loads((PARITY / f"{case}.json").read_text())
    state_dict = official_state_dict(case)
    model = UniASModel(**official_arguments({k.removeprefix("module."): v for k, v in state_dict.items()}))
    model.load_state_dict(convert_official_state_dict(state_dict))
    features = [
        random_array((meta["batch"], c, s, s), meta["seed"] + 101 + i) * 3
        for i, (c, s) in enumerate(zip(CHANNELS, (112, 56, 28, 14), strict=True))
    ]
    arrays = dict(np.load(PARITY / f"{case}.npz"))
    return model.eval(), features, arrays, meta


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the array's scale."""
    scale = max(float(np.abs(expected).max()), 1e-12)
    assert np.abs(actual.detach().numpy() - expected).max() / scale < tolerance


@pytest.mark.parametrize("case", CASES)
def test_reconstructions_and_maps(case: str) -> None:
    model, features, arrays, _ = load_case(case)
    with torch.no_grad():
        reconstructions, targets, _ = model.reconstruct_features(features)
        residual = model.detector.residual(torch.empty(0), reconstructions, targets)
        level_maps = model.detector.distances(residual)
        anomaly_map = model.detector(residual).anomaly_map
    for j, (reconstruction, level_map) in enumerate(zip(reconstructions, level_maps, strict=True)):
        sampled = reconstruction[:, ::4]
        if sampled.shape[-1] > 28:
            sampled = sampled[..., ::2, ::2]
        assert_close(sampled, arrays[f"recon_{j}"])
        assert_close(level_map[:, 0, ::2, ::2], arrays[f"level_map_{j}"])
    assert_close(anomaly_map[:, 0, ::2, ::2], arrays["pred"])
    for j, target in enumerate(reversed(targets)):
        assert target.mean().item() == pytest.approx(arrays[f"target_res{j + 1}_mean"], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_loss(case: str) -> None:
    model, features, arrays, _ = load_case(case)
    weight = 1.0 if case.endswith("spatial") else 10.0
    with torch.no_grad():
        reconstruction = model.reconstruct_features(features)
    release = ReconstructionLoss(weight=weight, cosine_term="release")(*reconstruction)
    paper = ReconstructionLoss(weight=weight)(*reconstruction)
    assert release.item() == pytest.approx(arrays["loss_times_weight_official_sign"], rel=1e-5)
    assert paper.item() == pytest.approx(arrays["loss_times_weight_paper_sign"], rel=1e-5)


def test_gradient_norms() -> None:
    model, features, arrays, _ = load_case("unias_head_h32")
    model.zero_grad()
    loss = ReconstructionLoss(weight=10.0, cosine_term="release")(*model.reconstruct_features(features))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # The same renaming that carries weights over carries the names of the gradients.
    names = [f"sem_seg_head.{key}" for key in arrays["grad_keys"]]
    markers = {
        key: torch.full_like(value, float(names.index(key.removeprefix("module."))))
        for key, value in official_state_dict("unias_head_h32").items()
        if key.removeprefix("module.") in names
    }
    converted = convert_official_state_dict({**official_state_dict("unias_head_h32"), **markers})
    checked = 0
    for ours, gradient in gradients.items():
        expected = arrays["grad_norms"][int(converted[ours].flatten()[0])]
        assert gradient.norm().item() == pytest.approx(float(expected), rel=1e-3, abs=1e-6), ours
        checked += 1
    assert checked == len(names)


def test_backbone_with_static_padding() -> None:
    state_dict = reference_state_dict("backbone_b4")
    renamed = match_by_order(state_dict, backbone="tf_efficientnet_b4", source="fixture")
    pyramid = FeaturePyramid("tf_efficientnet_b4", pre_trained=False)
    pyramid.load_state_dict({f"network.{key}": renamed[key] for key in pyramid.network.state_dict()})
    assert pyramid.channels == CHANNELS
    meta = json.loads((PARITY / "backbone_b4.json").read_text())
    features = pyramid(random_array((1, 3, 224, 224), meta["seed"] + 7))
    targets, inputs = GaussianFrequencySplit()(features)
    arrays = np.load(PARITY / "backbone_b4.npz")
    for i, (target, x) in enumerate(zip(targets, inputs, strict=True), start=1):
        assert_close(target[:, ::4, ::2, ::2], arrays[f"target_res{i}"])
        assert_close(x[:, ::8, ::2, ::2], arrays[f"forward_res{i}"])


@pytest.mark.parametrize("name", ["unias_full_keys", "unias_visa_full_keys"])
def test_full_size_checkpoint_of_the_release_converts(name: str) -> None:
    meta = json.loads((PARITY / f"{name}.json").read_text())
    state_dict = {f"module.{key}": torch.zeros(shape) for key, shape, _ in meta["keys"]}
    converted = convert_official_state_dict(state_dict)
    trainable = sum(v.numel() for k, v in converted.items() if not k.startswith("backbone."))
    millions = 53.85 if name == "unias_full_keys" else 49.39  # published sizes, design page
    assert trainable / 1e6 == pytest.approx(millions, abs=0.005)


def test_errors_list_what_is_wrong() -> None:
    state_dict = official_state_dict("unias_head_h32")
    first = "module.sem_seg_head.predictor.decoder_norm.weight"
    with pytest.raises(ValueError, match=r"Unknown: \['sem_seg_head.extra'\]"):
        convert_official_state_dict({**state_dict, "module.sem_seg_head.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"Missing \(our names\): \['norm.weight'\]"):
        convert_official_state_dict({k: v for k, v in state_dict.items() if k != first})
    with pytest.raises(ValueError, match=r"Misshapen: \['norm.weight: \(7,\) instead of \(32,\)'\]"):
        convert_official_state_dict({**state_dict, first: torch.zeros(7)})
    with pytest.raises(ValueError, match="Not an official UniAS state dict"):
        convert_official_state_dict({"weight": torch.zeros(1)})
