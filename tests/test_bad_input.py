# SPDX-License-Identifier: Apache-2.0
"""Bad input in one table: what is given, and the error that names what was expected, what came and what to do.

Nothing here trains: every row fails before the first step of work.
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from anomalib.cli.cli import main
from anomalib.deploy import CompressionType
from anomalib.models import UnknownModelError, get_model
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from anomalib_uniass import BoundedPatchcore, MVTec, UniAD, UniAS, Unified, load_official_checkpoint
from anomalib_uniass.acceleration.dropout import Dropout
from anomalib_uniass.metrics import CategoryMetrics
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.sample_data import write

SMALL: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128)}
NARROW = SMALL | {"hidden_dim": 32, "feedforward_dim": 32}
NAN, INF = math.nan, math.inf


class Bad(NamedTuple):
    """A call that must fail, its error, and what the message must match."""

    call: Callable[[], object]
    error: type[BaseException]
    message: str


def unias(message: str, error: type[Exception] = ValueError, **arguments: Any) -> Bad:
    return Bad(lambda: UniAS(**(NARROW | arguments)), error, message)


def uniad(message: str, error: type[Exception] = ValueError, **arguments: Any) -> Bad:
    return Bad(lambda: UniAD(**(NARROW | arguments)), error, message)


def patchcore(message: str, error: type[Exception] = ValueError, **arguments: Any) -> Bad:
    return Bad(lambda: BoundedPatchcore(**(SMALL | arguments)), error, message)


def unified(message: str, error: type[Exception] = ValueError, **arguments: Any) -> Bad:
    return Bad(lambda: Unified(**({"root": "no_such_folder"} | arguments)), error, message)


def weights(message: str, name: str, error: type[Exception] = ValueError) -> Bad:
    return Bad(lambda: UniAS(**(NARROW | {"pre_trained": True, "weights": name})), error, message)


def post_processor(message: str, **arguments: Any) -> Bad:
    return Bad(lambda: CategoryThresholdPostProcessor(**arguments), ValueError, message)


CONSTRUCTORS = [
    # sizes
    unias(r"image_size must be \(height, width\) such as \(224, 224\), got 224", image_size=224),
    unias("image_size must be .* got the string '224'", image_size="224"),
    unias("image_size must be .* got None", image_size=None),
    unias(r"image_size must be .* got \(224,\)", image_size=(224,)),
    unias(r"image_size must be .* got \(3, 224, 224\)", image_size=(3, 224, 224)),
    unias("image_size must be .* got {", image_size={"height": 224, "width": 224}),
    unias("height of image_size must be a whole number, at least 1, got 0", image_size=(0, 128)),
    unias("width of image_size must be a whole number, at least 1, got -128", image_size=(128, -128)),
    unias("width of image_size must be a whole number, at least 1, got 128.5", image_size=(128, 128.5)),
    unias("height of image_size must be a whole number.*got the string '128'.*without quotes", image_size=["128", 128]),
    unias("height of image_size must not exceed 4096 pixels, got 22400.*resized to it", image_size=(22400, 224)),
    unias(r"multiples of 16, got \(128, 130\)", image_size=(128, 130)),
    unias("larger than 112 pixels", image_size=(96, 96)),
    unias(r"hidden_dim must be a multiple of 32 .*got 40", hidden_dim=40),
    unias("hidden_dim must be a whole number, at least 1, got 0", hidden_dim=0),
    unias("hidden_dim must be a whole number, at least 1, got -32", hidden_dim=-32),
    unias("hidden_dim must be .* got the string '32'", hidden_dim="32"),
    unias("hidden_dim must be .* got 32.0", hidden_dim=32.0),
    unias("hidden_dim must be .* got True", hidden_dim=True),
    unias("can't allocate memory|out of memory", RuntimeError, hidden_dim=32 * 10**9),
    unias("feedforward_dim must be a whole number, at least 1, got 0", feedforward_dim=0),
    # rates, weights and probabilities
    unias("jitter_probability must be a number at least 0 and at most 1, got 2", jitter_probability=2),
    unias("jitter_probability must be .* got -0.1", jitter_probability=-0.1),
    unias("jitter_probability must be .* got nan", jitter_probability=NAN),
    unias("jitter_scale must be a number at least 0, got -1", jitter_scale=-1),
    unias("jitter_scale must be .* got nan", jitter_scale=NAN),
    unias("learning_rate must be a number above 0, got -1", learning_rate=-1),
    unias("learning_rate must be a number above 0, got 0", learning_rate=0),
    unias("learning_rate must be .* got inf", learning_rate=INF),
    unias("learning_rate must be .* got the string '1e-3'.*YAML takes 1e-3 for a string", learning_rate="1e-3"),
    unias("weight_decay must be a number at least 0, got -0.1", weight_decay=-0.1),
    unias("loss_weight must be a number above 0, got nan", loss_weight=NAN),
    unias("loss_weight must be .* got 0", loss_weight=0),
    unias("loss_weight must be a number above 0, got inf", loss_weight=INF),
    # schedule and seed
    unias("max_epochs must be a whole number, at least 1, got 0", max_epochs=0),
    unias("max_epochs must be .* got -5", max_epochs=-5),
    unias("max_epochs must be .* got 1.5", max_epochs=1.5),
    unias("lr_step_epochs must be a whole number, at least 1, got 0", lr_step_epochs=0),
    unias("lr_schedule must be one of step, onecycle, got 'cosine'", lr_schedule="cosine"),
    unias("seed must be a whole number, at least 0, got -1", seed=-1),
    unias("seed must be .* got the string 'x'", seed="x"),
    unias(f"seed must be at most {2**32 - 1}, got {2**32}", seed=2**32),
    # choices
    unias("recipe must be one of paper, best, got 'fast'", recipe="fast"),
    unias("recipe must be one of paper, best, got None", recipe=None),
    unias("cosine_term must be one of distance, release, got 'cos'", cosine_term="cos"),
    unias("channel_branch must be true or false, got the string 'false'", channel_branch="false"),
    unias("pre_trained must be true or false, got the string 'no'", pre_trained="no"),
    unias("accelerate must be true or false, got None", accelerate=None),
    unias("pre_processor must be a PreProcessor, true or false, got 'yes'", TypeError, pre_processor="yes"),
    unias("should be .*Module.* or bool", TypeError, post_processor="yes"),
    unias("should be .*Evaluator.* or bool", TypeError, evaluator="yes"),
    # backbone
    unias("backbone must be a timm model name, got 'efficientnet-b4'. Similar names: .*", backbone="efficientnet-b4"),
    unias("backbone must be a timm model name, got ''", backbone=""),
    unias("backbone must be a string, got 18", backbone=18),
    unias(r"backbone must .*strides \(2, 4, 8, 16\).*convnext", backbone="convnext_atto"),
    # UniAD and the memory bank
    uniad("hidden_dim must be a multiple of 8 .*got 20", hidden_dim=20),
    uniad("learning_rate must be a number above 0, got -1", learning_rate=-1.0),
    uniad("jitter_probability must be .* got 1.01", jitter_probability=1.01),
    uniad("max_epochs must be .* got 0", max_epochs=0),
    uniad("feedforward_dim must be .* got -1", feedforward_dim=-1),
    patchcore("coreset_size must be a whole number, at least 1, got 0", coreset_size=0),
    patchcore("between 1 and max_patches=10, got 11", max_patches=10, coreset_size=11),
    patchcore("max_patches must be a whole number, at least 1, got 1000.0", max_patches=1e3, coreset_size=1),
    patchcore("num_neighbors must be a whole number, at least 1, got 0", num_neighbors=0),
    patchcore("multiples of 16, got .*100", image_size=(100, 100)),
    patchcore("seed must be a whole number, at least 0, got None", seed=None),
    # post-processor and parts
    post_processor("image_fpr .* must be a number above 0 and below 1, got 0", image_fpr=0),
    post_processor("image_fpr .* got 5", image_fpr=5),
    post_processor("pixel_fpr .* got the string '0.1'", pixel_fpr="0.1"),
    post_processor("pixel_fpr .* got nan", pixel_fpr=NAN),
    post_processor("gamma must be a number above 0, got 0", gamma=0),
    post_processor("gamma must be .* got inf", gamma=INF),
    Bad(lambda: Dropout(1.0), ValueError, r"probability in \[0, 1\), got 1.0"),
    Bad(lambda: CategoryMetrics([]), ValueError, r"at least one; got \[\]"),
    Bad(lambda: CategoryMetrics(["a", "a"]), ValueError, "distinct names"),
    Bad(lambda: CategoryMetrics(["mean"]), ValueError, "other than 'mean'"),
]

DATA = [
    unified("source=.* is no image datamodule class.*Usable in anomalib.data: .*MVTecAD", source="MVTEC"),
    unified("source must be a string, got None", source=None),
    unified("categories must be a list of category names, got 'bolt'", TypeError, categories="bolt"),
    unified("categories must be a list of category names, got 5", TypeError, categories=5),
    unified(r"No categories to read: categories=\[\]", categories=[]),
    unified("unknown categories: 'bottel' .did you mean 'bottle'", categories=["bottel"]),
    unified("names a category twice: bottle", categories=["bottle", "bottle"]),
    unified("hflip names unknown categories: 'botle'", hflip=["botle"]),
    unified("rotate must be a list", TypeError, rotate="bottle"),
    unified("train_batch_size must be a whole number, at least 1, got 0", train_batch_size=0),
    unified("eval_batch_size must be .* got -1", eval_batch_size=-1),
    unified("eval_batch_size must be .* got the string '8'", eval_batch_size="8"),
    unified("num_workers must be a whole number, at least 0, got -1", num_workers=-1),
    unified("val_split_ratio must be a number above 0 and below 1, got 0", val_split_ratio=0),
    unified("val_split_ratio must be .* got 1", val_split_ratio=1),
    unified("val_split_ratio must be .* got nan", val_split_ratio=NAN),
    unified("val_split_mode='none' cannot work", val_split_mode="none"),
    unified("val_split_mode must be one of .*from_train.* got 'train'", val_split_mode="train"),
    unified("seed must be .* got -1", seed=-1),
    unified("seed must be .* got the string '0'", seed="0"),
    unified("cache_images must be true or false, got the string 'yes'", cache_images="yes"),
    unified("max_megapixels must be a number above 0, got 0", max_megapixels=0),
    unified("max_megapixels must be a number above 0, got nan", max_megapixels=NAN),
    unified("max_megapixels must be a number above 0, got the string '300'", max_megapixels="300"),
    unified("augmentations must be a transform of torchvision.transforms.v2, got 'resize'", augmentations="resize"),
    unified("comparison must be a string, got True", comparison=True),
    Bad(lambda: MVTec(categories=["bolt"]), ValueError, "categories names unknown categories: 'bolt'"),
    Bad(lambda: Unified(root="parts", hflip=["bolts"]), ValueError, "did you mean 'bolt'"),
    Bad(lambda: Unified(root="broken").setup(), ValueError, "train.good.001.png: unreadable"),
    Bad(lambda: Unified(root="parts", val_split_mode="from_dir").setup(), ValueError, "no validation images of"),
    Bad(
        lambda: Unified(root="parts", categories=["bolt", "bottle"]).setup(), FileNotFoundError, "lacks 1 of 2 .*bottle"
    ),
    Bad(lambda: Unified(root="single").setup(), ValueError, "'bolt' has a single training image"),
    Bad(
        lambda: write.write_sample_dataset(Path("sample"), image_size=32),
        ValueError,
        "image_size must be at least 64",
    ),
    Bad(lambda: write.write_sample_dataset(Path("parts")), FileExistsError, "delete it or choose another folder"),
]

FILES = [
    weights("weights must be a file or an installed package .*got 'no.pth'", "no.pth", FileNotFoundError),
    weights("weights must be a file or an installed package .*got 'numpy'", "numpy", FileNotFoundError),
    weights("Expected empty.pth to be a file that torch.save made .*fetch the file again", "empty.pth"),
    weights("Expected text.pth to be a file that torch.save made .*fetch the file again", "text.pth"),
    weights("Expected module.pth to be a file that torch.save made .*fetch the file again", "module.pth"),
    weights("Expected list.pth to hold a state dict .*got list", "list.pth"),
    weights("Expected numbers.pth to hold a state dict", "numbers.pth"),
    weights("does not hold weights of backbone 'resnet18': 1 entries", "other.pth"),
    weights("finite weights, got NaN or infinity in fc.weight", "nan.pth"),
    Bad(lambda: load_official_checkpoint("no_such_file.pth"), FileNotFoundError, "no_such_file.pth"),
    Bad(lambda: load_official_checkpoint("text.pth"), ValueError, "Expected text.pth to be a file"),
    Bad(lambda: load_official_checkpoint("other.pth"), ValueError, "Not an official UniAS state dict. Missing"),
    Bad(lambda: UniAS.load_from_checkpoint("no_such.ckpt"), FileNotFoundError, "no_such.ckpt"),
    Bad(lambda: UniAS.load_from_checkpoint("text.pth"), ValueError, "Expected text.pth to be a checkpoint.*10 bytes"),
    Bad(lambda: UniAS.load_from_checkpoint("uniad.ckpt"), ValueError, "uniad.ckpt: The checkpoint is no UniAS: it has"),
    Bad(
        lambda: UniAS(**(NARROW | {"hidden_dim": 64})).on_load_checkpoint(torch.load("unias.ckpt", weights_only=True)),
        ValueError,
        "another configuration .hidden_dim: checkpoint 32, model 64",
    ),
    Bad(lambda: tiny().to_openvino("out"), ValueError, "Expected a trained UniASModel to export.*--ckpt_path"),
    Bad(lambda: tiny().to_onnx("out"), ValueError, "Expected a trained UniASModel"),
    Bad(lambda: tiny().to_torch("out"), ValueError, "Expected a trained UniASModel"),
    Bad(
        lambda: trained().to_openvino("out", compression_type=CompressionType.INT8_PTQ),
        ValueError,
        "INT8_PTQ needs images to calibrate with, got no datamodule. Give --data",
    ),
    Bad(
        lambda: trained().to_openvino(
            "out",
            compression_type=CompressionType.INT8_PTQ,
            input_size=(32, 48),
            datamodule=Unified(root="parts", num_workers=0),
        ),
        ValueError,
        r"input_size \(32, 48\) needs images of that size to calibrate with, but .* has \(64, 64\)",
    ),
    Bad(
        lambda: trained().to_openvino(
            "out",
            compression_type=CompressionType.INT8_ACQ,
            datamodule=Unified(root="parts", num_workers=0, eval_batch_size=1),
        ),
        ValueError,
        "INT8_ACQ cannot test a batch of one image",
    ),
]

BENCHMARK_ENTRIES = [
    Bad(lambda: get_model({"class_path": "UniASS"}), UnknownModelError, ""),
    Bad(lambda: get_model({"class_path": "UniAS", "init_args": SMALL | {"hiden_dim": 32}}), TypeError, "hiden_dim"),
    Bad(
        lambda: get_model({"class_path": "UniAS", "init_args": SMALL | {"learning_rate": "1e-3"}}),
        ValueError,
        "got the string '1e-3'",
    ),
    Bad(lambda: get_model({"class_path": "UniAD", "init_args": SMALL | {"max_epochs": 0}}), ValueError, "max_epochs"),
]

TINY_MODEL = ("--model.backbone", "resnet18", "--model.hidden_dim", "32", "--model.feedforward_dim", "32")
TRAIN = ("train", "--model", "UniAS", "--model.pre_trained", "false", "--data", "Unified", "--data.root", "parts")
EXPORT = ("export", "--model", "UniAS", "--model.pre_trained", "false", "--export_type")


def cli(message: str, *arguments: str, error: type[BaseException] = SystemExit) -> Bad:
    """Run the command in this process; it prints its message if it ends by itself."""

    def call() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["anomalib", *arguments])
            main()

    return Bad(call, error, message)


COMMANDS = [
    cli('Parser key "model".*UniASS', "train", "--model", "UniASS"),
    cli("Option 'hiden_dim' is not accepted", *TRAIN, "--model.hiden_dim", "32"),
    cli("hidden_dim.*Expected a <class 'int'>. Got value: abc", *TRAIN, "--model.hidden_dim", "abc"),
    cli("height of image_size must .* got 0", *TRAIN, "--model.image_size", "[0, 0]", error=ValueError),
    cli("learning_rate must be a number above 0, got -1", *TRAIN, "--model.learning_rate", "-1", error=ValueError),
    cli("train_batch_size must .* got 0", *TRAIN, *TINY_MODEL, "--data.train_batch_size", "0", error=ValueError),
    cli("unknown categories: 'bolts'", *TRAIN, *TINY_MODEL, "--data.categories", "[bolts]", error=ValueError),
    cli("{FP16,INT8,INT8_PTQ,INT8_ACQ}", *EXPORT, "openvino", "--compression_type", "int8_ptq"),
    cli("'tflite' is not a valid ExportType", *EXPORT, "tflite", *TINY_MODEL, error=ValueError),
    cli("File does not exist.*no_such.yaml", "train", "--config", "no_such.yaml"),
    cli("no_such.yaml", "benchmark", "--config", "no_such.yaml", error=FileNotFoundError),
    cli("Checkpoint file not found.*no.ckpt", "test", *TRAIN[1:], *TINY_MODEL, "--ckpt_path", "no.ckpt", error=OSError),
]


def tiny() -> UniAS:
    return UniAS(**NARROW)


def trained() -> UniAS:
    """Make a UniAS whose layer norms have moved, which is what an export asks for."""
    model = tiny()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias.data += 0.1
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with small data, broken data, and all kinds of files that are no weights."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("parts", "broken"):
        make_mvtec_layout(folder / name, ["bolt", "cap"], train=3, good=1, defective=1)
    make_mvtec_layout(folder / "single", ["bolt"], train=1, good=1, defective=1)
    (folder / "broken/bolt/train/good/001.png").write_bytes(b"no picture")
    (folder / "empty.pth").touch()
    (folder / "text.pth").write_text("no weights")
    torch.save(nn.Linear(1, 1), folder / "module.pth")
    torch.save([torch.zeros(1)], folder / "list.pth")
    torch.save({"epoch": 1}, folder / "numbers.pth")
    torch.save({"fc.weight": torch.zeros(1)}, folder / "other.pth")
    torch.save({"fc.weight": torch.full((1,), NAN)}, folder / "nan.pth")
    for model in (tiny(), UniAD(**NARROW)):
        trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        trainer.strategy.connect(model)
        trainer.save_checkpoint(folder / f"{type(model).__name__.lower()}.ckpt")
    Image.new("RGB", (64, 64)).save(folder / "image.png")
    return folder


def name(bad: Bad) -> str:
    return bad.message[:50]


@pytest.mark.parametrize("bad", [*CONSTRUCTORS, *DATA, *FILES, *BENCHMARK_ENTRIES, *COMMANDS], ids=name)
def test_bad_input_is_refused_with_a_clear_word(
    bad: Bad, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(bad.error) as raised:
        bad.call()
    said = capsys.readouterr().err if bad.error is SystemExit else str(raised.value)
    assert re.search(bad.message, said, re.DOTALL), said


def test_good_values_at_the_bounds_are_taken() -> None:
    bounds = {"jitter_scale": 0, "jitter_probability": 1, "weight_decay": 0, "max_epochs": 1, "seed": 2**32 - 1}
    model = UniAS(**(NARROW | bounds), lr_step_epochs=1)
    assert {key: model.hparams[key] for key in bounds} == bounds
    UniAD(**(NARROW | bounds), learning_rate=1e-12)
    Unified(root="x", train_batch_size=1, eval_batch_size=1, num_workers=0, seed=None, comparison=Path("y"))
