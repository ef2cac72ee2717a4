# SPDX-License-Identifier: Apache-2.0
"""Print and save a table of `CategoryMetrics.compute`."""

import csv
import json
import math
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from anomalib_uniass.files import replace_text, replacing
from anomalib_uniass.metrics.category_metrics import COUNTS, MEAN
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.text import cell, one_line, storable


def format_table(table: dict[str, dict[str, float]], title: str | None = None, *, encoding: str = "utf-8") -> Table:
    """Format a table for `rich.print`: percent with two decimals, one row per category, the mean last.

    Args:
        table: Rows of `CategoryMetrics.compute`, values in [0, 1]; NaN is shown as "-".
        title: Line above the table.
        encoding: What the terminal can show; other letters of a name are escaped.
    """
    output = Table(title=title, box=box.SIMPLE, caption="percent; mean over categories")
    output.add_column("category", overflow="fold")
    # Headers on two lines keep the table within the 80 columns of a log file.
    for header in ("test\nimages", "anom-\nalous", *(key.replace("_", "\n") for key in METRICS)):
        output.add_column(header, justify="right")
    for name, row in table.items():
        if name == MEAN:
            output.add_section()
        percents = ("-" if math.isnan(row[key]) else f"{100 * row[key]:.2f}" for key in METRICS)
        output.add_row(escape(one_line(name, encoding)), *(str(int(row[key])) for key in COUNTS), *percents)
    return output


def write_table(
    table: dict[str, dict[str, float]],
    directory: Path | str,
    *,
    model: str,
    datamodule: str | None,
    map_size: tuple[int, int] | None,
) -> tuple[Path, Path]:
    """Write `per_category.csv` and `per_category.json`, values in [0, 1] with full precision.

    Each file replaces an earlier one in one step, or leaves it as it was. Names that are not UTF-8, or look like
    formulas, are written as :mod:`anomalib_uniass.text` says.

    Args:
        table: Rows of `CategoryMetrics.compute`.
        directory: Folder of the two files, made if needed.
        model: Class name of the model.
        datamodule: Class name of the data module, None if there was none.
        map_size: (H, W) of the maps, None for a model without maps.

    Returns:
        Paths of the CSV (NaN as "nan") and of the JSON file (NaN as null).

    Raises:
        OSError: If the folder or a file cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    csv_path, json_path = directory / "per_category.csv", directory / "per_category.json"

    with replacing(csv_path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["category", *COUNTS, *METRICS])
        for name, row in table.items():
            writer.writerow([cell(name), *(int(row[key]) for key in COUNTS), *(row[key] for key in METRICS)])

    rows = {
        storable(name): {key: None if math.isnan(value) else value for key, value in row.items()}
        for name, row in table.items()
    }
    report = {
        "model": model,
        "datamodule": datamodule,
        "map_size": map_size,
        "n_images": rows[MEAN]["n_images"],
        "categories": {name: row for name, row in rows.items() if name != MEAN},
        "mean": rows[MEAN],
    }
    replace_text(json_path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return csv_path, json_path
