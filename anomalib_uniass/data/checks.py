# SPDX-License-Identifier: Apache-2.0
"""Checks of images and masks that should fail before training starts rather than after hours."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pandas as pd
from anomalib.data.utils import LabelName
from PIL import Image

_MOST_NAMED: Final = 5
_JPEG_END: Final = b"\xff\xd9"
_JPEG_TAIL_BYTES: Final = 4096


def check_samples(samples: pd.DataFrame, *, needs_masks: bool) -> None:
    """Check every image and mask of a dataset.

    Files are read once, in threads. PNG is judged by its checksums, JPEG by its end marker; other formats are decoded.

    Args:
        samples: Frame with the columns ``image_path``, ``label_index`` and ``mask_path`` (a path, a list of paths, or
            nothing).
        needs_masks: Whether every anomalous image must have a mask of its own size.

    Raises:
        ValueError: If files are missing or unreadable, or masks missing or of another size; names up to five.
    """
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        problems = [
            problem
            for problem in pool.map(
                lambda row: _sample_problem(row.image_path, _mask_paths(row) if needs_masks else None),
                samples[["image_path", "label_index", "mask_path"]].itertuples(index=False),
            )
            if problem
        ]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:_MOST_NAMED])
        more = f"\n  and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        msg = (
            f"{len(problems)} of {len(samples)} images cannot be used:\n{shown}{more}\n"
            "Replace these files, or remove each image together with its mask."
        )
        raise ValueError(msg)


def _mask_paths(row: object) -> list[str] | None:
    """Masks an image must have: None for a normal image, empty if an anomalous one has none."""
    if row.label_index != LabelName.ABNORMAL:  # type: ignore[attr-defined]
        return None
    paths = row.mask_path  # type: ignore[attr-defined]
    if isinstance(paths, str):
        return [paths] if paths else []
    return [str(path) for path in paths] if isinstance(paths, Iterable) else []


def _sample_problem(image_path: str, mask_paths: list[str] | None) -> str | None:
    """Say what is wrong with an image or its masks, None if nothing is."""
    size, problem = _verify(image_path)
    if problem or mask_paths is None:
        return problem
    if not mask_paths:
        return f"{image_path}: anomalous, but has no mask"
    for mask_path in mask_paths:
        mask_size, problem = _verify(mask_path)
        if problem:
            return f"{problem} (mask of {image_path})"
        if mask_size != size:
            return f"{mask_path}: mask of {_text(mask_size)} pixels, its image {image_path} has {_text(size)}"
    return None


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _verify(path: str) -> tuple[tuple[int, int], str | None]:
    """Return (width, height) of an image file and what is wrong with it."""
    if not Path(path).is_file():
        return (0, 0), f"{path}: missing"
    try:
        with Image.open(path) as image:
            size, file_format = image.size, image.format
            image.verify()
        if file_format != "PNG" and not (file_format == "JPEG" and _has_jpeg_end(path)):
            # Pillow verifies PNG alone, so let the decoder decide on the others and on a JPEG without end marker.
            with Image.open(path) as image:
                image.load()
    except Exception as error:  # whatever Pillow raises, the file is of no use
        return (0, 0), f"{path}: unreadable ({type(error).__name__}: {error})"
    return size, None


def _has_jpeg_end(path: str) -> bool:
    with Path(path).open("rb") as file:
        file.seek(-min(_JPEG_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return _JPEG_END in file.read()


def images_without_mask(folder: Path) -> list[Path]:
    """List the anomalous images of a category in MVTec layout that have no mask.

    Args:
        folder: Category folder with ``test/<defect>/<name>.*`` and ``ground_truth/<defect>/<name>[_mask].*``
            or a folder ``ground_truth/<defect>/<name>`` of masks.

    Returns:
        Image paths, empty if the folder has another layout.
    """
    if not (folder / "test").is_dir() or not (folder / "ground_truth").is_dir():
        return []
    missing = []
    for defect in sorted((folder / "test").iterdir()):
        if defect.is_dir() and defect.name not in {"good", "ok"}:
            masks = {path.stem for path in (folder / "ground_truth" / defect.name).glob("*")}
            images = sorted(path for path in defect.glob("*.*") if not {path.stem, f"{path.stem}_mask"} & masks)
            missing.extend(images)
    return missing
