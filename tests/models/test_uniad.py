# SPDX-License-Identifier: Apache-2.0
"""UniAD: numbers of the official release, shapes, errors, training through the engine, checkpoints, export."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.engine import Engine
from anomalib.models import list_models
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import Resize

from anomalib_uniass import UniAD, Unified
from anomalib_uniass.layers.transformer import AttentionLayer
from anomalib_uniass.models.uniad.anomaly_map import AnomalyMapGenerator, image_score
from anomalib_uniass.models.uniad.decoder import LearnedPositionEmbedding2d
from anomalib_uniass.models.uniad.torch_model import UniADModel
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import SMALL, loss_on_unseen
from tests.helpers.official_uniad import convert_official_state_dict, official_arguments
from tests.models.test_unias_parity import CHANNELS, PARITY, assert_close, random_array, reference_state_dict

TINY: dict[str, Any] = SMALL | {
    "seed": 0,
}


@cache
def official_state_dict() -> dict[str, Tensor]:
    return {
        **reference_state_dict("backbone_b4", "module.backbone."),
        **reference_state_dict("uniad_h32", "module.reconstruction."),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "parts"
    make_mvtec_layout(folder, ["bolt", "cap"], train=6, good=2, defective=2)
    return folder


def datamodule(root: Path) -> Unified:
    return Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0)


def engine(folder: Path, **kwargs: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **kwargs)


def test_numbers_of_the_release() -> None:
    meta = json.loads((PARITY / "uniad_h32.json").read_text())
    arrays = np.load(PARITY / "uniad_h32.npz")
    arguments = official_arguments({k.removeprefix("module."): v for k, v in official_state_dict().items()})
    assert (arguments["hidden_dim"], arguments["feedforward_dim"]) == (meta["hidden"], meta["ffn"])
    model = UniADModel(**arguments).eval()
    model.load_state_dict(convert_official_state_dict(official_state_dict()))
    features = [
        random_array((meta["batch"], c, s, s), meta["seed"] + 101 + i) * 3
        for i, (c, s) in enumerate(zip(CHANNELS, (112, 56, 28, 14), strict=True))
    ]
    with torch.no_grad():
        reconstruction, target = model.reconstruct_features(features)
        anomaly_map = model.anomaly_map(reconstruction, target)
    assert_close(target[:, ::8], arrays["feature_align"])
    assert_close(reconstruction[:, ::8], arrays["feature_rec"])
    assert_close(anomaly_map[:, 0, ::4, ::4], arrays["pred"])


def test_errors_list_what_is_wrong() -> None:
    state_dict = official_state_dict()
    norm = "module.reconstruction.transformer.decoder.norm.weight"
    with pytest.raises(ValueError, match=r"Not a UniAD state dict. Unknown: \['reconstruction.extra', 'neck.x'\]"):
        convert_official_state_dict(
            {**state_dict, "module.reconstruction.extra": torch.zeros(1), "module.neck.x": torch.zeros(1)}
        )
    with pytest.raises(ValueError, match=r"Missing \(our names\): \['norm.weight'\]"):
        convert_official_state_dict({k: v for k, v in state_dict.items() if k != norm})
    with pytest.raises(ValueError, match=r"Misshapen: \['norm.weight: \(7,\) instead of \(32,\)'\]"):
        convert_official_state_dict({**state_dict, norm: torch.zeros(7)})
    with pytest.raises(ValueError, match="Not an official UniAD state dict"):
        convert_official_state_dict(reference_state_dict("unias_head_h32", "module.sem_seg_head."))
    with pytest.raises(ValueError, match=r"the official UniAD backbone does not hold .*: 0 entries"):
        convert_official_state_dict(reference_state_dict("uniad_h32", "reconstruction."))


@pytest.mark.parametrize("image_size", [(128, 128), (128, 192), (144, 80)])
def test_map_and_score_have_the_size_of_the_input(image_size: tuple[int, int]) -> None:
    model = UniADModel(**{**TINY, "image_size": image_size}).eval()
    output = model(torch.randn(2, 3, *image_size))
    assert output.anomaly_map.shape == (2, 1, *image_size)
    assert output.pred_score.shape == (2,)
    assert output.anomaly_map.isfinite().all()
    assert not output.anomaly_map.requires_grad
    reconstruction, target = model.reconstruct(torch.randn(2, 3, *image_size))
    assert reconstruction.shape == target.shape == (2, sum(model.backbone.channels), *model.grid_size)
    assert reconstruction.requires_grad and not target.requires_grad


def test_position_embedding_is_column_then_row() -> None:
    position = LearnedPositionEmbedding2d((3, 5), 8)
    table = position()
    assert table.shape == (15, 8)
    row, column = 2, 4
    expected = torch.cat([position.column_embedding.weight[column], position.row_embedding.weight[row]])
    torch.testing.assert_close(table[row * 5 + column], expected, rtol=0, atol=0)


def test_map_and_score_by_hand() -> None:
    reconstruction, target = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    reconstruction[0, :, 0, 0] = torch.tensor([3.0, -4.0])  # distance 5 in the upper left corner
    ramp = torch.linspace(1, 0, 33)
    expected = 5 * torch.outer(ramp, ramp)
    anomaly_map = AnomalyMapGenerator((33, 33))(reconstruction, target)
    torch.testing.assert_close(anomaly_map[0, 0], expected)
    torch.testing.assert_close(image_score(anomaly_map), expected[:16, :16].mean()[None])


def test_neighbours_stay_hidden_from_all_attentions() -> None:
    model = UniADModel(**{**TINY, "image_size": (128, 256)}).eval()
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, AttentionLayer):
            module.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
            assert module.attention.num_heads == 8
    model(torch.randn(1, 3, 128, 256))
    assert len(seen) == 4 + 2 * 4
    assert all(mask is model.neighbor_mask for mask in seen)
    assert "neighbor_mask" not in model.state_dict()


def test_jitter_reaches_the_input_in_every_batch_and_never_the_target() -> None:
    model = UniADModel(**TINY).train()
    seen: list[Tensor] = []
    model.input_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    image = torch.randn(2, 3, 128, 128)
    for _ in range(3):
        target = model.reconstruct(image).target.flatten(2).mT
        noise = (seen.pop() - target) / (target.norm(dim=2, keepdim=True) / target.shape[2] * 20)
        assert noise.std().item() == pytest.approx(1, abs=0.02)
    model.eval().reconstruct(image)
    torch.testing.assert_close(seen.pop(), target, rtol=0, atol=0)


def test_initial_weights_are_the_release_s() -> None:
    model = UniADModel(**{**TINY, "hidden_dim": 64})
    bound = (6 / (64 + sum(model.backbone.channels))) ** 0.5  # Xavier-uniform
    assert 0.95 * bound < model.input_proj.weight.abs().max().item() <= bound
    assert not model.output_proj.bias.any()
    rows = model.position.row_embedding.weight
    assert 0 <= rows.min().item() < 0.1 and 0.9 < rows.max().item() <= 1
    assert model.decoder[0].query_embedding.weight.std().item() == pytest.approx(1, abs=0.05)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = UniADModel(**TINY).state_dict(), UniADModel(**TINY).state_dict()
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    other = UniADModel(**{**TINY, "seed": 1}).state_dict()
    assert not torch.equal(first["input_proj.weight"], other["input_proj.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (225, 224)}, r"image_size must hold multiples of 16, got \(225, 224\)"),
        ({"image_size": (112, 112)}, "a side of the image must be larger than 112 pixels"),
        ({"image_size": (224,)}, r"image_size must be \(height, width\)"),
        ({"hidden_dim": 36}, r"hidden_dim must be a multiple of 8 \(attention heads\), got 36"),
        ({"backbone": "resnet1888"}, "backbone must be a timm model name"),
        ({"lr_schedule": "cosine"}, "lr_schedule must be one of step, onecycle"),
        ({"jitter_probability": 2.0}, r"jitter_probability must be a number at least 0 and at most 1"),
        ({"pre_processor": PreProcessor(Resize((64, 64)))}, r"makes images of size \(64, 64\)"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniAD(**{**TINY, **changes})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected images of size \(128, 128\), got \(64, 64\)"):
        UniADModel(**TINY)(torch.zeros(1, 3, 64, 64))


def test_anomalib_lists_the_model() -> None:
    assert "UniAD" in list_models("pascal")


def test_training_moves_everything_but_the_backbone_and_learns(root: Path, tmp_path: Path) -> None:
    model = UniAD(**TINY, learning_rate=1e-3, visualizer=False)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    untrained = loss_on_unseen(model, datamodule(root))
    run = engine(tmp_path, max_epochs=8)
    run.fit(model, datamodule=datamodule(root))
    assert run.trainer.gradient_clip_val == 0.1
    trainable = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    moved = {name for name, value in model.model.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == trainable
    assert loss_on_unseen(model, datamodule(root)) < untrained / 4  # it was a twelfth when this was written


def test_default_recipe_is_the_release_s() -> None:
    model = UniAD(backbone="resnet18", pre_trained=False)
    configuration = model.configure_optimizers()
    group = configuration["optimizer"].param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 1e-4, (0.9, 0.999))
    schedule = configuration["lr_scheduler"]["scheduler"]
    assert (schedule.step_size, schedule.gamma) == (800, 0.1)
    assert (model.hparams.hidden_dim, model.hparams.feedforward_dim) == (256, 1024)
    r, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model.loss(r, t), (r - t).square().mean())


def test_checkpoint_round_trip(root: Path, tmp_path: Path) -> None:
    data = datamodule(root)
    model = UniAD(**TINY, lr_schedule="onecycle", visualizer=False)
    run = engine(tmp_path, max_epochs=1)
    run.fit(model, datamodule=data)
    (results,) = run.test(model, datamodule=data)
    assert {"mean_pixel_AP", "mean_DSC"} <= results.keys()
    path = Path(run.best_model_path or "")
    loaded = UniAD.load_from_checkpoint(path)
    assert loaded.hparams.image_size == (128, 128)
    images = torch.rand(2, 3, 96, 80)
    expected, actual = model.eval()(images), loaded.eval()(images)
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(actual.pred_score, expected.pred_score)

    other = UniAD(**{**TINY, "hidden_dim": 64}, visualizer=False)
    with pytest.raises(ValueError, match=r"hidden_dim: checkpoint 32, model 64"):
        engine(tmp_path).test(other, datamodule=data, ckpt_path=path)


@pytest.mark.slow
def test_openvino_export_takes_any_batch_and_equals_eager(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = UniAD(**{**TINY, "image_size": (128, 144)}).eval()
    nn.init.uniform_(model.model.norm.weight)  # an untrained model is not exported
    path = model.to_openvino(tmp_path)
    core = openvino.Core()
    network = core.read_model(path)
    assert network.input(0).partial_shape[0].is_dynamic
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    for batch in (1, 3):
        images = torch.rand(batch, 3, 128, 144)
        expected: InferenceBatch = model(images)
        outputs = compiled(images.numpy())
        np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map, atol=1e-4)
        np.testing.assert_allclose(outputs["pred_score"].squeeze(), expected.pred_score.squeeze(), atol=1e-4)
