# SPDX-License-Identifier: Apache-2.0
"""Each rewrite alone and all together against the plain model: values, gradients, names, and whatever moves weights."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from anomalib_uniass import acceleration
from anomalib_uniass.acceleration import REWRITES, accelerate, memory
from anomalib_uniass.acceleration.source_embedding import FoldedSourceEmbedding
from anomalib_uniass.models.unias.loss import ReconstructionLoss
from anomalib_uniass.models.unias.torch_model import UniASModel

FORMS = [*([name] for name in REWRITES), list(REWRITES)]
WIDTH = 256  # wide enough that every rewrite rewrites something
SIZE = (128, 32)


def randomised(seed: int = 0) -> UniASModel:
    """Return a plain model in double precision, all its weights and statistics random: initial ones hide mistakes."""
    torch.manual_seed(seed)
    model = UniASModel(
        "resnet18", pre_trained=False, image_size=SIZE, hidden_dim=WIDTH, feedforward_dim=64, jitter_scale=0.0
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def plain() -> UniASModel:
    return randomised()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FORMS, ids=lambda names: "+".join(names) if len(names) == 1 else "all")
def rewritten(plain: UniASModel, request: pytest.FixtureRequest) -> UniASModel:
    model = copy.deepcopy(plain)
    accelerate(model, request.param)
    return model


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-15)


def test_map_score_and_names_are_the_plain_model_s(plain: UniASModel, rewritten: UniASModel, images: Tensor) -> None:
    assert rewritten.state_dict().keys() == plain.state_dict().keys()
    assert dict(rewritten.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    expected, output = plain.eval()(images), rewritten.eval()(images)
    assert close(output.anomaly_map, expected.anomaly_map)
    assert close(output.pred_score, expected.pred_score)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_plain_model_s(
    plain: UniASModel, rewritten: UniASModel, images: Tensor, training: bool
) -> None:
    gradients = []
    for model in (plain, rewritten):
        model.train(training).zero_grad()
        ReconstructionLoss()(*model.reconstruct(images)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert close(gradients[1][name], gradient), name


def test_exported_graph_takes_any_batch(plain: UniASModel, images: Tensor) -> None:
    model = copy.deepcopy(plain).eval()
    accelerate(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images,), dynamic_shapes={"image": {0: batch}}).module()
    for some in (images[:1], images, torch.cat([images, images[:1]])):
        assert close(exported(some).anomaly_map, plain.eval()(some).anomaly_map)


@pytest.mark.parametrize("part_bytes", [1, 2**40], ids=["image by image", "whole batch"])
def test_batches_may_be_cut(
    plain: UniASModel, images: Tensor, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PART_BYTES", part_bytes)
    model = copy.deepcopy(plain)
    accelerate(model, ["memory"])
    assert close(model.eval()(images).anomaly_map, plain.eval()(images).anomaly_map)


def test_a_batch_that_is_cut_folds_its_source_embedding_once(
    plain: UniASModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PART_BYTES", 1)
    model = copy.deepcopy(plain).train()
    accelerate(model, ["embedding", "memory"])
    embedding, folds = model.source_embedding, []
    assert isinstance(embedding, FoldedSourceEmbedding)
    monkeypatch.setattr(embedding, "fold", lambda: folds.append(1) or FoldedSourceEmbedding.fold(embedding))
    for each in (plain.train(), model):
        each.zero_grad()
        ReconstructionLoss()(*each.reconstruct(images)).backward()
    assert len(folds) == 1
    for ours, theirs in zip(embedding.parameters(), plain.source_embedding.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and close(ours.grad, theirs.grad)


def write_data(model: UniASModel) -> UniASModel:
    """Write weights behind the back of version counters, as `vector_to_parameters` and some optimizers do."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    return model.train().eval()


def load(model: UniASModel, *, assign: bool) -> UniASModel:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.eval().state_dict().items()}
    model.load_state_dict(state, assign=assign)
    return model


def move(model: UniASModel) -> UniASModel:
    """Go to another precision and back: folded weights of single precision must not come back with it."""
    return model.eval().float().double()


CHANGES: dict[str, Callable[[UniASModel], UniASModel]] = {
    "training and back": lambda model: model.train().eval(),
    "data written": write_data,
    "loaded": lambda model: load(model, assign=False),
    "assigned": lambda model: load(model, assign=True),
    "moved": move,
    "copied": lambda model: copy.deepcopy(model.eval()),
    "pickled": lambda model: pickle.loads(pickle.dumps(model.eval())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_map_follows_the_weights(plain: UniASModel, images: Tensor, change: str) -> None:
    model = copy.deepcopy(plain).eval()
    accelerate(model)
    before = model(images).anomaly_map
    model = CHANGES[change](model)
    reference = copy.deepcopy(plain)
    reference.load_state_dict(model.state_dict())
    expected = reference.eval()(images).anomaly_map
    assert close(model(images).anomaly_map, expected)
    assert close(before, expected) == (change not in ("data written", "loaded", "assigned", "moved"))


def test_in_training_there_are_no_constants(plain: UniASModel) -> None:
    """Distributed training would send them at every step."""
    model = copy.deepcopy(plain).train()
    accelerate(model)
    names = {name for name, _ in model.named_buffers()}
    assert not any("folded" in name for name in names)
    assert sum(buffer.numel() for _, buffer in model.eval().named_buffers()) > 10**6


def test_made_under_inference_mode_and_trained_outside(images: Tensor) -> None:
    model = randomised()
    with torch.inference_mode():
        accelerate(model.eval())
        model(images)
    model.train()
    ReconstructionLoss()(*model.reconstruct(images)).backward()
    assert model.heads[3].convs[0].weight.grad is not None


def test_built_under_inference_mode(plain: UniASModel, images: Tensor) -> None:
    with torch.inference_mode():
        model = randomised()
        accelerate(model)
    assert close(model.eval()(images).anomaly_map, plain.eval()(images).anomaly_map)


@pytest.mark.slow
def test_a_training_step_at_full_size_keeps_at_most_three_fifths() -> None:
    plain = UniASModel(pre_trained=False)
    images = torch.randn(8, 3, 224, 224)

    def kept(model: UniASModel) -> int:
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            ReconstructionLoss()(*model.train().reconstruct(images))
        return sum(storage.nbytes() for storage in storages.values())

    model = copy.deepcopy(plain)
    accelerate(model)
    assert kept(model) < 0.6 * kept(copy.deepcopy(plain))


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(acceleration, "LARGE_MAP", 0)  # as large as at full size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
