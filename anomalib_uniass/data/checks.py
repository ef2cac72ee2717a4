# SPDX-License-Identifier: Apache-2.0
"""Checks of images and masks that should fail before training starts rather than after hours."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pandas as pd
from anomalib.data.utils import LabelName

from anomalib_uniass.data.images import check_image, read_mask

logger = logging.getLogger(__name__)

_MOST_NAMED: Final = 5


def check_samples(samples: pd.DataFrame, *, needs_masks: bool) -> None:
    """Check every image and mask of a dataset.

    Files are read once, in threads. PNG is judged by its checksums, JPEG by its end marker; masks and other images are
    decoded. Masks without a defect are a warning that names up to five: all their image counts as good then.

    Args:
        samples: Frame with the columns ``image_path``, ``label_index`` and ``mask_path`` (a path, a list of paths, or
            nothing).
        needs_masks: Whether every anomalous image must have a mask of its own size.

    Raises:
        ValueError: If files are missing, unreadable or of a kind that cannot be read right, or masks missing or of
            another size; names up to five.
    """
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        findings = list(
            pool.map(
                lambda row: _check_sample(row.image_path, _mask_paths(row) if needs_masks else None),
                samples[["image_path", "label_index", "mask_path"]].itertuples(index=False),
            )
        )
    problems = [problem for problem, _ in findings if problem]
    if problems:
        msg = (
            f"{len(problems)} of {len(samples)} images cannot be used:\n{_some(problems)}\n"
            "Replace these files, or remove each image together with its mask."
        )
        raise ValueError(msg)
    if empty := [mask for _, mask in findings if mask]:
        logger.warning(
            "%d masks of anomalous images are all black, so metrics count the defects in these images as good pixels:"
            "\n%s\nIf an image has no defect, move it to the good ones. In a JPEG mask a defect must be white (255).",
            len(empty),
            _some(empty),
        )


def _some(lines: list[str]) -> str:
    """List the first lines and count the others."""
    more = f"\n  and {len(lines) - _MOST_NAMED} more" if len(lines) > _MOST_NAMED else ""
    return "\n".join(f"  - {line}" for line in lines[:_MOST_NAMED]) + more


def _mask_paths(row: object) -> list[str] | None:
    """Masks an image must have: None for a normal image, empty if an anomalous one has none."""
    if row.label_index != LabelName.ABNORMAL:  # type: ignore[attr-defined]
        return None
    paths = row.mask_path  # type: ignore[attr-defined]
    if isinstance(paths, str):
        return [paths] if paths else []
    return [str(path) for path in paths] if isinstance(paths, Iterable) else []


def _check_sample(image_path: str, mask_paths: list[str] | None) -> tuple[str | None, str | None]:
    """Say what is wrong with an image or its masks, and which mask is all black; None for nothing."""
    size, problem = check_image(image_path)
    if problem or mask_paths is None:
        return problem, None
    if not mask_paths:
        return f"{image_path}: anomalous, but has no mask", None
    defective = False
    for mask_path in mask_paths:
        try:
            mask = read_mask(mask_path)
        except ValueError as error:
            return f"{error} (mask of {image_path})", None
        mask_size = (mask.shape[1], mask.shape[0])
        if mask_size != size:
            return f"{mask_path}: mask of {_text(mask_size)} pixels, its image {image_path} has {_text(size)}", None
        defective |= bool(mask.any())
    return None, None if defective else mask_paths[0]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


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
