# SPDX-License-Identifier: Apache-2.0
"""`anomalib predict`: images read right, a picture of each, and the table."""

import csv
import errno
import json
import logging
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, InferenceBatch, MVTecAD, PredictDataset
from anomalib.data.utils import read_image as anomalib_read_image
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from PIL import Image, ImageFont
from scipy import ndimage
from torch import distributed, multiprocessing
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_uniass import BoundedPatchcore, UniAD, UniAS, Unified
from anomalib_uniass.deploy.pre_processor import PreProcessor
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.prediction import PathVisualizer, PredictionTable, table
from anomalib_uniass.prediction.names import name_below
from anomalib_uniass.prediction.table import MOST_REGIONS, Row, _regions
from anomalib_uniass.results import RunFolder
from tests.helpers.datasets import make_mvtec_layout
from tests.test_cli import SMALL_MODEL, Anomalib, anomalib

__all__ = ["anomalib"]  # the fixture

BACKBONE: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "image_size": (128, 128), "seed": 0}
SMALL = BACKBONE | {"hidden_dim": 32, "feedforward_dim": 32}
MODEL = ["--model", "UniAS", "--model.backbone", "resnet18", "--model.image_size", "[128, 128]", *SMALL_MODEL]
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
RUN = Path("results/UniAS/latest")


def engine(folder: Path, **arguments: Any) -> Engine:
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "devices": 1}
    return Engine(default_root_dir=folder, **quiet, **arguments)


def rows(run: Path) -> dict[str, dict[str, str]]:
    """Read the table as others will, by the path of each image."""
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["path", "category", "score", "threshold", "label", "regions", "threshold_of"]
        found = list(reader)
    assert [row["path"] for row in found] == sorted({row["path"] for row in found})
    return {row["path"]: row for row in found}


def pictures(run: Path) -> set[str]:
    return {path.relative_to(run / "images").as_posix() for path in (run / "images").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec_layout(tmp_path_factory.mktemp("data") / "parts", ["bolt", "cap"], (96, 144), train=5)


@pytest.fixture(scope="module")
def datamodule(parts: Path) -> Unified:
    return Unified(root=parts, train_batch_size=4, eval_batch_size=2, num_workers=0, val_split_ratio=0.4)


@pytest.fixture(scope="module")
def trained(datamodule: Unified, tmp_path_factory: pytest.TempPathFactory) -> UniAS:
    model = UniAS(**SMALL)
    engine(tmp_path_factory.mktemp("run"), max_epochs=1).fit(model, datamodule=datamodule)
    return model


@pytest.fixture(scope="module")
def checkpoint(trained: UniAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    trained.trainer.save_checkpoint(path)
    return path


@pytest.fixture
def twins(parts: Path, tmp_path: Path) -> Path:
    """Four images with equal names in two folders, one folder of them named as a category."""
    for source, name in [("bolt/good/000", "bolt/1"), ("bolt/square/000", "bolt/2"), ("cap/good/000", "shelf/1")]:
        category, image = source.split("/", 1)
        target = tmp_path / "images" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(parts / category / "test" / f"{image}.png", target)
    Image.open(parts / "cap/test/square/000.png").save(tmp_path / "images/shelf/1.jpg")
    return tmp_path / "images"


# --- Names and table --------------------------------------------------------------------------------------------------


def test_equal_names_give_a_picture_and_a_row_each(
    anomalib: Anomalib, twins: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (twins / "notes.txt").write_text("no image")
    (twins / "bolt/2.png").rename(twins / 'bolt/grün, "2".png')
    anomalib("predict", *MODEL, *CPU, "--data", "images", "--ckpt_path", str(checkpoint))
    paths = {"bolt/1.png", 'bolt/grün, "2".png', "shelf/1.jpg", "shelf/1.png"}
    table = rows(tmp_path / RUN)
    assert set(table) == pictures(tmp_path / RUN) == paths
    assert {path: row["category"] for path, row in table.items()} == {
        path: "bolt" if path.startswith("bolt") else "" for path in paths
    }
    assert not list((tmp_path / RUN).glob("*.tmp"))


def test_one_folder_in_the_given_one_keeps_its_name(
    anomalib: Anomalib, twins: Path, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.rmtree(twins / "shelf")
    arguments = ["--ckpt_path", str(checkpoint), "--model.visualizer", "false"]
    anomalib("predict", *MODEL, *CPU, "--data", "images", *arguments)
    assert set(rows(tmp_path / RUN)) == {"bolt/1.png", "bolt/2.png"}
    assert not (tmp_path / RUN / "images").exists()
    anomalib("predict", *MODEL, *CPU, "--data", "images/bolt/2.png", *arguments)
    assert set(rows(tmp_path / RUN)) == {"2.png"}


def test_arguments_of_the_visualizer(anomalib: Anomalib, twins: Path, checkpoint: Path, tmp_path: Path) -> None:
    visualizer = ["--model.visualizer", "anomalib_uniass.prediction.PathVisualizer"]
    fields = ["--model.visualizer.fields", "[image]", "--model.visualizer.field_size", "[32, 16]"]
    arguments = [*visualizer, *fields, "--model.visualizer.output_dir", "drawn"]
    anomalib("predict", *MODEL, *CPU, "--data", "images", "--ckpt_path", str(checkpoint), *arguments)
    assert Image.open(tmp_path / "drawn/shelf/1.jpg").size == (3 * 32, 16)  # image and two overlays


def test_scores_labels_and_regions_are_those_of_the_predictions(trained: UniAS, parts: Path, tmp_path: Path) -> None:
    run = engine(tmp_path)
    batches = run.predict(trained, data_path=parts / "cap/test")
    table = rows(Path(run.trainer.default_root_dir))
    assert len(batches) == len(table) == 4
    for batch in batches:
        row = table[Path(batch.image_path[0]).relative_to(parts / "cap/test").as_posix()]
        score, threshold = float(row["score"]), float(row["threshold"])
        assert np.float32(score) == batch.pred_score.item()
        assert threshold == 0.5
        assert (row["label"] == "defective") == (score > threshold) == bool(batch.pred_label)
        assert row["category"] == "cap"
        assert bool(json.loads(row["regions"])) == bool(batch.pred_mask.any())


@pytest.mark.parametrize("sensitivity", [0.0, 0.9, 1.0])
def test_threshold_follows_the_sensitivity(
    sensitivity: float, datamodule: Unified, twins: Path, tmp_path: Path, trained: UniAS
) -> None:
    """From no image defective to all of them, in the table as in the predictions."""
    del datamodule
    before = trained.post_processor.image_sensitivity
    trained.post_processor.image_sensitivity = torch.tensor(sensitivity)
    try:
        run = engine(tmp_path)
        batches = run.predict(trained, data_path=twins)
    finally:
        trained.post_processor.image_sensitivity = before
    table = rows(Path(run.trainer.default_root_dir)).values()
    assert [float(row["threshold"]) for row in table] == pytest.approx([1 - sensitivity] * 4)
    assert all((row["label"] == "defective") == (float(row["score"]) > float(row["threshold"])) for row in table)
    assert [row["label"] == "defective" for row in table] == [bool(batch.pred_label) for batch in batches]


@pytest.mark.parametrize("post_processor", [True, False, PostProcessor(enable_thresholding=False)])
def test_without_thresholds_there_is_no_label(
    post_processor: PostProcessor | bool, twins: Path, tmp_path: Path
) -> None:
    run = engine(tmp_path)
    run.predict(UniAS(**SMALL, post_processor=post_processor, visualizer=False), data_path=twins)
    for row in rows(Path(run.trainer.default_root_dir)).values():
        assert (row["threshold"], row["label"], row["regions"]) == ("", "", "")
        assert float(row["score"]) > 0


def test_datamodule_gives_paths_below_its_root_and_its_categories(
    trained: UniAS, datamodule: Unified, parts: Path, tmp_path: Path
) -> None:
    run = engine(tmp_path)
    run.predict(trained, datamodule=datamodule)
    table = rows(Path(run.trainer.default_root_dir))
    expected = {path.relative_to(parts).as_posix() for path in parts.glob("*/test/*/*.png")}
    assert set(table) == pictures(Path(run.trainer.default_root_dir)) == expected
    assert all(row["category"] == path.partition("/")[0] for path, row in table.items())


def test_pictures_of_test_keep_their_names(trained: UniAS, datamodule: Unified, parts: Path, tmp_path: Path) -> None:
    run = engine(tmp_path)
    run.test(trained, datamodule=datamodule)
    expected = {path.relative_to(parts).as_posix() for path in parts.glob("*/test/*/*.png")}
    assert pictures(Path(run.trainer.default_root_dir)) == expected
    assert not (Path(run.trainer.default_root_dir) / "predictions.csv").exists()


@pytest.mark.parametrize("model", [UniAD, BoundedPatchcore])
def test_other_models_of_the_package(
    model: Callable[..., AnomalibModule], datamodule: Unified, twins: Path, tmp_path: Path
) -> None:
    arguments = BACKBONE | {"max_patches": 200, "coreset_size": 20} if model is BoundedPatchcore else SMALL
    run, ours = engine(tmp_path, max_epochs=1), model(**arguments)
    run.fit(ours, datamodule=datamodule)
    run.predict(ours, data_path=twins)  # the trainer still has the datamodule
    folder = Path(run.trainer.default_root_dir)
    assert set(rows(folder)) == pictures(folder) == {"bolt/1.png", "bolt/2.png", "shelf/1.jpg", "shelf/1.png"}
    assert all(row["label"] in ("good", "defective") for row in rows(folder).values())


def test_several_loaders_and_batches(trained: UniAS, twins: Path, tmp_path: Path) -> None:
    loaders = [
        DataLoader(data, batch_size=2, collate_fn=data.collate_fn)
        for data in (PredictDataset(twins / "bolt"), PredictDataset(twins / "shelf"))
    ]
    run = engine(tmp_path)
    run.predict(trained, dataloaders=loaders)
    folder = Path(run.trainer.default_root_dir)
    assert set(rows(folder)) == pictures(folder) == {"bolt/1.png", "bolt/2.png", "shelf/1.jpg", "shelf/1.png"}


class OwnDataset(torch.utils.data.Dataset[ImageItem]):
    """Images by a name of the user's, of which no file may be left, or none at all."""

    def __init__(self, paths: list[str | None]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        return ImageItem(image=torch.rand(3, 128, 128), image_path=self.paths[index])

    collate_fn = staticmethod(ImageBatch.collate)


def test_images_without_a_file(trained: UniAS, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    visualizer, trained.visualizer = trained.visualizer, None
    try:
        run = engine(tmp_path)
        run.predict(trained, dataset=(names := OwnDataset(["camera/1", "camera/2"])), dataloaders=None)
        table = rows(Path(run.trainer.default_root_dir))
        assert {path: row["regions"] for path, row in table.items()} == dict.fromkeys(map(str, names.paths), "")
        with caplog.at_level(logging.WARNING):
            engine(tmp_path / "none").predict(trained, dataset=OwnDataset([None, None]))
        assert "their images no paths" in caplog.text
    finally:
        trained.visualizer = visualizer


def test_unwritable_table_is_told_and_leaves_the_old_one(
    trained: UniAS, twins: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine(tmp_path)
    run.predict(trained, data_path=twins / "bolt")
    folder = Path(run.trainer.default_root_dir)
    old = rows(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table.csv, "writer", full)
    with caplog.at_level(logging.WARNING):
        assert len(run.predict(trained, data_path=twins)) == 4
    assert "predictions could not be saved" in caplog.text
    assert rows(folder) == old
    assert not list(folder.glob(".*"))


def test_broken_run_leaves_the_old_table(trained: UniAS, twins: Path, tmp_path: Path) -> None:
    run = engine(tmp_path)
    run.predict(trained, data_path=twins / "bolt")
    folder = Path(run.trainer.default_root_dir)
    old = rows(folder)
    with (twins / "shelf/1.png").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"1 of 4 images cannot be predicted:\n  - .*shelf/1\.png"):
        run.predict(trained, data_path=twins)
    assert rows(folder) == old


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("/data/parts/bolt/1.png", "/data/parts", "bolt/1.png"),
        ("/data/partsbin/bolt/1.png", "/data/parts", "bolt/1.png"),
        ("/elsewhere/deep/bolt/1.png", "/data/parts", "bolt/1.png"),
        ("/data/parts/bolt/1.png", None, "bolt/1.png"),
        ("1.png", None, "1.png"),
    ],
)
def test_names_below_a_folder(path: str, folder: str | None, expected: str) -> None:
    assert name_below(path, None if folder is None else Path(folder)).as_posix() == expected


def test_links_below_the_folder_keep_their_names(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "folder"
    store.mkdir()
    Image.new("RGB", (4, 4)).save(store / "blob.png")
    folder.mkdir()
    (folder / "part.png").symlink_to(store / "blob.png")
    (tmp_path / "link").symlink_to(folder)
    assert name_below(tmp_path / "link" / "part.png", folder) == Path("part.png")


def test_pictures_outside_the_folder_do_not_overwrite_each_other(tmp_path: Path) -> None:
    visualizer = PathVisualizer()
    visualizer._folder, visualizer._written = None, {}
    paths = [tmp_path / name for name in ("a/x/1.png", "b/x/1.png", "c/x/1.png", "x/1.psd", "x/1.psd.png")]
    names = [visualizer._name(str(path)).as_posix() for path in (*paths, *paths)]
    assert names[:5] == names[5:] == ["x/1.png", "x/1_.png", "x/1__.png", "x/1.psd.png", "x/1.psd_.png"]


def gather(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    table = PredictionTable()
    # The second process has an image of the first again, as samplers give to fill up.
    table._rows = {name: Row(name, "", str(rank), "", "", "", "") for name in ("abc", "bd")[rank]}
    trainer = SimpleNamespace(is_global_zero=rank == 0, default_root_dir=f"{folder}/{rank}")
    table.on_predict_epoch_end(trainer, None)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_first_process_writes_the_rows_of_all_once(tmp_path: Path) -> None:
    multiprocessing.start_processes(gather, args=(str(tmp_path),), nprocs=2, start_method="fork")
    assert list(rows(tmp_path / "0")) == ["a", "b", "c", "d"]
    assert not (tmp_path / "1").exists()


@pytest.mark.slow
def test_two_processes_write_the_table_of_one(parts: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anomalib_uniass", "predict", *MODEL, "--trainer.accelerator", "cpu"]
    data = ["--data", str(parts / "bolt/train"), "--ckpt_path", str(checkpoint)]
    for devices in ("1", "2"):
        (tmp_path / devices).mkdir()
        own = ["--trainer.devices", devices, *(["--trainer.strategy", "ddp"] if devices == "2" else [])]
        subprocess.run([*command, *data, *own], cwd=tmp_path / devices, check=True)
    one, two = (tmp_path / devices / RUN for devices in ("1", "2"))
    assert rows(one).keys() == rows(two).keys()
    for path, row in rows(one).items():
        other = rows(two)[path]
        # Processes share the cores, and the number of threads changes the last digit.
        assert float(row.pop("score")) == pytest.approx(float(other.pop("score")), abs=1e-6)
        assert row == other
    assert pictures(one) == pictures(two) == set(rows(two))


# --- Regions ----------------------------------------------------------------------------------------------------------


def test_regions_of_a_known_mask_in_a_wide_image() -> None:
    mask = torch.zeros(1, 64, 32, dtype=torch.bool)
    mask[0, 8:16, 4:12] = True  # 64 cells
    mask[0, 40, 30] = mask[0, 41, 31] = True  # one region over a corner
    # The image is 10 times as wide and 2 times as high as the mask.
    assert _regions(mask, (320, 128)) == [[40, 16, 80, 16, 64 * 20], [300, 80, 20, 4, 2 * 20]]


def test_regions_agree_with_scipy_and_are_bounded() -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random((80, 60)) > 0.8)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = sorted(ndimage.sum_labels(mask, labels, range(1, count + 1)), reverse=True)
    assert count > MOST_REGIONS
    regions = _regions(mask, (60, 80))
    assert [area for *_, area in regions] == areas[:MOST_REGIONS]
    slices = ndimage.find_objects(labels)
    boxes = {(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in slices}
    assert {tuple(box) for *box, _ in regions} <= boxes


def test_no_region_vanishes_in_a_small_image() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    assert _regions(mask, (8, 8)) == []
    mask[3, 63] = True
    ((x, y, *size),) = _regions(mask, (8, 8))
    assert size == [1, 1, 1]
    mask[3, 62] = True
    assert _regions(mask, (70, 48))[0][2:] == [2, 1, 2]
    assert _regions(mask, (60, 60))[0][2:] == [2, 1, 2]
    assert 0 <= x < 8
    assert y == 0


def upper_left_quarter(image: torch.Tensor) -> InferenceBatch:
    """Call the upper left quarter of every image defective."""
    maps = torch.zeros(len(image), 1, *image.shape[-2:])
    maps[..., : maps.shape[-2] // 2, : maps.shape[-1] // 2] = 1
    return InferenceBatch(anomaly_map=maps, pred_score=maps.amax((1, 2, 3)))


def quarter_model(**arguments: Any) -> UniAS:
    model = UniAS(**SMALL, **arguments, visualizer=False)
    model.model.forward = upper_left_quarter
    rates = {"image_fpr": 0.01, "pixel_fpr": 0.001}
    model.post_processor.calibration = {"image": {"all": 0.5}, "pixel": {"all": 0.5}} | rates
    model.post_processor._image_threshold.fill_(0.5)
    model.post_processor._pixel_threshold.fill_(0.5)
    return model


def test_boxes_are_in_pixels_of_the_image_as_it_is_shown(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    picture = Image.new("RGB", (300, 200), "gray")
    picture.save(images / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(images / "turned.jpg", exif=exif)
    run = engine(tmp_path / "run")
    run.predict(quarter_model(), data_path=images)
    table = rows(Path(run.trainer.default_root_dir))
    assert json.loads(table["wide.png"]["regions"]) == [[0, 0, 150, 100, 150 * 100]]
    assert json.loads(table["turned.jpg"]["regions"]) == [[0, 0, 100, 150, 150 * 100]]
    assert {row["label"] for row in table.values()} == {"defective"}


def one_in_four(value: float) -> Callable[[torch.Tensor], InferenceBatch]:
    """Find the same in all images, and a value that is not finite in one corner of the black ones."""

    def detect(image: torch.Tensor) -> InferenceBatch:
        maps = torch.full((len(image), 1, 64, 64), 0.1)
        for row, pixels in enumerate(image):
            if pixels.amax() < 0:  # black, normalised
                maps[row, 0, 0, 0] = value
        return InferenceBatch(anomaly_map=maps, pred_score=maps[:, 0, 9, 9])

    return detect


@pytest.mark.parametrize("post_processor", [True, PostProcessor()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_good(
    value: float, post_processor: PostProcessor | bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor without thresholds; here the score is a number, and one pixel of the map is none."""
    (tmp_path / "images").mkdir()
    for name, colour in (("black", 0), ("grey", 128), ("white", 255)):
        Image.new("RGB", (64, 64), (colour,) * 3).save(tmp_path / "images" / f"{name}.png")
    model = quarter_model() if post_processor is True else UniAS(**SMALL, post_processor=post_processor)
    model.model.forward = one_in_four(value)
    run = engine(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run.predict(model, data_path=tmp_path / "images")
    table = rows(Path(run.trainer.default_root_dir))
    good = "good" if post_processor is True else ""
    expected = {"black.png": "not finite", "grey.png": good, "white.png": good}
    assert {name: row["label"] for name, row in table.items()} == expected
    if post_processor is True:
        assert "1 images of the prediction have scores or maps that are not finite" in caplog.text
        assert "black.png" in caplog.text
        assert json.loads(table["black.png"]["regions"]) == [[0, 0, 1, 1, 1]]


def test_the_table_says_whose_threshold_decided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = {
        "bolt": ("bolt", "bolt"),
        "Cap ": ("cap", "cap"),
        "incoming": ("", "cap"),
        "bolt/test/cap": ("bolt", "bolt"),
        unicodedata.normalize("NFD", "Größe"): ("Größe", "Größe"),
    }
    for folder in folders:
        (tmp_path / "images" / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "gray").save(tmp_path / "images" / folder / "1.png")
    model = quarter_model()
    model.post_processor.calibration = {
        level: {"bolt": 0.1, "cap": 0.5, "Größe": 0.2} for level in ("image", "pixel")
    } | {"image_fpr": 0.01, "pixel_fpr": 0.001}
    run = engine(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run.predict(model, data_path=tmp_path / "images")
    table = rows(Path(run.trainer.default_root_dir))
    assert {
        path.removesuffix("/1.png"): (row["category"], row["threshold_of"]) for path, row in table.items()
    } == folders
    (said,) = [record.message for record in caplog.records if "category of" in record.message]
    assert said.startswith("The category of 1 images is not known, by folder: 'incoming' (1).")


def test_a_pre_processor_that_crops_gives_no_regions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (300, 200), "gray").save(tmp_path / "wide.png")
    crop = PreProcessor(Compose([Resize((160, 160)), CenterCrop((128, 128)), Normalize([0.5] * 3, [0.5] * 3)]))
    run = engine(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run.predict(quarter_model(pre_processor=crop), data_path=tmp_path / "wide.png")
    assert "crops" in caplog.text
    assert rows(Path(run.trainer.default_root_dir))["wide.png"]["regions"] == ""


# --- Images that anomalib misreads ------------------------------------------------------------------------------------


def left_panel(picture: Path) -> np.ndarray:
    return np.asarray(Image.open(picture).convert("RGB"), np.float32)[40:, :256]  # below the caption


@pytest.fixture
def grey(parts: Path, tmp_path: Path) -> Path:
    """Folder of 8-bit grey images."""
    folder = tmp_path / "grey"
    for source in sorted(parts.glob("*/test/*/000.png")):
        target = folder / source.relative_to(parts)
        target.parent.mkdir(parents=True)
        Image.open(source).convert("L").save(target)
    return folder


def predictions(model: UniAS, run: Path, **data: Any) -> tuple[dict[str, dict[str, str]], Path]:
    own = engine(run)
    own.predict(model, **data)
    folder = Path(own.trainer.default_root_dir)
    return rows(folder), folder


@pytest.mark.parametrize("batch_size", [1, 3])
def test_16_bit_images_score_as_the_8_bit_images_they_come_from(
    batch_size: int, trained: UniAS, grey: Path, tmp_path: Path
) -> None:
    deep = tmp_path / "deep"
    for source in grey.rglob("*.png"):
        target = deep / source.relative_to(grey)
        target.parent.mkdir(parents=True)
        Image.fromarray(np.asarray(Image.open(source)).astype(np.uint16) * 257).save(target)
    assert anomalib_read_image(target, as_tensor=True).min() == 1  # white: what this is about
    results = []
    for folder in (grey, deep):
        data = PredictDataset(folder)
        loader = DataLoader(data, batch_size=batch_size, collate_fn=data.collate_fn)
        results.append(predictions(trained, tmp_path / f"run_{folder.name}", dataloaders=loader))
    (expected, shallow_run), (found, deep_run) = results
    assert found.keys() == expected.keys()
    assert len({row["score"] for row in expected.values()}) == 4
    for path, row in found.items():
        assert float(row["score"]) == pytest.approx(float(expected[path]["score"]), abs=1e-6)
        assert row["regions"] == expected[path]["regions"]
        ours, theirs = (left_panel(run / "images" / path) for run in (deep_run, shallow_run))
        assert ours.mean() < 200
        np.testing.assert_allclose(ours, theirs, atol=2)


def test_a_batch_of_several_kinds_is_read_right_and_transformed(trained: UniAS, grey: Path, tmp_path: Path) -> None:
    """A 16-bit image beside an 8-bit one, larger, with a transform of the dataset."""
    mixed = tmp_path / "mixed"
    (mixed / "b").mkdir(parents=True)
    sources = sorted(grey.rglob("*.png"))
    large = Image.open(sources[0]).resize((200, 160))
    large.save(mixed / "b/8.png")
    Image.fromarray(np.asarray(Image.open(sources[1])).astype(np.uint16) * 257).save(mixed / "16.png")
    plain = tmp_path / "plain"
    (plain / "b").mkdir(parents=True)
    large.save(plain / "b/8.png")
    Image.open(sources[1]).save(plain / "16.png")
    found = []
    for folder in (plain, mixed):
        data = PredictDataset(folder, transform=Resize((64, 96)))
        loader = DataLoader(data, batch_size=2, collate_fn=data.collate_fn)
        found.append(predictions(trained, tmp_path / f"run_{folder.name}", dataloaders=loader)[0])
    for path in ("16.png", "b/8.png"):
        assert float(found[1][path]["score"]) == pytest.approx(float(found[0][path]["score"]), abs=1e-6)


def test_images_turned_by_exif_score_as_upright_ones(trained: UniAS, grey: Path, tmp_path: Path) -> None:
    upright, turned = tmp_path / "upright", tmp_path / "turned"
    for folder in (upright, turned):
        folder.mkdir()
    image = Image.open(next(grey.rglob("square/000.png"))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    image.transpose(Image.Transpose.ROTATE_270).save(upright / "1.webp", lossless=True)
    image.save(turned / "1.webp", lossless=True, exif=exif)
    (expected, upright_run), (found, turned_run) = (
        predictions(trained, tmp_path / f"run_{folder.name}", data_path=folder) for folder in (upright, turned)
    )
    assert float(found["1.webp"]["score"]) == pytest.approx(float(expected["1.webp"]["score"]), abs=1e-6)
    assert found["1.webp"]["regions"] == expected["1.webp"]["regions"]
    panels = (left_panel(run / "images/1.webp") for run in (upright_run, turned_run))
    np.testing.assert_allclose(*panels, atol=2)


def test_pictures_of_16_bit_images_of_a_datamodule_are_not_white(trained: UniAS, parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    shutil.copytree(parts / "bolt", root / "bolt")
    for source in (root / "bolt/test").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(source).convert("L")).astype(np.uint16) * 257).save(source)
    run = engine(tmp_path / "run")
    run.test(trained, datamodule=Unified(root=root, eval_batch_size=4, num_workers=0))
    folder = Path(run.trainer.default_root_dir) / "images"
    drawn = sorted(path for path in folder.rglob("*.png"))
    assert len(drawn) == 4
    assert all(left_panel(path).mean() < 200 for path in drawn)


def test_files_that_cannot_be_read_right_are_named_before_the_first_is_predicted(
    trained: UniAS, twins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(*arguments: Any, **named: Any) -> None:
        pytest.fail("predicted an image")

    monkeypatch.setattr(trained, "predict_step", predicted)
    Image.new("RGBA", (64, 64), (255, 0, 0, 10)).save(twins / "z.png")
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(twins / "float.tif")
    Image.new("RGB", (64, 64)).save(twins / "pages.tiff", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    (twins / "cut.png").write_bytes(b"\x89PNG")
    (twins / "._1.png").write_bytes(b"\x00\x05\x16\x07")  # hidden, as in training
    with pytest.raises(ValueError, match="4 of 8 images cannot be predicted") as error:
        engine(tmp_path).predict(trained, data_path=twins)
    for name in ("z.png", "float.tif", "pages.tiff", "cut.png"):
        assert name in str(error.value)
    for index in range(4):
        shutil.copy(twins / "z.png", twins / f"z{index}.png")
    with pytest.raises(ValueError, match="and 3 more") as error:
        engine(tmp_path).predict(trained, data_path=twins)
    assert str(error.value).count("\n  - ") == 5


@pytest.mark.parametrize(("stage", "subset"), [("fit", "train"), ("test", "test"), ("predict", "test")])
def test_datamodule_of_anomalib_that_misreads_is_refused(
    stage: str, subset: str, trained: UniAS, parts: Path, tmp_path: Path
) -> None:
    """Opaque RGBA is read right by anomalib, 16 bits are not."""
    shutil.copytree(parts / "bolt", tmp_path / "data/bottle")
    good = sorted((tmp_path / "data/bottle" / subset / "good").glob("*.png"))
    Image.open(good[1]).convert("RGBA").save(good[1])
    data = MVTecAD(root=tmp_path / "data", num_workers=0, train_batch_size=4)
    getattr(engine(tmp_path / "right", fast_dev_run=1), stage)(trained, datamodule=data)
    Image.fromarray(np.asarray(Image.open(good[0]).convert("L")).astype(np.uint16) * 257).save(good[0])
    data = MVTecAD(root=tmp_path / "data", num_workers=0, train_batch_size=4)
    with pytest.raises(ValueError, match=r"1 of \d+ images cannot be read by MVTecAD:\n  - .*000\.png: has 16 bits"):
        getattr(engine(tmp_path / "wrong", fast_dev_run=1), stage)(trained, datamodule=data)


@pytest.mark.parametrize(
    ("data", "message"), [("nowhere", "nowhere"), ("empty", "0 images"), ("empty/notes.txt", "notes.txt")]
)
def test_nothing_to_predict_is_told(data: str, message: str, trained: UniAS, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no image")
    with pytest.raises((ValueError, OSError), match=message):
        engine(tmp_path).predict(trained, data_path=tmp_path / data)


# --- Pickles ----------------------------------------------------------------------------------------------------------


def test_a_model_keeps_nothing_of_a_prediction(trained: UniAS, twins: Path, tmp_path: Path) -> None:
    engine(tmp_path).predict(trained, data_path=twins)
    assert isinstance(trained.visualizer, PathVisualizer)
    assert (trained.visualizer._folder, trained.visualizer._written) == (None, {})
    assert trained.visualizer.output_dir is None
    kinds = [type(callback) for callback in trained.configure_callbacks()]
    writers = [PredictionTable, PathVisualizer, CategoryMetricsCallback]
    assert max(map(kinds.index, writers)) < kinds.index(RunFolder), "it removes folders in which they have left nothing"


def test_labels_of_a_picture_fit_on_its_panels() -> None:
    """Panels are as wide as the model's images, 224 pixels by default; the label begins 10 pixels from the left."""
    font = ImageFont.load_default(size=UniAS.configure_visualizer().text_config["size"])
    assert 10 + font.getlength("Image + Anomaly Map") < 224
