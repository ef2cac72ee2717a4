# SPDX-License-Identifier: Apache-2.0
"""What a PNG file tells without being decoded: its chunks, and whether its pixels are whole."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

_SIGNATURE: Final = 8  # bytes
_PIXELS: Final = (b"IDAT", b"fdAT")
_ORIENTATION: Final = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # keywords of text chunks
_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
_STEP: Final = 2**20  # bytes that are unpacked at a time
_FILTERS: Final = 4  # the greatest number of a filter, which stands before each row


def chunks(path: Path | str) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of each chunk of a PNG but its pixels."""
    with Path(path).open("rb") as file:
        file.seek(_SIGNATURE)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name in _PIXELS:
                file.seek(length, os.SEEK_CUR)
            else:
                yield name, file.read(length)
            file.seek(4, os.SEEK_CUR)


def may_be_turned(path: Path | str) -> bool:
    """Whether a PNG has a chunk that may hold an orientation."""
    return any(
        name == b"eXIf" or (name in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_ORIENTATION))
        for name, data in chunks(path)
    )


def is_whole(path: Path | str) -> bool:
    """Whether all pixels of a PNG are there: they unpack without an error to as many rows as its header tells.

    Takes half as long as decoding, or less. Chunks can have the right checksums around pixels that are broken.

    Args:
        path: File that begins as a PNG.

    Returns:
        True only if decoding will succeed; False if it is to be tried, interlaced files among them.
    """
    with Path(path).open("rb") as file:
        file.seek(_SIGNATURE)
        head = file.read(25)
        if len(head) < 25 or head[4:8] != b"IHDR":
            return False
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", head[8:21])
        if interlaced or colour not in _SAMPLES:
            return False
        row = 1 + (width * depth * _SAMPLES[colour] + 7) // 8
        unpacker, count, ended = zlib.decompressobj(), 0, False
        while len(start := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", start)
            content = file.read(length)
            if len(content) < length or file.read(4) != struct.pack(">I", zlib.crc32(content, zlib.crc32(name))):
                return False
            while content and name == b"IDAT" and count < row * height:
                try:
                    rows = np.frombuffer(unpacker.decompress(content, _STEP), np.uint8)
                except zlib.error:
                    return False
                if (rows[-count % row :: row] > _FILTERS).any():
                    return False
                count += len(rows)
                content = unpacker.unconsumed_tail
            ended |= name == b"IEND"
        return ended and count >= row * height
