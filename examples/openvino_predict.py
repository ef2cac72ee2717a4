# SPDX-License-Identifier: Apache-2.0
"""Find defects with an exported UniAS: needs openvino, numpy and pillow, neither torch nor anomalib.

    python openvino_predict.py model.xml part.png --out results
    python openvino_predict.py model.xml *.png --category bolt     # the thresholds of category_thresholds.json
    python openvino_predict.py model.xml large.png --tile_size 448 # of a model that was trained with this tile_size

Prints score and decision of each image; writes FOLDERS_NAME_heatmap.png and FOLDERS_NAME_mask.png of its size.
"""

import argparse
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from PIL import Image, ImageOps


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
    mode, coding, tags = image.mode, str(image.tile[:1]), getattr(image, "tag_v2", {})
    deep = any(mark in coding for mark in (";16", "SGI16", " 65535)")) or np.max(tags.get(258, 8)) > 8
    grey = mode.startswith({"PNG": "I", "TIFF": "I;16"}.get(image.format, "no other"))
    # A depth that the file tells by sBIT or MaxSampleValue, white as zero, a plane for each colour.
    special = b"sBIT" in data[: data.find(b"IDAT")] or tags.get(262) == 0 or 281 in tags or tags.get(284) == 2
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's photograph comes first
        raise ValueError("several pages or frames; save one by itself")
    if not grey and mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA"):
        raise ValueError(f"no defined white in {image.format} of Pillow's mode {mode}; save it as 8-bit or 16-bit PNG")
    ImageOps.exif_transpose(image, in_place=True)
    keyed = ";" in coding and (grey or mode in ("L", "RGB"))  # a colour key that Pillow compares with other values
    if image.has_transparency_data and (keyed or image.convert("RGBA").getchannel("A").getextrema()[0] < 255):
        raise ValueError("transparent pixels; flatten it on a background")
    pixels = np.asarray(image if grey else image.convert("RGB"), dtype=np.float32) / (65535 if grey else 255)
    if deep and (special or 0 < pixels.max() < 1 / 16):  # as 12-bit values in 16 bits would look
        raise ValueError("unknown bit depth; save it with values up to 65535 for white, or in 8 bits")
    return np.repeat(pixels[..., None], 3, axis=-1) if grey else pixels


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
    weight, score = np.outer(bell, bell), 0.0
    total, weights = np.zeros(sides), np.zeros(sides)
    for top, left in product(*starts):
        place = (slice(top, top + tile), slice(left, left + tile))
        result = predict(model, pixels[place])
        tile_map = Image.fromarray(result["anomaly_map"]).resize((tile, tile), Image.Resampling.BILINEAR)
        total[place] += weight * np.asarray(tile_map)
        weights[place] += weight
        score = max(score, float(result["pred_score"]))
    anomaly_map = total / weights
    return {"pred_score": score, "pred_label": score > 0.5, "anomaly_map": anomaly_map, "pred_mask": anomaly_map > 0.5}


def decide_for(category: str, result: dict[str, Any], file: Path) -> None:
    """Replace label and mask by those at the category's own thresholds."""
    if not file.is_file():
        raise SystemExit(f"--category needs {file.name} beside the model, and {file} does not exist.")
    thresholds = json.loads(file.read_text(encoding="utf-8"))
    if category not in thresholds["image"]:
        raise SystemExit(f"Unknown category {category!r}; {file} has {', '.join(thresholds['image'])}.")
    result["pred_label"] = result["pred_score"] > thresholds["image"][category]
    result["pred_mask"] = result["anomaly_map"] > thresholds["pixel"][category]


def save(result: dict[str, Any], pixels: np.ndarray, out: Path, name: str) -> None:
    """Write the map in red over the image, and the mask in black and white."""
    out.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    heat = Image.fromarray((result["anomaly_map"] * 200).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
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
    model = load(arguments.model, arguments.precision)
    for path in arguments.images:
        try:
            pixels = read(path)
        except Exception as error:  # Pillow raises many kinds
            raise SystemExit(f"Cannot read {path}: {error}.") from error
        if tile := arguments.tile_size:
            result = predict_by_tiles(model, pixels, tile, arguments.stride or 3 * tile // 4)
        else:
            result = predict(model, pixels)
        if arguments.category:
            decide_for(arguments.category, result, arguments.model.with_name("category_thresholds.json"))
        name = "_".join(path.with_suffix("").parts[-3:])  # datasets number the images of each folder anew
        save(result, pixels, arguments.out, name)
        print(f"{path}  score {result['pred_score']:.6f}  {'DEFECT' if result['pred_label'] else 'good'}")


if __name__ == "__main__":
    main()
