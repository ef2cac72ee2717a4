# SPDX-License-Identifier: Apache-2.0
"""Checks of images and masks that should fail before training starts rather than after hours."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import pandas as pd
from anomalib.data.utils import LabelName

from anomalib_uniass.data.images import check_image
from anomalib_uniass.data.masks import examine_mask
from anomalib_uniass.data.opening import MAX_MEGAPIXELS, in_turn
from anomalib_uniass.text import some_lines

logger = logging.getLogger(__name__)

_MANY: Final = 1000
"""Images whose check takes so long that it is said."""


_GROWTH: Final = 0.01
"""Share by which soft edges may enlarge the defects of a mask without a word."""

_MOST: Final = 0.5
"""Share of a mask, or of its border, above which defects are rather the background."""

_LEFT_OUT: Final = 0.01
"""Area of a mask in a lossy format, by that of its defects, that may be grey and so count as good without a word."""


class _Finding(NamedTuple):
    """What was found about a sample.

    Attributes:
        problem: Why it cannot be used, None if it can.
        empty: Mask of an anomalous image without any defect.
        background: Masks of which defects are the larger part, and how large.
        soft: Masks with soft edges, and how much larger they make the defects.
        grey: Masks in lossy formats with grey areas, and how large these are.
    """

    problem: str | None = None
    empty: str | None = None
    background: tuple[str, ...] = ()
    soft: tuple[str, ...] = ()
    grey: tuple[str, ...] = ()


def check_samples(samples: pd.DataFrame, *, needs_masks: bool, max_megapixels: float = MAX_MEGAPIXELS) -> None:
    """Check every image and mask of a dataset.

    Files are read once, in threads. The pixels of PNG are unpacked, JPEG is judged by its end marker; masks and other
    images are decoded. Masks that may be meant otherwise are warnings that name up to five: those without a defect,
    those whose defects are the larger part of the area or of the border, those with soft edges, and those in a lossy
    format with grey areas.

    Args:
        samples: Frame with the columns ``image_path``, ``label_index`` and ``mask_path`` (a path, a list of paths, or
            nothing).
        needs_masks: Whether every anomalous image must have a mask of its own size.
        max_megapixels: Millions of pixels that an image or a mask may have.

    Raises:
        ValueError: If files are missing, unreadable, too large or of a kind that cannot be read right, or masks missing
            or of another size; names up to five.
    """
    if len(samples) >= _MANY:
        logger.info("Checking the files of %d images, which is as long as a part of the first epoch.", len(samples))
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        findings = list(
            pool.map(
                lambda row: _check_sample(row.image_path, _mask_paths(row) if needs_masks else None, max_megapixels),
                samples[["image_path", "label_index", "mask_path"]].itertuples(index=False),
            )
        )
    problems = [finding.problem for finding in findings if finding.problem]
    if problems:
        msg = (
            f"{len(problems)} of {len(samples)} images cannot be used:\n{some_lines(problems)}\n"
            "Replace these files, or remove each image together with its mask."
        )
        raise ValueError(msg)
    _warn(
        [finding.empty for finding in findings if finding.empty],
        "masks of anomalous images are all black, so metrics count the defects in these images as good pixels",
        "If an image has no defect, move it to the good ones. In a JPEG mask a defect must be white (255).",
    )
    _warn(
        [text for finding in findings for text in finding.background],
        "masks call most of their area or of their border a defect, as an inverted mask or a coloured background would",
        "All that is not black (0) is a defect. If the background is not black, make it black and the defects white.",
    )
    _warn(
        [text for finding in findings for text in finding.soft],
        "masks have soft edges, of resizing, blurring or JPEG, which make their defects larger",
        "All above black is a defect. To cut at half, save masks of two values, 0 and 255; resize by nearest pixel.",
    )
    _warn(
        [text for finding in findings for text in finding.grey],
        "masks in a lossy format (JPEG, WebP, ...) have grey areas, which count as good",
        "In lossy formats a defect must be above half of white. Save masks as PNG, where all above black is a defect.",
    )


def _warn(lines: list[str], what: str, advice: str) -> None:
    """Log a warning that names the first lines, if there are any."""
    if lines:
        logger.warning("%d %s:\n%s\n%s", len(lines), what, some_lines(lines), advice)


def _mask_paths(row: object) -> list[str] | None:
    """Masks an image must have: None for a normal image, empty if an anomalous one has none."""
    if row.label_index != LabelName.ABNORMAL:  # type: ignore[attr-defined]
        return None
    paths = row.mask_path  # type: ignore[attr-defined]
    if isinstance(paths, str):
        return [paths] if paths else []
    return [str(path) for path in paths] if isinstance(paths, Iterable) else []


def _check_sample(image_path: str, mask_paths: list[str] | None, max_megapixels: float) -> _Finding:
    """Find out what is wrong with an image or its masks, and what looks so."""
    size, problem = check_image(image_path, max_megapixels=max_megapixels)
    if problem or mask_paths is None:
        return _Finding(problem)
    if not mask_paths:
        return _Finding(f"{image_path}: anomalous, but has no mask")
    masks = {}
    for mask_path in mask_paths:
        try:
            with in_turn(size):
                masks[mask_path] = findings = examine_mask(mask_path, max_megapixels=max_megapixels)
        except ValueError as error:
            return _Finding(f"{error} (mask of {image_path})")
        mask_size = (findings.mask.shape[1], findings.mask.shape[0])
        if mask_size != size:
            return _Finding(f"{mask_path}: mask of {_text(mask_size)} pixels, its image {image_path} has {_text(size)}")
    return _Finding(
        empty=None if any(mask.share for mask in masks.values()) else mask_paths[0],
        background=tuple(
            f"{path}: {100 * mask.share:.0f} % of the area, {100 * mask.border:.0f} % of the border"
            for path, mask in masks.items()
            if mask.share > _MOST or mask.border > _MOST
        ),
        soft=tuple(
            f"{path}: defects larger by {100 * mask.growth:.0f} %"
            for path, mask in masks.items()
            if mask.growth > _GROWTH
        ),
        grey=tuple(
            f"{path}: as large as {100 * mask.left_out:.0f} % of its defects"
            for path, mask in masks.items()
            if mask.left_out > _LEFT_OUT
        ),
    )


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
