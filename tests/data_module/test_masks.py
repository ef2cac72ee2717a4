# SPDX-License-Identifier: Apache-2.0
"""Masks of every kind: the right pixels, an error, or a warning; never most of an image as a defect without a word."""

import io
import logging
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from anomalib.data.utils import read_mask as anomalib_reads_mask
from PIL import Image, ImageFilter
from torchvision import tv_tensors

from anomalib_uniass.data import Unified
from anomalib_uniass.data.checks import check_samples
from anomalib_uniass.data.masks import examine_mask, read_mask
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.image_files import Writer, chunk, cut, exif, jpeg2000, pages, pillow, plain_pnm, png, text, tiff

HEIGHT, WIDTH = 8, 12
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(1, 256, (HEIGHT, WIDTH), np.uint8)
DEFECT = np.zeros((HEIGHT, WIDTH), bool)
DEFECT[2:5, 3:9] = True
CLASSES = DEFECT.astype(np.uint8)  # two of them, side by side
CLASSES[2:5, 6:9] = 2
OPAQUE = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)


def coloured_mask(*, hidden: int) -> np.ndarray:
    """Red where the defect is, transparent elsewhere over a hidden colour."""
    red = np.where(DEFECT[..., None], [255, 0, 0, 255], [hidden, hidden, hidden, 0])
    return red.astype(np.uint8)


def colours(first: tuple[int, ...], second: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    """Two classes by colour on black."""
    return np.array([(0,) * len(first), first, second])[CLASSES].astype(dtype)


def palette(*entries: tuple[int, int, int], numbers: np.ndarray = CLASSES, **options: Any) -> Writer:
    def write(path: Path) -> None:
        image = Image.fromarray(numbers)
        image.putpalette([value for entry in entries for value in entry])
        image.save(path, **options)

    return write


def deep_palette(*entries: int) -> Writer:
    table = np.zeros((3, 256), np.uint16)
    table[:, : len(entries)] = entries
    return tiff(CLASSES, photometric="palette", colormap=table)


def sixteen(array: np.ndarray, **options: Any) -> Writer:
    return png(array.astype(np.uint16), colour={1: 0, 2: 4, 3: 2, 4: 6}[array.shape[-1]], depth=16, **options)


def bilevel_tiff(array: np.ndarray, white: int) -> Writer:
    """A TIFF of one bit as fax programs write it, white being 0 or 1, in the hand of no library."""
    bits = np.packbits(array if white else ~array, axis=1).tobytes()
    tags = [(256, 3, 1, WIDTH), (257, 3, 1, HEIGHT), (258, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, white)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, HEIGHT), (279, 4, 1, len(bits))]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    offset = 8 + len(bits)
    return text(
        b"II*\0" + struct.pack("<I", offset) + bits + struct.pack("<H", len(tags)) + table + struct.pack("<I", 0)
    )


RIGHT: dict[str, Writer] = {
    "white.png": pillow(DEFECT.astype(np.uint8) * 255),
    "label.png": pillow(DEFECT.astype(np.uint8)),
    "bit.png": pillow(DEFECT),
    "white.bmp": pillow(DEFECT.astype(np.uint8) * 255),
    "white.tif": pillow(DEFECT.astype(np.uint8) * 255),
    "label16.png": pillow(DEFECT.astype(np.uint16)),
    "label256.tif": pillow(DEFECT.astype(np.uint16) * 256),
    "white16.png": pillow(DEFECT.astype(np.uint16) * 65535),
    "label32.tif": tiff(DEFECT.astype(np.int32) * 3),
    "float.tif": tiff(DEFECT.astype(np.float32) / 2),
    "label.webp": pillow(np.repeat(DEFECT[..., None], 3, -1).astype(np.uint8) * 9, lossless=True),
    "transparent.png": pillow(coloured_mask(hidden=0)),
    "opaque.png": pillow(np.concatenate([coloured_mask(hidden=0)[..., :3], OPAQUE], -1)),
    # numbers and dark colours
    "classes.png": pillow(CLASSES),
    "red 1 and 2.png": pillow(colours((1, 0, 0), (2, 0, 0))),
    "blue 4, green 1.png": pillow(colours((0, 0, 4), (0, 1, 0))),
    "blue 4.bmp": pillow(colours((0, 0, 4), (0, 0, 1))),
    "blue 4.tif": pillow(colours((0, 0, 4), (0, 0, 1))),
    "blue 4.ppm": pillow(colours((0, 0, 4), (0, 0, 1))),
    "blue 4.tga": pillow(colours((0, 0, 4), (0, 0, 1))),
    "blue 4.webp": pillow(colours((0, 0, 4), (0, 0, 1)), lossless=True),
    "opaque red 1.png": pillow(np.concatenate([colours((1, 0, 0), (2, 0, 0)), OPAQUE], -1)),
    "red 1, colour of no pixel.png": pillow(colours((1, 0, 0), (2, 0, 0)), transparency=(9, 9, 9)),
    "classes 1 and 2 of maxval 2.pgm": text(b"P5 12 8 2\n" + CLASSES.tobytes()),
    # palettes
    "palette.png": palette((0, 0, 0), (0, 0, 4), (9, 9, 9)),
    "palette.gif": palette((0, 0, 0), (0, 0, 4), (9, 9, 9)),
    "palette.bmp": palette((0, 0, 0), (0, 0, 4), (9, 9, 9)),
    "palette.tif": palette((0, 0, 0), (0, 0, 4), (9, 9, 9)),
    "black is number 2.png": palette((255, 0, 0), (0, 0, 1), (0, 0, 0), numbers=np.array([2, 1, 0], np.uint8)[CLASSES]),
    "palette, 0 is transparent.png": palette((0, 0, 0), (1, 0, 0), (9, 9, 9), transparency=0),
    "same colours of no pixel.png": palette((0, 0, 0), (0, 0, 4), (9, 9, 9), (9, 9, 9), (0, 0, 0)),
    "palette of 16 bits.tif": deep_palette(0, 256, 65535),
    # 16-bit colour
    "16 colour.png": sixteen(colours((1, 0, 0), (0, 0, 255))),
    "16 opaque.png": sixteen(np.concatenate([colours((1, 0, 0), (0, 0, 255)), OPAQUE.astype(np.uint16) * 257], -1)),
    "16 grey opaque.png": sixteen(np.stack([CLASSES, 0 * CLASSES + 255], -1)),
    "16 transparent.png": sixteen(np.stack([CLASSES, CLASSES], -1)),
    "16 key.png": sixteen(CLASSES[..., None], before=chunk(b"tRNS", b"\0\0")),
    "16 colour key.png": sixteen(colours((1, 0, 0), (2, 0, 0)), before=chunk(b"tRNS", bytes(6))),
    "key of 4 bits.png": png(
        np.packbits(np.unpackbits(CLASSES[..., None], axis=-1)[..., 4:].reshape(HEIGHT, -1), axis=1),
        colour=0,
        depth=4,
        before=chunk(b"tRNS", b"\0\0"),
    ),
    "16 colour.tif": tiff(colours((1, 0, 0), (0, 0, 255), np.uint16), photometric="rgb"),
    "16 colour planes.tif": tiff(
        colours((1, 0, 0), (0, 0, 255), np.uint16).transpose(2, 0, 1).copy(),
        photometric="rgb",
        planarconfig="separate",
    ),
    "16 colour.ppm": text(b"P6 12 8 65535\n" + colours((1, 0, 0), (0, 0, 255)).astype(">u2").tobytes()),
    "10 colour.ppm": text(b"P6 12 8 1023\n" + colours((1, 0, 0), (0, 0, 255)).astype(">u2").tobytes()),
    "12 plain colour.ppm": plain_pnm(colours((1, 0, 0), (0, 0, 255)), 4095),
    "12.pgm": text(b"P5 12 8 4095\n" + CLASSES.astype(">u2").tobytes()),
    "12 bits.jp2": jpeg2000(DEFECT.astype(np.uint16) * 4095, 12),
    "12 bits of colour.jp2": jpeg2000(colours((4095, 0, 0), (0, 0, 4095), np.uint16), 12),
    "classes without loss.jp2": pillow(CLASSES),
    "12 bits without loss.j2k": jpeg2000(CLASSES.astype(np.uint16), 12),
    "label with EXIF.webp": pillow(colours((1, 0, 0), (0, 0, 9)), lossless=True, exif=exif(1)),
    # numbers of other kinds
    "ids of 32 bits.tif": tiff(np.array([0, 2**31, 2**32 - 1], np.uint32)[CLASSES]),
    "ids of 64 bits.tif": tiff(CLASSES.astype(np.uint64) << np.uint64(40)),
    "signed.tif": tiff(CLASSES.astype(np.int16)),
    "half.tif": tiff(CLASSES.astype(np.float16) / 9),
    "double.tif": tiff(CLASSES / 9),
    "colour of 32 bits.tif": tiff(colours((1, 0, 0), (0, 0, 2), np.uint32), photometric="rgb"),
    "12 bits.tif": tiff(CLASSES.astype(np.uint16), bitspersample=12),
    "lzw 16.tif": tiff(CLASSES.astype(np.uint16), compression="lzw"),
    "big-endian BigTIFF.tif": tiff(CLASSES.astype(np.uint16), byteorder=">", bigtiff=True),
    "a channel for each class.tif": tiff(
        np.stack([CLASSES == 1, CLASSES == 2], -1).astype(np.uint8), photometric="minisblack", planarconfig="contig"
    ),
    "five channels.tif": tiff(
        np.stack([CLASSES == 1, 0 * CLASSES, CLASSES == 2, 0 * CLASSES, 0 * CLASSES]).astype(np.uint8),
        photometric="minisblack",
        planarconfig="separate",
    ),
    # white is zero
    "bool.tif": tiff(DEFECT),
    "bool zlib.tif": tiff(DEFECT, compression="zlib"),
    "fax, white is 0.tif": bilevel_tiff(DEFECT, white=0),
    "fax, white is 1.tif": bilevel_tiff(DEFECT, white=1),
    "8 white is zero.tif": tiff(255 - CLASSES, photometric="miniswhite"),
    "16 white is zero.tif": tiff(65535 - CLASSES.astype(np.uint16), photometric="miniswhite"),
    "32 white is zero.tif": tiff(2**32 - 1 - CLASSES.astype(np.uint32), photometric="miniswhite"),
    "12 white is zero.tif": tiff(4095 - CLASSES.astype(np.uint16), photometric="miniswhite", bitspersample=12),
    "black defect of P1.pbm": text(f"P1\n12 8\n{' '.join(map(str, (~DEFECT).astype(int).ravel()))}\n".encode()),
    # painted on nothing
    "black on transparent.png": pillow(np.concatenate([np.repeat(0 * OPAQUE, 3, -1), OPAQUE * DEFECT[..., None]], -1)),
    "half transparent.png": pillow(np.concatenate([np.repeat(0 * OPAQUE, 3, -1), OPAQUE // 9 * DEFECT[..., None]], -1)),
    "grey on transparent.png": pillow(np.stack([CLASSES, CLASSES * 100], -1)),
    # inks
    "cmyk.tif": lambda path: Image.fromarray(colours((9, 0, 0), (0, 0, 9))).convert("CMYK").save(path),
    "turned.png": pillow(np.rot90(CLASSES).copy(), exif=exif(6)),
    "turned 16 colour.tif": tiff(
        np.rot90(colours((1, 0, 0), (0, 0, 2), np.uint16)).copy(), photometric="rgb", extratags=[(274, "H", 1, 6, True)]
    ),
}

REFUSED: dict[str, tuple[Writer, str]] = {
    "pages.tif": (pages(GREY), "TIFF with 2 pictures"),
    "pages of 16 bits.tif": (tiff(np.stack([CLASSES, CLASSES]).astype(np.uint16)), "TIFF with 2 pictures"),
    "moving.gif": (pages(GREY), "GIF with 2 pictures"),
    "hidden.png": (pillow(coloured_mask(hidden=255)), "transparent pixels that are not black"),
    "hidden 16.png": (sixteen(np.stack([0 * CLASSES + 1, CLASSES], -1)), "transparent pixels that are not black"),
    "black and red on transparent.png": (
        pillow(np.concatenate([colours((0, 0, 0), (9, 0, 0)), OPAQUE * DEFECT[..., None]], -1)),
        "transparent pixels, black ones and others.*Flatten it on black",
    ),
    "words.png": (text(b"mask"), "no image"),
    "words.tif": (text(b"II*\0 this is none"), "unreadable"),
    "cut.png": (cut(pillow(GREY), 0.6), "unreadable"),
    "cut.tif": (cut(tiff(GREY.astype(np.uint16)), 0.7), "unreadable"),
    "cut lzw.tif": (cut(tiff(GREY.astype(np.uint16), compression="lzw"), 0.5), "unreadable"),
    "nothing.png": (lambda _: None, "missing"),
    "two blacks.png": (
        palette((0, 0, 0), (0, 0, 0), (9, 9, 9)),
        r"colour \(0, 0, 0\) for the numbers 0 and 1.*cannot be told apart.*as grey",
    ),
    "two reds.gif": (palette((0, 0, 0), (200, 0, 0), (200, 0, 0)), "numbers 1 and 2.*cannot be told apart"),
    "low colours of 16 bits.tif": (deep_palette(0, 1, 255), r"numbers 0 and 1.*cannot be told apart"),
    "white palette.png": (
        palette((255, 255, 255), (255, 0, 0), numbers=DEFECT.astype(np.uint8)),
        r"without a black pixel, from \(255, 0, 0\) to \(255, 255, 255\).*background is not known.*0 \(black\)",
    ),
    "CVAT.png": (
        pillow(np.where(DEFECT[..., None], [176, 112, 32], [48, 112, 32]).astype(np.uint8)),
        r"without a black pixel, from \(48, 112, 32\) to \(176, 112, 32\)",
    ),
    "background is 1.png": (pillow(CLASSES + np.uint8(1)), "without a black pixel, from 1 to 3"),
    "a channel for good, too.tif": (
        tiff(np.stack([~DEFECT, DEFECT], -1).astype(np.uint8), photometric="minisblack", planarconfig="contig"),
        r"without a black pixel, from \(1, 0\) to \(0, 1\)",
    ),
    "probabilities.tif": (
        tiff(np.where(DEFECT, 0.97, 0.01).astype(np.float32)),
        "without a black pixel, from 0.01 to 0.97.*cut at a probability",
    ),
    "NaN.tif": (tiff(np.where(DEFECT, np.nan, 0).astype(np.float32)), "no numbers"),
    "infinite.tif": (tiff(np.where(DEFECT, np.inf, 0).astype(np.float32)), "infinite"),
    "minus 1.tif": (tiff(CLASSES.astype(np.int32) - 1), "values below 0, down to -1"),
    "minus 1 of 8 bits.tif": (tiff(CLASSES.astype(np.int8) - 1), "values below 0"),
    "minus 0.5.tif": (tiff(CLASSES.astype(np.float32) - 0.5), "values below 0, down to -0.5"),
    "white is 0.0.tif": (tiff(CLASSES.astype(np.float32), photometric="miniswhite"), "white is 0, of signed or fl"),
    "lab.tif": (lambda path: Image.frombytes("LAB", (12, 8), bytes(288)).save(path), r"L\*a\*b\*"),
    "16 colour.sgi": (pillow(CLASSES, bpc=2), "16 bits in SGI, of which Pillow reads 8"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_mask_is_what_is_above_zero(tmp_path: Path, name: str) -> None:
    RIGHT[name](tmp_path / name)
    mask = read_mask(tmp_path / name)
    assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.uint8
    np.testing.assert_array_equal(mask, DEFECT)


@pytest.mark.parametrize("name", REFUSED)
def test_mask_refused_by_name(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: .*{message}"):
        read_mask(tmp_path / name)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(name)}: .*{message}.*mask of .*image.png"):
        check(tmp_path, tmp_path / name)


def check(folder: Path, *masks: Path, size: tuple[int, int] = (WIDTH, HEIGHT), each: bool = False) -> None:
    """Check masks of one image, or of an image each."""
    Image.effect_noise(size, 50).save(folder / "image.png")
    names = [[str(mask)] for mask in masks] if each else [[str(mask) for mask in masks]]
    rows = [{"image_path": str(folder / "image.png"), "label_index": 1, "mask_path": name} for name in names]
    check_samples(pd.DataFrame(rows), needs_masks=True)


def test_no_right_mask_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, write in RIGHT.items():
        write(tmp_path / name)
    check(tmp_path, *(tmp_path / name for name in RIGHT), each=True)
    assert not caplog.records


# --- lossy formats ---


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.jp2", "jpeg.tif"])
def test_compression_noise_is_no_defect(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    defect = np.zeros((64, 64), bool)
    defect[13:38, 21:47] = True
    options: dict[str, dict[str, Any]] = {
        "a.jpg": {"quality": 50},
        "a.webp": {"quality": 30},
        "a.jp2": {"irreversible": True, "quality_layers": [9]},
        "jpeg.tif": {"compression": "jpeg", "quality": 50},
    }
    pillow(defect.astype(np.uint8) * 255, **options[name])(tmp_path / name)
    assert anomalib_reads_mask(tmp_path / name, as_tensor=True).sum() > defect.sum()  # the noise is there
    assert (read_mask(tmp_path / name).numpy() != defect).sum() <= 4
    check(tmp_path, tmp_path / name, size=(64, 64))
    assert not caplog.records


def test_red_and_blue_of_a_jpeg_are_defects(tmp_path: Path) -> None:
    defect = np.zeros((64, 64, 3), np.uint8)
    defect[16:32, 16:48] = 255, 0, 0
    defect[32:48, 16:48] = 0, 0, 255
    pillow(defect, quality=95, subsampling=0)(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.jpg"), defect.any(axis=-1))


def test_grey_classes_of_a_jpeg_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes = np.zeros((64, 64), np.uint8)
    classes[8:24, 8:24], classes[40:56, 40:56] = 100, 250
    pillow(classes, quality=90)(tmp_path / "a.jpg")
    check(tmp_path, tmp_path / "a.jpg", size=(64, 64))
    (record,) = caplog.records
    assert re.search(r"lossy format.*\n.*a.jpg: as large as \d+ % of its defects", record.getMessage())
    assert read_mask(tmp_path / "a.jpg").sum() < 300


# --- what is said before training ---


def test_black_masks_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask, black, ones = (tmp_path / name for name in ("mask.png", "black.png", "ones.jpg"))
    pillow(DEFECT)(mask)
    pillow(DEFECT & False)(black)
    pillow(DEFECT.astype(np.uint8))(ones)
    check(tmp_path, mask)
    check(tmp_path, black, mask)  # one mask of several, as in MVTec LOCO
    assert not caplog.records
    check(tmp_path, *[black] * 6, ones, each=True)
    assert "7 masks of anomalous images are all black" in caplog.text and "and 2 more" in caplog.text
    assert caplog.text.count("black.png") == 5


@pytest.mark.parametrize(
    ("name", "write", "share", "border"),
    [
        ("black on white.png", pillow((~DEFECT).astype(np.uint8) * 255), 81, 100),
        ("all white.png", pillow(np.full_like(CLASSES, 255)), 100, 100),
        ("all ones.tif", tiff(np.ones_like(CLASSES)), 100, 100),
        ("bits.png", pillow(~DEFECT), 81, 100),
        ("16.png", pillow((~DEFECT).astype(np.uint16)), 81, 100),
        ("PBM of ones.pbm", text(f"P1\n12 8\n{' '.join(map(str, DEFECT.astype(int).ravel()))}\n".encode()), 81, 100),
        ("palette.png", palette((255, 255, 255), (0, 0, 0), (0, 0, 9)), 91, 100),
        ("white is zero.tif", tiff(np.where(DEFECT, 65535, 0).astype(np.uint16), photometric="miniswhite"), 81, 100),
        ("a.jpg", pillow((~np.pad(DEFECT, 8)).astype(np.uint8) * 255), 97, 100),
        ("frame.png", pillow(np.pad(np.zeros((6, 10), np.uint8), 1, constant_values=255)), 38, 100),
        ("large.png", pillow(np.pad(np.full((7, 11), 9, np.uint8), ((1, 0), (1, 0)))), 80, 45),
    ],
)
def test_a_background_that_is_not_black_is_named_with_its_share(
    tmp_path: Path, name: str, write: Writer, share: int, border: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        size = image.size
    pillow(DEFECT)(tmp_path / "right.png")
    check(tmp_path, tmp_path / name, size=size)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("1 masks call most of their area or of their border a defect") and "make it black" in text
    found = re.search(rf"{re.escape(str(tmp_path / name))}: (\d+) % of the area, (\d+) % of the border", text)
    assert found is not None
    assert abs(int(found[1]) - share) <= 1 and abs(int(found[2]) - border) <= 9


SOFTEN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "lanczos": lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
    "bicubic": lambda image: image.resize((64, 64), Image.Resampling.BICUBIC),
    "bilinear": lambda image: image.resize((64, 64), Image.Resampling.BILINEAR),
    "enlarged": lambda image: image.resize((1024, 1024), Image.Resampling.LANCZOS),
    "blur 1": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "blur 3": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "jpeg": lambda image: again(image, quality=75),
    "coarse jpeg": lambda image: again(image, quality=30),
    "webp": lambda image: again(image, format="WEBP", quality=50).convert("L"),
    "rgb": lambda image: image.convert("RGB").filter(ImageFilter.GaussianBlur(1)),
}


def again(image: Image.Image, format: str = "JPEG", **options: Any) -> Image.Image:
    """Save in a lossy format and read."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.fixture(scope="module")
def shapes() -> Image.Image:
    """A disc and a box, 256 pixels."""
    mask = np.zeros((256, 256), np.uint8)
    cv2.circle(mask, (90, 80), 30, 255, -1)
    mask[150:201, 120:183] = 255
    return Image.fromarray(mask)


@pytest.mark.parametrize("how", SOFTEN)
@pytest.mark.parametrize("deep", [False, True])
def test_soft_edges_are_named_with_the_share_by_which_defects_grow(
    tmp_path: Path, how: str, deep: bool, shapes: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    soft = np.asarray(SOFTEN[how](shapes))
    Image.fromarray(soft).save(tmp_path / "soft.png")
    if deep:
        tifffile.imwrite(tmp_path / "soft.tif", soft.astype(np.float32) / 255)
    path = tmp_path / ("soft.tif" if deep else "soft.png")
    brightest = soft if soft.ndim == 2 else soft.max(axis=-1)
    expected = (brightest > 0).sum() / (brightest > brightest.max() / 2).sum() - 1
    assert examine_mask(path, max_megapixels=1.1).growth == pytest.approx(expected, abs=1e-6)
    assert expected > 0.02
    assert read_mask(path).sum() == (brightest > 0).sum()  # the rule: all above black
    check(tmp_path, path, size=soft.shape[1::-1])
    (record,) = caplog.records
    assert "1 masks have soft edges" in record.getMessage() and "by nearest pixel" in record.getMessage()
    assert f"{path}: defects larger by {round(100 * expected)} %" in record.getMessage()


def test_classes_and_sharp_masks_have_no_soft_edges(tmp_path: Path, shapes: Image.Image) -> None:
    labels = np.zeros((256, 256), np.uint8)
    for number in range(1, 31):  # overlapping discs
        centre = tuple(int(value) for value in RANDOM.integers(20, 236, 2))
        cv2.circle(labels, centre, int(RANDOM.integers(6, 18)), number, -1)
    apart = np.zeros((256, 256), np.uint8)
    apart[20, 10:200], apart[100:180, 100:180] = 1, 255  # a scratch of class 1 by itself
    colours = np.zeros((256, 256, 3), np.uint8)
    colours[50:100, 50:100], colours[90:150, 90:150] = (255, 0, 0), (0, 9, 0)
    for mask in (labels, labels.astype(np.uint16) * 9, apart, colours, np.asarray(shapes), np.asarray(shapes) // 255):
        tifffile.imwrite(tmp_path / "a.tif", mask)
        assert examine_mask(tmp_path / "a.tif", max_megapixels=1).growth == 0


def test_unified_names_what_it_was_given_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shapes: Image.Image
) -> None:
    root = make_mvtec_layout(tmp_path, ["bolt"], 256, defective=3)
    masks = [root / f"bolt/ground_truth/square/00{i}_mask.png" for i in range(3)]
    Image.fromarray(255 - np.asarray(shapes)).save(masks[0])
    SOFTEN["blur 1"](shapes).save(masks[1])
    Unified(root=root, num_workers=0).setup()
    assert re.search(rf"1 masks call most.*\n.*{masks[0]}: 9\d % of the area, 100 % of the border", caplog.text)
    assert re.search(rf"1 masks have soft edges.*\n.*{masks[1]}: defects larger by \d\d %", caplog.text)
    Image.fromarray(np.asarray(shapes) // 2 + np.uint8(1)).save(masks[2])
    with pytest.raises(ValueError, match=rf"1 of 5 images.*\n.*{masks[2]}: mask without a black pixel, from 1 to 128"):
        Unified(root=root, num_workers=0).setup()


def test_unified_has_a_limit_of_its_own_for_images_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_mvtec_layout(tmp_path, ["bolt"], 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow would refuse all of them
    datamodule = Unified(root=root, num_workers=0, max_megapixels=0.005)
    datamodule.setup()
    assert datamodule.test_data[0].image.shape == (3, 64, 64)
    with pytest.raises(
        ValueError, match=r"4 of 4 images.*\n.*000.png: 0.004096 megapixels \(64 x 64\).*max_megapixels=0.004"
    ):
        Unified(root=root, num_workers=0, max_megapixels=0.004).setup()
