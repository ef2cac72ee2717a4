# SPDX-License-Identifier: Apache-2.0
"""Find defects with an exported UniAS: needs openvino, numpy and pillow, neither torch nor anomalib.

    python openvino_predict.py model.xml part.png --out results
    python openvino_predict.py model.xml *.png --category bolt     # the thresholds of category_thresholds.json
    python openvino_predict.py model.xml large.png --tile_size 448 # of a model that was trained with this tile_size

Prints score and decision of each image: good, DEFECT, or NOT FINITE for what holds NaN or infinity, which is never
good and ends with exit code 1. Writes FOLDERS_NAME_KEY_heatmap.png and FOLDERS_NAME_KEY_mask.png of its size, where KEY
is made from the whole path: images of one name do not overwrite each other.
"""

import argparse
import hashlib
import io
import json
import math
import os
import struct
import unicodedata
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from PIL import Image, ImageOps

PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")


def load(path: Path, precision: str = "f32") -> ov.CompiledModel:
    """Load a model; OpenVINO by itself computes in bfloat16 where the CPU has it, and maps differ by percents."""
    model = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    if not any("pred_label" in output.names for output in model.outputs):
        raise SystemExit(f"{path} was exported without thresholds and decides nothing; calibrate the model first.")
    return model


def read(path: Path) -> np.ndarray:
    """Return an image (H, W, 3) of float32 in [0, 1], upright as EXIF tells; refuse what has no certain colours."""
    data = path.read_bytes()
    image = Image.open(io.BytesIO(data))
    mode, kind, coding = image.mode, image.format, str(image.tile[:1])
    deep = any(mark in coding for mark in (";16", "SGI16", ", 65535)")) or tag(image, 258) > 8
    grey = mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM"))  # of up to 16 bits
    if kind == "JPEG2000" and (bits := data[data.find(b"\xff\x4f\xff\x51") + 42] + 1) > 8 and not (grey and bits == 16):
        raise ValueError(f"JPEG 2000 of {bits} bits, whose white Pillow rounds, to 0 in colour; save it as 16-bit PNG")
    if getattr(image, "n_frames", 1) > 1 and kind != "MPO":  # MPO: a phone's photograph comes first
        raise ValueError("several pages or frames; save one by itself")
    if kind not in ("PNG", "PPM", "TIFF", "JPEG2000") if grey else mode not in (*PLAIN, *ALPHA):
        raise ValueError(f"no defined white in {kind} of Pillow's mode {mode}; save it as 8-bit or 16-bit PNG")
    if tag(image, 284) == 2 and deep and "raw" in coding:  # Pillow takes its bytes for pixels
        raise ValueError("16 bits and a plane for each colour; save it with interleaved colours")
    keyed = mode in ("L", "RGB") and ";" in coding and image.has_transparency_data  # Pillow compares other values
    image.load()
    with suppress(SyntaxError):  # EXIF that is none
        ImageOps.exif_transpose(image, in_place=True)
    if grey:
        return np.repeat(read_grey16(image, data, scaled=kind == "PPM" and not deep)[..., None], 3, axis=-1)
    if keyed or (image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255):
        raise ValueError("transparent pixels; flatten it on a background")
    pixels = np.asarray(image.convert("RGB"))
    told = png_depth(data) if kind == "PNG" else tag(image, 281).bit_length() or 16
    top = np.asarray(image if mode == "CMYK" else pixels).max()
    if deep and (told < 16 or 0 < top < 16):  # below 16, as 12-bit values in 16 bits look
        raise ValueError("unknown bit depth; save it with values up to 65535 for white, or in 8 bits")
    return pixels.astype(np.float32) / 255


def read_grey16(image: Image.Image, data: bytes, *, scaled: bool) -> np.ndarray:
    """Return a grey image (H, W) of up to 16 bits in [0, 1], white where the file tells it or all 16 bits are used.

    `scaled` values are spread over all 16 bits already.
    """
    values = np.asarray(image).astype(np.uint16)
    if image.has_transparency_data and (values == image.info["transparency"]).any():
        raise ValueError("transparent pixels; flatten it on a background")
    kind = "PNG" if data.startswith(b"\x89PNG") else "other"
    greatest = tag(image, 281)  # MaxSampleValue counts if it is the greatest possible value, 2^n - 1
    depth = png_depth(data) if kind == "PNG" else tag(image, 258)
    if greatest >= 255 and greatest & (greatest + 1) == 0:
        depth = min(depth, greatest.bit_length())
    depth = depth if 0 < depth < 16 else 16
    top, white = int(values.max()), 2**depth - 1
    is_spread = kind == "PNG" and not ((values & (2 ** (16 - depth) - 1)) > 1).any()  # or dark: nobody can tell
    if scaled or top == 0 or (kind == "PNG" and top > white):
        white = 65535  # a PNG has its values spread over 16 bits by its standard
    elif top < 4096 if depth == 16 else top > white or is_spread:
        raise ValueError("unknown bit depth; save it with values up to 65535 for white, or in 8 bits")
    grey = values.astype(np.float32) / np.float32(white)
    return 1 - grey if tag(image, 262, default=1) == 0 else grey  # WhiteIsZero


def tag(image: Image.Image, number: int, default: int = 0) -> int:
    """Return the greatest value of a TIFF's tag, the default where there is none."""
    return int(np.max(getattr(image, "tag_v2", {}).get(number, default)))


def png_depth(data: bytes) -> int:
    """Return the bits that a PNG's sBIT chunk tells, 16 without one."""
    at = 8
    while data[at + 4 : at + 8] not in (b"IDAT", b""):
        if data[at + 4 : at + 8] == b"sBIT":
            return data[at + 8]
        at += 12 + struct.unpack(">I", data[at : at + 4])[0]
    return 16


def predict(model: ov.CompiledModel, pixels: np.ndarray) -> dict[str, Any]:
    """Return score and map in [0, 1], label and mask; the model resizes and normalises the image by itself."""
    outputs = model(pixels.transpose(2, 0, 1)[None])
    return {name: outputs[name].squeeze() for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask")}


def predict_by_tiles(model: ov.CompiledModel, pixels: np.ndarray, tile: int, stride: int) -> dict[str, Any]:
    """Return the same of a photograph of any size, tile by tile: maps blended in the overlaps, the highest score."""
    sides = pixels.shape[:2]
    if min(sides) < tile or not 0 < stride <= tile:
        raise SystemExit(f"Tiles of {tile} pixels every {stride} do not cover an image of {sides[0]} x {sides[1]}.")
    steps = [-(-(side - tile) // stride) for side in sides]
    starts = [
        [round(i * (side - tile) / max(1, n)) for i in range(n + 1)] for side, n in zip(sides, steps, strict=True)
    ]
    bell = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
    weight, scores = np.outer(bell, bell), []
    total, weights = np.zeros(sides), np.zeros(sides)
    for top, left in product(*starts):
        place = (slice(top, top + tile), slice(left, left + tile))
        result = predict(model, pixels[place])
        tile_map = Image.fromarray(result["anomaly_map"]).resize((tile, tile), Image.Resampling.BILINEAR)
        total[place] += weight * np.asarray(tile_map)
        weights[place] += weight
        scores.append(float(result["pred_score"]))
    score = np.max(scores) if np.isfinite(scores).all() else np.inf
    result = {"pred_score": score, "anomaly_map": total / weights}
    decide(result, 0.5, 0.5)
    return result


def decide(result: dict[str, Any], image: float, pixel: float) -> None:
    """Set label and mask by thresholds; what is not finite is never good."""
    result["pred_label"] = not result["pred_score"] <= image or not is_finite(result)
    result["pred_mask"] = ~(result["anomaly_map"] <= pixel)


def is_finite(result: dict[str, Any]) -> bool:
    """Tell whether score and map are numbers."""
    return bool(np.isfinite(result["pred_score"]) and np.isfinite(result["anomaly_map"]).all())


def thresholds_for(category: str, file: Path) -> tuple[float, float]:
    """Return the thresholds of scores and maps of a category, whose name may differ in case, blanks and accents."""
    if not file.is_file():
        raise SystemExit(f"--category needs {file.name} beside the model, and {file} does not exist.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        levels = {level: dict(content[level]) for level in ("image", "pixel")}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{file} has no thresholds of categories under 'image' and 'pixel': {error!r}.") from error
    names = [name for name in levels["image"] if normal_form(name) == normal_form(category)]
    name = category if category in names else names[0] if len(names) == 1 else None
    if name is None:
        raise SystemExit(f"Unknown category {category!r}; {file} has {', '.join(levels['image']) or 'none'}.")
    for level, thresholds in levels.items():
        value = thresholds.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise SystemExit(f"{file}: the {level} threshold of {name!r} must be a finite number, got {value!r}.")
    return levels["image"][name], levels["pixel"][name]


def normal_form(name: str) -> str:
    """Return what two spellings of one name have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def picture_name(path: Path) -> str:
    """Return a name for the pictures of an image, another one for every path."""
    whole = os.path.abspath(path)  # noqa: PTH100  # links stay
    key = hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]
    return "_".join(Path(whole).with_suffix("").parts[1:][-3:])[-60:] + f"_{key}"


def save(result: dict[str, Any], pixels: np.ndarray, out: Path, name: str) -> None:
    """Write the map in red over the image, and the mask in black and white."""
    out.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    strength = np.nan_to_num(result["anomaly_map"], nan=1, posinf=1, neginf=1).clip(0, 1)
    heat = Image.fromarray((strength * 200).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    image.paste((255, 0, 0), mask=heat)
    image.save(out / f"{name}_heatmap.png")
    mask = Image.fromarray(result["pred_mask"].astype(np.uint8) * 255)
    mask.resize(image.size, Image.Resampling.NEAREST).save(out / f"{name}_mask.png")


def main() -> None:
    """Read the command line and predict image by image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.xml or model.onnx of `anomalib export`")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--category", help="decide with the thresholds of this category")
    parser.add_argument("--tile_size", type=int, help="side of the tiles, for a model of tiles exported without a size")
    parser.add_argument("--stride", type=int, help="from a tile to the next; three quarters of their size by default")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    arguments = parser.parse_args()
    thresholds = None
    if arguments.category:
        thresholds = thresholds_for(arguments.category, arguments.model.with_name("category_thresholds.json"))
    model = load(arguments.model, arguments.precision)
    broken = 0
    for path in arguments.images:
        try:
            pixels = read(path)
        except Exception as error:  # Pillow raises many kinds
            raise SystemExit(f"Cannot read {shown(path)}: {error}.") from error
        if tile := arguments.tile_size:
            result = predict_by_tiles(model, pixels, tile, arguments.stride or 3 * tile // 4)
        else:
            result = predict(model, pixels)
        if thresholds:
            decide(result, *thresholds)
        save(result, pixels, arguments.out, picture_name(path))
        decision = "DEFECT" if result["pred_label"] else "good"
        if not is_finite(result):
            decision, broken = "NOT FINITE", broken + 1
        print(f"{shown(path)}  score {result['pred_score']:.6f}  {decision}")
    if broken:
        raise SystemExit(f"Score or map of {broken} images is NaN or infinite: nothing is known of them.")


def shown(path: Path) -> str:
    """Return a path as every terminal can print it."""
    return str(path).encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main()
