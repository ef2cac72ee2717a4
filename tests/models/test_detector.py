# SPDX-License-Identifier: Apache-2.0
"""The detector as a whole: its recipes, checkpoints of version 0.2.0, and what a training that goes on forgets."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_uniass.models.unias.detector.parts import Fitted
from anomalib_uniass.models.unias.detector.recipes import RECIPES
from anomalib_uniass.models.unias.torch_model import UniASModel

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "data" / "parity"


def filled(keys: list[tuple[str, list[int], str]]) -> dict[str, Tensor]:
    """Return weights and statistics of these names and shapes, drawn by their numbers."""
    state = {}
    for number, (key, shape, dtype) in enumerate(keys):
        value = torch.from_numpy(np.random.RandomState(number).standard_normal(shape).astype(np.float32))
        name = key.rsplit(".", 1)[-1]
        if name == "fitted":
            value = torch.tensor(True)
        elif dtype.startswith("int"):
            value = torch.zeros(shape, dtype=torch.int64)
        elif name.startswith("whitening_"):
            value = torch.eye(shape[-1]) + 0.02 * value
        elif name in ("exponents", "running_var", "scale") or name.startswith("std_"):
            value = 0.5 + value.abs()
        elif name.startswith("directions_"):
            value = torch.nn.functional.normalize(value, dim=-1)
        elif value.ndim >= 2:
            value = value / np.float32(np.sqrt(np.prod(shape[1:])))
        elif name == "weight":
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        state[key] = value
    return state


@pytest.fixture(scope="module")
def state_of_0_2() -> dict[str, Tensor]:
    return filled(json.loads((PARITY / "best_0_2_0.json").read_text())["keys"])


def model(recipe: str = "best") -> UniASModel:
    return UniASModel(
        "mobilenetv3_small_050", pre_trained=False, image_size=(64, 128), hidden_dim=32, feedforward_dim=32,
        recipe=recipe,
    ).eval()  # fmt: skip


def images() -> Tensor:
    pixels = np.random.RandomState(7).standard_normal((2, 3, 64, 128)).astype(np.float32)
    return torch.from_numpy(pixels) * torch.tensor([1.0, 5.0])[:, None, None, None]


def test_map_and_score_are_those_of_version_0_2(state_of_0_2: dict[str, Tensor]) -> None:
    """Every part is fitted in it; its numbers were made by the code of version 0.2.0."""
    network = model()
    network.load_state_dict(state_of_0_2)
    found, expected = network(images()), np.load(PARITY / "best_0_2_0.npz")
    torch.testing.assert_close(found.anomaly_map, torch.from_numpy(expected["anomaly_map"]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.pred_score, torch.from_numpy(expected["pred_score"]), rtol=1e-6, atol=0)


def test_every_part_has_a_say(state_of_0_2: dict[str, Tensor]) -> None:
    network = model()
    network.load_state_dict(state_of_0_2)
    whole = network(images()).anomaly_map
    for name in list(network.detector.parts):
        part = network.detector.parts.pop(name)
        assert not torch.allclose(network(images()).anomaly_map, whole, rtol=0.01), name
        network.detector.parts[name] = part
        network.detector.parts = torch.nn.ModuleDict({n: network.detector.parts[n] for n in model().detector.parts})
    assert torch.equal(network(images()).anomaly_map, whole)


def test_a_reset_detector_is_a_new_one(state_of_0_2: dict[str, Tensor]) -> None:
    network, new = model(), model()
    network.load_state_dict(state_of_0_2)
    assert not network.detector.lacks()
    network.detector.reset()
    assert network.detector.lacks() == new.detector.lacks() != []
    new.load_state_dict(network.state_dict() | {k: v for k, v in new.state_dict().items() if ".distances." in k})
    for a, b in zip(network(images()), new(images()), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


def test_documentation_names_the_parts_of_the_best_recipe_in_their_order() -> None:
    detector = model().detector
    files = [
        re.sub(r"(?<!^)([A-Z])", r"_\1", type(module).__name__).lower()
        for module in (detector.clusters, detector.distances.whitening, detector.distances.directions)
    ] + list(detector.parts)
    table = (ROOT / "docs" / "model.md").read_text().split("## Recipe `best`")[1].split("\n## ")[0]
    assert re.findall(r"\| `detector/(\w+)\.py`", table) == [*files, "image_score"]
    assert set(RECIPES) == {"paper", "best"} and not model("paper").detector.parts


def test_each_part_has_a_file_of_its_name() -> None:
    folder = ROOT / "anomalib_uniass" / "models" / "unias" / "detector"
    fitted = [type(part).__name__ for part in model().modules() if isinstance(part, Fitted)]
    assert fitted == ["Clusters", "WhitenedDistances", "SegmentationHead"]
    for name in model().detector.parts:
        assert (folder / f"{name}.py").is_file()
