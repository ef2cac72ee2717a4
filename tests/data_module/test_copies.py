# SPDX-License-Identifier: Apache-2.0
"""Files of equal content, in a folder and in a dataset."""

import builtins
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_uniass.data import Unified
from anomalib_uniass.data.copies import equal_files
from tests.helpers.datasets import make_mvtec_layout


def written(folder: Path, contents: list[bytes | None]) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        if content is not None:
            path.write_bytes(content)
    return paths


def test_equal_files_are_those_of_equal_bytes(tmp_path: Path) -> None:
    big = os.urandom(3_000_000)
    changed = bytearray(big)
    changed[5] ^= 1  # neither in the middle nor at the end
    paths = written(tmp_path, [big, b"x", bytes(changed), big, b"y", b"x", b"", b"", None, b"xy"])
    paths.append(tmp_path / "link.png")
    paths[-1].symlink_to(paths[4])
    os.mkfifo(tmp_path / "pipe")
    paths += [tmp_path / "pipe", tmp_path / "pipe", tmp_path, tmp_path]
    assert equal_files(paths) == [[0, 3], [1, 5], [4, 10], [6, 7]]
    assert equal_files(list(map(str, reversed(paths[:6])))) == [[0, 4], [2, 5]]
    assert equal_files([]) == []


def test_only_files_of_one_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = written(tmp_path, [b"a", b"bc", b"def", b"ghi"])
    opened: list[str] = []
    path_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self.name) or path_open(self, *args))
    monkeypatch.setattr(builtins, "open", lambda *_: pytest.fail("opened by other means"))
    assert equal_files(paths) == []
    assert opened == ["2.png", "3.png"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec_layout(tmp_path / "parts", ["bolt", "nut"], 16, train=10)


def unified(root: Path, **arguments: object) -> Unified:
    datamodule = Unified(root=root, num_workers=0, **arguments)  # type: ignore[arg-type]
    datamodule.setup()
    return datamodule


def sides(datamodule: Unified) -> tuple[set[bytes], set[bytes]]:
    train, val = (
        {Path(path).read_bytes() for path in data.samples["image_path"]}
        for data in (datamodule.train_data, datamodule.val_data)
    )
    return train, val


@pytest.mark.parametrize("seed", [0, 1, 2, None])
@pytest.mark.parametrize("link", [False, True])
def test_copies_are_never_on_both_sides_of_the_split(root: Path, seed: int | None, link: bool) -> None:
    """Each training image twice: nearly every validation image had a twin in training."""
    for path in sorted(root.glob("*/train/good/*.png")):
        copy = path.with_name(f"copy of {path.name}")
        copy.symlink_to(path) if link else shutil.copy(path, copy)
    datamodule = unified(root, val_split_ratio=0.3, seed=seed)
    train, val = sides(datamodule)
    assert not train & val
    assert (len(train), len(val)) == (2 * 7, 2 * 3)
    assert len(datamodule.val_data) == 2 * 2 * 3


def test_copies_in_several_categories_stay_on_one_side(root: Path) -> None:
    for path in sorted(root.glob("bolt/train/good/*.png"))[::2]:
        shutil.copy(path, root / "nut/train/good" / f"bolt{path.name}")
    for seed in range(10):
        train, val = sides(unified(root, val_split_ratio=0.3, seed=seed))
        assert train and val and not train & val
    shutil.rmtree(root / "nut/train")
    shutil.copytree(root / "bolt/train", root / "nut/train")
    train, val = sides(unified(root, val_split_ratio=0.3))
    assert (len(train), len(val)) == (7, 3)


def test_a_copy_that_is_added_takes_no_image_out_of_training(root: Path) -> None:
    before = set(unified(root, val_split_ratio=0.3).train_data.samples["image_path"])
    for i, path in enumerate(sorted(before)):
        copy = Path(path).with_name(f"copy{i}.png")
        shutil.copy(path, copy)
        after = unified(root, val_split_ratio=0.3)
        assert not before & set(after.val_data.samples["image_path"])
        copy.unlink()


def test_category_of_copies_alone_is_refused(root: Path) -> None:
    first, *others = sorted((root / "nut/train/good").iterdir())
    for path in others:
        shutil.copy(first, path)
    with pytest.raises(ValueError, match="'nut' has 10 training images, all equal"):
        unified(root)


def test_copies_are_named_once_and_how_many(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = sorted(root.glob("bolt/train/good/*.png"))
    for path in images[:7]:
        shutil.copy(path, path.with_stem(f"{path.stem}b"))
    shutil.copy(images[0], root / "bolt/test/good/leaked.png")
    shutil.copy(root / "nut/test/square/000.png", root / "nut/test/good/unclear.png")
    datamodule = Unified(root=root, num_workers=0)
    with caplog.at_level(logging.WARNING):
        datamodule.setup()
        datamodule.setup()
    repeated, leaked, unclear = (record.getMessage() for record in caplog.records)
    assert repeated.startswith("7 training images are copies of others.") and "and 2 more" in repeated
    assert "bolt/train/good/001.png = bolt/train/good/001b.png" in repeated
    assert leaked.startswith("1 images of the test or validation set are copies of training images")
    assert "bolt/train/good/000.png = bolt/train/good/000b.png = bolt/test/good/leaked.png" in leaked
    assert unclear.startswith("2 images are equal and have different labels")
    assert "nut/test/good/unclear.png = nut/test/square/000.png" in unclear


def test_without_copies_nothing_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pictures of one size in bytes, as every BMP of a camera has, are not equal for that."""
    rng = np.random.default_rng(0)
    for path in root.glob("*/train/good/*.png"):
        path.unlink()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path.with_suffix(".bmp"))
    with caplog.at_level(logging.WARNING):
        unified(root)
    assert not caplog.records
