# SPDX-License-Identifier: Apache-2.0
"""Small defects on large photographs: UniAS and the bank on tiles, beside UniAS on photographs that are squashed.

Three categories of photographs that pip packages carry, written below WORK:

- ``brick`` and ``gravel``: 1,024 x 1,024 pixels, mirrored from scikit-image's textures; training and test sheets come
  from different parts of a texture.
- ``module``: 1,800 x 3,000 pixels, solar modules of 6 x 10 cells of ``elpv-dataset``; whole modules of the dataset are
  on one side.

Defects of 8 to 64 pixels (spots and scratches) are drawn on half of the test photographs, with masks. More modules hold
real defects: two to four cells that experts called defective; they have no masks, so a cell's score is the highest
value of its map. Nothing is compared with other datasets.

The scale is that of the cells, 256 pixels to a tile; all models have the settings of ``configs/unias_fast.yaml`` and
equally many steps. Finished parts are kept in ``OUTPUT.json`` and not run again; trainings resume from WORK.

python benchmarks/large_images.py [--parts tiled squashed bank cost] [--epochs 100]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from accuracy_report import describe, host
from anomalib.data import InferenceBatch
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from elpv import MODULES, scale
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from speed_report import table
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass import BoundedPatchcore, UniAS, Unified
from anomalib_uniass.data.images import read_image
from anomalib_uniass.data.masks import read_mask
from anomalib_uniass.files import replace_text
from anomalib_uniass.layers.tiling import Tiling, make_tiling
from anomalib_uniass.metrics import CategoryMetrics
from anomalib_uniass.metrics.functional import METRICS, image_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "unias_fast.yaml"
PARTS = ("tiled", "squashed", "bank", "cost")
TILE, STRIDE = 256, 192
SHEET = 1024
CELL, ROWS, COLUMNS = 300, 6, 10
TRAIN, GOOD, DEFECTIVE, REAL = 8, 8, 8, 6
DEFECTS = 4  # of a photograph
SIZES = ((8, 16), (16, 32), (32, 64))  # pixels
TEXTURE_SPLIT = 307  # columns left of it are for training
ROUNDS = 3  # of timings
BANK_TILES = 32  # of a training photograph

Gray = NDArray[np.uint8]
Predict = Callable[[Tensor], InferenceBatch]


# --- Photographs ----------------------------------------------------------------------------------------------------


def write_photographs(root: Path) -> None:
    """Write all photographs, in MVTec AD layout but for the modules with real defects, unless they are there."""
    done = root / "complete"
    if done.exists():
        return
    rng = np.random.default_rng(0)
    sources = {"brick": texture("brick"), "gravel": texture("gravel"), "module": modules()}
    for category, make in sources.items():
        folder = root / category
        for number in range(TRAIN):
            save(make("train", rng), folder / f"train/good/{number:03d}.png")
        for number in range(GOOD):
            save(make("test", rng), folder / f"test/good/{number:03d}.png")
        for number in range(DEFECTIVE):
            photo, mask = with_small_defects(make("test", rng), rng)
            save(photo, folder / f"test/small/{number:03d}.png")
            save(mask, folder / f"ground_truth/small/{number:03d}_mask.png")
    write_real_modules(root.parent / "real", rng)
    done.touch()


def save(image: Gray, path: Path) -> None:
    """Write a grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def texture(name: str) -> Callable[[str, np.random.Generator], Gray]:
    """Return what makes sheets of a texture: mirrored to any size, cut out anywhere, lit a little differently."""
    from skimage import data

    photo = np.asarray(getattr(data, name)())
    halves = {"train": photo[:, :TEXTURE_SPLIT], "test": photo[:, TEXTURE_SPLIT:]}

    def make(side: str, rng: np.random.Generator) -> Gray:
        part = halves[side]
        large = np.pad(part, [(0, 2 * SHEET - length) for length in part.shape], mode="symmetric")
        top, left = rng.integers(0, SHEET, 2)
        sheet = large[top : top + SHEET, left : left + SHEET] * rng.uniform(0.95, 1.05)
        return np.clip(np.rint(sheet), 0, 255).astype(np.uint8)

    return make


def solar_cells() -> tuple[NDArray[np.uint8], dict[tuple[str, int], list[int]]]:
    """Return all cells, and the numbers of those of sure label by side and label, of mono wafers with three busbars."""
    from elpv_dataset.utils import load_dataset

    images, probabilities, _ = load_dataset()
    numbers: dict[tuple[str, int], list[int]] = {}
    for module in (module for module in MODULES if module.category == "mono_3"):
        for number in range(module.first, module.end):
            if probabilities[number] in (0, 1):
                numbers.setdefault((module.side, int(probabilities[number])), []).append(number)
    return images, numbers


def modules() -> Callable[[str, np.random.Generator], Gray]:
    """Return what makes modules of good cells."""
    images, numbers = solar_cells()

    def make(side: str, rng: np.random.Generator) -> Gray:
        chosen = rng.choice(numbers[side, 0], ROWS * COLUMNS, replace=False)
        return module_of([scale(images[number]) for number in chosen])

    return make


def module_of(cells: list[Gray]) -> Gray:
    """Put cells together, row by row."""
    rows = [np.hstack(cells[COLUMNS * row : COLUMNS * (row + 1)]) for row in range(ROWS)]
    return np.vstack(rows)


def write_real_modules(folder: Path, rng: np.random.Generator) -> None:
    """Write modules that hold defective cells, and which those are."""
    images, numbers = solar_cells()
    places = {}
    for photo in range(REAL):
        cells = list(rng.choice(numbers["test", 0], ROWS * COLUMNS, replace=False))
        where = rng.choice(ROWS * COLUMNS, rng.integers(2, 5), replace=False).tolist()
        for place, number in zip(where, rng.choice(numbers["test", 1], len(where), replace=False), strict=True):
            cells[place] = number
        save(module_of([scale(images[number]) for number in cells]), folder / f"{photo:03d}.png")
        places[f"{photo:03d}.png"] = where
    (folder / "defective_cells.json").write_text(json.dumps(places))


def with_small_defects(photo: Gray, rng: np.random.Generator) -> tuple[Gray, Gray]:
    """Draw spots and scratches, and return the mask of what they changed."""
    image, mask = photo.astype(np.float64), np.zeros(photo.shape, bool)
    for number in range(DEFECTS):
        low, high = SIZES[number % len(SIZES)]
        side = int(rng.integers(low, high))
        top, left = (int(rng.integers(0, length - side)) for length in photo.shape)
        sheet = Image.new("L", (side, side))
        draw = ImageDraw.Draw(sheet)
        if rng.random() < 0.5:
            draw.ellipse((0, 0, side - 1, side * rng.uniform(0.5, 1) - 1), fill=255)
        else:
            ends = (0, rng.uniform(0, side - 1), side - 1, rng.uniform(0, side - 1))
            draw.line(ends, fill=255, width=max(2, side // 10))
        opacity = gaussian_filter(np.asarray(sheet) / 255, 0.7)
        place = (slice(top, top + side), slice(left, left + side))
        change = rng.choice([-1, 1]) * rng.uniform(40, 90) * opacity
        image[place] += change
        mask[place] |= np.abs(change) > 10
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), 255 * mask.astype(np.uint8)


# --- Models ---------------------------------------------------------------------------------------------------------


def arguments() -> dict[str, Any]:
    """Return the preset's arguments."""
    return yaml.safe_load(CONFIG.read_text())["model"]["init_args"] | {"visualizer": False, "seed": 0}


def datamodule(root: Path, *, validated: int) -> Unified:
    """Return the photographs of a folder, in the order of any run."""
    return Unified(
        root=root, train_batch_size=8, eval_batch_size=validated, num_workers=0, hflip=["brick", "gravel", "module"]
    )


def train(model: AnomalibModule, root: Path, work: Path, epochs: int | None) -> AnomalibModule:
    """Train a model, or take it from the checkpoint of a finished training, or go on with an unfinished one."""
    checkpoints = sorted(work.rglob("model.ckpt"), key=lambda path: path.stat().st_mtime)
    length = {} if epochs is None else {"max_epochs": epochs, "check_val_every_n_epoch": max(1, epochs // 2)}
    engine = Engine(default_root_dir=work, **length)
    if checkpoints:
        saved = torch.load(checkpoints[-1], map_location="cpu", weights_only=False)
        if epochs is None or saved["epoch"] + 1 >= epochs:
            model.load_state_dict(saved["state_dict"])
            return model.eval()
    engine.fit(model, datamodule=datamodule(root, validated=1), ckpt_path=checkpoints[-1] if checkpoints else None)
    return model.eval()


def tiled(root: Path, work: Path, epochs: int) -> Predict:
    """UniAS on tiles."""
    return own(train(UniAS(**arguments(), tile_size=TILE, stride=STRIDE), root, work, epochs))


def squashed(root: Path, work: Path, epochs: int) -> Predict:
    """UniAS on whole photographs, whose maps are enlarged again."""
    return enlarged(own(train(UniAS(**arguments()), root, work, epochs)))


def bank(root: Path, work: Path, epochs: int) -> Predict:
    """The bank, filled with and asked for tiles."""
    del epochs
    tiling, rng = Tiling(tile_size=(TILE, TILE), stride=(STRIDE, STRIDE)), np.random.default_rng(0)
    cut = work / "tiles"
    for path in sorted(root.glob("*/*/good/*.png")):
        photo = np.asarray(Image.open(path))
        for number in range(BANK_TILES):
            top, left = (int(rng.integers(0, length - TILE)) for length in photo.shape)
            tile = photo[top : top + TILE, left : left + TILE]
            save(tile, cut / path.relative_to(root).parent / f"{path.stem}_{number:02d}.png")
    backbone = {name: value for name, value in arguments().items() if name in ("backbone", "weights", "visualizer")}
    predict = enlarged(own(train(BoundedPatchcore(**backbone), cut, work, None)))
    return lambda image: tiling.detect(image, predict)


def own(model: AnomalibModule) -> Predict:
    """Return what a model says of a photograph in [0, 1]."""

    @torch.no_grad()
    def predict(image: Tensor) -> InferenceBatch:
        return model.model(model.pre_processor.transform(image))

    return predict


def enlarged(predict: Predict) -> Predict:
    """Return maps at the size of the photograph."""

    def at_native_size(image: Tensor) -> InferenceBatch:
        found = predict(image)
        return found._replace(anomaly_map=F.interpolate(found.anomaly_map, image.shape[-2:], mode="bilinear"))

    return at_native_size


MODELS: dict[str, Callable[[Path, Path, int], Predict]] = {"tiled": tiled, "squashed": squashed, "bank": bank}


# --- Figures --------------------------------------------------------------------------------------------------------


def test_photographs(root: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield category, photograph ``(1, 3, H, W)`` and mask ``(1, H, W)`` of the test."""
    for path in sorted(root.glob("*/test/*/*.png")):
        image, category = read_image(path)[None], path.parts[-4]
        mask = torch.zeros(1, *image.shape[-2:], dtype=torch.bool)
        if path.parent.name != "good":
            mask = read_mask(root / category / "ground_truth" / path.parent.name / f"{path.stem}_mask.png")[None].bool()
        yield category, image, mask


def evaluate(predict: Predict, root: Path) -> dict[str, Any]:
    """Return metrics at native resolution, the recall of defects by size, and the cell-level AUROC of real defects."""
    metric = CategoryMetrics(sorted(path.name for path in root.iterdir() if path.is_dir()))
    good: dict[str, list[float]] = {}
    defects: list[tuple[str, int, float]] = []  # category, largest side, highest value
    seconds = []
    for category, image, mask in test_photographs(root):
        start = time.perf_counter()
        found = predict(image)
        seconds.append((category, time.perf_counter() - start))
        metric.update(found.anomaly_map, mask, found.pred_score, mask.flatten(1).any(dim=1), [category])
        anomaly_map = found.anomaly_map[0, 0]
        if not mask.any():
            good.setdefault(category, []).append(float(anomaly_map.max()))
        defects += [(category, *defect) for defect in highest_of_defects(anomaly_map, mask[0])]
    limits = {category: float(np.quantile(values, 0.99, method="higher")) for category, values in good.items()}
    recall = {
        f"recall_{low}_{high}": 100
        * fmean(value > limits[category] for category, side, value in defects if low <= side < high)
        for low, high in SIZES
    }
    table = metric.compute()
    return {
        "categories": {name: {key: 100 * row[key] for key in METRICS} for name, row in table.items()},
        "recall": recall,
        "real_cells_AUROC": 100 * real_cells(predict, root.parent / "real"),
        "seconds": {name: median(s for category, s in seconds if category == name) for name in limits},
    }


def highest_of_defects(anomaly_map: Tensor, mask: Tensor) -> list[tuple[int, float]]:
    """Return the largest side and the highest value of the map of each defect."""
    count, regions, stats, _ = cv2.connectedComponentsWithStats(mask.to(torch.uint8).numpy(), connectivity=8)
    sides = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(axis=1)
    labels = torch.from_numpy(regions)
    return [(int(sides[number]), float(anomaly_map[labels == number].max())) for number in range(1, count)]


def real_cells(predict: Predict, folder: Path) -> float:
    """Return the AUROC of cells, those with a real defect against the others of the same modules."""
    places, scores, labels = json.loads((folder / "defective_cells.json").read_text()), [], []
    for name, where in places.items():
        cells = F.max_pool2d(predict(read_image(folder / name)[None]).anomaly_map, CELL).flatten()
        scores.append(cells)
        labels.append(torch.tensor([place in where for place in range(len(cells))]))
    return image_metrics(torch.cat(scores), torch.cat(labels))["image_AUROC"]


def seam_step(predict: Predict, root: Path) -> float:
    """Return the largest jump of the map across the edges of tiles over the largest elsewhere, on good photographs."""
    tiling, across, within = make_tiling(TILE, STRIDE), 0.0, 0.0
    for _, image, mask in test_photographs(root):
        if mask.any():
            continue
        anomaly_map = predict(image).anomaly_map[0, 0]
        for axis, starts in enumerate(tiling.starts(tuple(image.shape[-2:]))):
            jumps = anomaly_map.diff(dim=axis).abs().amax(dim=1 - axis)  # between pixels i and i + 1
            edges = torch.zeros(len(jumps), dtype=torch.bool)
            for edge in (*starts[1:], *(start + TILE for start in starts[:-1])):
                edges[edge - 1] = True
            across = max(across, float(jumps[edges].max()))
            within = max(within, float(jumps[~edges].max()))
    return across / within


def export_difference(model: AnomalibModule, folder: Path) -> float:
    """Return the largest difference of map and score between the exported graph of photographs and the model."""
    import openvino as ov

    image = torch.rand(1, 3, SHEET, SHEET, generator=torch.Generator().manual_seed(0))
    path = model.to_openvino(folder, input_size=(SHEET, SHEET))
    result = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image.numpy())
    with torch.no_grad():
        expected = model.eval()(image)
    differences = (
        np.abs(result[name] - getattr(expected, name).numpy()).max() for name in ("anomaly_map", "pred_score")
    )
    return float(max(differences))


def linearity(predict: Predict) -> tuple[list[dict[str, Any]], float]:
    """Return seconds by number of tiles, and how far seconds per tile are apart at most, percent.

    Seconds are the least of some rounds: what else the machine does only adds to them.
    """
    sides = (4, 8, 16)  # tiles along a side
    images = {side: torch.rand(1, 3, *[TILE + (side - 1) * STRIDE] * 2) for side in sides}
    rounds: dict[int, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, image in images.items():
            start = time.perf_counter()
            predict(image)
            rounds[side].append(time.perf_counter() - start)
    rows = [
        {
            "pixels": images[side].shape[-1],
            "tiles": side**2,
            "seconds": min(seconds),
            "seconds_per_tile": min(seconds) / side**2,
        }
        for side, seconds in rounds.items()
    ]
    costs = [row["seconds_per_tile"] for row in rows]
    return rows, 100 * (max(costs) / min(costs) - 1)


def cost(root: Path, work: Path) -> dict[str, Any]:
    """Return what tiles cost, and how exact they are."""
    model = train(UniAS(**arguments(), tile_size=TILE, stride=STRIDE), root, work / "tiled", 1)
    predict = own(model)
    predict(torch.rand(1, 3, SHEET, SHEET))
    rows, apart = linearity(predict)
    call = [sys.executable, __file__, "--peak"]
    peak = float(subprocess.run(call, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {
        "tiles": rows,
        "cost_per_tile_apart": apart,
        "peak_gb_5000x4000": peak,
        "seam_step": seam_step(predict, root),
        "export_max_abs_diff": export_difference(model, work / "export"),
    }


def print_peak() -> None:
    """Print the memory that a process has needed for a photograph of 5,000 x 4,000 pixels, in GB."""
    predict = own(UniAS(**arguments(), tile_size=TILE, stride=STRIDE).eval())
    predict(torch.rand(1, 3, 4000, 5000))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


# --- Results --------------------------------------------------------------------------------------------------------


def summary(results: dict[str, Any]) -> dict[str, float]:
    """Return the figures that are looked at first."""
    flat = {}
    for name in MODELS:
        if name in results:
            flat |= {f"{name}_{key}": value for key, value in results[name]["categories"]["mean"].items()}
            flat |= {f"{key}_{name}": value for key, value in results[name]["recall"].items()}
            flat[f"{name}_real_cells_AUROC"] = results[name]["real_cells_AUROC"]
    names = ("cost_per_tile_apart", "peak_gb_5000x4000", "seam_step", "export_max_abs_diff")
    flat |= {name: results["cost"][name] for name in names if "cost" in results}
    return {name: round(value, 7 if name == "export_max_abs_diff" else 2) for name, value in flat.items()}


def markdown(results: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    models = [name for name in MODELS if name in results]
    quality = [
        {"model": name, "category": category, **{key: row[key] for key in METRICS}}
        for name in models
        for category, row in results[name]["categories"].items()
    ]
    found = [
        {"model": name, **results[name]["recall"], "real_cells_AUROC": results[name]["real_cells_AUROC"]}
        | {f"seconds {category}": seconds for category, seconds in results[name]["seconds"].items()}
        for name in models
    ]
    text = [
        "# Small defects on large photographs",
        f"Percent, at the size of the photographs. Tiles of {TILE} pixels every {STRIDE}; `squashed` resizes a whole "
        "photograph to the size of one. `recall_LOW_HIGH`: share of the defects with a largest side of so many pixels "
        "that exceed every pixel of the good test photographs of their category. `real_cells_AUROC`: cells with a real "
        "defect against the others of their module. Seconds are for one photograph.",
        table(quality, ("model", "category", *METRICS)),
        table(found, tuple(found[0])) if found else "",
    ]
    if "cost" in results:
        text += ["## Cost", table(results["cost"]["tiles"], tuple(results["cost"]["tiles"][0]))]
        text += [table([summary({"cost": results["cost"]})], tuple(summary({"cost": results["cost"]})))]
    text += ["## Machine", *(f"- {line}" for line in sorted({describe(row["machine"]) for row in results["runs"]}))]
    return "\n\n".join(part for part in text if part) + "\n"


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("results/large_images"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "large_images")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak()
        return
    root = args.work / "photographs"
    write_photographs(root)
    file = args.output.with_suffix(".json")
    for part in args.parts:
        results = json.loads(file.read_text()) if file.exists() else {"runs": []}
        if part in results:
            continue
        print(f"  {part} ...", flush=True)
        if part == "cost":
            row = cost(root, args.work)
        else:
            row = evaluate(MODELS[part](root, args.work / part, args.epochs), root)
        results = json.loads(file.read_text()) if file.exists() else {"runs": []}  # another part may be done by now
        results[part] = row
        results["runs"].append({"part": part, "epochs": args.epochs, "machine": host()})
        results["summary"] = summary(results)
        replace_text(file, json.dumps(results, indent=2) + "\n")
        replace_text(args.output.with_suffix(".md"), markdown(results))
        print(json.dumps(results["summary"], indent=2), flush=True)


if __name__ == "__main__":
    main()
