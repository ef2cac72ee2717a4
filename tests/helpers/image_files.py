# SPDX-License-Identifier: Apache-2.0
"""Image files of many kinds, written by Pillow, by tifffile, by imagecodecs, or byte by byte."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

ORIENTATION = 274  # tag of EXIF

Writer = Callable[[Path], Any]


def pillow(array: np.ndarray, mode: str | None = None, **options: Any) -> Writer:
    image = Image.fromarray(array)
    return lambda path: (image.convert(mode) if mode else image).save(path, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(array: np.ndarray, *, colour: int, depth: int, before: bytes = b"", after: bytes = b"") -> Writer:
    """Write a PNG without Pillow; rows of ``array`` are its samples of 16 bits, or its bytes."""
    lines = array.reshape(len(array), -1)
    width = array.shape[1] * 8 // depth if depth < 8 else array.shape[1]
    rows = b"".join(b"\0" + line.astype(">u2" if depth == 16 else np.uint8).tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, len(array), depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def sbit(*bits: int) -> bytes:
    return chunk(b"sBIT", bytes(bits))


def tiff(array: np.ndarray, **options: Any) -> Writer:
    return lambda path: tifffile.imwrite(path, array, **options)


def greatest(value: int) -> dict[str, Any]:
    return {"extratags": [(281, "H", 1, value, True)]}


def text(content: bytes) -> Writer:
    return lambda path: path.write_bytes(content)


def cut(write: Writer, keep: float) -> Writer:
    def write_part(path: Path) -> None:
        write(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])

    return write_part


def pages(array: np.ndarray, **options: Any) -> Writer:
    images = [Image.fromarray(array), Image.fromarray(255 - array)]
    return lambda path: images[0].save(path, save_all=True, append_images=images[1:], **options)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def jpeg2000(array: np.ndarray, bits: int) -> Writer:
    return lambda path: path.write_bytes(
        imagecodecs.jpeg2k_encode(array, bitspersample=bits, reversible=True, level=0, codecformat=path.suffix[1:])
    )


def avif(array: np.ndarray, bits: int) -> Writer:
    return lambda path: path.write_bytes(imagecodecs.avif_encode(array, bitspersample=bits, level=100))


def plain_pnm(array: np.ndarray, greatest: int) -> Writer:
    values = " ".join(map(str, array.ravel()))
    return text(f"P3 # a comment\n12 8\n{greatest}\n# another\n{values}\n".encode())
