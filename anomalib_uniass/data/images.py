# SPDX-License-Identifier: Apache-2.0
"""Images and masks of any kind that Pillow opens: read right, or refused with the file's name.

anomalib reads with Pillow's ``convert("RGB")``, which clips 16-bit values to white, forgets that pixels are
transparent, takes the first of several pictures and leaves EXIF's orientation to others, all without a word.

Bit depth of 16-bit grey images: what the file tells, that is BitsPerSample and MaxSampleValue (if it is 2^n - 1) of a
TIFF, the greatest value in the header of a PGM, or the sBIT chunk of a PNG. A PNG that follows its standard has its
values spread over all 16 bits whatever sBIT says, so sBIT counts only if the values show that they are not. A file that
tells nothing has 16 bits, white is 65535; but if none of its values is above 4095, it may as well hold 12 bits, and is
refused (unless it is all black). 16-bit colour comes at 8 bits, for Pillow keeps the high bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype, to_image

_PLAIN_MODES: Final = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA_MODES: Final = ("LA", "PA", "RGBA", "La", "RGBa")
_TIFF_BITS: Final = 258
_TIFF_PHOTOMETRIC: Final = 262
_TIFF_GREATEST_VALUE: Final = 281
_TIFF_PLANES: Final = 284
_WHITE: Final = 65535
_WHITE_OF_12_BITS: Final = 4095
# Compression noise makes the black of a mask a little grey in these.
_LOSSY_FORMATS: Final = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_LOSSY_COMPRESSIONS: Final = ("jpeg", "tiff_jpeg", "webp")  # inside a TIFF
_PNG_ORIENTATION: Final = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of its text chunks
_JPEG_END: Final = b"\xff\xd9"
_JPEG_TAIL_BYTES: Final = 4096


class _RefusedError(ValueError):
    """What is wrong with a file, in words of ours."""


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
    """Read an image, upright as EXIF tells.

    Args:
        path: File of any format that Pillow reads, whatever its name.

    Returns:
        Image ``(3, H, W)`` of float32 in [0, 1], RGB.

    Raises:
        ValueError: If the file is missing or broken, or cannot be read right: transparent pixels, several pictures, no
            defined white (32-bit, floating point, L*a*b*) or an unknown bit depth (see the module). Names the file,
            what is wrong and what to do.
    """
    with _opened(path) as image:
        _check_kind(image, path)
        if _is_grey16(image):
            grey = _read_grey16(image, path)
            return tv_tensors.Image(torch.from_numpy(grey).expand(3, -1, -1).contiguous())
        deep, keyed = _has_16_bits(image), _has_key_of_other_scale(image)
        _turn_upright(image)
        if keyed or (image.has_transparency_data and _alpha(image).min() < 255):
            raise _transparent(path)
        rgb = image.convert("RGB")
        if deep and 0 < np.asarray(image if image.mode == "CMYK" else rgb).max() <= _WHITE_OF_12_BITS >> 8:
            raise _unknown_depth(path)
        return to_dtype(to_image(rgb), torch.float32, scale=True)


def read_mask(path: Path | str) -> tv_tensors.Mask:
    """Read a mask, upright as EXIF tells.

    Args:
        path: File of any format that Pillow reads. All values above 0 are defects, as anomalib has it; those above
            half of the range where compression may have changed black (JPEG and other lossy formats).

    Returns:
        Mask ``(H, W)`` of uint8, 1 where the defect is.

    Raises:
        ValueError: If the file is missing or broken, holds several pictures, or has transparent pixels that are not
            black. Names the file, what is wrong and what to do.
    """
    with _opened(path) as image:
        _check_single(image, path)
        lossy = _is_lossy(image, path)
        transparent = image.has_transparency_data
        _turn_upright(image)
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            return tv_tensors.Mask(torch.from_numpy(values > (_WHITE // 2 if lossy else 0)).to(torch.uint8))
        defect = np.asarray(image.convert("L")) > (127 if lossy else 0)
        if transparent and defect[_alpha(image) == 0].any():
            msg = f"{path}: mask with transparent pixels that are not black. Flatten it on black."
            raise _RefusedError(msg)
        return tv_tensors.Mask(torch.from_numpy(defect).to(torch.uint8))


def is_misread(path: Path | str) -> bool:
    """Whether anomalib's own reader may give other pixels than :func:`read_image`, or may read what that refuses.

    Args:
        path: File to judge by its header, without decoding it.

    Returns:
        False only if both readers give the same, as far as the header tells.
    """
    try:
        with _opened(path) as image:
            return not _is_plain(image) or _orientation(image, path) != 1
    except ValueError:
        return True


def check_image(path: Path | str) -> tuple[tuple[int, int], str | None]:
    """Find out before training whether :func:`read_image` will read a file.

    PNG of the usual kinds is judged by its checksums, JPEG by its end marker; others are decoded.

    Args:
        path: Image file.

    Returns:
        (width, height) as :func:`read_image` gives them, and what is wrong with the file, None if nothing is.
    """
    try:
        with _opened(path) as image:
            if _is_plain(image):
                width, height = image.size
                if image.format == "PNG" and not _png_may_be_turned(path):
                    image.verify()
                    return (width, height), None
                if image.format == "JPEG" and _has_jpeg_end(path):
                    turned = _orientation(image, path) in (5, 6, 7, 8)
                    return ((height, width) if turned else (width, height)), None
        height, width = read_image(path).shape[-2:]
        return (width, height), None
    except ValueError as error:
        return (0, 0), str(error)


@contextmanager
def _opened(path: Path | str) -> Iterator[ImageFile.ImageFile]:
    """Open a file; whatever Pillow raises on it becomes an error that names the file."""
    if not Path(path).is_file():
        msg = f"{path}: missing"
        raise _RefusedError(msg)
    try:
        # Not by its name: Pillow then maps some files into memory, and garbles turned grey TIFFs (seen in 13.0).
        with Path(path).open("rb") as file, Image.open(file) as image:
            yield image
    except _RefusedError:
        raise
    except UnidentifiedImageError as error:
        msg = f"{path}: unreadable (no image, or of a kind that Pillow does not read). Replace it."
        raise _RefusedError(msg) from error
    except Exception as error:  # Pillow raises many kinds
        msg = f"{path}: unreadable ({type(error).__name__}: {error}). Replace it."
        raise _RefusedError(msg) from error


# --- what the header tells; to be asked before the pixels are loaded ---


def _is_plain(image: ImageFile.ImageFile) -> bool:
    """Whether the header shows nothing that needs care but EXIF's orientation."""
    return (
        image.mode in _PLAIN_MODES
        and not image.has_transparency_data
        and not _has_16_bits(image)
        and _frames(image) == 1
    )


def _frames(image: ImageFile.ImageFile) -> int:
    """Count the pictures; the first one of MPO, which phones write, is the photograph."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _is_grey16(image: ImageFile.ImageFile) -> bool:
    """Whether an image is grey of up to 16 bits; Pillow gives some of these as 32-bit integers."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _has_16_bits(image: ImageFile.ImageFile) -> bool:
    """Whether the file has 16 bits per channel, of which Pillow keeps the high bytes if it has colour."""
    tile = str(image.tile[:1])  # decoder and its arguments; a PPM's last one is the greatest value
    return any(mark in tile for mark in (";16", "SGI16", ", 65535)")) or max(_tiff_tag(image, _TIFF_BITS)) > 8


def _has_key_of_other_scale(image: ImageFile.ImageFile) -> bool:
    """Whether a colour key of 2, 4 or 16 bits marks transparent pixels; Pillow compares it with 8-bit values."""
    return image.mode in ("L", "RGB") and image.has_transparency_data and ";" in str(image.tile[:1])


def _tiff_tag(image: ImageFile.ImageFile, tag: int) -> tuple[int, ...]:
    """Return a tag of whole numbers, (0,) if the file is no TIFF or has none."""
    values = getattr(image, "tag_v2", {}).get(tag, 0)
    return tuple(int(value) for value in values) if isinstance(values, tuple) else (int(values),)


def _check_single(image: ImageFile.ImageFile, path: Path | str) -> None:
    """Refuse a file of several pictures."""
    if (frames := _frames(image)) > 1:
        msg = f"{path}: {image.format} with {frames} pictures (pages, frames or layers). Save one of them by itself."
        raise _RefusedError(msg)


def _check_kind(image: ImageFile.ImageFile, path: Path | str) -> None:
    """Refuse a file of several pictures or of values without a defined white."""
    _check_single(image, path)
    planes = _tiff_tag(image, _TIFF_PLANES) == (2,)
    if planes and _has_16_bits(image) and "raw" in str(image.tile[:1]):  # Pillow takes its bytes for pixels
        msg = f"{path}: uncompressed 16-bit TIFF with a plane for each colour. Save it with interleaved colours."
        raise _RefusedError(msg)
    if _is_grey16(image):
        if image.format not in ("PNG", "PPM", "TIFF", "JPEG2000"):
            msg = f"{path}: 16-bit {image.format}, whose white is not known. Save it as 16-bit PNG or in 8 bits."
            raise _RefusedError(msg)
    elif image.mode not in (*_PLAIN_MODES, *_ALPHA_MODES):
        kinds = {"I": "32-bit or signed values", "F": "floating-point values", "LAB": "L*a*b* colours"}
        kind = kinds.get(image.mode, "values")
        msg = (
            f"{path}: {image.format} with {kind} (Pillow's mode {image.mode}), whose white is not known. "
            "Save it as 8-bit or 16-bit grey or RGB."
        )
        raise _RefusedError(msg)


def _orientation(image: ImageFile.ImageFile, path: Path | str) -> int:
    """Return EXIF's orientation, 1 if there is none."""
    if image.format == "PNG" and not _png_may_be_turned(path):
        return 1  # Pillow would decode the image to find out
    with suppress(SyntaxError):  # EXIF that is none
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _png_may_be_turned(path: Path | str) -> bool:
    """Whether a PNG has a chunk that may hold an orientation."""
    return any(
        name == b"eXIf" or (name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_PNG_ORIENTATION))
        for name, data in _png_chunks(path)
    )


def _png_chunks(path: Path | str) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of each chunk of a PNG but its pixels."""
    with Path(path).open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name in (b"IDAT", b"fdAT"):
                file.seek(length, os.SEEK_CUR)
            else:
                yield name, file.read(length)
            file.seek(4, os.SEEK_CUR)


def _has_jpeg_end(path: Path | str) -> bool:
    with Path(path).open("rb") as file:
        file.seek(-min(_JPEG_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return _JPEG_END in file.read()


def _is_lossy(image: ImageFile.ImageFile, path: Path | str) -> bool:
    """Whether values may have been changed by compression."""
    if image.format == "WEBP":
        with Path(path).open("rb") as file:
            return file.read(16)[12:] != b"VP8L"
    return image.format in _LOSSY_FORMATS or image.info.get("compression") in _LOSSY_COMPRESSIONS


# --- pixels ---


def _turn_upright(image: ImageFile.ImageFile) -> None:
    """Load an image and apply EXIF's orientation to it."""
    image.load()
    with suppress(SyntaxError):  # EXIF that is none
        ImageOps.exif_transpose(image, in_place=True)


def _alpha(image: ImageFile.ImageFile) -> npt.NDArray[np.uint8]:
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _read_grey16(image: ImageFile.ImageFile, path: Path | str) -> npt.NDArray[np.float32]:
    """Return (H, W) in [0, 1]."""
    depth = _told_depth(image, path)
    scaled = image.format == "PPM" and not _has_16_bits(image)  # Pillow has scaled its greatest value to 65535
    inverted = image.format == "TIFF" and _tiff_tag(image, _TIFF_PHOTOMETRIC) == (0,)
    _turn_upright(image)
    values = np.asarray(image).astype(np.uint16)
    if image.has_transparency_data and (values == image.info["transparency"]).any():
        raise _transparent(path)
    white = _WHITE if scaled else _white(values, depth, path, standard=image.format == "PNG")
    grey = values.astype(np.float32) / np.float32(white)
    return 1 - grey if inverted else grey


def _told_depth(image: ImageFile.ImageFile, path: Path | str) -> int:
    """Return the bits per pixel that a grey file tells, 16 if it tells nothing else."""
    if image.format == "PNG":
        depth = dict(_png_chunks(path)).get(b"sBIT", b"\x10")[0]
    else:
        depth = _tiff_tag(image, _TIFF_BITS)[0]
        greatest = _tiff_tag(image, _TIFF_GREATEST_VALUE)[0]
        # Other values than 2^n - 1 are the greatest one in this picture, not the greatest possible.
        if greatest >= 255 and greatest & (greatest + 1) == 0:
            depth = min(depth, greatest.bit_length())
    return depth if 0 < depth <= 16 else 16


def _white(values: npt.NDArray[np.uint16], depth: int, path: Path | str, *, standard: bool) -> int:
    """Return the value of white of a grey image.

    Args:
        values: Pixels as they lie in the file.
        depth: Bits per pixel that the file tells.
        path: File, for the message.
        standard: Whether the file's standard has values spread over 16 bits whatever the depth, as that of PNG.
    """
    top, full = int(values.max()), 2**depth - 1
    if top == 0:
        return _WHITE
    if depth == 16:
        if top <= _WHITE_OF_12_BITS:
            raise _unknown_depth(path)
        return _WHITE
    if top > full:
        if standard:
            return _WHITE
        msg = f"{path}: tells {depth} bits per pixel but has values up to {top}. Save it in 16 or 8 bits."
        raise _RefusedError(msg)
    # Spread values below 2^depth have no more than a rounding error in their low bits.
    if standard and not ((values & (2 ** (16 - depth) - 1)) > 1).any():
        msg = (
            f"{path}: 16-bit PNG with an sBIT chunk of {depth} bits and no value above {top}: either dark, or not "
            "spread over 16 bits as PNG asks for. Save it with values up to 65535 for white, or in 8 bits."
        )
        raise _RefusedError(msg)
    return full


def _unknown_depth(path: Path | str) -> _RefusedError:
    return _RefusedError(
        f"{path}: 16-bit image with no value above {_WHITE_OF_12_BITS}, which looks like 12 bits in 16: its white is "
        "not known. Save it with values up to 65535 for white, or in 8 bits; a grey TIFF may tell its depth in the tag "
        "MaxSampleValue (4095 for 12 bits)."
    )


def _transparent(path: Path | str) -> _RefusedError:
    return _RefusedError(f"{path}: has transparent pixels, whose colour is not known. Flatten it on a background.")
