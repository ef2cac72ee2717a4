# SPDX-License-Identifier: Apache-2.0
"""Images of any kind that Pillow opens: read right, or refused with the file's name.

anomalib reads with Pillow's ``convert("RGB")``, which clips 16-bit values to white, forgets that pixels are
transparent, takes the first of several pictures and leaves EXIF's orientation to others, all without a word. Bits
beyond 8 are the matter of :mod:`anomalib_uniass.data.bit_depth`, masks of :mod:`anomalib_uniass.data.masks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_uniass.data import png
from anomalib_uniass.data.bit_depth import (
    bits,
    check_high_bytes,
    check_planes,
    is_grey16,
    needs_own_reader,
    read_deep,
    read_grey16,
    transparent,
)
from anomalib_uniass.data.opening import (
    MAX_MEGAPIXELS,
    RefusedError,
    check_megapixels,
    check_single,
    frames,
    in_turn,
    is_above_pillows_limit,
    opened,
    orientation,
    turn_upright,
)

_PLAIN_MODES: Final = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA_MODES: Final = ("LA", "PA", "RGBA", "La", "RGBa")
_JPEG_END: Final = b"\xff\xd9"
_JPEG_TAIL_BYTES: Final = 4096


def image_suffixes() -> frozenset[str]:
    """Return the file endings, in lower case with their dot, of all formats whose pixels Pillow reads."""
    endings = Image.registered_extensions()
    return frozenset(
        ending.lower()
        for ending, name in endings.items()
        if name in Image.OPEN
        and name != "MPEG"  # recognised, never decoded; so are the stubs
        and not (isinstance(opener := Image.OPEN[name][0], type) and issubclass(opener, ImageFile.StubImageFile))
    )


def read_image(path: Path | str) -> tv_tensors.Image:
    """Read an image, upright as EXIF tells, of any size (:func:`check_image` has a limit).

    Args:
        path: File of any format that Pillow reads, whatever its name.

    Returns:
        Image ``(3, H, W)`` of float32 in [0, 1], RGB, in the depth of the file.

    Raises:
        ValueError: If the file is missing or broken, or cannot be read right: transparent pixels, several pictures, no
            defined white (32-bit, floating point, L*a*b*) or an unknown bit depth. Names the file, what is wrong and
            what to do.
    """
    with opened(path) as image:
        _check_kind(image, path)
        if is_grey16(image):
            grey = read_grey16(image, path)
            return tv_tensors.Image(torch.from_numpy(grey).expand(3, -1, -1).contiguous())
        if needs_own_reader(image, path):
            colours = torch.from_numpy(read_deep(image, path))
            return tv_tensors.Image(colours.permute(2, 0, 1).contiguous())
        deep, keyed = bits(image, path) > 8, has_key_of_other_scale(image)
        turn_upright(image)
        if keyed or (image.has_transparency_data and alpha_of(image).min() < 255):
            raise transparent(path)
        rgb = image.convert("RGB")
        if deep:
            check_high_bytes(np.asarray(image if image.mode == "CMYK" else rgb), path)
        return to_dtype(to_image(rgb), torch.float32, scale=True)


def is_misread(path: Path | str) -> bool:
    """Whether anomalib's own reader may give other pixels than :func:`read_image`, or may read what that refuses.

    Args:
        path: File to judge by its header, without decoding it.

    Returns:
        False only if both readers give the same, as far as the header tells.
    """
    try:
        with opened(path) as image:
            return not _is_plain(image, path) or is_above_pillows_limit(image.size) or orientation(image, path) != 1
    except ValueError:
        return True


def check_image(path: Path | str, *, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[tuple[int, int], str | None]:
    """Find out before training whether :func:`read_image` will read a file.

    Pixels of PNG of the usual kinds are unpacked, JPEG is judged by its end marker; others are decoded.

    Args:
        path: Image file.
        max_megapixels: Millions of pixels that it may have; asked before anything of that size is read.

    Returns:
        (width, height) as :func:`read_image` gives them, and what is wrong with the file, None if nothing is.
    """
    try:
        with opened(path) as image:
            check_megapixels(image.size, path, max_megapixels)
            if _is_plain(image, path):
                width, height = image.size
                if image.format == "PNG" and not png.may_be_turned(path) and png.is_whole(path):
                    return (width, height), None
                if image.format == "JPEG" and _has_jpeg_end(image, path):
                    turned = orientation(image, path) in (5, 6, 7, 8)
                    return ((height, width) if turned else (width, height)), None
            size = image.size
        with in_turn(size):
            height, width = read_image(path).shape[-2:]
        return (width, height), None
    except ValueError as error:
        return (0, 0), str(error)


# --- what the header tells; to be asked before the pixels are loaded ---


def _is_plain(image: ImageFile.ImageFile, path: Path | str) -> bool:
    """Whether the header shows nothing that needs care but EXIF's orientation."""
    return (
        image.mode in _PLAIN_MODES and not image.has_transparency_data and bits(image, path) <= 8 and frames(image) == 1
    )


def has_key_of_other_scale(image: ImageFile.ImageFile) -> bool:
    """Whether a colour key of 2, 4 or 16 bits marks transparent pixels; Pillow compares it with 8-bit values."""
    return image.mode in ("L", "RGB") and image.has_transparency_data and ";" in str(image.tile[:1])


def _check_kind(image: ImageFile.ImageFile, path: Path | str) -> None:
    """Refuse a file of several pictures or of values without a defined white."""
    check_single(frames(image), image.format, path)
    check_planes(image, path)
    if needs_own_reader(image, path):
        return
    if is_grey16(image):
        if image.format not in ("PNG", "PPM", "TIFF"):
            msg = f"{path}: 16-bit {image.format}, whose white is not known. Save it as 16-bit PNG or in 8 bits."
            raise RefusedError(msg)
    elif image.mode not in (*_PLAIN_MODES, *_ALPHA_MODES):
        kinds = {"I": "32-bit or signed values", "F": "floating-point values", "LAB": "L*a*b* colours"}
        kind = kinds.get(image.mode, "values")
        msg = (
            f"{path}: {image.format} with {kind} (Pillow's mode {image.mode}), whose white is not known. "
            "Save it as 8-bit or 16-bit grey or RGB."
        )
        raise RefusedError(msg)


def _has_jpeg_end(image: ImageFile.ImageFile, path: Path | str) -> bool:
    """Whether the end marker stands behind the beginning of the pixels: a thumbnail in the header has its own."""
    begin = image.fp.tell() if image.fp is not None else 0  # Pillow has read the header
    with Path(path).open("rb") as file:
        file.seek(max(begin, file.seek(0, 2) - _JPEG_TAIL_BYTES))
        return _JPEG_END in file.read()


def alpha_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the opacity of each pixel of an image with transparency ``(H, W)``."""
    return np.asarray(image.convert("RGBA").getchannel("A"))
