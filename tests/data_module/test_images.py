# SPDX-License-Identifier: Apache-2.0
"""Files of every kind: the right values, or a word about what is wrong; in the datamodule, in INT8, in the example."""

import importlib.util
import json
import re
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageItem, MVTecADDataset, MVTecLOCODataset, PredictDataset
from anomalib.data.utils import read_image as anomalib_reads
from PIL import Image, features
from torchvision import tv_tensors
from torchvision.transforms.v2 import Resize

from anomalib_uniass.data import Unified, UnifiedDataset
from anomalib_uniass.data import png as png_file
from anomalib_uniass.data.checks import check_samples
from anomalib_uniass.data.images import check_image, image_suffixes, is_misread, read_image
from anomalib_uniass.data.masks import read_mask
from anomalib_uniass.data.opening import shown_size
from anomalib_uniass.deploy.export import calibration_images
from anomalib_uniass.prediction.folder import PredictFolder
from anomalib_uniass.prediction.reading import check_sizes_for_anomalib
from tests.helpers.datasets import make_mvtec_layout
from tests.helpers.image_files import (
    ORIENTATION,
    Writer,
    avif,
    chunk,
    cut,
    exif,
    greatest,
    jpeg2000,
    pages,
    pillow,
    plain_pnm,
    png,
    sbit,
    text,
    tiff,
)

HEIGHT, WIDTH = 8, 12
RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
GREY = RANDOM.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
RGB[0, 0], RGB[0, 1], GREY[0, :3] = 0, 255, (0, 255, 77)
DEEP = RANDOM.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
DEEP[0, :2] = 0, 65535
TWELVE = DEEP >> 4
PALETTE_INDEX = RANDOM.integers(0, 7, (HEIGHT, WIDTH), np.uint8)
COLOURS = RANDOM.integers(0, 256, (8, 3), np.uint8)
OPAQUE = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
HOLE = OPAQUE.copy()
HOLE[2, 3] = 254


def thrice(grey: np.ndarray, white: float = 255) -> np.ndarray:
    return np.repeat((grey.astype(np.float64) / white)[..., None], 3, axis=-1)


def raw(mode: str, array: np.ndarray, **options: Any) -> Writer:
    """Save the bytes of an array as they are in a mode that Pillow would convert to with losses."""
    return lambda path: Image.frombytes(mode, (WIDTH, HEIGHT), array.tobytes()).save(path, **options)


def palette(**options: Any) -> Writer:
    def write(path: Path) -> None:
        image = Image.fromarray(PALETTE_INDEX)
        image.putpalette(COLOURS.tobytes())
        image.save(path, **options)

    return write


SPREAD = (TWELVE << 4) | (TWELVE >> 8)  # 12 bits in 16 as PNG's standard has them
DEEP_RGB = RGB.astype(np.uint16) * 257 - (RGB.astype(np.uint16) > 0)  # low bytes that are no copy of the high ones
DEEP_RGB[0, 1] = 65535  # white
DEEP_RGB12 = DEEP_RGB >> 4


CODED = np.concatenate([255 - RGB, np.zeros_like(OPAQUE)], -1)  # CMYK without black

# name: how it is written, the right values (H, W, 3) or (H, W) in [0, 1], whether anomalib's reader may be taken.
RIGHT: dict[str, tuple[Writer, np.ndarray, bool]] = {
    "rgb.png": (pillow(RGB), RGB / 255, True),
    "grey.png": (pillow(GREY), thrice(GREY), True),
    "UPPER.PNG": (pillow(RGB), RGB / 255, True),
    "a png.jpg": (pillow(RGB, format="PNG"), RGB / 255, True),
    "no ending": (pillow(RGB, format="PNG"), RGB / 255, True),
    "rgb.bmp": (pillow(RGB), RGB / 255, True),
    "rgb.tif": (pillow(RGB), RGB / 255, True),
    "rgb lzw.tiff": (pillow(RGB, compression="tiff_lzw"), RGB / 255, True),
    "planes.tif": (tiff(RGB.transpose(2, 0, 1).copy(), planarconfig="separate", photometric="rgb"), RGB / 255, True),
    "rgb.webp": (pillow(RGB, lossless=True), RGB / 255, True),
    "rgb.tga": (pillow(RGB), RGB / 255, True),
    "rgb.ppm": (pillow(RGB), RGB / 255, True),
    "grey.pgm": (pillow(GREY), thrice(GREY), True),
    "rgb.jp2": (pillow(RGB), RGB / 255, True),
    "rgb.qoi": (pillow(RGB), RGB / 255, True),
    "one bit.png": (pillow(GREY > 99), thrice(GREY > 99, 1), True),
    "one bit.tif": (pillow(GREY > 99), thrice(GREY > 99, 1), True),
    "palette.png": (palette(), COLOURS[PALETTE_INDEX] / 255, True),
    "palette.bmp": (palette(), COLOURS[PALETTE_INDEX] / 255, True),
    "palette.gif": (palette(), COLOURS[PALETTE_INDEX] / 255, True),
    "cmyk.tif": (raw("CMYK", CODED), RGB / 255, True),
    "ycbcr.tif": (raw("YCbCr", np.stack([GREY, 0 * GREY + 128, 0 * GREY + 128], -1)), thrice(GREY), True),
    # alpha, but all opaque
    "opaque.png": (pillow(np.concatenate([RGB, OPAQUE], -1)), RGB / 255, False),
    "opaque.tif": (pillow(np.concatenate([RGB, OPAQUE], -1)), RGB / 255, False),
    "opaque grey.png": (pillow(np.concatenate([GREY[..., None], OPAQUE], -1)), thrice(GREY), False),
    "unused key.png": (pillow(GREY // 2, transparency=200), thrice(GREY // 2), False),
    "unused colour.png": (palette(transparency=7), COLOURS[PALETTE_INDEX] / 255, False),
    "opaque 16.png": (
        png(np.concatenate([DEEP_RGB, OPAQUE.astype(np.uint16) * 257], -1), colour=6, depth=16),
        DEEP_RGB / 65535,
        False,
    ),
    "opaque grey 16.png": (
        png(np.stack([GREY.astype(np.uint16) * 257, 0 * DEEP + 65535], -1), colour=4, depth=16),
        thrice(GREY),
        False,
    ),
    "unused key 16.png": (
        png(np.maximum(DEEP, 1), colour=0, depth=16, before=chunk(b"tRNS", b"\0\0")),
        thrice(np.maximum(DEEP, 1), 65535),
        False,
    ),
    # 16 bits
    "16.png": (pillow(DEEP), thrice(DEEP, 65535), False),
    "16.tif": (pillow(DEEP), thrice(DEEP, 65535), False),
    "16 lzw.tif": (pillow(DEEP, compression="tiff_lzw"), thrice(DEEP, 65535), False),
    "16 big-endian.tif": (tiff(DEEP, byteorder=">"), thrice(DEEP, 65535), False),
    "16 white is zero.tif": (tiff(DEEP, photometric="miniswhite"), thrice(65535 - DEEP, 65535), False),
    "16.pgm": (text(b"P5 12 8 65535\n" + DEEP.astype(">u2").tobytes()), thrice(DEEP, 65535), False),
    "16.jp2": (pillow(DEEP), thrice(DEEP, 65535), False),
    "16 colour.png": (png(DEEP_RGB, colour=2, depth=16), DEEP_RGB / 65535, False),
    "16 colour.tif": (tiff(DEEP_RGB), DEEP_RGB / 65535, False),
    "16 colour BigTIFF.tif": (tiff(DEEP_RGB, bigtiff=True, byteorder="<"), DEEP_RGB / 65535, False),
    "16 colour tiles.tif": (
        tiff(DEEP_RGB, photometric="rgb", tile=(16, 16), compression="lzw", predictor=True),
        DEEP_RGB / 65535,
        False,
    ),
    "16 opaque.tif": (
        tiff(np.concatenate([DEEP_RGB, OPAQUE.astype(np.uint16) * 257], -1), photometric="rgb"),
        DEEP_RGB / 65535,
        False,
    ),
    "16 planes.tif": (
        tiff(DEEP_RGB.transpose(2, 0, 1).copy(), planarconfig="separate", photometric="rgb", compression="zlib"),
        DEEP_RGB / 65535,
        False,
    ),
    "16 raw planes.tif": (
        tiff(DEEP_RGB.transpose(2, 0, 1).copy(), planarconfig="separate", photometric="rgb"),
        DEEP_RGB / 65535,
        False,
    ),
    "16 colour.jp2": (jpeg2000(DEEP_RGB, 16), DEEP_RGB / 65535, False),
    "16 colour.ppm": (text(b"P6 12 8 65535\n" + (RGB * np.uint16(257)).astype(">u2").tobytes()), RGB / 255, False),
    "16 colour.sgi": (pillow(GREY, bpc=2), thrice(GREY), False),
    "16 black.png": (pillow(0 * DEEP), thrice(0 * DEEP), False),
    "16 black colour.png": (png(0 * DEEP_RGB, colour=2, depth=16), 0 * RGB / 255, False),
    # less than 16 bits in 16, and the file says so
    "12 packed.tif": (tiff(TWELVE, bitspersample=12), thrice(TWELVE, 4095), False),
    "12 MaxSampleValue.tif": (tiff(TWELVE, **greatest(4095)), thrice(TWELVE, 4095), False),
    "10 MaxSampleValue.tif": (tiff(DEEP >> 6, **greatest(1023)), thrice(DEEP >> 6, 1023), False),
    "16 MaxSampleValue.tif": (tiff(DEEP // 2, **greatest(32000)), thrice(DEEP // 2, 65535), False),
    "12 sBIT.png": (png(TWELVE, colour=0, depth=16, before=sbit(12)), thrice(TWELVE, 4095), False),
    "14 sBIT.png": (png(DEEP >> 2, colour=0, depth=16, before=sbit(14)), thrice(DEEP >> 2, 16383), False),
    "12 spread sBIT.png": (png(SPREAD, colour=0, depth=16, before=sbit(12)), thrice(SPREAD, 65535), False),
    "16 sBIT.png": (png(DEEP, colour=0, depth=16, before=sbit(16)), thrice(DEEP, 65535), False),
    "12.pgm": (text(b"P5 12 8 4095\n" + TWELVE.astype(">u2").tobytes()), thrice(TWELVE, 4095), False),
    "12 dark.pgm": (text(b"P5 12 8 4095\n" + (TWELVE >> 5).astype(">u2").tobytes()), thrice(TWELVE >> 5, 4095), False),
    **{
        f"{bits} {name}.{ending}": (jpeg2000(values >> (16 - bits), bits), shown(values >> (16 - bits)), False)
        for bits in (9, 10, 12, 14, 15)
        for ending in ("jp2", "j2k")
        for name, values, shown in (
            ("grey", DEEP, lambda values, white=2**bits - 1: thrice(values, white)),
            ("colour", DEEP_RGB, lambda values, white=2**bits - 1: values / white),
        )
    },
    "10 dark.jp2": (jpeg2000(DEEP >> 9, 10), thrice(DEEP >> 9, 1023), False),
    "12 opaque.jp2": (
        jpeg2000(np.concatenate([DEEP_RGB12, OPAQUE.astype(np.uint16) * 0 + 4095], -1), 12),
        DEEP_RGB12 / 4095,
        False,
    ),
    "12 MaxSampleValue colour.tif": (tiff(DEEP_RGB12, **greatest(4095)), DEEP_RGB12 / 4095, False),
    "14 MaxSampleValue colour.tif": (tiff(DEEP_RGB >> 2, **greatest(16383)), (DEEP_RGB >> 2) / 16383, False),
    "14 sBIT colour.png": (
        png(DEEP_RGB >> 2, colour=2, depth=16, before=sbit(14, 14, 14)),
        (DEEP_RGB >> 2) / 16383,
        False,
    ),
    "10 colour.ppm": (text(b"P6 12 8 1023\n" + (DEEP_RGB >> 6).astype(">u2").tobytes()), (DEEP_RGB >> 6) / 1023, False),
    "12 plain colour.ppm": (plain_pnm(DEEP_RGB12, 4095), DEEP_RGB12 / 4095, False),
    # EXIF that is none, and colours that are no orientation
    "broken exif.png": (pillow(RGB, exif=b"Exif\0\0what is this"), RGB / 255, True),
    "orientation 0.png": (pillow(RGB, exif=exif(0)), RGB / 255, False),
    "comment.png": (png(RGB, colour=2, depth=8, before=chunk(b"tEXt", b"Software\0me")), RGB / 255, True),
}

# name: how it is written, what is said about it.
REFUSED: dict[str, tuple[Writer, str]] = {
    "hole.png": (pillow(np.concatenate([RGB, HOLE], -1)), "transparent pixels.*Flatten"),
    "hole.tif": (pillow(np.concatenate([RGB, HOLE], -1)), "transparent pixels"),
    "hole.webp": (pillow(np.concatenate([RGB, HOLE * 0], -1), lossless=True), "transparent pixels"),
    "hole grey.png": (pillow(np.concatenate([GREY[..., None], HOLE], -1)), "transparent pixels"),
    "hole.gif": (palette(transparency=int(PALETTE_INDEX[0, 0])), "transparent pixels"),
    "hole palette.png": (palette(transparency=int(PALETTE_INDEX[0, 0])), "transparent pixels"),
    "hole palette.tif": (raw("PA", np.stack([GREY, GREY], -1)), "transparent pixels"),
    "key.png": (pillow(GREY, transparency=77), "transparent pixels"),
    "colour key.png": (pillow(RGB, transparency=(255, 255, 255)), "transparent pixels"),
    "key of 4 bits.png": (png(GREY, colour=0, depth=4, before=chunk(b"tRNS", b"\0\x0f")), "transparent pixels"),
    "key of 16 bits.png": (png(DEEP, colour=0, depth=16, before=chunk(b"tRNS", b"\xff\xff")), "transparent pixels"),
    "colour key of 16 bits.png": (
        png(DEEP_RGB, colour=2, depth=16, before=chunk(b"tRNS", DEEP_RGB[0, 0].astype(">u2").tobytes())),
        "transparent pixels",
    ),
    "hole 16.png": (png(np.stack([DEEP, DEEP], -1), colour=4, depth=16), "transparent pixels"),
    "pages.tif": (pages(RGB), "TIFF with 2 pictures.*by itself"),
    "moving.gif": (pages(GREY), "GIF with 2 pictures"),
    "moving.png": (pages(RGB), "PNG with 2 pictures"),
    "moving.webp": (pages(RGB, lossless=True), "WEBP with 2 pictures"),
    "32 bits.tif": (tiff(DEEP.astype(np.int32)), "TIFF with 32-bit or signed values.*white is not known.*16-bit"),
    "unsigned 32 bits.tif": (tiff(DEEP.astype(np.uint32)), "32-bit"),
    "signed 16 bits.tif": (tiff(TWELVE.astype(np.int16)), "signed"),
    "float.tif": (tiff((GREY / 255).astype(np.float32)), "floating-point values"),
    "float.pfm": (pillow(GREY, mode="F"), "floating-point values"),
    "double.tif": (tiff(GREY / 255), "unreadable"),
    "lab.tif": (raw("LAB", RGB), r"L\*a\*b\*"),
    "12 in 16.png": (pillow(TWELVE), "looks like 12 bits in 16.*65535 for white.*MaxSampleValue"),
    "12 in 16.tif": (pillow(TWELVE), "looks like 12 bits"),
    "10 in 16.tif": (pillow(DEEP >> 6), "looks like 12 bits"),
    "12 in 16.jp2": (pillow(TWELVE), "looks like 12 bits"),
    "12 in 16.pgm": (text(b"P5 12 8 65535\n" + TWELVE.astype(">u2").tobytes()), "looks like 12 bits"),
    "12 in 16 colour.png": (png(DEEP_RGB >> 4, colour=2, depth=16), "looks like 12 bits"),
    "12 in 16 colour.tif": (tiff(DEEP_RGB >> 4), "looks like 12 bits"),
    "12 in 16 opaque.png": (
        png(np.concatenate([DEEP_RGB >> 4, OPAQUE.astype(np.uint16) * 257], -1), colour=6, depth=16),
        "looks like 12 bits",
    ),
    "one in 16.png": (pillow((DEEP > 9).astype(np.uint16)), "looks like 12 bits"),
    "said 12, is 16.tif": (tiff(DEEP, **greatest(4095)), "tells 12 bits per pixel but has values up to 65535"),
    "dark sBIT.png": (png(TWELVE & 0xFF0, colour=0, depth=16, before=sbit(12)), "sBIT chunk of 12 bits.*either dark"),
    "hole 12.jp2": (jpeg2000(np.concatenate([DEEP_RGB12, HOLE.astype(np.uint16) * 16], -1), 12), "transparent pixels"),
    "12 in 16 colour.jp2": (jpeg2000(DEEP_RGB12, 16), "looks like 12 bits"),
    "signed.jp2": (jpeg2000(DEEP_RGB12.astype(np.int16), 12), "JPEG 2000 with signed values.*white is not known"),
    "said 12, is 16 colour.tif": (
        tiff(DEEP_RGB, **greatest(4095)),
        "tells 12 bits per pixel but has values up to 65535",
    ),
    "cut 12.jp2": (cut(jpeg2000(DEEP_RGB12, 12), 0.5), "unreadable"),
    "cut 16 colour.tif": (cut(tiff(DEEP_RGB), 0.7), "unreadable"),
    "cut 16 colour.png": (cut(png(DEEP_RGB, colour=2, depth=16), 0.7), "unreadable"),
    "16.im": (pillow(DEEP), "16-bit IM, whose white is not known"),
    "16 raw planes of ink.tif": (
        tiff(
            np.concatenate([DEEP_RGB, DEEP_RGB[..., :1]], -1).transpose(2, 0, 1).copy(),
            planarconfig="separate",
            photometric="separated",
        ),
        "plane for each ink",
    ),
    "cut.png": (cut(pillow(RGB), 0.7), "unreadable"),
    "cut.jpg": (cut(pillow(RGB), 0.9), "unreadable"),
    "cut.bmp": (cut(pillow(RGB), 0.7), "unreadable"),
    "cut.tif": (cut(pillow(DEEP), 0.7), "unreadable"),
    "cut.webp": (cut(pillow(RGB), 0.7), "unreadable"),
    "cut.jp2": (cut(pillow(RGB), 0.5), "unreadable"),
    "no bytes.png": (text(b""), "unreadable"),
    "words.png": (text(b"this is no image"), "no image, or of a kind that Pillow does not read"),
    "Thumbs.db": (text(b"\xd0\xcf\x11\xe0" * 100), "no image"),
    "folder.png": (Path.mkdir, "missing"),
    "nothing.png": (lambda _: None, "missing"),
}
# What the example, which needs Pillow alone, refuses and we read.
LEFT_TO_US = {
    *(name for name in RIGHT if name.endswith(("jp2", "j2k")) and name not in ("rgb.jp2", "16.jp2")),
    "12 MaxSampleValue colour.tif",
    "14 MaxSampleValue colour.tif",
    "14 sBIT colour.png",
    "16 raw planes.tif",
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    file = Path(__file__).parents[2] / "examples" / "openvino_predict.py"
    spec = importlib.util.spec_from_file_location("openvino_predict", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_reads(path: Path, expected: np.ndarray, tolerance: float = 1e-7) -> None:
    image = read_image(path)
    assert isinstance(image, tv_tensors.Image) and image.dtype == torch.float32
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, rtol=0, atol=tolerance)
    assert check_image(path) == ((expected.shape[1], expected.shape[0]), None)
    if not is_misread(path):
        assert torch.equal(image, anomalib_reads(path, as_tensor=True))


@pytest.mark.parametrize("name", RIGHT)
def test_read_right(tmp_path: Path, name: str, example: ModuleType) -> None:
    write, expected, plain = RIGHT[name]
    write(tmp_path / name)
    assert_reads(tmp_path / name, expected, 2e-5 if name == "12.pgm" or name == "12 dark.pgm" else 1e-7)
    assert is_misread(tmp_path / name) is not plain
    if name in LEFT_TO_US:
        with pytest.raises((ValueError, SyntaxError)):
            example.read(tmp_path / name)
    else:
        # The example reads colours at 8 bits, as Pillow has them.
        ours = read_image(tmp_path / name).permute(1, 2, 0)
        coarse = any(part in name for part in ("colour", "opaque 16", "16 opaque", "16 planes"))
        np.testing.assert_allclose(example.read(tmp_path / name), ours, rtol=0, atol=1 / 255 if coarse else 1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path: Path, name: str, example: ModuleType) -> None:
    write, message = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(tmp_path / name))}: .*{message}"):
        read_image(tmp_path / name)
    size, problem = check_image(tmp_path / name)
    assert size == (0, 0) and problem is not None and re.search(message, problem)
    if message not in ("unreadable",):
        assert is_misread(tmp_path / name)
    with pytest.raises(Exception, match=r"\w"):
        example.read(tmp_path / name)


def test_photographs_above_the_limit_of_pillow_are_read_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    files: dict[str, Writer] = {f"a.{ending}": pillow(RGB) for ending in ("png", "tif", "bmp", "ppm")}
    files |= {"white is zero.tif": tiff(GREY, photometric="miniswhite"), "planes.tif": RIGHT["planes.tif"][0]}
    files |= {"a.gif": palette(), "16.png": pillow(DEEP), "turned.png": pillow(RGB, exif=exif(6))}
    for name, write in files.items():
        write(tmp_path / name)
    expected = {name: read_image(tmp_path / name) for name in files}
    for limit in (HEIGHT * WIDTH - 1, HEIGHT * WIDTH // 2 - 1):  # Pillow warns above the first, refuses twice the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for name in files:
            torch.testing.assert_close(read_image(tmp_path / name), expected[name], rtol=0, atol=1e-7, msg=name)
            assert check_image(tmp_path / name)[1] is None and is_misread(tmp_path / name)
            assert shown_size(tmp_path / name) == ((8, 12) if name == "turned.png" else (12, 8))
        read_mask(tmp_path / "a.png")
        assert limit == Image.MAX_IMAGE_PIXELS
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]
    monkeypatch.undo()
    assert not is_misread(tmp_path / "a.png")


def test_a_limit_of_the_user_names_file_size_and_argument(tmp_path: Path) -> None:
    pillow(np.zeros((500, 1000), np.uint8))(tmp_path / "large.png")
    assert check_image(tmp_path / "large.png", max_megapixels=0.5) == ((1000, 500), None)
    message = r"large.png: 0.5 megapixels \(1000 x 500\), more than max_megapixels=0.4\..*`--data.max_megapixels 1`.*GB"
    size, problem = check_image(tmp_path / "large.png", max_megapixels=0.4)
    assert size == (0, 0) and problem is not None and re.search(message, problem)
    pillow(GREY)(tmp_path / "small.png")
    for limit, write in ((0.4, pillow), (0.4, tiff)):
        write(np.zeros((500, 1000), np.uint16))(tmp_path / "mask.tif")
        with pytest.raises(ValueError, match=r"mask.tif: 0.5 megapixels.*mask of .*small.png"):
            check_samples(
                samples(tmp_path / "small.png", tmp_path / "mask.tif"), needs_masks=True, max_megapixels=limit
            )


def test_header_of_a_huge_file_is_refused_before_its_pixels_are_read(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    _, problem = check_image(tmp_path / "bomb.png")
    assert problem is not None and "3600 megapixels (60000 x 60000), more than max_megapixels=300." in problem


def test_what_anomalibs_own_dataset_cannot_read_is_named_before_a_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow(RGB)(tmp_path / "large.png")
    check_sizes_for_anomalib([tmp_path / "large.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        PredictDataset(tmp_path)[0]
    with pytest.raises(ValueError, match=r"(?s)1 of 1 images are too large.*large.png.*--data PredictFolder"):
        check_sizes_for_anomalib([tmp_path / "large.png"])
    assert torch.equal(PredictFolder(tmp_path)[0].image, read_image(tmp_path / "large.png"))


@pytest.mark.slow
def test_a_photograph_of_190_megapixels_passes_the_check(tmp_path: Path) -> None:
    Image.new("1", (19000, 10000)).save(tmp_path / "large.png")
    assert check_image(tmp_path / "large.png") == ((19000, 10000), None)
    assert read_mask(tmp_path / "large.png").shape == (10000, 19000)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_white_of_avif_is_white(tmp_path: Path, bits: int) -> None:
    white = 2**bits - 1
    values = np.full((64, 64, 3), white, np.uint8 if bits == 8 else np.uint16)
    values[32:] = white // 2
    avif(values, bits)(tmp_path / "a.avif")
    assert_reads(tmp_path / "a.avif", values / white, 2 / 255)


# --- broken pixels ---


def test_png_with_right_checksums_around_broken_pixels_is_found_before_training(tmp_path: Path) -> None:
    photo = RANDOM.integers(0, 256, (64, 48, 3), np.uint8)
    good = photo.tobytes()
    rows = b"".join(b"\0" + good[i : i + 144] for i in range(0, len(good), 144))
    broken = {
        "short.png": zlib.compress(rows[:-700]),
        "garbled.png": zlib.compress(rows)[:4000] + bytes(900) + zlib.compress(rows)[4900:],
        "filter.png": zlib.compress(rows[:1450] + b"\x07" + rows[1451:]),
        "empty.png": b"",
    }
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 64, 8, 2, 0, 0, 0))

    def write(name: str, *parts: bytes) -> Path:
        content = b"".join(chunk(b"IDAT", part) for part in parts)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b""))
        return tmp_path / name

    for name, data in broken.items():
        path = write(name, data[:1000], data[1000:])
        with Image.open(path) as image:
            image.verify()  # what the checksums say
        with pytest.raises(ValueError, match=f"{name}: unreadable"):
            read_image(path)
        with pytest.raises(ValueError, match=rf"(?s)1 of 1 images cannot be used.*{name}: unreadable"):
            check_samples(samples(path), needs_masks=False)
    packed = zlib.compress(rows)
    for step in (1, 7, 145, 5000):  # chunks that end anywhere
        path = write("whole.png", *(packed[i : i + step] for i in range(0, len(packed), step)))
        assert png_file.is_whole(path)
        assert_reads(path, photo / 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_whole_png_are_not_decoded(tmp_path: Path, mode: str) -> None:
    for size in ((1, 1), (7, 3), (33, 9), (300, 200)):
        Image.effect_noise(size, 90).convert(mode).save(tmp_path / "a.png")
        assert png_file.is_whole(tmp_path / "a.png")
        cut(lambda path: None, 0.8)(tmp_path / "a.png")
        assert not png_file.is_whole(tmp_path / "a.png")


def test_jpeg_whose_only_end_marker_is_that_of_its_thumbnail(tmp_path: Path) -> None:
    thumbnail, whole = tmp_path / "thumbnail.jpg", tmp_path / "whole.jpg"
    Image.effect_noise((60, 40), 90).save(thumbnail)
    Image.effect_noise((200, 100), 90).save(whole, exif=b"Exif\0\0" + thumbnail.read_bytes())
    assert check_image(whole) == ((200, 100), None)
    data = whole.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: data.rfind(b"\xff\xda") + 400])
    assert b"\xff\xd9" in (tmp_path / "cut.jpg").read_bytes()[-4096:]
    _, problem = check_image(tmp_path / "cut.jpg")
    assert problem is not None and "cut.jpg: unreadable" in problem


NAN = float("nan")


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
def test_the_example_finds_nothing_good_that_is_not_finite(
    value: float,
    tmp_path: Path,
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither by the graph's label nor by a category's thresholds, nor in the tile that is not the highest."""
    for name in ("a/x/1.png", "b/x/1.png", "b/x/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pillow(RGB)(tmp_path / name)
    (tmp_path / "category_thresholds.json").write_text(json.dumps({"image": {"Größe": 0.4}, "pixel": {"Größe": 0.4}}))
    scores = iter([0.1, value, 0.2, 0.1, value, 0.2])

    def predict(*_: object) -> dict[str, Any]:
        maps = np.full((4, 4), 0.1, np.float32)
        return {"pred_score": next(scores), "pred_label": False, "anomaly_map": maps, "pred_mask": maps > 0.5}

    monkeypatch.setattr(example, "load", lambda *_: None)
    monkeypatch.setattr(example, "predict", predict)
    images = [str(tmp_path / name) for name in ("a/x/1.png", "b/x/1.png", "b/x/1.jpg")]
    for category in ([], ["--category", unicodedata.normalize("NFD", "GRÖSSE ")]):
        arguments = [str(tmp_path / "model.xml"), *images, *category, "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["example", *arguments])
        with pytest.raises(SystemExit, match="Score or map of 1 images is NaN or infinite"):
            example.main()
        decisions = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
        assert decisions == ["good", "NOT FINITE", "good"]
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == len(list((tmp_path / "out").glob("*_heatmap.png"))) == 3
    scores = iter([value, *[0.9] * 99])
    found = example.predict_by_tiles(None, np.zeros((8, 12, 3), np.float32), 8, 4)
    assert found["pred_label"] and np.isinf(found["pred_score"])


@pytest.mark.parametrize("threshold", [NAN, np.inf, None, "0.5", True, -1])
@pytest.mark.parametrize("level", ["image", "pixel"])
def test_the_example_names_a_broken_threshold(
    level: str, threshold: object, tmp_path: Path, example: ModuleType
) -> None:
    file = tmp_path / "category_thresholds.json"
    content = {"image": {"bolt": 0.4}, "pixel": {"bolt": 0.4}}
    file.write_text(json.dumps(content | {level: {"bolt": threshold}}))
    with pytest.raises(SystemExit, match=rf"{file}: the {level} threshold of 'bolt' must be a finite number"):
        example.thresholds_for("bolt", file)
    for broken in ("{", "[]", '{"image": {"bolt": 1}}', '{"image": 1, "pixel": 2}'):
        file.write_text(broken)
        with pytest.raises(SystemExit, match=r"category_thresholds\.json has no thresholds of categories"):
            example.thresholds_for("bolt", file)


def test_lossy_formats(tmp_path: Path, example: ModuleType) -> None:
    smooth = np.outer(np.linspace(20, 220, HEIGHT), np.linspace(0.7, 1, WIDTH)).astype(np.uint8)
    names = ["a.jpg", "a.jpeg", "a.JPG", "a.jfif", "a.webp", "a.j2k", *(["a.avif"] if features.check("avif") else [])]
    for name in names:
        pillow(smooth)(tmp_path / name)
        assert_reads(tmp_path / name, thrice(smooth), 10 / 255)
        assert not is_misread(tmp_path / name)
        ours = read_image(tmp_path / name).permute(1, 2, 0)
        np.testing.assert_allclose(example.read(tmp_path / name), ours, rtol=0, atol=1e-7)
    pillow(smooth, mode="CMYK")(tmp_path / "cmyk.jpg")
    assert_reads(tmp_path / "cmyk.jpg", thrice(smooth), 10 / 255)


# --- orientation ---

# What a viewer shows for each orientation, from the EXIF standard: where the first row and column go.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_of_every_format_for_images_and_masks(
    tmp_path: Path, orientation: int, example: ModuleType
) -> None:
    turn, tag = TURNED[orientation], {ORIENTATION: orientation}
    late = chunk(b"eXIf", exif(orientation)[6:])
    files: dict[str, tuple[Writer, np.ndarray]] = {
        "rgb.png": (pillow(RGB, exif=exif(orientation)), RGB / 255),
        "after the pixels.png": (png(RGB, colour=2, depth=8, after=late), RGB / 255),
        "16.png": (pillow(DEEP, exif=exif(orientation)), thrice(DEEP, 65535)),
        "rgb.webp": (pillow(RGB, exif=exif(orientation), lossless=True), RGB / 255),
        "rgb.tif": (pillow(RGB, tiffinfo=tag), RGB / 255),
        "grey.tif": (pillow(GREY, tiffinfo=tag), thrice(GREY)),
        "16.tif": (pillow(DEEP, tiffinfo=tag), thrice(DEEP, 65535)),
        "lzw.tif": (pillow(GREY, tiffinfo=tag, compression="tiff_lzw"), thrice(GREY)),
    }
    for name, (write, upright) in files.items():
        write(tmp_path / name)
        assert_reads(tmp_path / name, turn(upright))
        np.testing.assert_allclose(example.read(tmp_path / name), turn(upright), rtol=0, atol=1e-7)
        assert is_misread(tmp_path / name) or orientation == 1
        if "rgb" not in name and "after" not in name:
            np.testing.assert_array_equal(read_mask(tmp_path / name), turn(upright[..., 0]) > 0)
    for ending in ("jpg", "mpo"):
        write = pillow(RGB) if ending == "jpg" else pages(RGB)
        write(tmp_path / f"plain.{ending}")
        pillow(RGB, exif=exif(orientation))(tmp_path / "turned.jpg")
        upright = read_image(tmp_path / f"plain.{ending}").permute(1, 2, 0).numpy()
        assert_reads(tmp_path / "turned.jpg", turn(upright))
        assert is_misread(tmp_path / "turned.jpg") is (orientation != 1)


def test_first_picture_of_mpo_is_the_photograph(tmp_path: Path, example: ModuleType) -> None:
    pages(RGB)(tmp_path / "phone.jpg.mpo")
    pillow(RGB)(tmp_path / "one.jpg")
    assert Image.open(tmp_path / "phone.jpg.mpo").n_frames == 2
    expected = anomalib_reads(tmp_path / "one.jpg")
    assert_reads(tmp_path / "phone.jpg.mpo", expected)
    np.testing.assert_allclose(example.read(tmp_path / "phone.jpg.mpo"), expected, rtol=0, atol=1e-7)


def test_suffixes() -> None:
    suffixes = image_suffixes()
    assert {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".jp2"} <= suffixes
    assert not {".pdf", ".mpg", ".h5", ".wmf", ".db", ".txt", ""} & suffixes
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes)


DEFECT = np.zeros((HEIGHT, WIDTH), bool)
DEFECT[2:5, 3:9] = True


# --- before training ---


def samples(image: Path, *masks: Path, copies: int = 1) -> pd.DataFrame:
    row = {"image_path": str(image), "label_index": 1, "mask_path": [str(mask) for mask in masks]}
    return pd.DataFrame([row] * copies)


def test_check_names_every_image_that_would_be_misread(tmp_path: Path) -> None:
    names = ["hole.png", "moving.gif", "32 bits.tif", "12 in 16.png"]
    for name in names:
        REFUSED[name][0](tmp_path / name)
    pillow(DEEP)(tmp_path / "good.png")
    frame = pd.concat([samples(tmp_path / name) for name in ["good.png", *names]])
    with pytest.raises(ValueError, match="4 of 5 images cannot be used") as error:
        check_samples(frame, needs_masks=False)
    assert all(name in str(error.value) for name in names)


def test_sizes_are_compared_upright(tmp_path: Path) -> None:
    pillow(RGB, exif=exif(6))(tmp_path / "turned.jpg")
    pillow(RGB)(tmp_path / "plain.jpg")
    pillow(GREY, exif=exif(6))(tmp_path / "turned.png")
    pillow(GREY)(tmp_path / "plain.png")
    pillow(GREY.T.copy())(tmp_path / "upright.png")
    for image, mask in (("turned.jpg", "turned.png"), ("turned.jpg", "upright.png"), ("plain.jpg", "plain.png")):
        check_samples(samples(tmp_path / image, tmp_path / mask), needs_masks=True)
    with pytest.raises(ValueError, match=r"plain.png: mask of 12x8 pixels, its image .*turned.jpg has 8x12"):
        check_samples(samples(tmp_path / "turned.jpg", tmp_path / "plain.png"), needs_masks=True)


# --- the datamodule ---


def deepen(root: Path) -> None:
    """Save each 8-bit grey image and mask of a dataset with 16 bits."""
    for path in root.rglob("*.png"):
        grey = np.asarray(Image.open(path))
        assert grey.dtype == np.uint8 and grey.ndim == 2
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    """The same grey images in 8 bits and in 16."""
    roots = tmp_path / "8", tmp_path / "16"
    for root in roots:
        make_mvtec_layout(root, ["bolt", "nut"], (32, 24), train=3)
        for path in root.rglob("*.png"):
            Image.open(path).convert("L").save(path)
    deepen(roots[1])
    return roots


def unified(root: Path, **arguments: Any) -> Unified:
    arguments = {"num_workers": 0, "train_batch_size": 3, "hflip": ["nut"], "rotate": ["nut"], **arguments}
    datamodule = Unified(root=root, **arguments)
    datamodule.setup("fit")
    return datamodule


@pytest.mark.parametrize("cache_images", [False, True])
def test_16_bit_dataset_trains_on_the_pixels_of_its_8_bit_original(
    twins: tuple[Path, Path], cache_images: bool
) -> None:
    epochs = []
    for root in twins:
        data = unified(root, augmentations=Resize((16, 16)), cache_images=cache_images)
        torch.manual_seed(0)
        loader = data.train_dataloader()
        epochs.append([batch for _ in range(2) for batch in loader] + list(data.test_dataloader()))
    assert len(epochs[0]) == len(epochs[1]) > 4
    for shallow, deep in zip(*epochs, strict=True):
        torch.testing.assert_close(deep.image, shallow.image, rtol=0, atol=1e-6)
        assert shallow.image.std() > 0.05
        assert torch.equal(deep.gt_mask, shallow.gt_mask)


def test_int8_is_calibrated_with_the_pixels_of_the_8_bit_original(twins: tuple[Path, Path]) -> None:
    shallow, deep = (calibration_images(unified(root, hflip=[], rotate=[])) for root in twins)
    assert len(shallow) == len(deep) == 4
    for one, other in zip(shallow, deep, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-7)
        assert one.shape == (1, 3, 32, 24) and one.std() > 0.05


def test_datamodule_refuses_a_misread_image_before_training(twins: tuple[Path, Path]) -> None:
    path = twins[0] / "nut/train/good/001.png"
    REFUSED["hole.png"][0](path)
    with pytest.raises(ValueError, match=r"1 of \d+ images cannot be used.*\n.*nut/train/good/001.png: has tr"):
        unified(twins[0])


@pytest.mark.parametrize("turned", [False, True])
def test_items_with_jpeg_masks_and_orientation(tmp_path: Path, turned: bool) -> None:
    root = make_mvtec_layout(tmp_path, ["bolt"], (32, 24), good=0, defective=1)
    source = MVTecADDataset(root, "bolt", split="test")
    plain = UnifiedDataset.join({"bolt": source})[0]
    paths = tmp_path / "image.png", tmp_path / "mask.jpg"
    tag = {"exif": exif(6)} if turned else {}
    Image.open(source.samples.image_path[0]).save(paths[0], **tag)
    Image.open(source.samples.mask_path[0]).save(paths[1], **tag)
    source.samples[["image_path", "mask_path"]] = [str(path) for path in paths]
    item = UnifiedDataset.join({"bolt": source})[0]
    turns = -1 if turned else 0
    assert torch.equal(item.image, torch.rot90(plain.image, turns, (-2, -1)))
    expected = torch.rot90(plain.gt_mask, turns, (-2, -1))
    assert (item.gt_mask != expected).sum() <= 0.2 * expected.sum() and item.gt_mask.any()


@pytest.mark.parametrize("label", [0, 1, -1])
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_items_equal_those_of_anomalib_for_plain_files(tmp_path: Path, label: int, task: str) -> None:
    root = make_mvtec_layout(tmp_path, ["bolt"], (32, 24), good=0, defective=1)
    source = MVTecADDataset(root, "bolt", split="test", augmentations=Resize((16, 16)))
    source.samples["label_index"] = label
    source.samples.attrs["task"] = task
    joined = UnifiedDataset.join({"bolt": source})
    joined.augmentations = source.augmentations
    for name, value in vars(source[0]).items():
        ours = getattr(joined[0], name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours, value) and ours.dtype == value.dtype and type(ours) is type(value), name
        else:
            assert ours == value, name


def test_several_masks_of_16_bits(tmp_path: Path) -> None:
    root = make_mvtec_layout(tmp_path, ["bolt"], (HEIGHT, WIDTH), good=1, defective=0)
    first, second = DEFECT.copy(), np.roll(DEFECT, 3, axis=1)
    (root / "bolt/test/logical").mkdir()
    pillow(DEEP)(root / "bolt/test/logical/000.png")
    (root / "bolt/ground_truth/logical/000").mkdir(parents=True)
    pillow(first.astype(np.uint16))(root / "bolt/ground_truth/logical/000/000.png")
    pillow(second.astype(np.uint8) * 255)(root / "bolt/ground_truth/logical/000/001.png")
    with pd.option_context("future.infer_string", False):  # anomalib 2.7's MVTecLOCO fails with pandas 3
        joined = UnifiedDataset.join({"bolt": MVTecLOCODataset(root, "bolt", split="test")})
    good, anomalous = joined[0], joined[1]
    np.testing.assert_array_equal(anomalous.gt_mask, first | second)
    np.testing.assert_allclose(anomalous.image.permute(1, 2, 0), thrice(DEEP, 65535), rtol=0, atol=1e-7)
    assert not good.gt_mask.any() and good.gt_mask.shape == (HEIGHT, WIDTH)
    assert anomalous.mask_path.endswith("000/000.png")


class Reader(MVTecADDataset):
    """A source from outside anomalib that reads its files itself."""

    def __getitem__(self, index: int) -> ImageItem:
        image = tv_tensors.Image(torch.full((3, 8, 8), 0.25))
        return ImageItem(image=self.augmentations(image) if self.augmentations else image, gt_label=torch.tensor(0))


class Renamed(MVTecADDataset):
    """A source from outside anomalib that leaves reading to anomalib."""


def test_sources_from_outside_may_read_by_themselves(twins: tuple[Path, Path]) -> None:
    joined = UnifiedDataset.join({"bolt": Reader(twins[1], "bolt", split="train")})
    joined.augmentations = Resize((4, 4))
    assert torch.equal(joined[0].image, torch.full((3, 4, 4), 0.25))
    joined = UnifiedDataset.join({"bolt": Renamed(twins[1], "bolt", split="train")})
    assert torch.equal(joined[0].image, read_image(joined.samples.image_path[0]))
    assert joined[0].image.std() > 0.05
