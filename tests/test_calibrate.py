# SPDX-License-Identifier: Apache-2.0
"""`anomalib-uniass calibrate`: new thresholds for a trained model, and nothing else of it changes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor

from anomalib_uniass import UniAS, Unified
from anomalib_uniass.cli.calibrate import main
from tests.helpers import models
from tests.helpers.datasets import make_mvtec_layout

SMALL: dict[str, Any] = models.SMALL | {
    "channel_branch": False,
    "visualizer": False,
    "evaluator": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small model, and lay new good images of its categories and of another one beside it."""
    folder = tmp_path_factory.mktemp("calibrate")
    root = make_mvtec_layout(folder / "parts", ["bolt", "cap"], train=5, good=2, defective=1, image_size=128)
    engine = Engine(default_root_dir=folder, max_epochs=1, logger=False, accelerator="cpu")
    engine.fit(UniAS(**SMALL, seed=0), datamodule=Unified(root=root, num_workers=0))
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    for source, target in (("bolt", "new/bolt"), ("cap", "new/Nut")):
        shutil.copytree(root / source / "test" / "good", folder / target)
    return folder


def config(path: Path) -> dict[str, Any]:
    return dict(torch.load(path)["anomalib_post_processor_config"])


def test_images_of_some_categories_leave_the_others_and_all_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new.ckpt"
    assert main([str(folder / "model.ckpt"), "--data", str(folder / "new"), "--out", str(target)]) == 0
    before, after = config(folder / "model.ckpt"), config(target)
    old, new = before["calibration"], after["calibration"]
    assert new["images"] == {"bolt": 2, "cap": old["images"]["cap"], "Nut": 2}
    for level in ("image", "pixel"):
        assert new[level]["cap"] == pytest.approx(old[level]["cap"], rel=1e-9)
        assert new[level]["bolt"] != pytest.approx(old[level]["bolt"], rel=1e-3)
    assert after["categories"] == ["Nut", "bolt", "cap"]
    said = capsys.readouterr().out
    assert "5 % of good images" in said and "Nut" in said and "19 images or more" in said and str(target) in said
    whole, written = torch.load(folder / "model.ckpt"), torch.load(target)
    assert whole.keys() == written.keys()
    for name, values in whole["state_dict"].items():
        assert torch.equal(values, written["state_dict"][name]) or name.startswith("post_processor."), name
    assert written["optimizer_states"]  # a training may go on from it


def test_thresholds_are_those_of_a_validation_on_the_same_images(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.ckpt"
    images = folder / "new" / "bolt"
    main([str(folder / "model.ckpt"), "--data", str(images), "--category", "Bolt ", "--out", str(target)])
    loaded = UniAS.load_from_checkpoint(folder / "model.ckpt", visualizer=False)
    root = make_mvtec_layout(tmp_path / "parts", ["bolt"], train=1, good=2, defective=1, image_size=128)
    shutil.rmtree(root / "bolt/test/good")
    shutil.copytree(images, root / "bolt/test/good")
    data = Unified(root=root, num_workers=0, val_split_mode="same_as_test")
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu").validate(loaded, datamodule=data)
    expected = loaded.post_processor.calibration
    new = config(target)["calibration"]
    assert set(new["image"]) == {"bolt", "cap"}
    for level in ("image", "pixel"):
        assert new[level]["bolt"] == pytest.approx(expected[level]["bolt"], rel=1e-5)


def test_other_rates_need_no_images(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.ckpt"
    found = {}
    for rate in ("0.2", "0.01"):
        target = tmp_path / rate
        assert main([str(path), "--image_fpr", rate, "--pixel_fpr", "0.01", "--out", str(target)]) == 0
        found[rate] = config(target)["calibration"]
        assert (found[rate]["image_fpr"], found[rate]["pixel_fpr"]) == (float(rate), 0.01)
    old = config(path)["calibration"]
    for category in ("bolt", "cap"):
        assert found["0.2"]["image"][category] < old["image"][category] < found["0.01"]["image"][category]
        assert found["0.2"]["pixel"][category] <= old["pixel"][category]
    model = UniAS.load_from_checkpoint(tmp_path / "0.2", visualizer=False)
    assert float(model.post_processor.image_threshold) == pytest.approx(max(found["0.2"]["image"].values()))


def test_a_checkpoint_that_knows_no_images_keeps_the_thresholds_of_other_categories(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of version 0.2."""
    content = torch.load(folder / "model.ckpt")
    for name in ("good", "learned"):
        del content["anomalib_post_processor_config"][name]
    del content["anomalib_post_processor_config"]["calibration"]["images"]
    torch.save(content, tmp_path / "old.ckpt")
    given = [str(tmp_path / "old.ckpt"), "--data", str(folder / "new/bolt"), "--category", "bolt"]
    assert main([*given, "--out", str(tmp_path / "new.ckpt")]) == 0
    old, new = (config(tmp_path / name)["calibration"] for name in ("old.ckpt", "new.ckpt"))
    assert new["image"]["cap"] == old["image"]["cap"] and new["pixel"]["cap"] == old["pixel"]["cap"]
    assert new["images"] == {"bolt": 2} and new["image"]["bolt"] != old["image"]["bolt"]
    capsys.readouterr()
    for arguments in ([*given, "--image_fpr", "0.2"], [given[0], "--image_fpr", "0.2"]):
        with pytest.raises(SystemExit):
            main([*arguments, "--out", str(tmp_path / "other.ckpt")])
        assert "knows no good images of" in capsys.readouterr().err


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "defects": (lambda folder: ["--data", str(folder / "parts")], "lie in folders of defects or masks"),
    "no category": (lambda folder: ["--data", str(folder / "new/bolt")], "lies in no folder of a category"),
    "no folder": (lambda folder: ["--data", str(folder / "nowhere")], "There is no"),
    "no images": (lambda folder: ["--data", str(folder / "empty")], "There are no images"),
    "rate": (lambda _: ["--image_fpr", "1.5"], "--image_fpr .a false-positive rate. must be"),
    "category alone": (lambda _: ["--category", "bolt"], "needs --data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_written(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    arguments, message = BAD[case]
    with pytest.raises(SystemExit) as ended:
        main([str(folder / "model.ckpt"), *arguments(folder), "--out", str(tmp_path / "new.ckpt")])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new.ckpt").exists()


def test_a_model_with_one_threshold_for_all_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(UniAS, "configure_post_processor", lambda _: PostProcessor())
    with pytest.raises(SystemExit):
        main([str(folder / "model.ckpt"), "--image_fpr", "0.1", "--out", str(tmp_path / "new.ckpt")])
    assert "no thresholds per category" in capsys.readouterr().err
