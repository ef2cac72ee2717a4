# SPDX-License-Identifier: Apache-2.0
"""Every model of anomalib that runs without a network trains and tests on the unified datamodule, with our table.

Models that insist on pretrained weights get random ones, in files where the libraries keep what they have downloaded.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pandas as pd
import pytest
import timm
import torch
import torchvision
from anomalib.engine import Engine
from anomalib.models import Dsr, EfficientAd
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import get_pretrained_weights_dir
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2 import Resize

from anomalib_uniass import Unified
from anomalib_uniass.metrics.functional import METRICS, PIXEL_METRICS
from tests.helpers.datasets import make_mvtec_layout

CATEGORIES = ["bolt", "cap"]


class Case(NamedTuple):
    """How a model is made small.

    Attributes:
        arguments: Its constructor's arguments.
        image_size: Height and width that a pre-processor without normalisation resizes to; 0 takes the model's own.
        batch_size: Training images in a batch.
        timm_weights: Network of timm whose pretrained weights it wants.
        torchvision_weights: Network of torchvision, likewise.
        has_maps: Whether it gives anomaly maps.
        is_slow: Whether it takes more than about two seconds.
    """

    arguments: dict[str, Any]
    image_size: int = 64
    batch_size: int = 4
    timm_weights: str = ""
    torchvision_weights: str = ""
    has_maps: bool = True
    is_slow: bool = False


RESNET: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False}
TWO_LAYERS = {"layers": ("layer2", "layer3")}
DINOV2_REG = {"encoder_name": "vit_small_patch14_reg4_dinov2"}
OURS = RESNET | {"image_size": (128, 128)}
NARROW = {"hidden_dim": 32, "feedforward_dim": 32}

CASES = {
    "AnomalyDINO": Case({}, 56, timm_weights="vit_small_patch14_dinov2", is_slow=True),
    "BoundedPatchcore": Case(OURS | {"coreset_size": 20, "max_patches": 200}, 0),
    "Cfa": Case({"backbone": "resnet18"}, torchvision_weights="resnet18"),
    "Cflow": Case(RESNET | TWO_LAYERS | {"fiber_batch_size": 8}, is_slow=True),
    "Csflow": Case(
        {"cross_conv_hidden_channels": 16, "n_coupling_blocks": 1},
        256,
        torchvision_weights="efficientnet_b5",
        is_slow=True,
    ),
    "Dfkde": Case({"pre_trained": False, "n_pca_components": 2}, has_maps=False),
    "Dfm": Case(RESNET | {"layer": "layer3"}),
    "Dinomaly": Case(DINOV2_REG, 56, timm_weights=DINOV2_REG["encoder_name"], is_slow=True),
    "Draem": Case({"dtd_dir": "textures"}, is_slow=True),
    "Dsr": Case({}, is_slow=True),
    "EfficientAd": Case({"imagenet_dir": "pictures"}, 256, 1, is_slow=True),
    "Fastflow": Case({"pre_trained": False, "flow_steps": 1}),
    "FoundAD": Case(
        {"encoder_name": "dinov2_vit_small_14", "image_size": 56, "pred_depth": 1, "pred_emb_dim": 48},
        56,
        timm_weights="vit_small_patch14_dinov2",
        is_slow=True,
    ),
    "Fre": Case(RESNET | {"layer": "layer3", "pooling_kernel_size": 2, "input_dim": 1024, "latent_dim": 8}),
    "Ganomaly": Case({"batch_size": 4, "n_features": 8, "latent_vec_size": 8}, has_maps=False),
    "GeneralAD": Case(
        {"backbone": "vit_tiny_patch16_224", "layers": (6,), "hidden_dim": 32, "dsc_heads": 3, "pre_trained": False}
        | {"epochs": 1}
    ),
    "Glass": Case(  # without pretrained weights its optimizer finds no backbone
        {"backbone": "resnet18", "input_shape": (64, 64), "layers": ["layer2", "layer3"]}
        | {"pretrain_embed_dim": 64, "target_embed_dim": 64, "discriminator_hidden": 32},
        timm_weights="resnet18",
    ),
    "InpFormer": Case(DINOV2_REG, 56, timm_weights=DINOV2_REG["encoder_name"], is_slow=True),
    "L2BT": Case({}, 56, timm_weights="vit_base_patch14_reg4_dinov2", is_slow=True),
    "MHPatchcore": Case(RESNET | TWO_LAYERS | {"memory_bank_size": 20, "local_coreset_size": 8, "num_neighbors": 2}),
    "Padim": Case(RESNET | {"layers": ["layer1"], "n_features": 4}),
    "Patchcore": Case(RESNET | TWO_LAYERS),
    "Patchflow": Case(
        {"backbone": "tf_efficientnet_b0", "pre_trained": False, "flow_feature_dim": 16, "flow_hidden_dim": 16}
    ),
    "Rad": Case({"backbone": "vit_tiny_patch16_224", "pre_trained": False, "k_image": 2}),
    "ReverseDistillation": Case(RESNET, is_slow=True),
    "Stfpm": Case({"layers": ("layer1", "layer2")}, timm_weights="resnet18"),
    "SuperADD": Case(
        {"backbone": "vit_small_patch16_dinov3", "patch_size": 64},
        timm_weights="vit_small_patch16_dinov3",
        is_slow=True,
    ),
    "Supersimplenet": Case({"backbone": "resnet18"}, 128, timm_weights="resnet18", is_slow=True),
    "Uflow": Case({"backbone": "resnet18", "flow_steps": 1}, 256, timm_weights="resnet18", is_slow=True),
    "UniAD": Case(OURS | NARROW, 0),
    "UniAS": Case(OURS | NARROW, 0),
    "UniNet": Case({}, torchvision_weights="wide_resnet50_2", is_slow=True),
}
NOT_RUN = {
    "AiVad": "for videos; downloads a detector",
    "AnomalyVFM": "downloads weights that exist in one place of the hub only",
    "CFM": "for colour images with depth; downloads weights",
    "Fuvas": "for videos; downloads a network by torch.hub",
    "VlmAd": "asks a language model that runs elsewhere",
    "WinClip": "needs the package open_clip and downloads CLIP",
}


def models() -> dict[str, type[AnomalibModule]]:
    """Return the classes behind `list_models`, those that tests define left out."""
    found = {cls.__name__: cls for cls in AnomalibModule.__subclasses__()}
    return {name: cls for name, cls in found.items() if cls.__module__.startswith(("anomalib.", "anomalib_uniass."))}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Switch the network off and start with empty caches below a folder, which holds data for all."""
    folder = tmp_path_factory.mktemp("offline")
    make_mvtec_layout(folder / "parts", CATEGORIES)
    for name in ("textures", "pictures"):
        (folder / name / "all").mkdir(parents=True)
        Image.effect_noise((80, 80), 50).convert("RGB").save(folder / name / "all/0.png")

    def no_network(*_: object, **__: object) -> None:
        raise OSError("the network is off")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(socket, "getaddrinfo", no_network)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def write_timm_weights(name: str, hub: Path) -> None:
    """Write random weights where the hub's client keeps those that timm asks for."""
    config = timm.models.get_pretrained_cfg(name)
    repository = config.hf_hub_id if not config.hf_hub_id.endswith("/") else config.hf_hub_id + config.architecture
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    if not snapshot.is_dir():
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
        save_file(timm.create_model(name).state_dict(), snapshot / "model.safetensors")


def write_torchvision_weights(name: str, checkpoints: Path) -> None:
    """Write random weights where torch.hub keeps those that torchvision asks for."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    state_dict = torchvision.models.get_model(name, weights=None).state_dict()
    for weights in torchvision.models.get_model_weights(name):
        torch.save(state_dict, checkpoints / weights.url.rpartition("/")[2])


def write_own_weights(name: str) -> None:
    """Write random weights where anomalib keeps those that it has downloaded itself."""
    folder = get_pretrained_weights_dir()
    if name == "EfficientAd":
        (folder / "efficientad_pretrained_weights").mkdir(parents=True)
        teacher = EfficientAd().model.teacher.state_dict()
        torch.save(teacher, folder / "efficientad_pretrained_weights/pretrained_teacher_small.pth")
    if name == "Dsr":
        (folder / "dsr").mkdir(parents=True)
        torch.save(Dsr().model.discrete_latent_model.state_dict(), folder / "dsr/vq_model_pretrained_128_4096.pckl")


def test_every_model_is_in_one_of_the_tables() -> None:
    assert set(models()) == {*CASES, *NOT_RUN}
    assert not set(CASES) & set(NOT_RUN)


@pytest.mark.parametrize("name", NOT_RUN)
def test_model_that_is_left_out_cannot_be_built_or_tested_without_a_network(
    name: str, offline: Path, tmp_path: Path
) -> None:
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    with pytest.raises((ImportError, OSError, RuntimeError)):
        engine.test(models()[name](), datamodule=Unified(root=offline / "parts", num_workers=0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if case.is_slow else []) for name, case in CASES.items()]
)
def test_model_trains_and_tests_on_unified_data_with_our_table(name: str, offline: Path, tmp_path: Path) -> None:
    case = CASES[name]
    if case.timm_weights:
        write_timm_weights(case.timm_weights, offline / "hub")
    if case.torchvision_weights:
        write_torchvision_weights(case.torchvision_weights, offline / "torch/hub/checkpoints")
    write_own_weights(name)
    resize = {"pre_processor": PreProcessor(Resize((case.image_size, case.image_size)))} if case.image_size else {}
    model = models()[name](**case.arguments, **resize, visualizer=False)
    datamodule = Unified(
        root=offline / "parts",
        num_workers=0,
        train_batch_size=case.batch_size,
        eval_batch_size=3,
        comparison=tmp_path / "comparison",
    )
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path / "results", logger=False)
    engine.fit(model, datamodule=datamodule)
    (logged,) = engine.test(model, datamodule=datamodule)

    table = pd.read_csv(next(tmp_path.glob("results/**/metrics/per_category.csv")), index_col="category")
    assert list(table.index) == [*CATEGORIES, "mean"]
    assert list(table["n_images"]) == [4, 4, 8]
    assert table["image_AUROC"].between(0, 1).all()
    pixels = table[list(PIXEL_METRICS)].stack(future_stack=True)
    assert pixels.between(0, 1).all() if case.has_maps else pixels.isna().all()
    assert {f"mean_{metric}" for metric in METRICS} <= set(logged)
    assert list(pd.read_csv(tmp_path / "comparison/table.csv")["model"]) == [name]
