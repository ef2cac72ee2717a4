# SPDX-License-Identifier: Apache-2.0
"""Canvases: good images cut from real photographs, for training as they are and for tests with defects on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Gray = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Where photographs are split: columns left of it, or rows of coins below it, are for training.
_TEXTURE_SPLIT_COLUMN = 307
_COIN_SPLIT_ROW = 83
_TRAY_LEVEL = 60  # grey level of the coins' background
# Whole modules of 60 consecutive cells with the same busbars, (first, one past the last) index in elpv-dataset.
_MODULES = {
    ("solar_mono", "train"): (1494, 1554),
    ("solar_mono", "test"): (1554, 1614),
    ("solar_poly", "train"): (2336, 2396),
    ("solar_poly", "test"): (2564, 2624),
}
BUSBARS = (0.03, 0.165, 0.5, 0.835, 0.97)  # cell edge, three busbars, cell edge; fractions of the height


@dataclass(frozen=True)
class Canvas:
    """A good image to draw a defect on.

    Attributes:
        image: Grey levels of shape ``(S, S)`` in ``[0, 255]``.
        part: The inspected part, of shape ``(S, S)``; defects stay on it.
        blur: Standard deviation of the photograph's sharpness in pixels; drawn lines are blurred alike.
        origin: Which pixels of which source the image was made of.
    """

    image: Gray
    part: Mask
    blur: float
    origin: Mapping[str, object]

    @property
    def size(self) -> int:
        """Width and height in pixels."""
        return self.image.shape[0]


Canvases = Callable[[str, int, Generator], Iterator[Canvas]]


@cache
def photograph(name: str) -> Gray:
    """One of the photographs inside scikit-image's wheel, (H, W) in [0, 255]."""
    from skimage import data

    return np.asarray(getattr(data, name)(), dtype=np.float64)


def square(photo: Gray, center: tuple[float, float], side: float, angle: float, size: int, order: int = 3) -> Gray:
    """Resample the square of ``side`` pixels around ``center`` (row, column), turned by ``angle``, to (size, size)."""
    offset = ((np.arange(size) + 0.5) / size - 0.5) * side
    rows, columns = np.meshgrid(offset, offset, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    coordinates = (center[0] + cos * rows - sin * columns, center[1] + sin * rows + cos * columns)
    return np.asarray(ndimage.map_coordinates(photo, coordinates, order=order, mode="reflect"))


def _exposure(image: Gray, rng: Generator) -> Gray:
    """Vary gain and gamma a little, as lamps do."""
    return np.clip(255 * (np.clip(image, 0, 255) / 255) ** rng.uniform(0.94, 1.06) * rng.uniform(0.94, 1.06), 0, 255)


def texture_canvases(name: str, split: str, size: int, rng: Generator) -> Iterator[Canvas]:
    """Crops of a surface: slightly turned, scaled and mirrored."""
    photo = photograph(name)
    first, last = (0, _TEXTURE_SPLIT_COLUMN) if split == "train" else (_TEXTURE_SPLIT_COLUMN, photo.shape[1])
    region = photo[:, first:last]
    while True:
        side, angle = rng.uniform(144, 176), np.deg2rad(rng.uniform(-4, 4))
        margin = side / 2 * (np.cos(angle) + np.sin(abs(angle)))
        row, column = (rng.uniform(margin, extent - 1 - margin) for extent in region.shape)
        image = square(region, (row, column), side, angle, size)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        origin = {"source": name, "columns": [first, last], "center": [round(row), round(column) + first]}
        yield Canvas(_exposure(image, rng), np.ones((size, size), bool), 0.45 * size / side, origin)


@cache
def _segmented_coins() -> NDArray[np.int64]:
    """Label the 24 coins of the photograph, (H, W), 0 = background."""
    from skimage import filters, morphology, segmentation

    photo = photograph("coins")
    markers = np.where(photo < 30, 1, 0) + np.where(photo > 150, 2, 0)
    coins = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(photo), markers) == 2)
    coins = ndimage.binary_opening(coins, morphology.disk(5))
    return np.asarray(ndimage.label(coins)[0], dtype=np.int64)


def _is_inside(coin: Mask) -> bool:
    """Whether a coin keeps clear of the left and right border, where the photograph is dark."""
    return not coin[:, :8].any() and not coin[:, -8:].any()


def coin_canvases(split: str, size: int, rng: Generator) -> Iterator[Canvas]:
    """One coin per image, centred on its own background, evenly lit."""
    photo, labels = photograph("coins"), _segmented_coins()
    first, last = (_COIN_SPLIT_ROW, photo.shape[0]) if split == "train" else (0, _COIN_SPLIT_ROW)
    photo, labels = photo[first:last], labels[first:last]
    tray = ~ndimage.binary_dilation(labels > 0, iterations=4)
    photo = photo - fill_from(photo, tray, sigma=8) + _TRAY_LEVEL  # the light falls off across the photograph
    empty = rng.normal(_TRAY_LEVEL, photo[tray].std(), photo.shape)
    diameters = {coin: 2 * np.sqrt((labels == coin).sum() / np.pi) for coin in np.unique(labels[labels > 0])}
    whole = [coin for coin, diameter in diameters.items() if diameter > 25 and _is_inside(labels == coin)]
    while True:
        for coin in rng.permutation(whole):
            own = labels == coin
            alone = np.where(ndimage.binary_dilation((labels > 0) & ~own, iterations=4), empty, photo)
            row, column = (center + rng.uniform(-1, 1) for center in ndimage.center_of_mass(own))
            side = rng.uniform(1.4, 1.5) * diameters[coin]
            angle = np.deg2rad(rng.uniform(-10, 10))
            image = square(alone, (row, column), side, angle, size)
            part = square(own.astype(np.float64), (row, column), side, angle, size, order=1) > 0.5
            origin = {"source": "coins", "rows": [first, last], "coin": int(coin)}
            yield Canvas(_exposure(image, rng), part, 0.45 * size / side, origin)


@cache
def _good_cells() -> dict[int, Gray]:
    """The cells without any defect (probability 0) of the used modules, by their index in elpv-dataset."""
    from elpv_dataset.utils import load_dataset

    images, probabilities, _ = load_dataset()
    used = {index for module in _MODULES.values() for index in range(*module)}
    return {index: images[index].astype(np.float64) for index in sorted(used) if probabilities[index] == 0}


def solar_canvases(name: str, split: str, size: int, rng: Generator) -> Iterator[Canvas]:
    """Electroluminescence images of whole cells, mirrored at random."""
    cells = {index: cell for index, cell in _good_cells().items() if index in range(*_MODULES[name, split])}
    while True:
        for index in rng.permutation(list(cells)):
            cell = cells[index][:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
            image = np.asarray(Image.fromarray(cell.astype(np.uint8)).resize((size, size), Image.Resampling.LANCZOS))
            image = _exposure(image.astype(np.float64), rng)
            bright = ndimage.gaussian_filter(image, 0.01 * size) > 0.7 * np.median(image)
            part = ndimage.binary_fill_holes(ndimage.binary_closing(bright, iterations=max(1, size // 64)))
            edge = max(1, round(0.015 * size))
            part &= np.pad(np.ones((size - 2 * edge, size - 2 * edge), bool), edge)
            yield Canvas(image, part, 0.6 * size / 300, {"source": "elpv-dataset", "cell": int(index)})


def fill_from(image: Gray, known: Mask, sigma: float) -> Gray:
    """Smooth continuation of the known pixels over the whole image (normalised convolution)."""
    weight = ndimage.gaussian_filter(known.astype(np.float64), sigma, truncate=6)
    return np.asarray(ndimage.gaussian_filter(np.where(known, image, 0), sigma, truncate=6) / np.maximum(weight, 1e-9))
