# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is all it takes: every command with the default model, without a network, and what is refused."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from anomalib.cli.cli import main
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from torch import nn

from anomalib_uniass import BoundedPatchcore, UniAD, UniAS, Unified
from anomalib_uniass.layers.backbone import FeaturePyramid
from anomalib_uniass.training.checkpoint_size import say_large_checkpoints
from anomalib_uniass.training.from_checkpoint import normal_forms
from tests.helpers.datasets import make_mvtec_layout

SMALL: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128)}
NARROW = SMALL | {"hidden_dim": 32, "feedforward_dim": 32}
TILES = {"recipe": "best", "tile_size": 64, "stride": 48}
MODELS = {"UniAS": UniAS, "UniAD": UniAD, "BoundedPatchcore": BoundedPatchcore}


def save(model: Any, path: Path) -> Path:
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def trained(kind: str, **arguments: Any) -> Any:
    """Make a model whose weights are not those of a constructor, and say that it has thresholds."""
    if kind == "BoundedPatchcore":
        model: Any = BoundedPatchcore(**SMALL, **arguments)
        model.model.memory_bank = torch.rand(20, 384)
        model._is_fitted.fill_(True)
    else:
        model = MODELS[kind](**NARROW, **arguments)
        nn.init.normal_(model.model.norm.weight, mean=1, std=0.1)
    for name in ("_image_threshold", "_pixel_threshold"):
        getattr(model.post_processor, name).fill_(0.1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make small data, a checkpoint of every model, and files that are none."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_mvtec_layout(folder / "parts", ["bolt", "cap"], train=4, good=1, defective=1, image_size=96)
    for kind in MODELS:
        save(trained(kind), folder / f"{kind}.ckpt")
    save(trained("UniAS", **TILES), folder / "tiles.ckpt")
    (folder / "empty.ckpt").touch()
    (folder / "text.ckpt").write_text("no checkpoint")
    whole = (folder / "UniAS.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.load(folder / "UniAS.ckpt")["state_dict"], folder / "weights.ckpt")
    torch.save([torch.zeros(1)], folder / "list.ckpt")
    torch.save(nn.Linear(1, 1), folder / "module.ckpt")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm's hub fail as it does without a network."""
    create = timm.create_model

    def refuse(*arguments: Any, pretrained: bool = False, **named: Any) -> nn.Module:
        if pretrained:
            raise ConnectionError("no route to host")
        return create(*arguments, pretrained=False, **named)

    monkeypatch.setattr(timm, "create_model", refuse)


@pytest.fixture
def anomalib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: None) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["anomalib", *arguments])
        main()

    return run


def engine(path: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=path, accelerator="cpu", enable_progress_bar=False, **arguments)


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_stock_command_predicts_with_a_checkpoint_alone_and_no_network(folder: Path, tmp_path: Path) -> None:
    """As README has it; every connection fails, in every process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(*_):\n"
        "    raise OSError('no network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_CACHE": str(tmp_path / "no_cache"),
    }
    script = Path(sysconfig.get_path("scripts")) / "anomalib"
    command = ["predict", "--model", "UniAS", "--ckpt_path", str(folder / "UniAS.ckpt")]
    result = subprocess.run(
        [script, *command, "--data", str(folder / "parts/bolt/test")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = " ".join((result.stdout + result.stderr).split())
    assert "UniAS is built as the checkpoint has it: backbone resnet18, image_size (128, 128), hidden_dim 32" in said
    assert len((tmp_path / "results/UniAS/latest/predictions.csv").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize("kind", ["UniAS", "UniAD", "BoundedPatchcore", "tiles"])
def test_predict_in_python(kind: str, folder: Path, tmp_path: Path, offline: None) -> None:
    """The default model becomes that of the checkpoint: its maps and scores are those of the loaded one."""
    path, images = folder / f"{kind}.ckpt", folder / "parts/bolt/test"
    cls: Any = MODELS.get(kind, UniAS)
    loaded, model = cls.load_from_checkpoint(path, visualizer=False), cls(visualizer=False)
    (batch, *_) = engine(tmp_path / "a").predict(model, data_path=images, ckpt_path=path)
    (wanted, *_) = engine(tmp_path / "b").predict(loaded, data_path=images)
    torch.testing.assert_close(batch.anomaly_map, wanted.anomaly_map, rtol=0, atol=0)
    torch.testing.assert_close(batch.pred_score, wanted.pred_score, rtol=0, atol=0)
    kept = {name: value for name, value in loaded.hparams.items() if name not in ("pre_trained", "weights")}
    assert {name: model.hparams[name] for name in kept} == kept


@pytest.mark.parametrize("kind", ["UniAS", "tiles"])
def test_test_and_validate_in_python(kind: str, folder: Path, tmp_path: Path, offline: None) -> None:
    """The datamodule too makes images of the checkpoint's size; tiles are cut out of images as they are, 96 here."""
    path, images = folder / f"{kind}.ckpt", Unified(root=folder / "parts", num_workers=0)
    loaded, model = UniAS.load_from_checkpoint(path, visualizer=False), UniAS(visualizer=False)
    (table,) = engine(tmp_path / "a").test(model, datamodule=images, ckpt_path=path)
    assert images.test_data[0].image.shape[-1] == (96 if kind == "tiles" else 128)
    images = Unified(root=folder / "parts", num_workers=0)
    assert engine(tmp_path / "b").test(loaded, datamodule=images) == [table]
    if kind == "UniAS":
        model, images = UniAS(visualizer=False), Unified(root=folder / "parts", num_workers=0)
        engine(tmp_path / "c").validate(model, datamodule=images, ckpt_path=path)
        torch.testing.assert_close(model.model.state_dict(), loaded.model.state_dict(), rtol=0, atol=0)
        assert model.post_processor.calibration["image"].keys() == {"bolt", "cap"}


@pytest.mark.parametrize(
    "export_type", ["torch", *(pytest.param(each, marks=pytest.mark.slow) for each in ("onnx", "openvino"))]
)
def test_export(export_type: str, folder: Path, tmp_path: Path, anomalib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    anomalib("export", "--model", "UniAS", "--export_type", export_type, "--ckpt_path", str(folder / "UniAS.ckpt"))
    (exported,) = {*tmp_path.rglob("model.pt"), *tmp_path.rglob("model.onnx"), *tmp_path.rglob("model.xml")}
    if export_type == "torch":
        monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
        image = next((folder / "parts/bolt/test/good").iterdir())
        found = TorchInferencer(exported, device="cpu").predict(image)
        pixels = torch.from_numpy(np.asarray(Image.open(image).convert("RGB")).copy()).permute(2, 0, 1)[None] / 255
        ours = UniAS.load_from_checkpoint(folder / "UniAS.ckpt").eval()(pixels)
        torch.testing.assert_close(found.anomaly_map.flatten(), ours.anomaly_map.flatten())


def test_a_run_goes_on_with_the_architecture_of_its_checkpoint(folder: Path, tmp_path: Path, anomalib: Any) -> None:
    """Data and optimizer are named, the model is not."""
    data = ["--data", "Unified", "--data.root", str(folder / "parts"), "--data.num_workers", "0"]
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs"]
    small = ["--model.backbone=resnet18", "--model.pre_trained=false", "--model.image_size=[128,128]"]
    narrow = [*small, "--model.hidden_dim=32", "--model.feedforward_dim=32", "--model.loss_weight=1"]
    anomalib("fit", "--model", "UniAS", *narrow, *data, *quick, "1")
    first = tmp_path / "results/UniAS/parts/v0/weights/lightning/model.ckpt"
    anomalib("fit", "--model", "UniAS", *data, *quick, "2", "--ckpt_path", str(first))
    second = torch.load(tmp_path / "results/UniAS/parts/v1/weights/lightning/model.ckpt")
    assert second["epoch"] == 1
    changed = second["state_dict"]["model.norm.weight"] - torch.load(first)["state_dict"]["model.norm.weight"]
    assert changed.abs().max() > 0
    assert {name: second["hyper_parameters"][name] for name in ("hidden_dim", "loss_weight", "backbone")} == {
        "hidden_dim": 32,
        "loss_weight": 1,
        "backbone": "resnet18",
    }
    with pytest.raises(ValueError, match=r"hidden_dim: checkpoint 32, model 64.*leave these arguments out"):
        anomalib("fit", "--model", "UniAS", "--model.hidden_dim=64", *data, *quick, "2", "--ckpt_path", str(first))


def test_what_holds_another_network_already_is_named(folder: Path, tmp_path: Path, offline: None) -> None:
    run = engine(tmp_path, max_epochs=1, callbacks=[EMAWeightAveraging()])
    with pytest.raises(
        ValueError, match=r"EMAWeightAveraging has taken .*Set the checkpoint's arguments .*hidden_dim: 32"
    ):
        run.fit(
            UniAS(accelerate=False),  # accelerated modules are refused beside it in any case
            datamodule=Unified(root=folder / "parts", num_workers=0),
            ckpt_path=save_trained(folder, tmp_path),
        )


def save_trained(folder: Path, path: Path) -> Path:
    """Return a copy of a checkpoint: names of runs must not meet."""
    copy = path / "copy.ckpt"
    copy.write_bytes((folder / "UniAS.ckpt").read_bytes())
    return copy


def test_a_model_without_pre_processor_is_tested_without_one(folder: Path, tmp_path: Path) -> None:
    path = save(trained("UniAS", pre_processor=False), tmp_path / "raw.ckpt")
    make_mvtec_layout(tmp_path / "parts", ["bolt"], train=2, good=1, defective=1, image_size=128)
    images = tmp_path / "parts/bolt/test"
    (batch, *_) = engine(tmp_path / "a").predict(UniAS(visualizer=False), data_path=images, ckpt_path=path)
    loaded = UniAS.load_from_checkpoint(path)
    assert loaded.pre_processor is None
    with torch.no_grad():
        raw = loaded.eval().model(batch.image)
    torch.testing.assert_close(batch.image.min() >= 0, torch.tensor(True))
    wanted = loaded.post_processor(raw)
    torch.testing.assert_close(batch.anomaly_map, wanted.anomaly_map[:, 0])


# --- Weights that are fetched when they are needed -------------------------------------------------------------------


def test_without_a_checkpoint_the_missing_network_is_named_before_the_first_step(
    folder: Path, tmp_path: Path, offline: None
) -> None:
    model = UniAS(**SMALL | {"pre_trained": True}, visualizer=False)
    with pytest.raises(RuntimeError, match=r"Could not fetch ImageNet weights.*no route to host"):
        engine(tmp_path, max_epochs=1).fit(model, datamodule=Unified(root=folder / "parts", num_workers=0))
    assert not list(tmp_path.rglob("*.ckpt"))
    for use in (lambda: model.model(torch.zeros(1, 3, 128, 128)), model.state_dict):
        with pytest.raises(RuntimeError, match="Could not fetch"):
            use()


@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0", "test_vit"])
def test_fetched_weights_are_those_of_the_hub(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever they come; the hub is a function that seeds the random numbers. No random number of others moves."""
    create = timm.create_model

    def hub(*arguments: Any, pretrained: bool = False, **named: Any) -> nn.Module:
        if pretrained:
            torch.manual_seed(77)
        return create(*arguments, pretrained=False, **named)

    monkeypatch.setattr(timm, "create_model", hub)
    torch.manual_seed(0)
    pyramid = FeaturePyramid(backbone, image_size=(160, 160))
    assert pyramid.awaits_weights
    before = torch.get_rng_state()
    features = pyramid(torch.ones(1, 3, 160, 160))
    assert torch.equal(torch.get_rng_state(), before) and not pyramid.awaits_weights
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *arguments, **named: hub(*arguments, **named | {"pretrained": True}))
        by_hand = FeaturePyramid(backbone, pre_trained=False, image_size=(160, 160))
    torch.testing.assert_close(features, by_hand(torch.ones(1, 3, 160, 160)), rtol=0, atol=0)
    state = FeaturePyramid(backbone, image_size=(160, 160)).state_dict()
    torch.testing.assert_close(dict(state), dict(by_hand.state_dict()), rtol=0, atol=0)
    with torch.inference_mode():
        again = FeaturePyramid(backbone, image_size=(160, 160))
    assert len(again(torch.ones(1, 3, 160, 160))) == 4


def test_a_part_of_the_state_goes_on_top_of_the_fetched_weights(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    pyramid = FeaturePyramid("resnet18")
    own = FeaturePyramid("resnet18", pre_trained=False).state_dict()
    with pytest.raises(RuntimeError, match="Could not fetch"):
        pyramid.load_state_dict({"network.conv1.weight": own["network.conv1.weight"]}, strict=False)
    pyramid.load_state_dict({}, strict=False)
    assert pyramid.awaits_weights
    pyramid.load_state_dict(own)
    assert not pyramid.awaits_weights


def test_weights_beside_random_ones_are_refused(folder: Path) -> None:
    for cls in MODELS.values():
        with pytest.raises(ValueError, match=r"weights='some\.pth' and pre_trained=False contradict"):
            cls(backbone="resnet18", pre_trained=False, weights="some.pth")


# --- Arguments in several forms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"tile_size": 64},
        {"tile_size": [64, 64]},
        {"tile_size": (64, 64), "stride": 48},
        {"stride": (48, 48)},
        {"stride": [32, 48]},
        {"image_size": [128, 128]},
        {"image_size": np.array([128, 128])},
        {"hidden_dim": np.int64(32)},
        {"recipe": "best"},
        {"weights": None, "pre_trained": False},
    ],
)
def test_arguments_of_a_checkpoint_in_any_form(given: dict[str, Any], folder: Path) -> None:
    model = UniAS.load_from_checkpoint(folder / "tiles.ckpt", **given)
    assert model.hparams["tile_size"] == (64, 64)
    assert model.hparams["stride"] == ((32, 48) if given.get("stride") == [32, 48] else (48, 48))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_dim": 64}, "hidden_dim: checkpoint 32, model 64"),
        ({"image_size": (256, 128)}, r"image_size: checkpoint \(128, 128\), model \(256, 128\)"),
        ({"recipe": "paper"}, "recipe: checkpoint best, model paper"),
        ({"backbone": "resnet34"}, "backbone: checkpoint resnet18, model resnet34"),
    ],
)
def test_another_architecture_is_refused(given: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"tiles\.ckpt was trained with another configuration \({message}\)"):
        UniAS.load_from_checkpoint(folder / "tiles.ckpt", **given)


def test_other_tiles_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    UniAS.load_from_checkpoint(folder / "tiles.ckpt", tile_size=64)
    assert "other tiles" not in caplog.text
    model = UniAS.load_from_checkpoint(folder / "tiles.ckpt", tile_size=(96, 96))
    assert (model.hparams["tile_size"], model.hparams["stride"]) == ((96, 96), (72, 72))
    assert "trained on other tiles (tile_size: checkpoint (64, 64), model (96, 96))" in caplog.text


def test_checkpoints_hold_plain_types(tmp_path: Path) -> None:
    model = UniAS(**SMALL, hidden_dim=np.int64(32), feedforward_dim=np.int64(32), learning_rate=np.float32(0.5))
    kept = torch.load(save(model, tmp_path / "a.ckpt"))["hyper_parameters"]
    assert [type(kept[name]) for name in ("hidden_dim", "feedforward_dim", "learning_rate")] == [int, int, float]
    assert UniAS.load_from_checkpoint(tmp_path / "a.ckpt").hparams["hidden_dim"] == 32


def test_normal_forms_are_those_of_the_constructor() -> None:
    arguments = NARROW | {"tile_size": 64, "stride": [48, 32], "weights": None}
    model = UniAS(**arguments)
    assert normal_forms(arguments) == {name: model.hparams[name] for name in arguments}
    assert normal_forms({"tile_size": 64})["tile_size"] == (64, 64)
    assert normal_forms({"weights": Path("a.pth")}) == {"weights": "a.pth"}


# --- Files that are no checkpoints -----------------------------------------------------------------------------------

NO_CHECKPOINTS = {
    "empty.ckpt": "0 bytes, cannot be read",
    "cut.ckpt": "cannot be read.*cut",
    "text.ckpt": "cannot be read",
    "module.ckpt": "cannot be read",
    "list.ckpt": "lacks state_dict.*it holds a list",
    "weights.ckpt": "lacks state_dict.*it holds .*Give a file that a training saved",
    "UniAD.ckpt": "is no UniAS: it has model.* and lacks model.*Name the model that was trained",
    "BoundedPatchcore.ckpt": "is no UniAS: it has model.* and lacks model",
    "parts": "got the folder",
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named(name: str, folder: Path, tmp_path: Path, offline: None) -> None:
    path, images = folder / name, folder / "parts/bolt/test"
    calls = {
        "load": lambda: UniAS.load_from_checkpoint(path),
        "predict": lambda: engine(tmp_path).predict(UniAS(), data_path=images, ckpt_path=path),
        "export": lambda: engine(tmp_path).export(UniAS(), "onnx", ckpt_path=path),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=f"(?s){NO_CHECKPOINTS[name]}") as raised:
            call()
        assert str(path) in str(raised.value)
    if name == "empty.ckpt":
        data = Unified(root=folder / "parts", num_workers=0)
        with pytest.raises(ValueError, match="0 bytes"):
            engine(tmp_path, max_epochs=1).fit(UniAS(), datamodule=data, ckpt_path=path)


# --- Backbones that cannot take the images ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "size", "message"),
    [
        (
            "inception_v3",
            (224, 224),
            r"'inception_v3' makes levels of 64x109x109, .*image_size \(224, 224\); expected 64x1",
        ),
        ("maxvit_tiny_rw_224", (256, 256), r"'maxvit_tiny_rw_224' cannot take .*\(256, 256\).*divisible by window"),
        ("coatnet_nano_rw_224", (320, 224), r"'coatnet_nano_rw_224' cannot take .*\(320, 224\).*Expected levels of"),
    ],
)
def test_backbones_that_cannot_work_are_refused(backbone: str, size: tuple[int, int], message: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){message}.*Take another image_size.*or another backbone"):
        UniAS(backbone, pre_trained=False, image_size=size, hidden_dim=32, feedforward_dim=32, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "backbone",
    ["coatnet_nano_rw_224", "regnetx_002", "mobilenetv3_large_100", "hrnet_w18_small", "mobilevitv2_050", "rexnet_100"],
)
def test_backbones_that_work_are_taken(backbone: str) -> None:
    pyramid = FeaturePyramid(backbone, pre_trained=False)
    levels = pyramid(torch.zeros(1, 3, 224, 224))
    assert [level.shape[-1] for level in levels] == [112, 56, 28, 14]


def test_levels_of_any_size_do_where_they_are_resized() -> None:
    """UniAD takes inception, whose levels are a few pixels smaller."""
    model = UniAD("inception_v3", pre_trained=False, hidden_dim=32, feedforward_dim=32)
    assert model.eval()(torch.rand(1, 3, 224, 224)).anomaly_map.shape == (1, 1, 224, 224)


# --- Large checkpoints -----------------------------------------------------------------------------------------------


def test_large_checkpoints_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A transformer's channels make large statistics; the size is that of the file, which has no moments here."""
    caplog.set_level("INFO")
    small = UniAS(**NARROW)
    say_large_checkpoints(small.model)
    assert "takes about" not in caplog.text
    large = UniAS(**NARROW | {"backbone": "vit_base_patch16_224", "recipe": "best"})
    say_large_checkpoints(large.model)
    said = re.search(r"takes about (\d+) MB, most of it in (\w+)", caplog.text)
    moments = 2 * sum(value.nbytes for value in large.model.parameters() if value.requires_grad)
    file = save(large, tmp_path / "large.ckpt").stat().st_size
    assert said is not None and 1e6 * int(said[1]) == pytest.approx(file + moments, rel=0.02)
