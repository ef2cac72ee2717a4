# SPDX-License-Identifier: Apache-2.0
"""Training with recomputed activations: the same losses and gradients, from less memory."""

from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from anomalib_uniass import UniAS
from anomalib_uniass.components.recomputation import recomputation, recompute, recomputes
from anomalib_uniass.models.unias import torch_model
from anomalib_uniass.models.unias.loss import ReconstructionLoss
from anomalib_uniass.models.unias.torch_model import UniASModel


@pytest.fixture
def finest_level() -> int:
    return 1


@pytest.fixture
def wide() -> bool:
    return False


@pytest.fixture
def model(finest_level: int, wide: bool) -> UniASModel:
    return UniASModel(
        "tf_efficientnet_lite0" if wide else "resnet18",
        pre_trained=False,
        image_size=(128, 128),
        hidden_dim=256 if wide else 32,
        feedforward_dim=128,
        standardize_features=finest_level > 1,
        finest_level=finest_level,
        seed=0,
    ).train()


def loss_of(model: UniASModel) -> Tensor:
    torch.manual_seed(1)  # of jitter and dropout too
    return ReconstructionLoss()(*model.reconstruct(torch.randn(3, 3, 128, 128)))


def gradients(model: UniASModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("finest_level", "wide"),
    [
        pytest.param(1, False, id="narrow"),
        pytest.param(3, False, id="two levels"),
        pytest.param(1, True, id="wide enough to convolve summands apart"),
    ],
)
@pytest.mark.parametrize("part_bytes", [1, 2**24], ids=["image by image", "whole batch"])
def test_losses_and_gradients_are_those_of_kept_activations(
    model: UniASModel, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_model, "PART_BYTES", part_bytes)
    kept_loss, kept = gradients(model)
    with recomputation():
        loss, recomputed = gradients(model)
    torch.testing.assert_close(loss, kept_loss, rtol=1e-6, atol=0)
    assert recomputed.keys() == kept.keys()
    for name, gradient in kept.items():
        assert (recomputed[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_at_most_three_fifths_of_the_activations_are_kept(model: UniASModel) -> None:
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def kept_bytes() -> int:
        storages: dict[int, Any] = {}  # holding them keeps their addresses from being used again

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(model)
        return sum(storage.nbytes() for storage in storages.values())

    everything = kept_bytes()
    with recomputation():
        assert kept_bytes() < 0.6 * everything


def test_a_product_at_the_end_is_not_computed_again() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter, recomputation():
        recompute(lambda a: torch.mm(a.relu(), weight.mT), x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 4 * 5  # forward and two gradients


def test_recomputation_is_asked_for() -> None:
    assert not recomputes()
    with recomputation():
        assert recomputes()
        with torch.no_grad():
            assert not recomputes()
        with recomputation(enabled=False):
            assert not recomputes()
        assert recomputes()
    with pytest.raises(RuntimeError, match="stop"), recomputation():
        raise RuntimeError("stop")
    assert not recomputes()


@pytest.mark.parametrize("enabled", [False, True])
def test_training_step_recomputes_if_the_model_says_so(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UniAS(
        "resnet18", pre_trained=False, image_size=(128, 128), hidden_dim=32, feedforward_dim=32,
        recompute_activations=enabled,
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(model.loss, "forward", lambda *_: seen.append(recomputes()) or torch.zeros(()))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    model.training_step(ImageBatch(image=torch.rand(1, 3, 128, 128)), 0)
    assert seen == [enabled]
