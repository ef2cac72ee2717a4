# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import anomalib.data.datamodules.image.mvtecad as mvtecad_module
import numpy as np
import pandas as pd
import pytest
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.engine import Engine
from anomalib.utils.path import generate_output_filename
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_uniass.data import MVTec, Unified, UnifiedDataset, VisA
from anomalib_uniass.metrics import CategoryMetricsCallback
from tests.helpers.datasets import make_mvtec_layout, make_visa_layout
from tests.helpers.models import tiny_padim

OWN = ("bolt", "nut")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec_layout(tmp_path / "parts", OWN, 32, train=4, good=2, defective=2, defects=("crack", "dent"))


def unified(root: Path, **arguments: object) -> Unified:
    datamodule = Unified(root=root, num_workers=0, **arguments)  # type: ignore[arg-type]
    datamodule.setup()
    return datamodule


def counts(dataset: AnomalibDataset) -> dict[str, int]:
    return dataset.samples["category"].value_counts().to_dict()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        pytest.fail("something was downloaded")

    monkeypatch.setattr(mvtecad_module, "download_and_extract", fail)


# --- joining ---


def test_join_of_own_data(root: Path) -> None:
    datamodule = unified(root)
    assert datamodule.categories == ["bolt", "nut"]
    assert counts(datamodule.train_data) == {"bolt": 3, "nut": 3}
    assert counts(datamodule.val_data) == {"bolt": 1, "nut": 1}
    assert counts(datamodule.test_data) == {"bolt": 6, "nut": 6}
    assert datamodule.test_data.samples["label_index"].sum() == 8
    assert datamodule.task == "segmentation"
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.image.shape == (12, 3, 32, 32)
    assert batch.gt_mask.flatten(1).any(1).tolist() == batch.gt_label.tolist()


def test_categories_and_augmentation_lists_of_omegaconf(root: Path) -> None:
    config = OmegaConf.create({"categories": ["nut"], "hflip": ["nut", "bolt"]})
    datamodule = Unified(root=root, **config)
    assert type(datamodule.categories) is list and datamodule.categories == ["nut"]
    assert type(datamodule.hflip) is list


def test_pickle(root: Path) -> None:
    datamodule = pickle.loads(pickle.dumps(unified(root, rotate=["nut"])))
    assert len(datamodule.train_data) == 6
    assert datamodule.train_data[0].image.shape == (3, 32, 32)


def test_workers_read_the_augmented_items(root: Path) -> None:
    datamodule = unified(root, hflip=["nut"])
    datamodule.num_workers = 2
    assert sum(len(batch.image_path) for batch in datamodule.train_dataloader()) == 6


def test_augmentation_is_for_training_alone(root: Path) -> None:
    for mode in ("from_train", "same_as_test"):
        datamodule = unified(root, hflip=["nut"], rotate=["nut"], vflip=["bottle"], val_split_mode=mode)
        assert list(datamodule.train_data.category_augmentations) == ["nut"]
        assert datamodule.val_data.category_augmentations == {}
        assert datamodule.test_data.category_augmentations == {}


@pytest.mark.parametrize(
    ("source", "layout", "categories"),
    [
        ("MPDD", {}, ["bracket_black", "tubes"]),
        ("VAD", {}, ["vad"]),
        ("BTech", {"normal": "ok", "mask_suffix": ""}, ["01", "03"]),
        ("anomalib.data.BTech", {"normal": "ok", "mask_suffix": ""}, ["01", "03"]),
    ],
)
def test_other_sources(tmp_path: Path, source: str, layout: dict[str, str], categories: list[str]) -> None:
    make_mvtec_layout(tmp_path, categories, 32, **layout)
    datamodule = unified(tmp_path, source=source)
    assert datamodule.categories == categories
    assert counts(datamodule.test_data) == dict.fromkeys(categories, 4)
    masks = [datamodule.test_data[i].gt_mask for i in range(len(datamodule.test_data))]
    assert sum(bool(mask.any()) for mask in masks) == 2 * len(categories)


@pytest.mark.filterwarnings("ignore:The 'future.infer_string' option")
def test_mvtec_loco_with_several_masks_per_image(tmp_path: Path) -> None:
    categories = ["pushpins", "screw_bag"]
    make_mvtec_layout(tmp_path, categories, 32, defects=("logical_anomalies",))
    for category in categories:
        shutil.copytree(tmp_path / category / "train", tmp_path / category / "validation")
        for mask in (tmp_path / category).glob("ground_truth/*/*_mask.png"):
            folder = mask.parent / mask.stem.removesuffix("_mask")
            folder.mkdir()
            mask.rename(folder / "000.png")
            corner = np.zeros((32, 32), np.uint8)
            corner[0, 0] = 255
            Image.fromarray(corner).save(folder / "001.png")
    with pd.option_context("future.infer_string", False):  # anomalib 2.7's MVTecLOCO fails with pandas 3
        datamodule = unified(tmp_path, source="MVTecLOCO", val_split_mode="from_dir")
    assert counts(datamodule.train_data) == counts(datamodule.val_data) == {"pushpins": 4, "screw_bag": 4}
    assert counts(datamodule.test_data) == {"pushpins": 4, "screw_bag": 4}
    for item in (datamodule.test_data[i] for i in range(8)):
        assert bool(item.gt_mask[0, 0]) == bool(item.gt_label)
        assert (item.gt_mask.sum() > 1) == bool(item.gt_label)
    next(iter(datamodule.test_dataloader()))


# --- presets ---


def test_presets_demand_all_official_categories(root: Path, no_download: None) -> None:
    for preset, count in ((MVTec, 15), (VisA, 12)):
        assert AnomalibDataModule in preset.__mro__
        assert len(preset().categories) == count
        datamodule = preset(root=root)
        for step in (datamodule.prepare_data, datamodule.setup):
            with pytest.raises(
                FileNotFoundError, match=rf"lacks {count} of {count} .*the categories bolt, nut.*`categories`"
            ):
                step()
    assert MVTec().root == Path("datasets/MVTecAD")
    assert VisA().root == Path("datasets/visa")


def test_mvtec_with_a_subset(tmp_path: Path, no_download: None) -> None:
    make_mvtec_layout(tmp_path, ["bottle", "hazelnut"], 16)
    datamodule = MVTec(root=tmp_path, categories=["hazelnut", "bottle"], hflip=["zipper", "bottle"], num_workers=0)
    datamodule.prepare_data()
    datamodule.setup()
    assert counts(datamodule.test_data) == {"bottle": 4, "hazelnut": 4}
    assert list(datamodule.train_data.category_augmentations) == ["bottle"]


def test_visa_is_converted_once(tmp_path: Path) -> None:
    root = make_visa_layout(tmp_path / "visa", ["candle", "pcb4"], 32, train=5, good=2, defective=3)
    datamodule = VisA(root=root, categories=["candle", "pcb4"], num_workers=0)
    datamodule.prepare_data()
    written = sorted((path, path.stat().st_mtime_ns) for path in (root / "visa_pytorch").rglob("*.*"))
    datamodule.prepare_data()
    assert written == sorted((path, path.stat().st_mtime_ns) for path in (root / "visa_pytorch").rglob("*.*"))
    datamodule.setup()
    assert counts(datamodule.train_data) == {"candle": 4, "pcb4": 4}
    assert counts(datamodule.test_data) == {"candle": 5, "pcb4": 5}
    assert datamodule.test_data.samples["label_index"].sum() == 6
    assert all(datamodule.test_data[i].gt_mask.any() == datamodule.test_data[i].gt_label for i in range(10))
    # anomalib made empty folders for the other ten
    assert Unified(source="Visa", root=root).categories == ["candle", "pcb4"]


def test_classes_from_a_configuration_file(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [16, 16]}}
    arguments = {"num_workers": 0, "val_split_mode": "same_as_test", "augmentations": resize}
    for name, categories in (("Unified", ["nut"]), ("MVTec", ["wood"]), ("VisA", ["candle", "pcb1"])):
        init_args = {"root": str(root), "categories": categories, "rotate": categories, **arguments}
        OmegaConf.save({"class_path": name, "init_args": init_args}, config)
        datamodule = AnomalibDataModule.from_config(config)
        assert type(datamodule).__name__ == name
        assert datamodule.categories == datamodule.rotate == categories
        assert isinstance(datamodule.train_augmentations, Resize)


# --- errors before anything is read ---


@pytest.mark.parametrize("argument", ["categories", "hflip", "vflip", "rotate"])
def test_misspelt_category(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} names .*'hazel_nut' \(did you mean 'hazelnut'\?\)"):
        MVTec(**{argument: ["bottle", "hazel_nut"]})


def test_unknown_own_category(root: Path) -> None:
    with pytest.raises(ValueError, match=r"'bolts' \(did you mean 'bolt'\?\).*the folders of"):
        Unified(root=root, categories=["bolts"])
    with pytest.raises(ValueError, match="does not exist"):
        Unified(root=root / "typo", categories=["bolt"])
    for name in ("../parts", str(root / "bolt"), ""):
        with pytest.raises(ValueError, match="unknown"):
            Unified(root=root, categories=[name])


def test_names_must_be_a_list(root: Path) -> None:
    with pytest.raises(TypeError, match="categories must be a list of category names, got 'bolt'"):
        Unified(root=root, categories="bolt")  # type: ignore[arg-type]


def test_no_categories(root: Path) -> None:
    with pytest.raises(ValueError, match="No categories to read"):
        Unified(root=root, categories=[])


def test_validation_arguments() -> None:
    with pytest.raises(ValueError, match="val_split_mode='none' cannot work"):
        MVTec(val_split_mode="none")
    for ratio in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="val_split_ratio must be a number above 0 and below 1"):
            MVTec(val_split_ratio=ratio)


# --- folders and downloads ---


def test_missing_category_downloads_nothing(root: Path, no_download: None) -> None:
    datamodule = Unified(root=root, categories=["bolt", "bottle", "nut", "zipper"])
    for step in (datamodule.prepare_data, datamodule.setup):
        with pytest.raises(FileNotFoundError, match=rf"{root} lacks 2 of 4 .*: bottle, zipper. It holds .* bolt, nut"):
            step()


def test_root_of_something_else_downloads_nothing(root: Path, no_download: None) -> None:
    with pytest.raises(FileNotFoundError, match=r"It holds no category, only parts\. Did you mean root="):
        MVTec(root=root.parent).prepare_data()


def test_missing_root_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []

    def download(root: Path, _: object) -> None:
        downloads.append(root)
        make_mvtec_layout(root, ["bottle", "cable"], 16)

    monkeypatch.setattr(mvtecad_module, "download_and_extract", download)
    datamodule = MVTec(root=tmp_path / "new", categories=["bottle", "cable"], num_workers=0)
    datamodule.prepare_data()
    datamodule.prepare_data()
    assert downloads == [tmp_path / "new"]
    datamodule.setup()
    assert counts(datamodule.test_data) == {"bottle": 4, "cable": 4}


# --- checks of what is read ---


def test_category_without_images(root: Path) -> None:
    shutil.rmtree(root / "nut/train")
    for arguments in ({}, {"categories": ["bolt", "nut"]}):
        with pytest.raises(ValueError, match=f"No training images in {root}/nut/train/good: the folder does not exist"):
            Unified(root=root, **arguments).setup()
    (root / "nut/train/good").mkdir(parents=True)
    (root / "nut/train/good/notes.txt").touch()
    with pytest.raises(ValueError, match=f"No training images in {root}/nut/train/good: only 1 .txt"):
        Unified(root=root).setup()
    assert Unified(root=root, categories=["bolt"]).categories == ["bolt"]


def test_category_of_another_source_without_images(tmp_path: Path) -> None:
    make_mvtec_layout(tmp_path, ["bolt", "nut"], 16)
    shutil.rmtree(tmp_path / "nut/train")
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 categories, or their training images: nut"):
        Unified(source="MPDD", root=tmp_path, categories=["bolt", "nut"]).setup()
    shutil.rmtree(tmp_path / "bolt/test")
    shutil.rmtree(tmp_path / "bolt/ground_truth")
    with pytest.raises(ValueError, match=f"No test images below {tmp_path} in: bolt"):
        Unified(source="MPDD", root=tmp_path).setup()


def test_missing_mask_is_named(root: Path) -> None:
    (root / "nut/ground_truth/dent/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"(?s)Images without a mask: .*nut/test/dent/001.png"):
        Unified(root=root).setup()
    with pytest.raises(
        RuntimeError, match=r"(?s)MPDD cannot read category 'nut' .*Images without a mask: .*nut/test/dent/001.png"
    ):
        Unified(source="MPDD", root=root).setup()


def test_wrong_mask_size_and_truncated_image_are_named(root: Path) -> None:
    Image.new("L", (32, 30)).save(root / "nut/ground_truth/dent/001_mask.png")
    with pytest.raises(ValueError, match=r"nut/ground_truth/dent/001_mask.png: mask of 32x30 pixels"):
        Unified(root=root).setup()
    image = root / "bolt/train/good/002.png"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bolt/train/good/002.png: unreadable"):
        Unified(root=root).setup()


def test_files_are_checked_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = unified(root)
    monkeypatch.setattr("anomalib_uniass.data.unified.check_samples", lambda *_, **__: pytest.fail("checked again"))
    datamodule.setup()


# --- validation ---


def test_from_train_is_disjoint_and_leaves_the_test_set_alone(root: Path) -> None:
    datamodule = unified(root, val_split_ratio=0.5)
    train, val, test = (
        set(d.samples.image_path) for d in (datamodule.train_data, datamodule.val_data, datamodule.test_data)
    )
    assert train | val == {str(path) for path in root.glob("*/train/*/*.png")}
    assert not train & val
    assert test == {str(path) for path in root.glob("*/test/*/*.png")}
    assert counts(datamodule.val_data) == {"bolt": 2, "nut": 2}
    assert not datamodule.val_data.has_anomalous


def test_draw_of_a_category_does_not_depend_on_the_others(root: Path) -> None:
    both = unified(root, val_split_ratio=0.5).val_data.samples
    alone = unified(root, val_split_ratio=0.5, categories=["nut"]).val_data.samples
    assert list(both[both.category == "nut"].image_path) == list(alone.image_path)


def test_other_validation_modes(root: Path) -> None:
    same = unified(root, val_split_mode="same_as_test")
    assert list(same.val_data.samples.image_path) == list(same.test_data.samples.image_path)
    assert len(same.train_data) == 8
    drawn = unified(root, val_split_mode="from_test", val_split_ratio=0.5)
    assert (len(drawn.train_data), len(drawn.val_data), len(drawn.test_data)) == (8, 6, 6)
    assert not set(drawn.val_data.samples.image_path) & set(drawn.test_data.samples.image_path)
    synthetic = unified(root, val_split_mode="synthetic", val_split_ratio=0.5)
    assert isinstance(synthetic.val_data, SyntheticAnomalyDataset)
    assert (len(synthetic.train_data), len(synthetic.val_data)) == (4, 4)
    for datamodule in (same, drawn, synthetic):
        assert isinstance(datamodule.train_data, UnifiedDataset)
        next(iter(datamodule.val_dataloader()))


def test_from_dir_needs_a_source_with_validation_images(root: Path) -> None:
    with pytest.raises(ValueError, match="MVTecAD has no validation images of its own for bolt, nut"):
        Unified(root=root, val_split_mode="from_dir").setup()


# --- the names of pictures ---


def linked_root(root: Path) -> Path:
    link = root.parent / "link"
    link.symlink_to(root, target_is_directory=True)
    return link


def linked_categories(root: Path) -> Path:
    farm = root.parent / "farm"
    farm.mkdir()
    for i, category in enumerate(OWN):  # apart from each other, and without a name in common with the farm
        (root.parent / f"disk{i}").mkdir()
        (root / category).rename(root.parent / f"disk{i}" / "data")
        (farm / category).symlink_to(root.parent / f"disk{i}" / "data")
    return farm


ROOTS = {
    "absolute": lambda root: root,
    "relative": lambda root: Path(os.path.relpath(root)),
    "dot": lambda root: Path(),
    "up": lambda root: root / "nut" / "..",
    "linked root": linked_root,
    "linked categories": linked_categories,
    "name like a defect": lambda root: root.rename(root.parent / "crack"),
    "name like a category": lambda root: root.rename(root.parent / "Nut"),
    "name like its parent": lambda root: root.rename(root.parent / root.parent.name),
}


@pytest.mark.parametrize("place", ROOTS.values(), ids=ROOTS.keys())
def test_every_picture_gets_a_file_of_its_own(
    root: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path], Path]
) -> None:
    monkeypatch.chdir(root)
    datamodule = unified(place(root))
    outputs = {
        str(generate_output_filename(path, "out", datamodule.name, datamodule.category, mkdir=False)): category
        for path, category in datamodule.test_data.samples[["image_path", "category"]].itertuples(index=False)
    }
    assert len(outputs) == len(datamodule.test_data) == 12
    assert all(f"/{category}/test/" in name for name, category in outputs.items())
    assert all(Path(path).is_file() for path in datamodule.test_data.samples.mask_path.dropna())


# --- anomalib's engine ---


def test_engine(root: Path, tmp_path: Path) -> None:
    datamodule = Unified(root=root, train_batch_size=4, eval_batch_size=4, num_workers=0, hflip=["nut"])
    model = tiny_padim(visualizer=True)
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", devices=1, barebones=False, logger=False)
    engine.train(model, datamodule=datamodule)
    assert isinstance(engine.trainer.callbacks[0], CategoryMetricsCallback)
    assert sum(isinstance(callback, CategoryMetricsCallback) for callback in engine.trainer.callbacks) == 1
    folder = tmp_path / "results" / "Padim" / "parts"
    assert folder.is_dir()
    pictures = {path.relative_to(folder / "v0" / "images") for path in (folder / "v0" / "images").rglob("*.png")}
    assert pictures == {path.relative_to(root) for path in root.glob("*/test/*/*.png")}
    (results,) = engine.test(model, datamodule=datamodule)
    assert "mean_pixel_AP" in results
    assert set(engine.trainer.callbacks[0].table) >= {"bolt", "nut"}
