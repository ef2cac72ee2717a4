# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of `CategoryMetrics` on a synthetic test set of the size of MVTec AD.

Masks hold blobs and scores are noise that is higher inside them, so nearly all scores are distinct: the costly case.
Prints one JSON line. Run: python benchmarks/metrics_cost.py [--size 224] [--batch-size 32] [--threads 2]
"""

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator

import anomalib
import torch
from torch import Tensor

from anomalib_uniass.metrics import CategoryMetrics

TEST_IMAGES = {
    "bottle": 83,
    "cable": 150,
    "capsule": 132,
    "carpet": 117,
    "grid": 78,
    "hazelnut": 110,
    "leather": 124,
    "metal_nut": 115,
    "pill": 167,
    "screw": 160,
    "tile": 117,
    "toothbrush": 42,
    "transistor": 100,
    "wood": 79,
    "zipper": 151,
}
GOOD_SHARE = 0.27
"""467 of the 1,725 test images of MVTec AD are good."""


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="height and width of the maps in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(args.seed)
    metric = CategoryMetrics(list(TEST_IMAGES))
    rss_imported = peak_rss_gb()
    update_seconds = 0.0
    for anomaly_map, gt_mask, category in synthetic_batches(args.size, args.batch_size, generator):
        start = time.perf_counter()
        metric.update(anomaly_map, gt_mask, anomaly_map.amax((1, 2)), gt_mask.flatten(1).any(1), category)
        update_seconds += time.perf_counter() - start
    rss_updated = peak_rss_gb()
    start = time.perf_counter()
    table = metric.compute()
    compute_seconds = time.perf_counter() - start

    images = sum(TEST_IMAGES.values())
    result = {
        "images": images,
        "megapixels": round(images * args.size**2 / 1e6, 1),
        "categories": len(TEST_IMAGES),
        "update_s": round(update_seconds, 2),
        "compute_s": round(compute_seconds, 2),
        "peak_rss_gb": {"imported": rss_imported, "updated": rss_updated, "computed": peak_rss_gb()},
        "mean": {key: round(value, 6) for key, value in table["mean"].items()},
        "threads": args.threads,
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "anomalib": anomalib.__version__},
    }
    print(json.dumps(result))


def synthetic_batches(
    size: int, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Yield maps (B, H, W), masks (B, H, W) and category names, category after category as a test set would."""
    for name, count in TEST_IMAGES.items():
        for start in range(0, count, batch_size):
            length = min(batch_size, count - start)
            masks = torch.stack([random_mask(size, generator) for _ in range(length)])
            noise = torch.rand(length, size, size, generator=generator)
            yield noise + 0.3 * masks, masks, [name] * length


def random_mask(size: int, generator: torch.Generator) -> Tensor:
    """Draw a bool mask (size, size): empty for a good image, else one to three discs."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    if torch.rand((), generator=generator) < GOOD_SHARE:
        return mask
    axis = torch.arange(size)
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        row, column = torch.randint(0, size, (2,), generator=generator).tolist()
        radius = size * (0.02 + 0.1 * float(torch.rand((), generator=generator)))
        mask |= (axis[:, None] - row) ** 2 + (axis[None, :] - column) ** 2 <= radius**2
    return mask


def peak_rss_gb() -> float:
    """Peak resident memory of this process so far, in GB (1e9 bytes)."""
    # ru_maxrss is in bytes on macOS and in KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def cpu_name() -> str:
    """CPU model if the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a device file
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
