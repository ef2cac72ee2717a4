# SPDX-License-Identifier: Apache-2.0
"""Tiny datasets in the layouts of MVTec AD and VisA, made of smooth random textures with square defects."""

from __future__ import annotations

import csv
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter


def texture(rng: np.random.Generator, *, height: int, width: int, tint: np.ndarray) -> np.ndarray:
    """Draw a smooth random texture around a mean colour.

    Args:
        rng: Source of randomness.
        height: Pixels.
        width: Pixels.
        tint: Mean colour (3,) in 0..255.

    Returns:
        Image (height, width, 3) of uint8.
    """
    grain = gaussian_filter(rng.standard_normal((height, width)), sigma=2)
    fine = rng.standard_normal((height, width, 3))
    return np.clip(tint + 25 * (grain / grain.std())[..., None] + 4 * fine, 0, 255).astype(np.uint8)


def with_square(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put a square defect into an image.

    Args:
        rng: Source of randomness.
        image: Image (H, W, 3) of uint8.

    Returns:
        Image with the defect and its mask (H, W) of uint8, 0 or 255.
    """
    height, width = image.shape[:2]
    side = max(4, min(height, width) // 5)
    top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
    image, mask = image.copy(), np.zeros((height, width), np.uint8)
    window = np.s_[top : top + side, left : left + side]
    image[window] = 255 - image[window] // 2
    mask[window] = 255
    return image, mask


def _size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _tint(category: str) -> tuple[np.random.Generator, np.ndarray]:
    """Randomness and mean colour that belong to a category, whichever others there are."""
    rng = np.random.default_rng(zlib.crc32(os.fsencode(category)))
    return rng, rng.uniform(70, 180, size=3)


def _save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_mvtec_layout(
    root: Path,
    categories: Sequence[str],
    image_size: int | tuple[int, int] = 64,
    *,
    train: int = 4,
    good: int = 2,
    defective: int = 2,
    defects: Sequence[str] = ("square",),
    normal: str = "good",
    mask_suffix: str = "_mask",
) -> Path:
    """Write a dataset in the layout of MVTec AD (MPDD is the same; BTech calls normal ``ok`` and has no mask suffix).

    Args:
        root: Folder to write to.
        categories: Names of the category folders.
        image_size: Side, or (height, width), in pixels.
        train: Training images per category.
        good: Normal test images per category.
        defective: Anomalous test images per defect, each with a mask.
        defects: Names of the defects.
        normal: Name of the folders of normal images.
        mask_suffix: What a mask's name adds to its image's.

    Returns:
        ``root``.
    """
    height, width = _size(image_size)
    for category in categories:
        rng, tint = _tint(category)
        for split, count in (("train", train), ("test", good)):
            for i in range(count):
                image = texture(rng, height=height, width=width, tint=tint)
                _save(image, root / category / split / normal / f"{i:03}.png")
        for defect in defects:
            for i in range(defective):
                image, mask = with_square(rng, texture(rng, height=height, width=width, tint=tint))
                _save(image, root / category / "test" / defect / f"{i:03}.png")
                _save(mask, root / category / "ground_truth" / defect / f"{i:03}{mask_suffix}.png")
    return root


def make_visa_layout(
    root: Path,
    categories: Sequence[str],
    image_size: int | tuple[int, int] = 64,
    *,
    train: int = 4,
    good: int = 2,
    defective: int = 2,
) -> Path:
    """Write a dataset as VisA is published, before anomalib converts it into ``visa_pytorch``.

    Args:
        root: Folder to write to; gets ``<category>/Data/{Images,Masks}`` and ``split_csv/1cls.csv``.
        categories: Names of the category folders, official ones of VisA.
        image_size: Side, or (height, width), in pixels.
        train: Training images per category.
        good: Normal test images per category.
        defective: Anomalous test images per category, each with a mask of small integers as VisA has.

    Returns:
        ``root``.
    """
    height, width = _size(image_size)
    rows = []
    for category in categories:
        rng, tint = _tint(category)
        data = f"{category}/Data"
        for i in range(train + good):
            path = f"{data}/Images/Normal/{i:04}.JPG"
            _save(texture(rng, height=height, width=width, tint=tint), root / path)
            rows.append([category, "train" if i < train else "test", "normal", path, ""])
        for i in range(defective):
            image, mask = with_square(rng, texture(rng, height=height, width=width, tint=tint))
            path, mask_path = f"{data}/Images/Anomaly/{i:03}.JPG", f"{data}/Masks/Anomaly/{i:03}.png"
            _save(image, root / path)
            _save((mask > 0).astype(np.uint8), root / mask_path)
            rows.append([category, "test", "anomaly", path, mask_path])
    (root / "split_csv").mkdir(parents=True, exist_ok=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    return root
