# SPDX-License-Identifier: Apache-2.0
"""Drawing of defects: functions of (canvas, rng) that return the changed image."""

from __future__ import annotations

import numpy as np
from canvases import BUSBARS, Canvas, Gray, Mask, fill_from, photograph, square
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter, shift
from scipy.signal import lfilter


def _smooth_noise(size: int, sigma: float, rng: Generator) -> Gray:
    """Low-frequency noise (size, size) of mean 0 and standard deviation 1."""
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
    steps = max(3, round(length / 2))
    headings = heading + lfilter([1], [1, -0.85], rng.normal(0, wobble, steps))
    return start + 2 * np.cumsum(np.stack([np.sin(headings), np.cos(headings)], axis=1), axis=0)


def _stroke(points: Gray, widths: Gray, size: int, blur: float) -> Gray:
    """Opacity (size, size) of a polyline with one width (pixels) per point, as sharp as the photograph."""
    zoom = 4
    sheet = Image.new("L", (zoom * size, zoom * size))
    draw = ImageDraw.Draw(sheet)
    for start, end, width in zip(points[:-1], points[1:], widths, strict=False):
        segment = [(zoom * (point[1] + 0.5), zoom * (point[0] + 0.5)) for point in (start, end)]
        draw.line(segment, fill=255, width=max(1, round(zoom * width)))
    return np.asarray(gaussian_filter(np.asarray(sheet.reduce(zoom), dtype=np.float64) / 255, blur))


def crack(canvas: Canvas, rng: Generator) -> Gray:
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


def scratch(canvas: Canvas, rng: Generator) -> Gray:
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


def stain(canvas: Canvas, rng: Generator, *, absorbed: tuple[float, float] = (0.25, 0.5)) -> Gray:
    """A liquid that darkens the surface by a fraction ``absorbed`` of the light and leaves its relief visible."""
    size = canvas.size
    radius, softness = rng.uniform(0.05, 0.14) * size, rng.uniform(0.015, 0.05) * size
    opacity = _blob(_random_pixel(canvas.part, rng), size, radius, softness, rng) * canvas.part
    opacity *= np.clip(0.85 + 0.15 * _smooth_noise(size, 0.02 * size, rng), 0, 1)
    return canvas.image * (1 - rng.uniform(*absorbed) * opacity)


def worn(canvas: Canvas, rng: Generator) -> Gray:
    """Relief rubbed flat: the blurred image shows through."""
    size = canvas.size
    opacity = _blob(_random_pixel(canvas.part, rng), size, rng.uniform(0.1, 0.17) * size, 0.04 * size, rng)
    flat = gaussian_filter(canvas.image, rng.uniform(0.015, 0.03) * size) * rng.uniform(0.95, 1.1)
    return canvas.image + (flat - canvas.image) * opacity * canvas.part


def chip(canvas: Canvas, rng: Generator) -> Gray:
    """A piece broken off at the rim, the background visible in its place."""
    size = canvas.size
    step = max(1, size // 100)
    rim = canvas.part & ~binary_erosion(canvas.part, iterations=step)
    opacity = _blob(_random_pixel(rim, rng), size, rng.uniform(0.04, 0.11) * size, 1 + 2 * canvas.blur, rng)
    outside = ~binary_dilation(canvas.part, iterations=step)
    behind = fill_from(canvas.image, outside, 0.12 * size) + 2 * _smooth_noise(size, 0.5 + canvas.blur, rng)
    return canvas.image + (behind - canvas.image) * opacity * canvas.part


def misplaced(canvas: Canvas, rng: Generator) -> Gray:
    """A piece from elsewhere on the same surface: joints that do not meet."""
    size = canvas.size
    height, width = (int(rng.uniform(0.12, 0.3) * size) for _ in range(2))
    row, column, other_row, other_column = (int(rng.random() * (size - extent)) for extent in (height, width) * 2)
    piece = np.roll(canvas.image, (row - other_row, column - other_column), (0, 1))
    opacity = np.zeros_like(canvas.image)
    opacity[row : row + height, column : column + width] = 1
    return canvas.image + (piece - canvas.image) * gaussian_filter(opacity, 0.006 * size)


def fines(canvas: Canvas, rng: Generator) -> Gray:
    """A pocket of the same material with much smaller grains."""
    size = canvas.size
    fine = square(canvas.image, (size / 2, size / 2), rng.uniform(2.5, 4) * size, rng.uniform(0, np.pi), size)
    opacity = _blob(_random_pixel(canvas.part, rng), size, rng.uniform(0.09, 0.17) * size, 0.02 * size, rng)
    return canvas.image + (fine - canvas.image) * opacity


def foreign(canvas: Canvas, rng: Generator) -> Gray:
    """Blades of grass from another photograph, in the light of this one, with a shadow."""
    size, photo = canvas.size, photograph("grass")
    row, column = (rng.uniform(130, extent - 130) for extent in photo.shape)
    grass = square(photo, (row, column), 180, rng.uniform(0, np.pi), size)
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


def inactive(canvas: Canvas, rng: Generator) -> Gray:
    """An area cut off from the current: dark, bounded by a busbar or cell edge and by two oblique breaks."""
    size, band = canvas.size, rng.integers(len(BUSBARS) - 1)
    top, bottom = (size * edge for edge in BUSBARS[band : band + 2])
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


def shunt(canvas: Canvas, rng: Generator) -> Gray:
    """Up to three spots where current leaks: dark, with a soft halo."""
    size = canvas.size
    image = canvas.image
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(0.015, 0.04) * size
        opacity = _blob(_random_pixel(canvas.part, rng), size, radius, 1.5 * radius, rng)
        image = image * (1 - rng.uniform(0.4, 0.75) * opacity * canvas.part)
    return image
