# SPDX-License-Identifier: Apache-2.0
"""How small defects become at the size that a model works at: said before training, for nothing else says it."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from anomalib.data.utils import LabelName

from anomalib_uniass.categories import row_categories
from anomalib_uniass.data.masks import read_mask
from anomalib_uniass.data.opening import shown_size

logger = logging.getLogger(__name__)

TOKEN = 16
"""Pixels along a token of the models of this package."""

MOST_MASKS = 50
"""Masks of a category that are looked at."""

SMALL = 0.1
"""Share of the defects that may be smaller than a token at an advised size."""


class DefectSizes(NamedTuple):
    """Sizes of the defects of a category.

    Attributes:
        sides: Side of the square of a defect's area, in pixels of its image, one a defect.
        scales: Geometric mean of the two factors by which its image, or a tile of it, is resized.
        native: Largest height and width of the images.
    """

    sides: npt.NDArray[np.float64]
    scales: npt.NDArray[np.float64]
    native: tuple[int, int]

    def smaller_than(self, pixels: float) -> float:
        """Return the share of the defects that become smaller than some pixels."""
        return float(np.mean(self.sides * self.scales < pixels))

    def advised_size(self, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the size, in steps of 32, that keeps nine tenths of the defects above a token.

        Returns:
            None if `image_size` does, or the images themselves are too small to.
        """
        factor = TOKEN / float(np.quantile(self.sides * self.scales, SMALL))
        if factor <= 1:
            return None
        height, width = (32 * math.ceil(length * factor / 32) for length in image_size)
        return (height, width) if height <= self.native[0] and width <= self.native[1] else None

    def advised_tile(self, image_size: tuple[int, int]) -> int | None:
        """Return the side of tiles, in steps of 16, that keeps nine tenths of the defects above a token.

        Returns:
            None if the images are hardly larger than that, or the defects so small that tiles would be blown up.
        """
        kept = float(np.quantile(self.sides, SMALL)) / TOKEN  # pixels of the image that may become one
        side = TOKEN * math.floor(min(image_size) * kept / TOKEN)
        return side if min(image_size) / 2 <= side <= min(self.native) / 2 else None


def defect_sizes(
    samples: pd.DataFrame, image_size: tuple[int, int], *, tile_size: tuple[int, int] | None = None
) -> dict[str, DefectSizes]:
    """Measure the defects in the masks of a test set, up to `MOST_MASKS` a category, evenly over its images.

    Args:
        samples: Frame with the columns ``label_index``, ``mask_path`` and, if there are several, ``category``.
        image_size: Height and width that images are resized to.
        tile_size: Height and width of what is resized to it; None for all of an image.

    Returns:
        Sizes by category, of those that have masks with defects.
    """
    defective = samples[samples["label_index"] == LabelName.ABNORMAL]
    return {
        str(category): sizes
        for category, rows in defective.groupby(row_categories(defective))
        if (sizes := _measure(list(_masks(rows["mask_path"])), image_size, tile_size)) is not None
    }


def _masks(paths: Iterable[object]) -> Iterator[str]:
    """Yield the paths of masks, of which an image has one, several or none."""
    for path in paths:
        if isinstance(path, str):
            yield from [path] if path else []
        elif isinstance(path, Iterable):
            yield from map(str, path)


def _measure(masks: list[str], image_size: tuple[int, int], tile_size: tuple[int, int] | None) -> DefectSizes | None:
    sides, scales, shapes = [], [], []
    step = max(1, math.ceil(len(masks) / MOST_MASKS))
    for path in masks[::step]:
        try:
            mask = np.asarray(read_mask(path), np.uint8)
        except ValueError:  # the test says so
            continue
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        found = np.sqrt(stats[1:, cv2.CC_STAT_AREA].astype(np.float64))  # the first region is what is good
        sides.append(found)
        height, width = tile_size or mask.shape
        scales.append(np.full(len(found), math.sqrt(image_size[0] / height * image_size[1] / width)))
        shapes.append(mask.shape)
    if not sum(map(len, sides)):
        return None
    native = (max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
    return DefectSizes(np.concatenate(sides), np.concatenate(scales), native)


class Loss(NamedTuple):
    """What the defects of a category lose at the size that a model works at.

    Attributes:
        text: In words, with an advice if there is one.
        is_total: Whether some get smaller than a pixel.
    """

    text: str
    is_total: bool


def what_gets_lost(
    samples: pd.DataFrame, image_size: tuple[int, int], *, tile_size: tuple[int, int] | None = None
) -> dict[str, Loss]:
    """Tell of which categories defects get smaller than a token.

    Args:
        samples: As of :func:`defect_sizes`.
        image_size: Height and width that images or tiles are resized to.
        tile_size: Height and width of the tiles; None for whole images.
    """
    losses = {}
    for category, sizes in defect_sizes(samples, image_size, tile_size=tile_size).items():
        small, lost = sizes.smaller_than(TOKEN), sizes.smaller_than(1)
        if not small:
            continue
        text = (
            f"at {image_size[0]} x {image_size[1]} pixels {100 * small:.0f} % of {len(sizes.sides)} defects in the "
            f"masks become smaller than a token ({TOKEN} x {TOKEN} pixels, which the model reconstructs as one), "
            f"{100 * lost:.0f} % smaller than a pixel. {_advice(sizes, image_size, by_tiles=tile_size is not None)}"
        )
        losses[category] = Loss(text, is_total=lost > 0)
    return losses


def _advice(sizes: DefectSizes, image_size: tuple[int, int], *, by_tiles: bool) -> str:
    """Return what would keep nine of ten defects above a token, or why nothing needs to or can."""
    if sizes.smaller_than(TOKEN) <= SMALL or np.quantile(sizes.sides * sizes.scales, SMALL) >= TOKEN:
        return "About nine of ten stay above a token: leave the size as it is, unless the others matter most."
    advised = None if by_tiles else sizes.advised_size(image_size)
    tile = sizes.advised_tile(image_size)
    options = [f"image_size [{advised[0]}, {advised[1]}]"] if advised else []
    options += [f"tile_size {tile}"] if tile else []
    if options:
        return f"{' or '.join(options)} would keep nine of ten above a token."
    side, (height, width) = np.quantile(sizes.sides, SMALL), sizes.native
    return (
        f"No image_size or tile_size that the images, of up to {height} x {width} pixels, fill would keep nine of ten "
        f"above a token: nine of ten are at least {side:.0f} pixels wide in them. Photograph the parts from closer or "
        "with more pixels, or expect that the smallest are missed."
    )


def say_what_gets_lost(
    samples: pd.DataFrame, image_size: tuple[int, int], *, tile_size: tuple[int, int] | None = None
) -> None:
    """Log :func:`what_gets_lost`, a line per category, and a warning if defects get lost altogether."""
    for category, loss in what_gets_lost(samples, image_size, tile_size=tile_size).items():
        logger.log(logging.WARNING if loss.is_total else logging.INFO, "%s: %s", category, loss.text)


def check_sizes(frames: Iterable[pd.DataFrame], check: Callable[[tuple[int, int]], object]) -> None:
    """Check the size of every image, by what its file says first.

    Args:
        frames: Frames with the column ``image_path``.
        check: Raises a ValueError for a height and width that do not do.

    Raises:
        ValueError: If an image does not do; the message names it.
    """
    for path in (path for frame in frames for path in frame["image_path"]):
        try:
            width, height = shown_size(path)
        except ValueError:  # not for Pillow; whoever reads it will say so
            continue
        try:
            check((height, width))
        except ValueError as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from error
