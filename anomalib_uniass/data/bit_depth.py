# SPDX-License-Identifier: Apache-2.0
"""Images of more than 8 bits per channel: their values as they lie in the file, and which of these is white.

Bit depth: what the file tells, that is BitsPerSample and MaxSampleValue (if it is 2^n - 1) of a TIFF, the greatest
value in the header of a PNM, the precision of JPEG 2000, or the sBIT chunk of a PNG. A PNG that follows its standard
has its values spread over all 16 bits whatever sBIT says, so sBIT counts only if the values show that they are not. A
file that tells nothing has 16 bits, white is 65535; but if none of its values is above 4095, it may as well hold 12
bits, and is refused (unless it is all black).

Pillow gives grey of 16 bits as it is, keeps the high bytes of 16-bit colour, and rounds the white of JPEG 2000 of 9 to
16 bits to 256, which becomes 0. So grey comes from Pillow, and colour and JPEG 2000 from imagecodecs and tifffile.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import ImageFile

from anomalib_uniass.data import png
from anomalib_uniass.data.opening import RefusedError, is_above_pillows_limit, orientation, turn_upright

TIFF_PHOTOMETRIC: Final = 262
WHITE_IS_ZERO: Final = 0
_TIFF_BITS: Final = 258
_TIFF_GREATEST_VALUE: Final = 281
_TIFF_PLANES: Final = 284
_ALPHA: Final = (1, 2)  # ExtraSamples of a TIFF that are transparency, associated with the colours or not
_WHITE: Final = 65535
_WHITE_OF_12_BITS: Final = 4095
_JPEG2000_START: Final = b"\xff\x4f\xff\x51"  # of the codestream and of its sizes
_JPEG2000_STYLE: Final = b"\xff\x52"
_JPEG2000_COLOURS: Final = (16, 17)  # sRGB and grey; others would have to be converted

Samples = npt.NDArray[Any]


def tiff_tag(image: ImageFile.ImageFile, tag: int) -> tuple[int, ...]:
    """Return a tag of whole numbers, (0,) if the file is no TIFF or has none."""
    values = getattr(image, "tag_v2", {}).get(tag, 0)
    return tuple(int(value) for value in values) if isinstance(values, tuple) else (int(values),)


def bits(image: ImageFile.ImageFile, path: Path | str) -> int:
    """Return the bits per channel of an image that is not loaded yet: 16 if they are more than 8 in most formats."""
    if image.format == "JPEG2000":
        return _jpeg2000_bits(path)
    if image.format == "TIFF":
        return max(tiff_tag(image, _TIFF_BITS))
    tile = str(image.tile[:1])  # decoder and its arguments
    return 16 if any(mark in tile for mark in (";16", "SGI16")) or _greatest_of_pnm(image) > 255 else 8


def is_grey16(image: ImageFile.ImageFile) -> bool:
    """Whether an image is grey of up to 16 bits as Pillow gives it, some of these as 32-bit integers."""
    if image.format == "JPEG2000":
        return False
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def needs_own_reader(image: ImageFile.ImageFile, path: Path | str) -> bool:
    """Whether Pillow would lose bits of an image that :func:`read_samples` reads in full, or refuse its size."""
    if image.format == "JPEG2000":
        return bits(image, path) > 8
    if image.format == "TIFF" and image.mode in ("L", "RGB") and is_above_pillows_limit(image.size):
        return True
    formats = {"PNG": ("LA", "RGB", "RGBA"), "PPM": ("RGB",), "TIFF": ("RGB", "RGBA", "RGBX", "RGBa")}
    return image.mode in formats.get(image.format or "", ()) and bits(image, path) > 8


def check_planes(image: ImageFile.ImageFile, path: Path | str) -> None:
    """Refuse deep inks in planes, whose bytes Pillow takes for pixels."""
    planes = tiff_tag(image, _TIFF_PLANES) == (2,)
    if planes and image.mode == "CMYK" and bits(image, path) > 8 and "raw" in str(image.tile[:1]):
        msg = f"{path}: uncompressed 16-bit TIFF with a plane for each ink. Save it with interleaved colours."
        raise RefusedError(msg)


# --- pixels ---


def read_samples(image: ImageFile.ImageFile, path: Path | str) -> tuple[Samples, Samples | None]:
    """Return the values of an image as they lie in its file, upright.

    Args:
        image: Image for which :func:`needs_own_reader` is true.
        path: Its file.

    Returns:
        Grey ``(H, W, 1)`` or colours ``(H, W, 3)``, unsigned, and alpha ``(H, W)``, None without.
    """
    turned = orientation(image, path)
    if image.format == "TIFF":
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            samples, alpha = read_tiff_page(page)
            if page.photometric == WHITE_IS_ZERO:
                samples = np.invert(samples)
            return samples[..., :3], alpha  # a fourth channel of no meaning is nothing to see
    if image.format == "PPM":
        samples, alpha = _read_pnm(image, path), None
    else:
        samples, alpha = _without_alpha(read_png(path) if image.format == "PNG" else _read_jpeg2000(path))
    return turn(samples, turned), None if alpha is None else turn(alpha, turned)


def read_tiff_page(page: Any) -> tuple[Samples, Samples | None]:
    """Return values and transparency of a TIFF page as they lie in the file, upright.

    Args:
        page: Page of tifffile, grey or RGB.

    Returns:
        Channels ``(H, W, C)`` of the file's own type and alpha ``(H, W)``, None without.
    """
    samples = page.asarray()
    if page.axes.startswith("S"):
        samples = np.moveaxis(samples, 0, -1)
    samples = samples.reshape(*samples.shape[:2], -1)
    colours = samples.shape[-1] - len(page.extrasamples)
    alphas = [colours + i for i, kind in enumerate(page.extrasamples) if kind in _ALPHA]
    tag = page.tags.get("Orientation")
    samples = turn(samples, 1 if tag is None else int(tag.value))
    if not alphas:
        return samples, None
    return np.delete(samples, alphas, axis=-1), samples[..., alphas[0]]


def turn(array: Samples, orientation: int) -> Samples:
    """Turn an array ``(H, W, ...)`` as EXIF's orientation tells."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    down, right = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return array[::down, ::right]


def read_grey16(image: ImageFile.ImageFile, path: Path | str) -> npt.NDArray[np.float32]:
    """Return grey of up to 16 bits that Pillow reads, upright, ``(H, W)`` in [0, 1].

    Raises:
        RefusedError: If white is not known, or pixels are transparent.
    """
    inverted = image.format == "TIFF" and tiff_tag(image, TIFF_PHOTOMETRIC) == (WHITE_IS_ZERO,)
    depth, greatest = _told_depth(image, path), _greatest_of_pnm(image)
    turn_upright(image)
    values = np.asarray(image).astype(np.uint16)
    if image.has_transparency_data and (values == image.info["transparency"]).any():
        raise transparent(path)
    scaled = image.format == "PPM" and greatest < _WHITE  # Pillow has scaled its greatest value to 65535
    white = _WHITE if scaled else _white(values, depth, path, image.format)
    grey = values.astype(np.float32) / np.float32(white)
    return 1 - grey if inverted else grey


def read_deep(image: ImageFile.ImageFile, path: Path | str) -> npt.NDArray[np.float32]:
    """Return an image for which :func:`needs_own_reader` is true, upright, ``(H, W, 3)`` in [0, 1].

    Raises:
        RefusedError: If white is not known, pixels are transparent, or the channels are no colours.
    """
    samples, alpha = read_samples(image, path)
    if samples.shape[-1] not in (1, 3):
        msg = f"{path}: {image.format} with {samples.shape[-1]} channels. Save it as grey or RGB."
        raise RefusedError(msg)
    told = image.format == "PPM" and _greatest_of_pnm(image) < _WHITE
    white = _greatest_of_pnm(image) if told else _white(samples, _told_depth(image, path), path, image.format)
    if alpha is not None and alpha.min() < min(white, 2 ** bits(image, path) - 1):
        raise transparent(path)
    colours = samples.astype(np.float32) / np.float32(white)
    return colours if colours.shape[-1] == 3 else np.repeat(colours, 3, axis=-1)


# --- helpers of single formats ---


def _without_alpha(samples: Samples) -> tuple[Samples, Samples | None]:
    """Part the channels of a format whose second or fourth channel is alpha."""
    return (samples[..., :-1], samples[..., -1]) if samples.shape[-1] in (2, 4) else (samples, None)


def _greatest_of_pnm(image: ImageFile.ImageFile) -> int:
    """Return the greatest value of a PNM that is not loaded yet, as its header tells; 0 for other formats."""
    if image.format != "PPM":
        return 0
    arguments = image.tile[0][3]
    return _WHITE if arguments == "I;16B" else int(arguments[-1]) if isinstance(arguments, tuple) else 1


def _read_pnm(image: ImageFile.ImageFile, path: Path | str) -> Samples:
    """Return the colours of a PNM of 16 bits (H, W, 3); Pillow gives them at 8."""
    decoder, _, offset, _ = image.tile[0]
    data = Path(path).read_bytes()[offset:]
    count = 3 * image.width * image.height
    if decoder == "ppm_plain":
        words = b" ".join(line.partition(b"#")[0] for line in data.splitlines()).split()
        values = np.array(words[:count], dtype=np.int64)
    else:
        values = np.frombuffer(data, ">u2", count)
    return values.reshape(image.height, image.width, 3).astype(np.uint16)


def _jpeg2000_bits(path: Path | str) -> int:
    """Return the bits of the deepest channel of a JPEG 2000, from the sizes at the start of its codestream."""
    data = Path(path).read_bytes()
    start = data.find(_JPEG2000_START)
    if start < 0:
        return 8  # whoever decodes it will say so
    (channels,) = struct.unpack_from(">H", data, start + 40)
    return max((data[start + 42 + 3 * i] & 0x7F) + 1 for i in range(channels))


def read_png(path: Path | str) -> Samples:
    """Return the channels of a PNG (H, W, C) at its own scale; a transparent colour has become alpha."""
    samples = imagecodecs.png_decode(Path(path).read_bytes())
    return samples.reshape(*samples.shape[:2], -1)


def is_reversible_jpeg2000(path: Path | str) -> bool:
    """Whether a JPEG 2000 was compressed by the transform without losses, as its coding style tells."""
    data = Path(path).read_bytes()
    style = data.find(_JPEG2000_STYLE, max(data.find(_JPEG2000_START), 0))
    return 0 <= style < len(data) - 13 and data[style + 13] == 1


def _read_jpeg2000(path: Path | str) -> Samples:
    """Return the channels of a JPEG 2000 (H, W, C) if they are grey or RGB."""
    data = Path(path).read_bytes()
    head = data[: data.find(_JPEG2000_START)]
    colours = head.find(b"colr\1")
    known = colours < 0 or struct.unpack_from(">I", head, colours + 7)[0] in _JPEG2000_COLOURS
    if b"pclr" in head or not known:
        msg = f"{path}: JPEG 2000 of more than 8 bits in other colours than grey or RGB. Save it as 16-bit PNG."
        raise RefusedError(msg)
    samples = imagecodecs.jpeg2k_decode(data)
    if samples.dtype.kind != "u":
        msg = f"{path}: JPEG 2000 with signed values, whose white is not known. Save it as 16-bit PNG."
        raise RefusedError(msg)
    return samples.reshape(*samples.shape[:2], -1)


def _told_depth(image: ImageFile.ImageFile, path: Path | str) -> int:
    """Return the bits per channel that a file tells, 16 if it tells nothing else."""
    if image.format == "JPEG2000":
        depth = _jpeg2000_bits(path)
    elif image.format == "PNG":
        depth = max(dict(png.chunks(path)).get(b"sBIT", b"\x10")[:3])  # a fourth one is alpha's
    else:
        depth = tiff_tag(image, _TIFF_BITS)[0]
        greatest = tiff_tag(image, _TIFF_GREATEST_VALUE)[0]
        # Other values than 2^n - 1 are the greatest one in this picture, not the greatest possible.
        if greatest >= 255 and greatest & (greatest + 1) == 0:
            depth = min(depth, greatest.bit_length())
    return depth if 0 < depth <= 16 else 16


def _white(values: Samples, depth: int, path: Path | str, kind: str | None) -> int:
    """Return the value of white of an image.

    Args:
        values: Pixels as they lie in the file.
        depth: Bits per channel that the file tells.
        path: File, for the message.
        kind: Its format. PNG's standard has values spread over 16 bits whatever the depth.
    """
    top, full, standard = int(values.max()), 2**depth - 1, kind == "PNG"
    if top == 0:
        return _WHITE
    if depth == 16:
        if top <= _WHITE_OF_12_BITS:
            raise unknown_depth(path)
        return _WHITE
    if top > full:
        if standard:
            return _WHITE
        msg = f"{path}: tells {depth} bits per pixel but has values up to {top}. Save it in 16 or 8 bits."
        raise RefusedError(msg)
    # Spread values below 2^depth have no more than a rounding error in their low bits.
    if standard and not ((values & (2 ** (16 - depth) - 1)) > 1).any():
        msg = (
            f"{path}: 16-bit PNG with an sBIT chunk of {depth} bits and no value above {top}: either dark, or not "
            "spread over 16 bits as PNG asks for. Save it with values up to 65535 for white, or in 8 bits."
        )
        raise RefusedError(msg)
    return full


def check_high_bytes(colours: npt.NDArray[np.uint8], path: Path | str) -> None:
    """Refuse the high bytes of a 16-bit image if its values may have 12 bits.

    Raises:
        RefusedError: If none is above 4095.
    """
    if 0 < colours.max() <= _WHITE_OF_12_BITS >> 8:
        raise unknown_depth(path)


def unknown_depth(path: Path | str) -> RefusedError:
    """Make the error that says that white is not known."""
    return RefusedError(
        f"{path}: 16-bit image with no value above {_WHITE_OF_12_BITS}, which looks like 12 bits in 16: its white is "
        "not known. Save it with values up to 65535 for white, or in 8 bits; a TIFF may tell its depth in the tag "
        "MaxSampleValue (4095 for 12 bits)."
    )


def transparent(path: Path | str) -> RefusedError:
    """Make the error that says that pixels are transparent."""
    return RefusedError(f"{path}: has transparent pixels, whose colour is not known. Flatten it on a background.")
