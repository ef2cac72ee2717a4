# SPDX-License-Identifier: Apache-2.0
"""Folders in the layout of MVTec AD as people have them: the frame that is read, or what the refusal says."""

import logging
import mimetypes
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import Split
from PIL import Image

from anomalib_uniass.data import Unified
from anomalib_uniass.data.images import image_suffixes
from anomalib_uniass.data.mvtec_layout import LayoutError, MVTecLayout, read_category
from tests.helpers.datasets import make_mvtec_layout

FORMATS = ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp", "ppm", "gif"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec_layout(tmp_path / "parts", ["nut", "pin"], 16, train=3, good=2, defects=("crack", "dent"))


def convert(path: Path, suffix: str) -> Path:
    """Save an image in another format, losslessly where the format can."""
    new = path.with_suffix(suffix)
    with Image.open(path) as image:
        image.load()
    path.unlink()
    image.save(new, **({"lossless": True} if suffix.lower() == ".webp" else {}))
    return new


def unified(root: Path, **arguments: object) -> Unified:
    datamodule = Unified(root=root, num_workers=0, **arguments)  # type: ignore[arg-type]
    datamodule.setup()
    return datamodule


# --- the frame ---


def anomalibs(root: Path, category: str) -> MVTecAD:
    datamodule = MVTecAD(root=root, category=category)
    datamodule._setup()
    return datamodule


@pytest.mark.parametrize("place", [Path, lambda root: Path(os.path.relpath(root))], ids=["absolute", "relative"])
def test_frame_of_png_equals_anomalibs(
    root: Path, tmp_path: Path, place: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "nut/test/good/000.png", root / "nut/train/good/0 1.PNG")  # anomalib takes both endings
    ours = MVTecLayout(root=place(root), category="nut")
    ours._setup()
    theirs = anomalibs(place(root), "nut")
    for subset in ("train_data", "test_data"):
        pd.testing.assert_frame_equal(getattr(ours, subset).samples, getattr(theirs, subset).samples)
        assert getattr(ours, subset).samples.attrs == getattr(theirs, subset).samples.attrs
        assert getattr(ours, subset).task == "segmentation"
    assert len(ours.train_data) == 4 and len(ours.test_data) == 6


def test_items_of_png_equal_anomalibs(root: Path) -> None:
    ours, theirs = unified(root, categories=["nut"]).test_data, anomalibs(root, "nut").test_data
    for i in range(len(theirs)):
        torch.testing.assert_close(ours[i].image, theirs[i].image, rtol=0, atol=0)
        torch.testing.assert_close(ours[i].gt_mask, theirs[i].gt_mask, rtol=0, atol=0)
        assert ours[i].gt_label == theirs[i].gt_label


@pytest.mark.parametrize("suffix", [f".{name}" for name in FORMATS] + [".PNG", ".JPG", ".Tif", ".BMP"])
def test_every_format_is_read(root: Path, suffix: str) -> None:
    before = unified(root)
    for image in root.glob("*/t*/*/*.png"):
        convert(image, suffix)
    after = unified(root)
    for old, new in ((before.train_data, after.train_data), (before.test_data, after.test_data)):
        assert [Path(path).suffix for path in new.samples["image_path"]] == [suffix] * len(old)
        assert [Path(path).stem for path in new.samples["image_path"]] == [
            Path(path).stem for path in old.samples["image_path"]
        ]
        assert new.samples["mask_path"].tolist() == old.samples["mask_path"].tolist()
    batch = next(iter(after.test_dataloader()))
    assert batch.image.shape == (12, 3, 16, 16) and batch.gt_mask.flatten(1).any(1).sum() == 8


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        *((suffix, "{}_mask") for suffix in (".PNG", ".tif", ".bmp", ".webp", ".gif", ".pgm")),
        (".png", "{}"),
        (".TIF", "{}"),
        (".BMP", "{}_MASK"),
    ],
)
def test_masks_of_every_lossless_format_are_matched_by_name(root: Path, suffix: str, name: str) -> None:
    expected = {
        (Path(item.image_path).parts[-4:]): item.gt_mask for item in (unified(root).test_data[i] for i in range(12))
    }
    for mask in root.glob("*/ground_truth/*/*.png"):
        mask = mask.rename(mask.with_stem(name.format(mask.stem.removesuffix("_mask"))))
        convert(mask, suffix)
    data = unified(root).test_data
    for i in range(12):
        torch.testing.assert_close(data[i].gt_mask, expected[Path(data[i].image_path).parts[-4:]])


def test_endings_may_be_mixed(root: Path) -> None:
    images = sorted(root.glob("nut/*/*/00*.png"))
    for image, suffix in zip(images, (".jpg", ".PNG", ".tiff", ".BMP") * len(images), strict=False):
        if image.suffix != suffix:
            convert(image, suffix)
    samples = unified(root).test_data.samples
    anomalous = samples[samples["label_index"] == 1]
    assert len(samples) == 12
    for image, mask in anomalous[["image_path", "mask_path"]].itertuples(index=False):
        assert Path(image).stem + "_mask" == Path(mask).stem
        assert Path(image).parts[-4] == Path(mask).parts[-4] and Path(image).parts[-2] == Path(mask).parts[-2]


def test_masks_are_not_matched_by_their_order(root: Path) -> None:
    """In the order of names, as anomalib pairs them, ``1`` and ``10`` would get each other's masks."""
    folder = root / "nut"
    for old, new in (("000", "10"), ("001", "1")):
        (folder / f"test/dent/{old}.png").rename(folder / f"test/dent/{new}.png")
        (folder / f"ground_truth/dent/{old}_mask.png").rename(folder / f"ground_truth/dent/{new}_mask.png")
    samples = read_category(folder)
    names = {
        Path(i).stem: Path(m).stem
        for i, m in samples[samples["label"] == "dent"][["image_path", "mask_path"]].itertuples(index=False)
    }
    assert names == {"1": "1_mask", "10": "10_mask"}


def test_every_suffix_is_one_that_pillow_opens() -> None:
    assert {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"} <= image_suffixes()
    assert not {".pdf", ".txt", ".db", ".heic", ""} & image_suffixes()
    assert all(suffix == suffix.lower() for suffix in image_suffixes())


# --- what is read all the same ---


def no_masks(root: Path) -> None:
    for category in root.iterdir():
        shutil.rmtree(category / "ground_truth")


def copy(root: Path, source: str, target: str) -> None:
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / source, root / target)


def replace_by_link(path: Path) -> None:
    store = path.parents[len(path.parents) - 3] / f"store{path.stem}{path.suffix}"
    shutil.move(path, store)
    path.symlink_to(store)


STILL_READ: dict[str, Callable[[Path], object]] = {
    "apple's hidden files": lambda root: [
        copy(root, "nut/test/dent/000.png", f"nut/{folder}/._000.png")
        for folder in ("train/good", "test/good", "test/dent", "ground_truth/dent")
    ],
    "notebook's folders": lambda root: [
        copy(root, "nut/test/dent/000.png", f"nut/{folder}/.ipynb_checkpoints/000-checkpoint.png")
        for folder in ("", "train", "train/good", "test", "test/dent", "ground_truth", "ground_truth/dent")
    ],
    "thumbnails of a network drive": lambda root: copy(
        root, "nut/test/dent/000.png", "nut/train/good/@eaDir/000.png/SYNOPHOTO_THUMB_M.jpg"
    ),
    "macOS archive": lambda root: copy(root, "nut/test/dent/000.png", "__MACOSX/nut/train/good/._000.png"),
    "Thumbs.db": lambda root: [(path / "Thumbs.db").write_bytes(b"x") for path in root.glob("*/*/*") if path.is_dir()],
    ".DS_Store": lambda root: [
        (path / ".DS_Store").write_bytes(b"x") for path in (root, *root.rglob("*")) if path.is_dir()
    ],
    "text files": lambda root: [
        (path / name).write_text("x")
        for path in (root, *root.rglob("*"))
        if path.is_dir()
        for name in ("readme.txt", "labels.json", "license", "a.csv")
    ],
    "empty folders": lambda root: [
        (root / path).mkdir(parents=True)
        for path in ("empty", "nut/empty", "nut/train/bad", "nut/test/hole", "nut/test/Good", "nut/ground_truth/hole")
    ],
    "other folders": lambda root: copy(root, "nut/test/dent/000.png", "nut/raw/000.png"),
    "results below the root": lambda root: copy(
        root, "nut/test/dent/000.png", "results/UniAS/parts/v0/images/nut/test/dent/000.png"
    ),
    "masks of good images": lambda root: copy(
        root, "nut/ground_truth/dent/000_mask.png", "nut/ground_truth/good/000.png"
    ),
    "mask without an image": lambda root: copy(
        root, "nut/ground_truth/dent/000_mask.png", "nut/ground_truth/dent/009_mask.png"
    ),
    "masks of a defect without images": lambda root: copy(
        root, "nut/ground_truth/dent/000_mask.png", "nut/ground_truth/hole/000_mask.png"
    ),
    "linked images": lambda root: [replace_by_link(path) for path in root.glob("nut/*/dent/*.png")],
}


@pytest.mark.parametrize("change", STILL_READ.values(), ids=STILL_READ.keys())
def test_what_is_beside_the_images_changes_nothing(root: Path, change: Callable[[Path], object]) -> None:
    before = unified(root)
    change(root)
    after = unified(root)
    assert after.categories == ["nut", "pin"]
    for subset in ("train_data", "val_data", "test_data"):
        pd.testing.assert_frame_equal(getattr(after, subset).samples, getattr(before, subset).samples)
    assert len(after.test_data) == 12
    next(iter(after.test_dataloader()))


def test_mask_without_an_image_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(10, 17):
        copy(root, "nut/ground_truth/dent/000_mask.png", f"nut/ground_truth/dent/0{i}_mask.png")
    with caplog.at_level(logging.WARNING):
        unified(root)
    (message,) = [record.getMessage() for record in caplog.records if "no image" in record.getMessage()]
    assert "7 masks have no image" in message and "and 2 more" in message
    assert re.findall(r"dent/0(\d\d)_mask", message) == ["10", "11", "12", "13", "14"]


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("anomalib_uniass")]


def test_hidden_files_need_no_word(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("apple's hidden files", "notebook's folders", ".DS_Store", "Thumbs.db"):
        STILL_READ[name](root)
    (root / "nut/train/good/desktop.ini").touch()
    with caplog.at_level(logging.WARNING):
        unified(root)
    assert not ours(caplog)


def test_visible_files_that_are_no_images_are_named_by_ending_and_count(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/good/1.dcm", "train/good/2.DCM", "test/dent/3.dcm", "train/good/IMG_1.HEIC"):
        (root / "nut" / name).write_bytes(b"x")
    for name in ("train/x.npy", "train/good/deep/er/y.nrrd", "ground_truth/dent/000.json", "test/README"):
        (root / "pin" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "pin" / name).write_bytes(b"x")
    os.mkfifo(root / "pin/train/good/pipe.png")
    with caplog.at_level(logging.WARNING):
        assert len(unified(root).train_data) == 4
    (message,) = ours(caplog)
    assert "Left out" in message and " 9 files below " in message
    for told in (
        "3 .dcm (nut/test/dent/3.dcm, ...)",
        "1 .heic (nut/train/good/IMG_1.HEIC)",
        "1 .npy (pin/train/x.npy)",
        "1 .nrrd (pin/train/good/deep/er/y.nrrd)",
        "1 .json (pin/ground_truth/dent/000.json)",
        "1 without ending (pin/test/README)",
        "1 no files but pipes or the like (pin/train/good/pipe.png)",
    ):
        assert told in message


def test_which_files_are_images_does_not_depend_on_the_machines_mime_table(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A slim container has no table, and a machine of others any: neither adds nor takes a file."""
    (root / "nut/train/good/1.dng").write_bytes(b"x")
    told = []
    for table in ({}, {".dng": "image/x-adobe-dng", ".png": "text/plain"}):
        monkeypatch.setattr(mimetypes, "types_map", table)
        monkeypatch.setattr(mimetypes, "guess_type", lambda name, table=table: (table.get(Path(name).suffix), None))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(unified(root).train_data) == 4
        told.append(ours(caplog))
    assert told[0] == told[1] and "1 .dng" in told[0][0]


def test_images_in_folders_that_the_layout_does_not_know_are_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy(root, "nut/test/dent/000.png", "nut/raw/2024/000.png")
    copy(root, "nut/test/dent/000.png", "nut/cover.jpg")
    (root / "nut/readme.txt").touch()
    with caplog.at_level(logging.WARNING):
        unified(root)
    (message,) = ours(caplog)
    assert message.startswith("Not read") and f"{root / 'nut/raw'}, {root / 'nut/cover.jpg'}." in message


@pytest.mark.parametrize("link", ["nut/train/good/loop", "nut/train/loop", "nut/loop", "loop", "nut/test/dent/loop"])
@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_links_to_their_own_folder_change_nothing(root: Path, link: str, target: str) -> None:
    before = unified(root)
    (root / link).symlink_to(target if len(Path(link).parts) > 1 else ".", target_is_directory=True)
    after = unified(root)
    assert after.categories == ["nut", "pin"]
    for subset in ("train_data", "val_data", "test_data"):
        pd.testing.assert_frame_equal(getattr(after, subset).samples, getattr(before, subset).samples)


def test_forty_links_in_an_image_less_folder_are_followed_once(root: Path) -> None:
    """Two links to its own folder: as many paths as there are numbers of forty bits."""
    folder = root / "nut/train/good/empty"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).symlink_to(".", target_is_directory=True)
    (root / "nut/ground_truth/none").mkdir()
    for i in range(40):
        (root / f"nut/ground_truth/none/{i}").symlink_to(folder, target_is_directory=True)
    start = time.monotonic()
    assert len(unified(root).train_data) == 4
    for image in (root / "nut/train/good").glob("*.png"):
        image.unlink()
    with pytest.raises(LayoutError, match=r"No training images in .*: the folder is empty"):
        unified(root)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", ["file", "link to itself"])
def test_a_file_where_a_folder_should_be_is_told(root: Path, kind: str) -> None:
    good = root / "nut/train/good"
    shutil.rmtree(good)
    good.touch() if kind == "file" else good.symlink_to("good")
    there = "this is no folder" if kind == "file" else "the folder does not exist"
    with pytest.raises(LayoutError, match=f"No training images in {good}: {there}"):
        unified(root)


def test_without_masks_there_are_image_labels_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    no_masks(root)
    with caplog.at_level(logging.WARNING):
        datamodule = unified(root, hflip=["nut"])
    assert datamodule.task == "classification"
    assert "metrics of pixels are left out" in caplog.text
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.gt_mask is None and batch.gt_label.sum() == 8
    next(iter(datamodule.train_dataloader()))


def test_empty_ground_truth_is_none(root: Path) -> None:
    for category in root.iterdir():
        shutil.rmtree(category / "ground_truth")
        (category / "ground_truth/dent").mkdir(parents=True)
        (category / "ground_truth/.DS_Store").touch()
    assert unified(root).task == "classification"


@pytest.mark.parametrize(("masks", "task"), [(True, "segmentation"), (False, "classification")])
def test_category_without_defects_goes_with_the_others(root: Path, masks: bool, task: str) -> None:
    for name in ("crack", "dent"):
        shutil.rmtree(root / "pin/test" / name)
    shutil.rmtree(root / "pin/ground_truth")
    if not masks:
        shutil.rmtree(root / "nut/ground_truth")
    datamodule = unified(root)
    assert datamodule.train_data.task == datamodule.val_data.task == datamodule.test_data.task == task
    assert len(datamodule.test_data) == 8


def test_category_without_good_test_images(root: Path) -> None:
    shutil.rmtree(root / "nut/test/good")
    assert unified(root).test_data.samples["category"].value_counts().to_dict() == {"pin": 6, "nut": 4}


def test_linked_folders(root: Path, tmp_path: Path) -> None:
    before = unified(root)
    for i, folder in enumerate((root / "nut", root / "pin/train/good", root / "pin/test")):
        shutil.move(folder, tmp_path / f"disk{i}")
        folder.symlink_to(tmp_path / f"disk{i}")
    after = unified(root)
    pd.testing.assert_frame_equal(after.train_data.samples, before.train_data.samples)
    pd.testing.assert_frame_equal(after.test_data.samples, before.test_data.samples)


# --- what is refused, before anything is trained ---


def lay(root: Path, name: str, images: str = "nut/test/dent/000.png") -> None:
    copy(root, images, f"{name}/000.png")


def rename(root: Path, old: str, new: str) -> None:
    (root / old).rename(root / new)


def remove(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def as_annotations(root: Path, name: str) -> None:
    for mask in (root / "nut/ground_truth").glob("*/*"):
        mask.rename(mask.with_name(name.format(mask.stem)))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "image without a mask": (
        lambda root: remove(root, "nut/ground_truth/dent/001_mask.png"),
        r"1 anomalous images .*Images without a mask: \S+nut/test/dent/001\.png\. Expected ground_truth/<defect>/",
    ),
    "mask as JSON beside masks": (
        lambda root: rename(root, "nut/ground_truth/dent/001_mask.png", "nut/ground_truth/dent/001.json"),
        r"nut/test/dent/001\.png\. ground_truth holds 1 \.json \(ground_truth/dent/001\.json\), which are no images",
    ),
    "annotations of LabelMe": (
        lambda root: as_annotations(root, "{}.json"),
        r"nut/ground_truth: holds no mask, only 4 \.json \(crack/000_mask\.json, \.\.\.\)\. Masks are images.*LabelMe",
    ),
    "arrays": (
        lambda root: as_annotations(root, "{}.npy"),
        r"nut/ground_truth: holds no mask, only 4 \.npy \(.*Image\.fromarray.*For image labels alone remove",
    ),
    "annotations in one file": (
        lambda root: (
            remove(root, "nut/ground_truth/dent", "nut/ground_truth/crack"),
            (root / "nut/ground_truth/coco.json").touch(),
        ),
        r"nut/ground_truth: holds no mask, only 1 \.json \(coco\.json\)",
    ),
    "defect without masks": (
        lambda root: remove(root, "nut/ground_truth/dent"),
        r"2 anomalous images .*nut/test/dent/000\.png, \S+nut/test/dent/001\.png",
    ),
    "mask under another name": (
        lambda root: rename(root, "nut/ground_truth/dent/001_mask.png", "nut/ground_truth/dent/001_gt.png"),
        r"without a mask: \S+001\.png\. Masks without an image: \S+001_gt\.png",
    ),
    "two masks": (
        lambda root: copy(root, "nut/ground_truth/dent/000_mask.png", "nut/ground_truth/dent/000.png"),
        r"nut/test/dent/000\.png: several masks \(\S+dent/000\.png, \S+dent/000_mask\.png\)\. Keep one",
    ),
    "a mask in two formats": (
        lambda root: copy(root, "nut/ground_truth/dent/000_mask.png", "nut/ground_truth/dent/000_mask.bmp"),
        r"nut/test/dent/000\.png: several masks \(\S+000_mask\.bmp, \S+000_mask\.png\)",
    ),
    "two defective images of one name": (
        lambda root: copy(root, "nut/test/dent/000.png", "nut/test/dent/000.JPG"),
        r"dent/000\.JPG, \S+dent/000\.png: images of one name; which has the mask\?",
    ),
    "masks among the images": (
        lambda root: [
            copy(root, f"nut/ground_truth/dent/00{i}_mask.png", f"nut/test/dent/00{i}_mask.png") for i in (0, 1)
        ],
        r"nut/test/dent: masks lie among the images \(\S+000_mask\.png, .*Move them to ground_truth/<defect>",
    ),
    "masks among the images and nowhere else": (
        lambda root: [
            copy(root, "nut/ground_truth/dent/000_mask.png", "nut/test/dent/000_mask.png"),
            no_masks(root),
        ],
        r"nut/test/dent: masks lie among the images",
    ),
    "anomalous training images": (
        lambda root: lay(root, "nut/train/dent"),
        r"nut/train/dent: training images must be good and lie in train/good",
    ),
    "train/Good": (
        lambda root: rename(root, "nut/train/good", "nut/train/Good"),
        r"nut/train/Good: training images must be good and lie in train/good; rename this folder",
    ),
    "test/ok": (lambda root: rename(root, "nut/test/good", "nut/test/ok"), r"nut/test/ok: .*Rename it to 'good'"),
    "test/GOOD": (lambda root: lay(root, "nut/test/GOOD"), r"nut/test/GOOD: would be taken for a defect"),
    "Train": (lambda root: rename(root, "nut/train", "nut/Train"), r"nut/Train: rename this folder to 'train'"),
    "TEST": (lambda root: rename(root, "nut/test", "nut/TEST"), r"nut/TEST: rename this folder to 'test'"),
    "Ground_Truth": (
        lambda root: rename(root, "nut/ground_truth", "nut/Ground_Truth"),
        r"nut/Ground_Truth: rename this folder to 'ground_truth'",
    ),
    "images in train": (lambda root: lay(root, "nut/train"), r"nut/train: 1 images lie directly .*or train/good\."),
    "images in test": (lambda root: lay(root, "nut/test"), r"nut/test: 1 images lie directly .*or test/good\."),
    "masks in ground_truth": (
        lambda root: lay(root, "nut/ground_truth"),
        r"nut/ground_truth: 1 images lie directly in this folder \(\S+000\.png\)\. Expected them in ground_truth/<def",
    ),
    "deeper images": (
        lambda root: lay(root, "nut/train/good/monday"),
        r"nut/train/good: holds folders with images \(\S+good/monday\)\. Move the images up",
    ),
    "much deeper images": (lambda root: lay(root, "nut/test/dent/a/b"), r"nut/test/dent: holds folders with images"),
    "folders of masks": (
        lambda root: lay(root, "nut/ground_truth/dent/000"),
        r"nut/ground_truth/dent: holds folders with images .*source='MVTecLOCO'",
    ),
    "link that leads nowhere": (
        lambda root: (root / "nut/train/good/009.png").symlink_to(root / "gone.png"),
        r"nut/train/good/009\.png: links that lead nowhere",
    ),
    "no training folder": (
        lambda root: remove(root, "nut/train"),
        r"No training images in \S+nut/train/good: the folder does not exist\..*leave the category out",
    ),
    "only test": (lambda root: remove(root, "nut/train", "nut/ground_truth"), r"No training images in \S+nut/train"),
    "empty training folder": (
        lambda root: remove(root, *(f"nut/train/good/00{i}.png" for i in range(3))),
        r"No training images in \S+nut/train/good: the folder is empty",
    ),
    "training images of phones": (
        lambda root: [rename(root, f"nut/train/good/00{i}.png", f"nut/train/good/00{i}.heic") for i in range(3)],
        r"No training images in \S+nut/train/good: only 3 \.heic \(000\.heic, \.\.\.\)\. Add images that Pillow opens",
    ),
    "no test folder": (
        lambda root: remove(root, "nut/test", "nut/ground_truth"),
        r"No test images in \S+nut/test: the folder does not exist",
    ),
    "empty test folder": (
        lambda root: remove(root, "nut/test/good", "nut/test/dent", "nut/test/crack", "nut/ground_truth"),
        r"No test images in \S+nut/test: the folder is empty",
    ),
    "masks in one category alone": (
        lambda root: remove(root, "nut/ground_truth"),
        r"All categories must have masks, or none\. With masks: pin\. Without: nut\.",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusal_names_the_file_and_what_to_do(root: Path, change: Callable[[Path], object], message: str) -> None:
    change(root)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        unified(root)


def test_the_same_images_in_good_and_other_names_are_no_problem(root: Path) -> None:
    copy(root, "nut/test/good/000.png", "nut/test/good/000.jpg")
    copy(root, "nut/train/good/000.png", "nut/train/good/000.bmp")
    copy(root, "nut/test/dent/000.png", "nut/test/crack/100.png")
    copy(root, "nut/ground_truth/dent/000_mask.png", "nut/ground_truth/crack/100.png")
    assert len(unified(root).test_data) == 14


def test_problems_of_all_categories_are_told_at_once(root: Path) -> None:
    for category in ("nut", "pin"):
        remove(root, f"{category}/ground_truth/dent/001_mask.png")
    for i in range(7):
        lay(root, f"nut/train/bad{i}")
    with pytest.raises(LayoutError, match=r"(?s)nut/train/bad4.*and 3 more problems.*pin/test/dent/001\.png"):
        unified(root)


# --- the root ---


def test_root_at_one_category(root: Path) -> None:
    for arguments in ({}, {"root": root / "nut/../nut"}):
        datamodule = Unified(**({"root": root / "nut"} | arguments))
        for step in (datamodule.prepare_data, datamodule.setup):
            with pytest.raises(
                FileNotFoundError,
                match=rf"holds no category. It looks like a category itself: give root='{root}' with categories=\['nut",
            ):
                step()
    with pytest.raises(ValueError, match=rf"'nut'.*looks like a category itself: give root='{root}'"):
        Unified(root=root / "nut", categories=["nut"])


def test_root_above(root: Path) -> None:
    copy(root, "nut/test/dent/000.png", "../__MACOSX/nut/train/good/._000.png")
    datamodule = Unified(root=root.parent)
    for step in (datamodule.prepare_data, datamodule.setup):
        with pytest.raises(FileNotFoundError, match=rf"holds no category. Did you mean root='{root}'\?"):
            step()


@pytest.mark.parametrize("exists", [True, False])
def test_misspelt_root_downloads_nothing(tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "anomalib.data.datamodules.image.mvtecad.download_and_extract", lambda *_: pytest.fail("downloaded")
    )
    if exists:
        (tmp_path / "typo").mkdir()
    there = "holds no category" if exists else "does not exist"
    with pytest.raises(FileNotFoundError, match=rf"typo {there}\. Expected the folders \S+typo/<category>/train/good"):
        Unified(root=tmp_path / "typo").prepare_data()


def test_category_called_mean(root: Path) -> None:
    rename(root, "nut", "mean")
    with pytest.raises(ValueError, match=r"No category can be called 'mean'.*Rename the folder .*parts/mean, or leave"):
        Unified(root=root)
    assert unified(root, categories=["pin"]).categories == ["pin"]


NAMES = {
    "numbers": ["01", "2"],
    "spaces": ["hex nut", "pin "],
    "umlauts": ["Schraube groß", "Dübel"],
    "CJK": ["螺母", "ねじ"],
    "dots and dashes": ["v1.0-nut", "a.png", "-pin"],
    "case": ["Nut", "nut", "NUT"],
    "splits": ["train", "test", "good"],
    "marks": ["nut,pin", 'the "nut"', "50%", "[v2]", "a$b$c", "#1", "nut|pin", "{x}"],
    "long": ["n" * 255, "m" * 200],
    "reserved elsewhere": ["all", "Mean", "nan", "None", "null"],
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("home", ["parts", "Meine Teile (größer)/データ"])
def test_names_of_categories_and_roots(tmp_path: Path, names: list[str], home: str) -> None:
    root = make_mvtec_layout(tmp_path / home, names, 16, train=2, good=1, defective=1)
    datamodule = unified(root)
    assert datamodule.categories == sorted(names)
    assert datamodule.test_data.samples["category"].value_counts().to_dict() == dict.fromkeys(names, 2)
    assert unified(root, categories=names, hflip=names).categories == names
    batch = next(iter(datamodule.test_dataloader()))
    assert all(Path(path).parts[-4] in names for path in batch.image_path)


def test_umlauts_typed_in_another_form_than_the_folders(tmp_path: Path) -> None:
    one, two = (unicodedata.normalize(form, "Größe") for form in ("NFC", "NFD"))
    assert one != two
    make_mvtec_layout(tmp_path / "mac", [two], 16, train=2, good=1, defective=1)
    datamodule = unified(tmp_path / "mac", categories=[one], hflip=[one])
    assert datamodule.categories == datamodule.hflip == [two]
    make_mvtec_layout(tmp_path / "both", [one, two], 16, train=2, good=1, defective=1)
    assert unified(tmp_path / "both", categories=[one, two]).categories == [one, two]


def test_layout_alone_splits_as_a_datamodule_of_anomalib(root: Path) -> None:
    datamodule = MVTecLayout(root=root, category="nut", num_workers=0, val_split_mode="from_test", seed=1)
    datamodule.setup()
    assert {str(split.value) for split in Split} >= set(datamodule.test_data.samples["split"])
    assert len(datamodule.val_data) + len(datamodule.test_data) == 6
    assert next(iter(datamodule.val_dataloader())).gt_mask is not None
