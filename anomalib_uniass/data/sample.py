# SPDX-License-Identifier: Apache-2.0
"""The sample dataset: real photographs from pip packages with generated defects, in MVTec AD layout.

The good images come from scikit-image's photographs (coins, brick, gravel) and from the cells that elpv-dataset labels
defect-free (solar_mono, solar_poly). Train and test images never share a pixel: each photograph is cut in two regions,
and solar cells of train and test belong to different modules, because the neighbours within a module are often sister
wafers with the same crystal pattern. The defects are generated here, on test images only. A defect is a function of
``(canvas, rng)`` that returns the changed image; its mask is computed from what visibly changed.

It is a set to try the tools on, not a benchmark: never compare its figures with those of MVTec AD or VisA.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["SAMPLE_CATEGORIES", "write_sample_dataset"]

Gray = NDArray[np.float64]
Mask = NDArray[np.bool_]

_VERSION = 1
_MANIFEST = "dataset.json"
_VISIBLE = 8  # grey levels
_MASK_AREA = (0.001, 0.12)  # fraction of the image
_MAX_DRAWS = 100

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
_BUSBARS = (0.03, 0.165, 0.5, 0.835, 0.97)  # cell edge, three busbars, cell edge; fractions of the height

_LICENSES = {
    "coins": "scikit-image: Greek coins from Pompeii, no known copyright restrictions (Brooklyn Museum)",
    "brick": "scikit-image: CC0 (CC0Textures)",
    "gravel": "scikit-image: CC0 (CC0Textures)",
    "grass": "scikit-image: CC0 (DeviantArt, linolafett); foreign matter on brick and gravel",
    "solar_mono": "elpv-dataset (Deitsch et al.): CC BY-NC-SA 4.0",
    "solar_poly": "elpv-dataset (Deitsch et al.): CC BY-NC-SA 4.0",
}


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
Defect = Callable[[Canvas, Generator], Gray]


# --- Canvases: real photographs -----------------------------------------------------------------------------------


@cache
def _photograph(name: str) -> Gray:
    """One of the photographs inside scikit-image's wheel, (H, W) in [0, 255]."""
    from skimage import data

    return np.asarray(getattr(data, name)(), dtype=np.float64)


def _square(photo: Gray, center: tuple[float, float], side: float, angle: float, size: int, order: int = 3) -> Gray:
    """Resample the square of ``side`` pixels around ``center`` (row, column), turned by ``angle``, to (size, size)."""
    from scipy.ndimage import map_coordinates

    offset = ((np.arange(size) + 0.5) / size - 0.5) * side
    rows, columns = np.meshgrid(offset, offset, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    coordinates = (center[0] + cos * rows - sin * columns, center[1] + sin * rows + cos * columns)
    return np.asarray(map_coordinates(photo, coordinates, order=order, mode="reflect"))


def _exposure(image: Gray, rng: Generator) -> Gray:
    """Vary gain and gamma a little, as lamps do."""
    return np.clip(255 * (np.clip(image, 0, 255) / 255) ** rng.uniform(0.94, 1.06) * rng.uniform(0.94, 1.06), 0, 255)


def _texture_canvases(name: str, split: str, size: int, rng: Generator) -> Iterator[Canvas]:
    """Crops of a surface: slightly turned, scaled and mirrored."""
    photo = _photograph(name)
    first, last = (0, _TEXTURE_SPLIT_COLUMN) if split == "train" else (_TEXTURE_SPLIT_COLUMN, photo.shape[1])
    region = photo[:, first:last]
    while True:
        side, angle = rng.uniform(144, 176), np.deg2rad(rng.uniform(-4, 4))
        margin = side / 2 * (np.cos(angle) + np.sin(abs(angle)))
        row, column = (rng.uniform(margin, extent - 1 - margin) for extent in region.shape)
        image = _square(region, (row, column), side, angle, size)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        origin = {"source": name, "columns": [first, last], "center": [round(row), round(column) + first]}
        yield Canvas(_exposure(image, rng), np.ones((size, size), bool), 0.45 * size / side, origin)


@cache
def _segmented_coins() -> NDArray[np.int64]:
    """Label the 24 coins of the photograph, (H, W), 0 = background."""
    from scipy import ndimage
    from skimage import filters, morphology, segmentation

    photo = _photograph("coins")
    markers = np.where(photo < 30, 1, 0) + np.where(photo > 150, 2, 0)
    coins = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(photo), markers) == 2)
    coins = ndimage.binary_opening(coins, morphology.disk(5))
    return np.asarray(ndimage.label(coins)[0], dtype=np.int64)


def _is_inside(coin: Mask) -> bool:
    """Whether a coin keeps clear of the left and right border, where the photograph is dark."""
    return not coin[:, :8].any() and not coin[:, -8:].any()


def _coin_canvases(split: str, size: int, rng: Generator) -> Iterator[Canvas]:
    """One coin per image, centred on its own background, evenly lit."""
    from scipy import ndimage

    photo, labels = _photograph("coins"), _segmented_coins()
    first, last = (_COIN_SPLIT_ROW, photo.shape[0]) if split == "train" else (0, _COIN_SPLIT_ROW)
    photo, labels = photo[first:last], labels[first:last]
    tray = ~ndimage.binary_dilation(labels > 0, iterations=4)
    photo = photo - _fill_from(photo, tray, sigma=8) + _TRAY_LEVEL  # the light falls off across the photograph
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
            image = _square(alone, (row, column), side, angle, size)
            part = _square(own.astype(np.float64), (row, column), side, angle, size, order=1) > 0.5
            origin = {"source": "coins", "rows": [first, last], "coin": int(coin)}
            yield Canvas(_exposure(image, rng), part, 0.45 * size / side, origin)


@cache
def _good_cells() -> dict[int, Gray]:
    """The cells without any defect (probability 0) of the used modules, by their index in elpv-dataset."""
    from elpv_dataset.utils import load_dataset

    images, probabilities, _ = load_dataset()
    used = {index for module in _MODULES.values() for index in range(*module)}
    return {index: images[index].astype(np.float64) for index in sorted(used) if probabilities[index] == 0}


def _solar_canvases(name: str, split: str, size: int, rng: Generator) -> Iterator[Canvas]:
    """Electroluminescence images of whole cells, mirrored at random."""
    from scipy import ndimage

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


# --- Drawing ------------------------------------------------------------------------------------------------------


def _fill_from(image: Gray, known: Mask, sigma: float) -> Gray:
    """Smooth continuation of the known pixels over the whole image (normalised convolution)."""
    from scipy.ndimage import gaussian_filter

    weight = gaussian_filter(known.astype(np.float64), sigma, truncate=6)
    return np.asarray(gaussian_filter(np.where(known, image, 0), sigma, truncate=6) / np.maximum(weight, 1e-9))


def _smooth_noise(size: int, sigma: float, rng: Generator) -> Gray:
    """Low-frequency noise (size, size) of mean 0 and standard deviation 1."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.normal(size=(size, size)), sigma, mode="wrap")
    return np.asarray((noise - noise.mean()) / noise.std())


def _random_pixel(mask: Mask, rng: Generator) -> NDArray[np.float64]:
    """A (row, column) inside the mask."""
    pixels = np.argwhere(mask)
    return np.asarray(pixels[rng.integers(len(pixels))], dtype=np.float64)


def _blob(center: NDArray[np.float64], size: int, radius: float, softness: float, rng: Generator) -> Gray:
    """Opacity (size, size) in [0, 1] of an irregular spot; ``radius`` and ``softness`` in pixels."""
    rows, columns = np.indices((size, size), dtype=np.float64) - center[:, None, None]
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.5)
    along, across = rows * np.cos(angle) + columns * np.sin(angle), columns * np.cos(angle) - rows * np.sin(angle)
    outline = 1 + 0.2 * _smooth_noise(size, 0.5 * radius, rng) + 0.1 * _smooth_noise(size, 0.15 * radius, rng)
    distance = radius * outline - np.hypot(along / stretch, across * stretch)
    return np.clip(distance / softness + 0.5, 0, 1)


def _direction(part: Mask, rng: Generator) -> tuple[NDArray[np.float64], float]:
    """A random start on the part and the heading (radians) towards another of its pixels."""
    start = _random_pixel(part, rng)
    rows, columns = _random_pixel(part, rng) - start
    return start, float(np.arctan2(rows, columns))


def _walk(start: NDArray[np.float64], heading: float, length: float, wobble: float, rng: Generator) -> Gray:
    """Points (N, 2), 2 pixels apart, of a walk whose turns (``wobble`` radians a step) swing back to ``heading``."""
    from scipy.signal import lfilter

    steps = max(3, round(length / 2))
    headings = heading + lfilter([1], [1, -0.85], rng.normal(0, wobble, steps))
    return start + 2 * np.cumsum(np.stack([np.sin(headings), np.cos(headings)], axis=1), axis=0)


def _stroke(points: Gray, widths: Gray, size: int, blur: float) -> Gray:
    """Opacity (size, size) of a polyline with one width (pixels) per point, as sharp as the photograph."""
    from scipy.ndimage import gaussian_filter

    zoom = 4
    sheet = Image.new("L", (zoom * size, zoom * size))
    draw = ImageDraw.Draw(sheet)
    for start, end, width in zip(points[:-1], points[1:], widths, strict=False):
        segment = [(zoom * (point[1] + 0.5), zoom * (point[0] + 0.5)) for point in (start, end)]
        draw.line(segment, fill=255, width=max(1, round(zoom * width)))
    return np.asarray(gaussian_filter(np.asarray(sheet.reduce(zoom), dtype=np.float64) / 255, blur))


# --- Defects ------------------------------------------------------------------------------------------------------


def _crack(canvas: Canvas, rng: Generator) -> Gray:
    """A dark crack that thins out, with up to two branches."""
    size = canvas.size
    start, heading = _direction(canvas.part, rng)
    length, width, wobble = rng.uniform(0.2, 0.6) * size, rng.uniform(0.005, 0.012) * size, rng.uniform(0.15, 0.35)
    trunk = _walk(start, heading, length, wobble, rng)
    paths = [trunk]
    for _ in range(rng.integers(0, 3)):
        fork = heading + rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)
        paths.append(_walk(trunk[rng.integers(len(trunk))], fork, length * rng.uniform(0.2, 0.5), wobble, rng))
    opacity = np.zeros_like(canvas.image)
    for path in paths:
        taper = np.linspace(1, 0.3, len(path)) * rng.uniform(0.6, 1.3, len(path))
        opacity = np.maximum(opacity, _stroke(path, width * taper, size, canvas.blur))
        width *= 0.7
    return canvas.image * (1 - rng.uniform(0.4, 0.75) * opacity * canvas.part)


def _scratch(canvas: Canvas, rng: Generator) -> Gray:
    """One to three nearly straight grooves: a bright ridge beside a dark one."""
    size = canvas.size
    start, heading = _direction(canvas.part, rng)
    width, strength = rng.uniform(0.007, 0.012) * size, rng.uniform(50, 120)
    relief = np.zeros_like(canvas.image)
    for _ in range(rng.integers(1, 4)):
        path = _walk(start + rng.normal(0, 0.03 * size, 2), heading, rng.uniform(0.12, 0.35) * size, 0.01, rng)
        widths = width * np.sin(np.linspace(0.3, np.pi - 0.2, len(path)))
        relief += _stroke(path, widths, size, canvas.blur) - 0.6 * _stroke(path + width, widths, size, canvas.blur)
    return canvas.image + strength * np.clip(relief, -1, 1) * canvas.part


def _stain(canvas: Canvas, rng: Generator, *, absorbed: tuple[float, float] = (0.25, 0.5)) -> Gray:
    """A liquid that darkens the surface by a fraction ``absorbed`` of the light and leaves its relief visible."""
    size = canvas.size
    radius, softness = rng.uniform(0.05, 0.14) * size, rng.uniform(0.015, 0.05) * size
    opacity = _blob(_random_pixel(canvas.part, rng), size, radius, softness, rng) * canvas.part
    opacity *= np.clip(0.85 + 0.15 * _smooth_noise(size, 0.02 * size, rng), 0, 1)
    return canvas.image * (1 - rng.uniform(*absorbed) * opacity)


def _worn(canvas: Canvas, rng: Generator) -> Gray:
    """Relief rubbed flat: the blurred image shows through."""
    from scipy.ndimage import gaussian_filter

    size = canvas.size
    opacity = _blob(_random_pixel(canvas.part, rng), size, rng.uniform(0.1, 0.17) * size, 0.04 * size, rng)
    flat = gaussian_filter(canvas.image, rng.uniform(0.015, 0.03) * size) * rng.uniform(0.95, 1.1)
    return canvas.image + (flat - canvas.image) * opacity * canvas.part


def _chip(canvas: Canvas, rng: Generator) -> Gray:
    """A piece broken off at the rim, the background visible in its place."""
    from scipy.ndimage import binary_dilation, binary_erosion

    size = canvas.size
    step = max(1, size // 100)
    rim = canvas.part & ~binary_erosion(canvas.part, iterations=step)
    opacity = _blob(_random_pixel(rim, rng), size, rng.uniform(0.04, 0.11) * size, 1 + 2 * canvas.blur, rng)
    outside = ~binary_dilation(canvas.part, iterations=step)
    behind = _fill_from(canvas.image, outside, 0.12 * size) + 2 * _smooth_noise(size, 0.5 + canvas.blur, rng)
    return canvas.image + (behind - canvas.image) * opacity * canvas.part


def _misplaced(canvas: Canvas, rng: Generator) -> Gray:
    """A piece from elsewhere on the same surface: joints that do not meet."""
    from scipy.ndimage import gaussian_filter

    size = canvas.size
    height, width = (int(rng.uniform(0.12, 0.3) * size) for _ in range(2))
    row, column, other_row, other_column = (int(rng.random() * (size - extent)) for extent in (height, width) * 2)
    piece = np.roll(canvas.image, (row - other_row, column - other_column), (0, 1))
    opacity = np.zeros_like(canvas.image)
    opacity[row : row + height, column : column + width] = 1
    return canvas.image + (piece - canvas.image) * gaussian_filter(opacity, 0.006 * size)


def _fines(canvas: Canvas, rng: Generator) -> Gray:
    """A pocket of the same material with much smaller grains."""
    size = canvas.size
    fine = _square(canvas.image, (size / 2, size / 2), rng.uniform(2.5, 4) * size, rng.uniform(0, np.pi), size)
    opacity = _blob(_random_pixel(canvas.part, rng), size, rng.uniform(0.09, 0.17) * size, 0.02 * size, rng)
    return canvas.image + (fine - canvas.image) * opacity


def _foreign(canvas: Canvas, rng: Generator) -> Gray:
    """Blades of grass from another photograph, in the light of this one, with a shadow."""
    from scipy.ndimage import shift

    size, photo = canvas.size, _photograph("grass")
    row, column = (rng.uniform(130, extent - 130) for extent in photo.shape)
    grass = _square(photo, (row, column), 180, rng.uniform(0, np.pi), size)
    tuft = _blob(_random_pixel(canvas.part, rng), size, rng.uniform(0.06, 0.13) * size, 0.05 * size, rng)
    dark, bright = np.quantile(grass, [0.4, 0.6])
    opacity = tuft * np.clip((grass - dark) / (bright - dark), 0, 1)
    light = (
        np.average(canvas.image, weights=tuft + 1e-6)
        / grass.mean()
        * rng.choice([rng.uniform(0.5, 0.75), rng.uniform(1.1, 1.4)])
    )
    shadow = shift(opacity, 0.012 * size, order=1)
    return canvas.image * (1 - 0.4 * shadow) * (1 - opacity) + light * grass * opacity


def _inactive(canvas: Canvas, rng: Generator) -> Gray:
    """An area cut off from the current: dark, bounded by a busbar or cell edge and by two oblique breaks."""
    from scipy.ndimage import gaussian_filter

    size, band = canvas.size, rng.integers(len(_BUSBARS) - 1)
    top, bottom = (size * edge for edge in _BUSBARS[band : band + 2])
    rows, columns = np.indices((size, size), dtype=np.float64)
    depth = (rows - top) / (bottom - top)
    if rng.random() < 0.5:
        depth = 1 - depth
    jagged = 0.006 * size * _smooth_noise(size, 0.02 * size, rng)[:, :1]
    left, width = rng.uniform(0.03, 0.85) * size, rng.uniform(0.08, 0.3) * size
    left_edge = left + rng.uniform(-0.3, 0.9) * width * depth + jagged
    right_edge = left + width * (1 - rng.uniform(0, 0.9) * depth) - jagged
    area = (columns > left_edge) & (columns < right_edge) & (depth > 0) & (depth < 1) & canvas.part
    opacity = gaussian_filter(area.astype(np.float64), 2 * canvas.blur)
    return canvas.image * (1 - rng.uniform(0.25, 0.65) * opacity)


def _shunt(canvas: Canvas, rng: Generator) -> Gray:
    """Up to three spots where current leaks: dark, with a soft halo."""
    size = canvas.size
    image = canvas.image
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(0.015, 0.04) * size
        opacity = _blob(_random_pixel(canvas.part, rng), size, radius, 1.5 * radius, rng)
        image = image * (1 - rng.uniform(0.4, 0.75) * opacity * canvas.part)
    return image


@dataclass(frozen=True)
class _Category:
    canvases: Canvases
    defects: dict[str, Defect]


_SOLAR_DEFECTS: dict[str, Defect] = {"chip": _chip, "crack": _crack, "inactive": _inactive, "shunt": _shunt}
_CATEGORIES = {
    "brick": _Category(
        partial(_texture_canvases, "brick"),
        {"crack": _crack, "foreign": _foreign, "misplaced": _misplaced, "stain": _stain},
    ),
    "coins": _Category(_coin_canvases, {"chip": _chip, "scratch": _scratch, "stain": _stain, "worn": _worn}),
    "gravel": _Category(
        partial(_texture_canvases, "gravel"),
        {"fines": _fines, "foreign": _foreign, "oil": partial(_stain, absorbed=(0.5, 0.8))},
    ),
    "solar_mono": _Category(partial(_solar_canvases, "solar_mono"), _SOLAR_DEFECTS),
    "solar_poly": _Category(partial(_solar_canvases, "solar_poly"), _SOLAR_DEFECTS),
}
SAMPLE_CATEGORIES = tuple(_CATEGORIES)


# --- Writing ------------------------------------------------------------------------------------------------------


def _gray_levels(image: Gray) -> NDArray[np.uint8]:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _visible_change(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Mask:
    """Where two images differ visibly: small gaps closed, holes filled, specks dropped."""
    from scipy import ndimage

    changed = np.abs(after.astype(np.int16) - before) >= _VISIBLE
    reach = max(1, before.shape[0] // 100)
    closed = ndimage.binary_closing(np.pad(changed, reach), iterations=reach)[reach:-reach, reach:-reach]
    labels, _ = ndimage.label(ndimage.binary_fill_holes(closed), structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return np.asarray((areas >= max(3, areas.max() / 50))[labels])


def _draw_defect(canvas: Canvas, defect: Defect, rng: Generator) -> tuple[NDArray[np.uint8], Mask]:
    """Draw until the visible area lies in the wanted range.

    Raises:
        RuntimeError: If no draw does.
    """
    good = _gray_levels(canvas.image)
    for _ in range(_MAX_DRAWS):
        image = _gray_levels(defect(canvas, rng))
        mask = _visible_change(good, image)
        if _MASK_AREA[0] <= mask.mean() <= _MASK_AREA[1]:
            return image, mask
    msg = f"No visible defect of {_MASK_AREA} of the image in {_MAX_DRAWS} draws on {canvas.origin}."
    raise RuntimeError(msg)


def _save(image: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def _write_category(
    root: Path, name: str, *, image_size: int, train: int, good: int, per_defect: int, seed: int
) -> dict[str, Mapping[str, object]]:
    """Write one category below ``root`` and return the origin of each image by its relative path."""
    category = _CATEGORIES[name]
    rng = np.random.default_rng([seed, *name.encode()])
    origins: dict[str, Mapping[str, object]] = {}

    def record(path: Path, canvas: Canvas) -> Path:
        origins[path.as_posix()] = canvas.origin
        return root / path

    for split, count in (("train", train), ("test", good)):
        for index, canvas in zip(range(count), category.canvases(split, image_size, rng), strict=False):
            _save(_gray_levels(canvas.image), record(Path(name, split, "good", f"{index:03}.png"), canvas))
    canvases = category.canvases("test", image_size, rng)
    for index in range(per_defect):
        for kind, defect in category.defects.items():
            canvas = next(canvases)
            image, mask = _draw_defect(canvas, defect, rng)
            _save(image, record(Path(name, "test", kind, f"{index:03}.png"), canvas))
            _save(255 * mask.astype(np.uint8), root / name / "ground_truth" / kind / f"{index:03}_mask.png")
    return origins


def _require_sources() -> None:
    """Fail before anything is written if the packages that hold the photographs are missing."""
    try:
        import elpv_dataset.utils  # noqa: F401
        import skimage.data  # noqa: F401
    except ImportError as error:
        msg = (
            "The sample dataset is made from the photographs in the packages scikit-image and elpv-dataset, "
            f"but {error.name} cannot be imported: pip install 'anomalib-uniass[demo]'"
        )
        raise ImportError(msg, name=error.name) from error


def _is_complete(root: Path, expected: dict[str, int]) -> bool:
    """Whether ``root`` holds this very set.

    Raises:
        FileExistsError: If it holds anything else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        found = f"something without a readable {_MANIFEST}"
    if found == expected:
        return True
    msg = f"{root} should hold the sample dataset {expected}, but holds {found}: delete it or choose another folder."
    raise FileExistsError(msg)


def write_sample_dataset(
    root: Path, *, image_size: int = 256, train: int = 50, good: int = 12, per_defect: int = 7, seed: int = 0
) -> None:
    """Write the sample dataset in MVTec AD layout, or keep the same set if it is there already.

    Each of :data:`SAMPLE_CATEGORIES` gets ``train/good``, ``test/good``, ``test/DEFECT`` and
    ``ground_truth/DEFECT/NNN_mask.png`` (0 or 255). ``root/dataset.json`` records the parameters, the licences and each
    image's origin. The set is built beside ``root`` and renamed at the end, so ``root`` never holds half a set, and
    nothing existing is overwritten. Equal parameters give equal files (with equal versions of numpy, scipy, Pillow).

    Args:
        root: Folder to write; it is new, empty, or holds this very set.
        image_size: Width and height of the images in pixels, at least 64.
        train: Good images to train on, per category.
        good: Good test images per category.
        per_defect: Defective test images per category and kind of defect (three or four kinds each).
        seed: Seed of the crops, exposures and defects.

    Raises:
        ImportError: If scikit-image or elpv-dataset is missing.
        FileExistsError: If ``root`` holds another set or other files.
        ValueError: If a size or count is too small.
    """
    root = Path(root)
    parameters = {"image_size": image_size, "train": train, "good": good, "per_defect": per_defect, "seed": seed}
    lowest = {"image_size": 64, "train": 1, "good": 1, "per_defect": 1, "seed": 0}
    for name, value in parameters.items():
        if value < lowest[name]:
            msg = f"{name} must be at least {lowest[name]}, got {value}."
            raise ValueError(msg)
    expected = {"version": _VERSION, **parameters}
    if _is_complete(root, expected):
        return
    _require_sources()
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        building = Path(scratch, root.name)
        origins: dict[str, Mapping[str, object]] = {}
        for name in SAMPLE_CATEGORIES:
            origins |= _write_category(building, name, **parameters)
        manifest = {"parameters": expected, "licenses": _LICENSES, "origins": origins}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if root.exists():
            root.rmdir()
        building.rename(root)
