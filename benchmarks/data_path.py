# SPDX-License-Identifier: Apache-2.0
"""How fast the training loader delivers images of MVTec AD's size, with and without `cache_images`.

Writes photographs of scikit-image (extra `demo`), enlarged and with a little noise, as PNGs of 700 to 1024 px in MVTec
AD layout to a temporary folder, and takes epochs of `Unified` with flips and rotations. No model runs: a model that
takes less time per image than the loader waits for it. The files lie in the system's page cache, and the cached images
partly in the CPU's, so both sides are at their best.

    python benchmarks/data_path.py [--images 20] [--size 224] [--workers 0 2] [--output DIR]
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accuracy_report import describe, host
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from speed_report import Row, table
from torch.utils.data import DataLoader, RandomSampler
from torchvision.transforms.v2 import Resize

from anomalib_uniass import Unified

SIDES = {"astronaut": 1024, "coffee": 900, "brick": 700}
"""Photograph of each category and its side in pixels; MVTec AD has 700 to 1024."""
NOISE = 2.0
"""Standard deviation in grey levels. Without it enlarged photographs are smoother than real ones and decode faster."""
EPOCH_IMAGES = 3629
"""Training images of MVTec AD. Later epochs draw as many, so that starting the workers costs what it does there."""
COLUMNS = ("workers", "read_each_time", "cache_first_epoch", "cache_later_epochs", "ratio")


def main() -> None:
    """Measure and write `data_path.json` and `data_path.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="training images of each of the three categories")
    parser.add_argument("--size", type=int, default=224, help="height and width images are resized to")
    parser.add_argument("--batch-size", type=int, default=8, help="few, so that all workers share an epoch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="worker processes of the loader")
    parser.add_argument("--epochs", type=int, default=3, help="epochs without cache, and later epochs with it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in each worker

    with TemporaryDirectory() as folder:
        root = Path(folder)
        megabytes = write_photographs(root, args.images)
        rows = [measure(root, workers, args) for workers in args.workers]
    results: Row = {
        "machine": host(),
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "mean_png_megabytes": megabytes,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "data_path.json"
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    print(path.with_suffix(".md").read_text())


def write_photographs(root: Path, count: int) -> float:
    """Write ``count`` training and one test image of each category; return the mean size of a file in MB."""
    rng = np.random.default_rng(0)
    for name, side in SIDES.items():
        photo = getattr(data, name)()
        for split, images in (("train", count), ("test", 1)):
            target = root / name / split / "good"
            target.mkdir(parents=True)
            for i in range(images):
                Image.fromarray(view(photo, side, rng)).save(target / f"{i:03}.png")
    sizes = [path.stat().st_size for path in root.rglob("*.png")]
    return round(sum(sizes) / len(sizes) / 1e6, 2)


def view(photo: NDArray[np.uint8], side: int, rng: Generator) -> NDArray[np.uint8]:
    """Enlarge a random square of a photograph to RGB ``(side, side, 3)`` and add noise."""
    extent = min(photo.shape[:2]) * 3 // 4
    top, left = (int(rng.integers(0, length - extent)) for length in photo.shape[:2])
    crop = Image.fromarray(photo).convert("RGB").crop((left, top, left + extent, top + extent))
    enlarged = np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.clip(enlarged + rng.normal(0, NOISE, enlarged.shape), 0, 255).astype(np.uint8)


def measure(root: Path, workers: int, args: argparse.Namespace) -> Row:
    """Return milliseconds per image of whole epochs, from starting the workers to the last batch."""
    plain, cached = (training_loader(root, workers, args, cache_images=cache) for cache in (False, True))
    row: Row = {"workers": workers}
    row["read_each_time"] = median(milliseconds(plain) for _ in range(args.epochs))
    row["cache_first_epoch"] = milliseconds(cached)
    long = DataLoader(
        cached.dataset,
        batch_size=args.batch_size,
        sampler=RandomSampler(cached.dataset, replacement=True, num_samples=EPOCH_IMAGES),
        num_workers=workers,
        collate_fn=cached.collate_fn,
    )
    row["cache_later_epochs"] = median(milliseconds(long) for _ in range(args.epochs))
    row["ratio"] = row["read_each_time"] / row["cache_later_epochs"]
    return {name: value if name == "workers" else round(value, 3) for name, value in row.items()}


def training_loader(root: Path, workers: int, args: argparse.Namespace, *, cache_images: bool) -> DataLoader:
    """Return the loader that a training would take."""
    moved = {name: list(SIDES) for name in ("hflip", "vflip", "rotate")}
    datamodule = Unified(
        root=root,
        train_batch_size=args.batch_size,
        num_workers=workers,
        augmentations=Resize((args.size, args.size)),
        cache_images=cache_images,
        **moved,
    )
    datamodule.setup()
    return datamodule.train_dataloader()


def milliseconds(loader: DataLoader) -> float:
    """Return the milliseconds per image of one epoch."""
    start = time.perf_counter()
    images = sum(len(batch.image) for batch in loader)
    return 1000 * (time.perf_counter() - start) / images


def markdown(results: Row) -> str:
    """Return all results as Markdown."""
    size, rows = results["arguments"]["size"], results["rows"]
    command = " ".join(["python benchmarks/data_path.py", *results["machine"]["arguments"]])
    alone = next((row for row in rows if row["workers"] == 0), None)
    bounds = [
        f"with {row['workers']} worker processes a model is bound by reading if it takes less than "
        f"{row['read_each_time']:.1f} ms per image, with the cache less than {row['cache_later_epochs']:.2f} ms"
        for row in rows
        if row["workers"]
    ]
    if alone is not None:
        bounds.append(
            f"without workers nothing overlaps: reading adds {alone['read_each_time']:.1f} ms to each image, the cache "
            f"{alone['cache_later_epochs']:.2f} ms; eight idle cores would at best deliver an image every "
            f"{alone['read_each_time'] / 8:.1f} ms without cache"
        )
    text = [
        "# Data path",
        f"{describe(results['machine'])}; {results['machine']['cores']} cores, load {results['machine']['load']:.1f} "
        f"at the end, other work included. `{command}`",
        f"Milliseconds per image of the training loader: PNGs of {min(SIDES.values())} to {max(SIDES.values())} px "
        f"({results['mean_png_megabytes']} MB in the mean), read and resized to {size} x {size}, batches of "
        f"{results['arguments']['batch_size']}, flips and rotations for all.",
        table(rows, COLUMNS),
        "What bounds an epoch: " + "; ".join(bounds) + ".",
        f"`cache_images` holds {size * size * 12 / 1e6:.2f} MB per training image, "
        f"{EPOCH_IMAGES * size * size * 12 / 1e9:.1f} GB for the {EPOCH_IMAGES:,} of MVTec AD.",
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main()
