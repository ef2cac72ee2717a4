# SPDX-License-Identifier: Apache-2.0
import copy
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import ImageItem
from anomalib.engine import Engine
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import ColorJitter, Compose, Resize, Transform

from anomalib_uniass.data import MVTec, Unified, UnifiedDataset, VisA
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.models import tiny_padim

FLIPS = {"hflip": ["nut"], "vflip": ["nut"], "rotate": ["nut"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec_layout(tmp_path / "parts", ["bolt", "nut"], (32, 24), train=4)


def unified(root: Path, resize: Transform | None = None, **arguments: Any) -> Unified:
    arguments = {"num_workers": 0, "train_batch_size": 3, "cache_images": True, **FLIPS, **arguments}
    datamodule = Unified(root=root, augmentations=resize or Resize((16, 16)), **arguments)
    datamodule.setup(TrainerFn.FITTING)
    return datamodule


def cached(root: Path, resize: Transform | None = None, **arguments: Any) -> UnifiedDataset:
    datamodule = unified(root, resize, **arguments)
    datamodule.train_dataloader()
    return datamodule.train_data


def delete_training_images(root: Path) -> None:
    for folder in root.glob("*/train"):
        shutil.rmtree(folder)


def read_all(dataset: UnifiedDataset, *, seed: int) -> list[ImageItem]:
    torch.manual_seed(seed)
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_items_are_those_without_cache(root: Path, interpolation: str, task: str) -> None:
    resize = Resize((16, 16), interpolation=interpolation)
    plain = unified(root, resize, cache_images=False).train_data
    dataset = cached(root, resize)
    assert plain.image_cache is None and dataset.image_cache is not None
    for data in (plain, dataset):
        data.samples.attrs["task"] = task
    expected = [read_all(plain, seed=seed) for seed in range(6)]
    items = [read_all(dataset, seed=0)]
    delete_training_images(root)
    items += [read_all(dataset, seed=seed) for seed in range(1, 6)]
    for epoch, expected_epoch in zip(items, expected, strict=True):
        for item, expected_item in zip(epoch, expected_epoch, strict=True):
            torch.testing.assert_close(item.image, expected_item.image, rtol=0, atol=1e-6)
            if "bolt" in item.image_path:
                assert torch.equal(item.image, expected_item.image)
            assert type(item.image) is type(expected_item.image)
            assert (item.gt_mask is None) == (expected_item.gt_mask is None) == (task == "classification")
            if item.gt_mask is not None:
                assert torch.equal(item.gt_mask, expected_item.gt_mask)
                assert item.gt_mask.dtype == expected_item.gt_mask.dtype
            assert torch.equal(item.gt_label, expected_item.gt_label)
            assert (item.image_path, item.mask_path) == (expected_item.image_path, expected_item.mask_path)
    moved = [not torch.equal(epoch[5].image, items[0][5].image) for epoch in items]  # a nut
    assert any(moved)


def test_sides_may_differ_without_rotation(root: Path) -> None:
    arguments: dict[str, Any] = {"rotate": ["zipper", "nut"], "categories": ["bolt"], "hflip": ["bolt"]}
    make_mvtec_layout(root, ["zipper"], 16)
    plain = unified(root, Resize((20, 8)), cache_images=False, **arguments).train_data
    dataset = cached(root, Resize((20, 8)), **arguments)
    for _ in range(2):
        for item, expected in zip(read_all(dataset, seed=1), read_all(plain, seed=1), strict=True):
            torch.testing.assert_close(item.image, expected.image, rtol=0, atol=1e-6)
            assert item.gt_mask is not None and item.gt_mask.shape == (20, 8)


@pytest.mark.parametrize("context", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_files_are_read_once_whatever_the_workers(root: Path, context: str | None) -> None:
    datamodule = unified(root, **dict.fromkeys(FLIPS))
    expected = {item.image_path: item.image for item in read_all(datamodule.train_data, seed=0)}
    dataset = datamodule.train_dataloader().dataset
    loader = DataLoader(
        dataset,
        batch_size=3,
        shuffle=True,
        num_workers=2 if context else 0,
        multiprocessing_context=context,
        persistent_workers=context == "spawn",  # they start slowly
        collate_fn=dataset.collate_fn,
    )
    for epoch in range(3):
        batches = list(loader)
        assert sorted(path for batch in batches for path in batch.image_path) == sorted(expected)
        for batch in batches:
            for image, path in zip(batch.image, batch.image_path, strict=True):
                assert torch.equal(image, expected[path])
        if epoch == 0:
            assert dataset.image_cache.filled.all()
            delete_training_images(root)


def test_loaders_of_the_datamodule_share_one_cache(root: Path) -> None:
    datamodule = unified(root, num_workers=2)
    assert sum(len(batch.image_path) for batch in datamodule.train_dataloader()) == 6
    delete_training_images(root)
    datamodule.setup(TrainerFn.TESTING)
    assert sum(len(batch.image_path) for batch in datamodule.train_dataloader()) == 6
    assert datamodule.val_data.image_cache is None and datamodule.test_data.image_cache is None


def test_images_cannot_be_changed_from_outside(root: Path) -> None:
    dataset = cached(root, **dict.fromkeys(FLIPS))
    expected = dataset[0].image.clone()
    dataset[0].image.zero_()
    assert torch.equal(dataset[0].image, expected)


def test_other_rows_and_other_sizes_are_read_anew(root: Path) -> None:
    datamodule = unified(root, **dict.fromkeys(FLIPS))
    datamodule.train_dataloader()
    dataset = datamodule.train_data
    images = [item.image for item in read_all(dataset, seed=0)]
    subset = dataset.subsample([4, 1])
    assert subset.image_cache is None and dataset.image_cache is not None
    assert torch.equal(subset[0].image, images[1])  # sorted by path
    assert copy.deepcopy(dataset).image_cache is dataset.image_cache
    dataset.augmentations = Resize((8, 8))
    assert dataset[0].image.shape == (3, 8, 8)
    datamodule.train_dataloader()
    assert dataset[0].image.shape == (3, 8, 8)
    assert dataset.image_cache.images.shape == (6, 3, 8, 8)


def test_anomalous_samples_are_not_cached(root: Path) -> None:
    datamodule = unified(root)
    datamodule.train_data = datamodule.test_data
    datamodule.train_dataloader()
    masks = [item.gt_mask.any() for item in read_all(datamodule.train_data, seed=0)]
    assert sum(masks) == 4
    assert int(datamodule.train_data.image_cache.filled.sum()) == 4


def test_broken_file_is_named_and_not_kept(root: Path) -> None:
    dataset = cached(root)
    path = Path(dataset.samples.image_path[2])
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(RuntimeError, match=f"Cannot read image .*{path.name}.*category 'bolt'"):
        dataset[2]
    path.write_bytes(good)
    assert dataset[2].image.shape == (3, 16, 16)


def test_engine_takes_the_resize_of_the_model(root: Path, tmp_path: Path) -> None:
    datamodule = Unified(root=root, train_batch_size=3, num_workers=0, cache_images=True, **FLIPS)
    Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False).fit(
        tiny_padim(visualizer=False), datamodule=datamodule
    )
    assert datamodule.train_data.image_cache.images.shape == (6, 3, 32, 32)
    assert datamodule.train_data.image_cache.filled.all()


# --- refusals ---


@pytest.mark.parametrize("argument", ["train_augmentations", "augmentations"])
@pytest.mark.parametrize("transform", [ColorJitter(), Compose([ColorJitter(), Resize((16, 16))]), Resize(16)], ids=str)
def test_augmentations_that_would_be_frozen(root: Path, argument: str, transform: Transform) -> None:
    for datamodule in (Unified, MVTec, VisA):
        with pytest.raises(ValueError, match=r"(?s)cache_images keeps.*no other augmentation than.*; got .*leave"):
            datamodule(**{argument: transform}, cache_images=True)


@pytest.mark.parametrize(
    ("resize", "found"),
    [
        (None, "neither does the model resize"),
        (Resize(16), r"got Resize\(size=\[16\]"),
        (Resize(None, max_size=16), "got Resize"),
        (Resize((16, 16), interpolation="nearest"), "nearest"),
        (Resize((16, 12)), r"size=\[16, 12\].*and categories to rotate, which needs height = width"),
    ],
)
def test_resizes_that_do_not_commute(root: Path, resize: Transform | None, found: str) -> None:
    datamodule = unified(root)
    datamodule.train_data.augmentations = resize
    with pytest.raises(ValueError, match=rf"(?s)cache_images keeps resized images.*{found}.*leave cache_images out"):
        datamodule.train_dataloader()


def test_too_little_shared_memory(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")(64e6, 64e6, 0)
    monkeypatch.setattr("anomalib_uniass.data.image_cache._SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    datamodule = unified(root, Resize((320, 320)))
    with pytest.raises(MemoryError, match=r"needs 0.01 GB .* for 6 images of 320 x 320, .* has 0.00. Enlarge it"):
        datamodule.train_dataloader()
