# SPDX-License-Identifier: Apache-2.0
"""Opening an image file with Pillow: by its content, whatever its size, with errors that name the file."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Final

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from anomalib_uniass.data import png

MAX_MEGAPIXELS: Final = 300.0
"""Millions of pixels that an image may have unless the user says otherwise: 3.6 GB as float32 of three colours."""

_LARGE: Final = 50_000_000  # pixels
_TURN: Final = threading.Lock()


class RefusedError(ValueError):
    """What is wrong with a file, in words of ours."""


@contextmanager
def opened(path: Path | str) -> Iterator[ImageFile.ImageFile]:
    """Open a file by what it holds, without decoding it; leave its size to :func:`check_megapixels`.

    Args:
        path: File of any format that Pillow reads, whatever its name.

    Yields:
        The image, its pixels not loaded.

    Raises:
        RefusedError: If the file is missing, or Pillow raises anything on it, here or in the caller's block.
    """
    if not Path(path).is_file():
        msg = f"{path}: missing"
        raise RefusedError(msg)
    try:
        # Not by its name: Pillow then maps some files into memory, and garbles turned grey TIFFs (seen in 13.0).
        with Path(path).open("rb") as file, _identified(file) as image:
            yield image
    except RefusedError:
        raise
    except UnidentifiedImageError as error:
        msg = f"{path}: unreadable (no image, or of a kind that Pillow does not read). Replace it."
        raise RefusedError(msg) from error
    except Image.DecompressionBombError as error:  # from inside a format, such as WebP
        msg = f"{path}: larger than Pillow allows in this format ({error}). Save it as PNG."
        raise RefusedError(msg) from error
    except Exception as error:  # Pillow raises many kinds
        msg = f"{path}: unreadable ({type(error).__name__}: {error}). Replace it."
        raise RefusedError(msg) from error


def _identified(file: IO[bytes]) -> ImageFile.ImageFile:
    """Find the format and open the file, as ``Image.open`` does.

    That one warns of "decompression bombs" above 89 megapixels and refuses those above 179, by a limit that belongs to
    the whole process and not to us.
    """
    Image.preinit()  # the usual formats come first
    Image.init()
    prefix = file.read(16)
    for name in Image.ID:
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):  # a string says what Pillow was built without
            continue
        file.seek(0)
        with suppress(SyntaxError, IndexError, TypeError, struct.error):
            return factory(file, "")
    raise UnidentifiedImageError


def check_megapixels(size: tuple[int, int], path: Path | str, limit: float) -> None:
    """Refuse an image of more pixels than the user allows, before it fills the memory.

    Args:
        size: Width and height.
        path: File, for the message.
        limit: Millions of pixels.

    Raises:
        RefusedError: If it has more.
    """
    megapixels = size[0] * size[1] / 1e6
    if megapixels > limit:
        msg = (
            f"{path}: {megapixels:.4g} megapixels ({size[0]} x {size[1]}), more than max_megapixels={limit:g}. If it "
            f"is meant to be so large, raise `max_megapixels` of the datamodule (`--data.max_megapixels "
            f"{int(megapixels) + 1}`): reading it takes {12 * megapixels / 1000:.1f} GB of memory in each worker."
        )
        raise RefusedError(msg)


def in_turn(size: tuple[int, int]) -> AbstractContextManager[object]:
    """Return a lock under which large files are decoded one after the other, for each takes gigabytes.

    Args:
        size: Width and height.
    """
    return _TURN if size[0] * size[1] > _LARGE else nullcontext()


def is_above_pillows_limit(size: tuple[int, int]) -> bool:
    """Whether ``Image.open`` would warn of an image's width and height, or refuse it."""
    return Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS


def is_refused_by_pillow(size: tuple[int, int]) -> bool:
    """Whether ``Image.open`` would refuse an image's width and height: it warns up to twice its limit."""
    return Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS


def frames(image: ImageFile.ImageFile) -> int:
    """Count the pictures; the first one of MPO, which phones write, is the photograph."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def check_single(count: int, kind: str | None, path: Path | str) -> None:
    """Refuse a file of several pictures."""
    if count > 1:
        msg = f"{path}: {kind} with {count} pictures (pages, frames or layers). Save one of them by itself."
        raise RefusedError(msg)


def orientation(image: ImageFile.ImageFile, path: Path | str) -> int:
    """Return EXIF's orientation, 1 if there is none."""
    if image.format == "PNG" and not png.may_be_turned(path):
        return 1  # Pillow would decode the image to find out
    with suppress(SyntaxError):  # EXIF that is none
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def shown_size(path: Path | str) -> tuple[int, int]:
    """Return width and height of an image as it is shown, turned as EXIF tells, from its header.

    Raises:
        RefusedError: If Pillow does not open the file.
    """
    with opened(path) as image:
        width, height = image.size
        return (height, width) if orientation(image, path) in (5, 6, 7, 8) else (width, height)


def turn_upright(image: ImageFile.ImageFile) -> None:
    """Load an image and apply EXIF's orientation to it."""
    image.load()
    with suppress(SyntaxError):  # EXIF that is none
        ImageOps.exif_transpose(image, in_place=True)
