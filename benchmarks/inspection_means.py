# SPDX-License-Identifier: Apache-2.0
"""Print the means of the inspection benchmark's groups from a run's table.

Choices are made on the development part; what is held back, and all nine, are reported. Earlier choices have seen both.

anomalib train --config benchmarks/configs/inspection.yaml --data.root DIR
python benchmarks/inspection_means.py results/UniAS/inspection/latest/metrics/per_category.json
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

REAL = ("ballscrew", "magtile", "pavement", "pcb")
DEVELOPMENT = ("brick", "coins", "magtile", "pcb", "solar_mono")
METRICS = ("pixel_AP", "DSC", "pixel_F1Max", "AUPRO", "pixel_AUROC", "image_AUROC")


def group_means(categories: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean of every metric over the categories of each group that has any, in percent."""
    groups = {
        "real": [name for name in categories if name in REAL],
        "synthetic": [name for name in categories if name not in REAL],
        "development": [name for name in categories if name in DEVELOPMENT],
        "held_back": [name for name in categories if name not in DEVELOPMENT],
        "all": list(categories),
    }
    return {
        group: {metric: round(100 * fmean(categories[name][metric] for name in names), 2) for metric in METRICS}
        for group, names in groups.items()
        if names
    }


def main() -> None:
    """Print the means of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="per_category.json of a test run on the inspection benchmark")
    categories = json.loads(parser.parse_args().table.read_text())["categories"]
    missing = [name for name in REAL if name not in categories]
    if missing:
        parser.error(f"the table lacks {', '.join(missing)}: test on all nine categories")
    print(json.dumps(group_means(categories), indent=2))


if __name__ == "__main__":
    main()
