# SPDX-License-Identifier: Apache-2.0
"""Masks of any kind: what is a defect, and what looks as if it were meant otherwise.

A defect is every pixel with any channel above 0, in the depth of the file: white, a class by its number, a colour of an
annotation tool. Where compression may have changed black (JPEG and other lossy formats) it has to be above half of the
range. Pixels of a palette have its colours. On a transparent background what is painted is a defect.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image, ImageFile
from torchvision import tv_tensors

from anomalib_uniass.data.bit_depth import (
    TIFF_PHOTOMETRIC,
    WHITE_IS_ZERO,
    bits,
    is_reversible_jpeg2000,
    needs_own_reader,
    read_png,
    read_samples,
    read_tiff_page,
    tiff_tag,
    turn,
)
from anomalib_uniass.data.images import alpha_of, has_key_of_other_scale
from anomalib_uniass.data.opening import (
    RefusedError,
    check_megapixels,
    check_single,
    frames,
    is_above_pillows_limit,
    opened,
    orientation,
    turn_upright,
)

# Compression noise makes the black of a mask a little grey in these.
_LOSSY_FORMATS: Final = ("JPEG", "MPO", "AVIF")
_LOSSY_COMPRESSIONS: Final = ("jpeg", "tiff_jpeg", "webp")  # inside a TIFF, as Pillow calls them
_TIFF_STARTS: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LOSSLESS_TIFF: Final = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 50000)  # Compression
_TIFF_SOFTWARE: Final = 305
_BLACK_IS_ZERO: Final = 1
_RGB: Final = 2
_NOISE: Final = 1 / 5
"""Share of the range up to which a lossy format may change black."""

_NEAR: Final = 8
"""Pixels from a defect up to which what is darker may be its edge: the side of a block of JPEG."""

_SOFT: Final = 0.3
"""Share of the darker pixels of defects that lie in no even area if they are edges; classes are even areas."""

Values = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]


class _Pixels(NamedTuple):
    """A mask as its file has it.

    Attributes:
        values: Channels (H, W, C), black is 0.
        painted: Where it is not transparent (H, W); None if the file has no transparency.
        black: Greatest value that is no defect: 0, or half of the range in lossy formats.
    """

    values: Values
    painted: Bools | None
    black: float


class MaskFindings(NamedTuple):
    """A mask, and what of it looks as if it were meant otherwise.

    Attributes:
        mask: Mask ``(H, W)`` of uint8, 1 where the defect is.
        share: Share of its pixels that are defects.
        border: Share of its outermost pixels that are.
        growth: Share by which soft edges enlarge the defects: pixels up to half of the greatest value, by those above.
        left_out: Area that is plainly grey in a lossy format, but not above half, as a share of that of the defects.
    """

    mask: tv_tensors.Mask
    share: float
    border: float
    growth: float
    left_out: float


def read_mask(path: Path | str) -> tv_tensors.Mask:
    """Read a mask, upright as EXIF tells.

    Args:
        path: File of any format that Pillow reads, or TIFF of any numbers. See the module for what a defect is.

    Returns:
        Mask ``(H, W)`` of uint8, 1 where the defect is.

    Raises:
        ValueError: If the file is missing or broken, or it is not clear what it means: several pictures, transparent
            pixels that are not black, colours of a palette that cannot be told apart, no black at all around several
            values, numbers below 0 or none. Names the file, what is wrong and what to do.
    """
    return _as_mask(_defect(_read(path, None), path))


def examine_mask(path: Path | str, *, max_megapixels: float) -> MaskFindings:
    """Read a mask and look for what may be meant otherwise.

    Args:
        path: As of :func:`read_mask`.
        max_megapixels: Millions of pixels that it may have; asked before anything of that size is read.

    Raises:
        ValueError: As :func:`read_mask`, and for a larger mask.
    """
    pixels = _read(path, max_megapixels)
    defect = _defect(pixels, path)
    edge = np.concatenate([defect[0], defect[-1], defect[:, 0], defect[:, -1]])
    levels = _greatest(pixels.values)
    return MaskFindings(
        _as_mask(defect),
        share=float(defect.mean()),
        border=float(edge.mean()),
        growth=0.0 if pixels.black else _growth(levels),
        left_out=_left_out(levels, defect, pixels.black) if pixels.black else 0.0,
    )


def _as_mask(defect: Bools) -> tv_tensors.Mask:
    return tv_tensors.Mask(torch.from_numpy(defect.astype(np.uint8)))


# --- what is a defect ---


def _defect(pixels: _Pixels, path: Path | str) -> Bools:
    values, painted, black = pixels
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        msg = (
            f"{path}: mask with values that are no numbers (NaN or infinite). Save it with 0 for good, 255 for defect."
        )
        raise RefusedError(msg)
    if values.dtype.kind in "fi" and (values < 0).any():
        msg = f"{path}: mask with values below 0, down to {values.min()}. Save it with 0 for good and 255 for defect."
        raise RefusedError(msg)
    defect: Bools = _greatest(values) > black
    if painted is not None and not painted.all():
        defect = _painted_defect(defect, painted, path, lossy=black > 0)
    if not black and defect.all() and not (values == values[:1, :1]).all():
        least, most = (_text(pixel) for pixel in _extremes(values))
        msg = (
            f"{path}: mask without a black pixel, from {least} to {most}, so that its background is not known. Save it "
            "with 0 (black) where the part is good and 255 where the defect is"
            + (", cut at a probability." if values.dtype.kind == "f" else "; if all of it is a defect, all in 255.")
        )
        raise RefusedError(msg)
    return defect


def _greatest(values: Values) -> Values:
    """Return the greatest channel of each pixel (H, W)."""
    return functools.reduce(np.maximum, np.moveaxis(values, -1, 0))  # numpy's max along a short last axis is slow


def _painted_defect(lit: Bools, painted: Bools, path: Path | str, *, lossy: bool) -> Bools:
    """Return the defects of a mask with transparent pixels."""
    if (lit & ~painted).any():
        msg = f"{path}: mask with transparent pixels that are not black. Flatten it on black."
        raise RefusedError(msg)
    if not lit.any():
        return painted
    if not lossy and (painted & ~lit).any():
        msg = (
            f"{path}: mask with transparent pixels, black ones and others, so that its background is unknown. Flatten "
            "it on black, with 255 where the defect is."
        )
        raise RefusedError(msg)
    return lit


def _extremes(values: Values) -> tuple[Values, Values]:
    """Return the pixels with the least and the greatest sum, two others that differ if all have the same."""
    flat = values.reshape(-1, values.shape[-1])
    sums = flat.sum(axis=-1, dtype=np.float64)
    if sums.min() == sums.max():
        sums = (flat != flat[0]).any(axis=-1)
    return flat[sums.argmin()], flat[sums.argmax()]


def _text(pixel: Values) -> str:
    return f"{pixel[0]:g}" if len(pixel) == 1 else f"({', '.join(f'{value:g}' for value in pixel)})"


# --- what may be meant otherwise ---


def _growth(levels: Values) -> float:
    """Return by which share the pixels of soft edges enlarge defects, 0 if these have none or are classes by number."""
    bright = levels > levels.max() / 2
    low = (levels > 0) & ~bright
    if not low.any():
        return 0.0
    # What lies near a brighter defect, for ringing and noise of blocks leave gaps, belongs to its edge.
    _, regions = cv2.connectedComponents(cv2.dilate((low | bright).astype(np.uint8), _square(2 * _NEAR + 1)))
    of_bright = np.zeros(regions.max() + 1, bool)
    of_bright[regions[bright]] = True
    edges = low & of_bright[regions]
    smooth = levels.astype(np.float32)
    inside = edges & (cv2.dilate(smooth, _square(3)) == cv2.erode(smooth, _square(3)))
    even = edges & (cv2.dilate(inside.astype(np.uint8), _square(3)) > 0)
    if (edges & ~even).sum() < _SOFT * edges.sum():
        return 0.0
    return float(edges.sum() / (bright.sum() + low.sum() - edges.sum()))


def _left_out(levels: Values, defect: Bools, black: float) -> float:
    """Return how large the areas are that are plainly grey, but not above half of the range, beside the defects."""
    if not defect.any():
        return 0.0
    beside = cv2.dilate(defect.astype(np.uint8), _square(5)) == 0  # an edge is never quite sharp
    return float(((levels > 2 * black * _NOISE) & beside).sum() / defect.sum())


def _square(side: int) -> npt.NDArray[np.uint8]:
    return np.ones((side, side), np.uint8)


# --- pixels ---


def _read(path: Path | str, limit: float | None) -> _Pixels:
    if (pixels := _read_tiff(path, limit)) is not None:
        return pixels
    with opened(path) as image:
        if limit is not None:
            check_megapixels(image.size, path, limit)
        check_single(frames(image), image.format, path)
        lossy, depth = _is_lossy(image, path), bits(image, path)
        if needs_own_reader(image, path):
            samples, alpha = read_samples(image, path)
            return _Pixels(samples, None if alpha is None else alpha > 0, (2**depth - 1) // 2 if lossy else 0)
        if image.format == "PNG" and image.has_transparency_data and (depth > 8 or has_key_of_other_scale(image)):
            samples = turn(read_png(path), orientation(image, path))
            return _Pixels(samples[..., :-1], samples[..., -1] > 0, 0)
        if depth > 8 and image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
            msg = f"{path}: mask of {depth} bits in {image.format}, of which Pillow reads 8. Save it as PNG."
            raise RefusedError(msg)
        software = str(getattr(image, "tag_v2", {}).get(_TIFF_SOFTWARE, ""))
        inverted = (
            image.mode == "1" and tiff_tag(image, TIFF_PHOTOMETRIC) == (WHITE_IS_ZERO,) and _is_of_tifffile(software)
        )
        turn_upright(image)
        painted = alpha_of(image) > 0 if image.has_transparency_data else None
        values = _colours(image, path)
        return _Pixels(~values if inverted else values, painted, (65535 if depth > 8 else 255) // 2 if lossy else 0)


def _colours(image: Image.Image, path: Path | str) -> Values:
    """Return the channels of a loaded image without alpha (H, W, C)."""
    if image.mode in ("P", "PA"):
        return _palette_colours(image, path)
    if image.mode in ("CMYK", "YCbCr", "HSV"):
        image = image.convert("RGB")  # black is not 0 in these
    elif image.mode == "LAB":
        msg = f"{path}: mask in L*a*b* colours. Save it with 0 (black) for good and 255 for defect."
        raise RefusedError(msg)
    values = np.asarray(image)
    values = values.reshape(*values.shape[:2], -1)
    return values[..., :-1] if image.mode in ("LA", "La", "RGBA", "RGBa") else values


def _palette_colours(image: Image.Image, path: Path | str) -> Values:
    """Return the colours of an image with a palette, if each number in use has one of its own."""
    numbers = np.asarray(image).reshape(image.height, image.width, -1)[..., 0]
    colours = np.asarray(image.convert("RGB"))
    table = np.zeros((256, 3), np.uint8)
    table[numbers] = colours
    used = np.flatnonzero(np.bincount(numbers.ravel(), minlength=256))
    number_of: dict[tuple[int, ...], int] = {}
    for number in used.tolist():
        colour = tuple(table[number].tolist())
        if (other := number_of.setdefault(colour, number)) != number:
            msg = (
                f"{path}: mask whose palette has the colour {colour} for the numbers {other} and {number}, so they "
                "cannot be told apart. Save the numbers as grey, or give them colours of their own and black to good."
            )
            raise RefusedError(msg)
    return colours


def _is_lossy(image: ImageFile.ImageFile, path: Path | str) -> bool:
    """Whether values may have been changed by compression."""
    if image.format == "WEBP":
        return _has_lossy_chunk(path)
    if image.format == "JPEG2000":
        return not is_reversible_jpeg2000(path)
    return image.format in _LOSSY_FORMATS or image.info.get("compression") in _LOSSY_COMPRESSIONS


def _has_lossy_chunk(path: Path | str) -> bool:
    """Whether a WebP has pixels in its lossy format; there may be chunks of other things before."""
    with Path(path).open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", head)
            if name == b"VP8 ":
                return True
            file.seek(length + length % 2, os.SEEK_CUR)
    return False


def _is_of_tifffile(software: str) -> bool:
    """Whether tifffile wrote a TIFF. Of an array of bool it says that white is 0, and leaves True as it is, 1."""
    return software.startswith("tifffile")


def _read_tiff(path: Path | str, limit: float | None) -> _Pixels | None:
    """Read a TIFF of numbers or channels that Pillow changes or does not read; None for other files."""
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        if file.read(4) not in _TIFF_STARTS:
            return None
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            count = len(file.pages)
            numbers = page.photometric in (WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) and page.compression in _LOSSLESS_TIFF
            plain = page.sampleformat == 1 and max(np.atleast_1d(page.bitspersample)) <= 8
            plain &= page.samplesperpixel in ((3, 4) if page.photometric == _RGB else (1,))
            size = (page.imagewidth, page.imagelength)
            if not numbers or (plain and not is_above_pillows_limit(size)):
                return None
            check_single(count, "TIFF", path)
            if limit is not None:
                check_megapixels(size, path, limit)
            values, alpha = read_tiff_page(page)
            if page.photometric == WHITE_IS_ZERO and not (values.dtype == bool and _is_of_tifffile(page.software)):
                if values.dtype.kind not in "ub":
                    msg = f"{path}: TIFF whose white is 0, of signed or floating-point values. Save it as 8-bit PNG."
                    raise RefusedError(msg)
                values = (2**page.bitspersample - 1) - values
    except RefusedError:
        raise
    except Exception as error:  # tifffile and imagecodecs raise many kinds
        msg = f"{path}: unreadable ({type(error).__name__}: {error}). Replace it."
        raise RefusedError(msg) from error
    return _Pixels(values, None if alpha is None else alpha > 0, 0)
