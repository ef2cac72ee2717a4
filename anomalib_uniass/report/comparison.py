# SPDX-License-Identifier: Apache-2.0
"""A comparison of models that grows by a row with every model that is tested."""

import atexit
import inspect
import io
import json
import logging
import math
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anomalib_uniass.files import replace_text, replacing
from anomalib_uniass.logs import from_here
from anomalib_uniass.metrics.callback import CategoryMetricsCallback
from anomalib_uniass.metrics.category_metrics import COUNTS, MEAN
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.report.callback import ReportCallback
from anomalib_uniass.report.charts import bar_chart, comparison_chart
from anomalib_uniass.report.gallery import KINDS
from anomalib_uniass.report.page import HEADINGS, PICTURE_BYTES, versions, worst_first, write_page
from anomalib_uniass.text import cell

logger = logging.getLogger(__name__)

COSTS = ("parameters", "trainable_parameters", "fit_seconds", "test_seconds")


class ComparisonCallback(Callback):
    """Add the tested model to the comparison in a folder, beside a :class:`CategoryMetricsCallback`.

    A model's figures are kept in ``models/<class>-<code of its settings>.json``, written at the end of its test and
    replaced when the same class is tested again with the same settings. From these files, in the order of their tests,
    the comparison is made anew each time: ``table.csv``, ``table.md``, ``per_category.csv``, ``pixel_AP.png`` and
    ``report.html`` (see :func:`write_comparison`). Whatever happens to a later model, the rows of earlier ones stay: a
    file is replaced in one step or left as it was.

    Args:
        directory: Folder of the comparison, one for each dataset; made before the first epoch if needed.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._start = 0.0
        self._fit: dict[str, float | None] = {"trainable_parameters": None, "fit_seconds": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder, so that one that cannot be written fails before any work."""
        del pl_module, stage
        if trainer.is_global_zero:
            (self.directory / "models").mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.directory), TemporaryDirectory(dir=self.directory / "models"):
                pass

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what the training cost."""
        del pl_module
        # Not `requires_grad`: anomalib's memory banks leave it on, though they train nothing.
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        self._fit = {"trainable_parameters": trained, "fit_seconds": time.monotonic() - self._start}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start = time.monotonic()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model's figures and the comparison."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        findings = [callback.findings for callback in callbacks if isinstance(callback, ReportCallback)]
        tables = [callback.table for callback in callbacks if isinstance(callback, CategoryMetricsCallback)]
        if not trainer.is_global_zero or not tables or tables[0] is None:
            return
        name, settings = type(pl_module).__name__, _settings(pl_module)
        figures = {
            "model": name,
            "settings": settings,
            "tested": time.time(),
            "parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            **self._fit,
            "test_seconds": time.monotonic() - self._start,
            "table": {
                row: {key: None if math.isnan(value) else value for key, value in values.items()}
                for row, values in tables[0].items()
            },
            "findings": findings[0] if findings else {},
        }
        path = self.directory / "models" / f"{name}-{zlib.crc32(settings.encode(errors='surrogatepass')):08x}.json"
        try:
            replace_text(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")
            write_comparison(self.directory)
        except OSError as error:  # it must not cost the test
            logger.warning("The comparison lacks this test, or is older than it: %s", error)
        if isinstance(sys.stdout, io.StringIO):  # anomalib's benchmark hides what its jobs print
            atexit.unregister(print_comparison)
            atexit.register(print_comparison, self.directory)


def print_comparison(directory: Path | str) -> None:
    """Print the table of a comparison, in percent, and where its page is.

    The last lines of ``anomalib benchmark``, whose own table has a column for every argument of every model.

    Args:
        directory: Folder of the comparison; nothing is printed if it has no table any more.
    """
    directory = Path(directory).resolve()
    if not (directory / "table.csv").is_file():
        return
    title, caption = f"Comparison in {from_here(directory)}", "percent; means over categories"
    output = Table(title=title, caption=caption, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    output.add_column("model", overflow="fold")
    for header in (*(key.replace("_", "\n") for key in METRICS), "fit\ns", "test\ns"):
        output.add_column(header, justify="right")
    for row in pd.read_csv(directory / "table.csv").to_dict("records"):
        cells = [_number(row[key], ".2f", 100) for key in METRICS]
        output.add_row(
            escape(row["model"]), *cells, *(_number(row[f"{key}_seconds"], ".0f") for key in ("fit", "test"))
        )
    Console().print(output)
    print(f"Table: {from_here(directory / 'table.csv')} (fractions)\nPage:  {from_here(directory / 'report.html')}")


def write_comparison(directory: Path | str) -> None:
    """Make the tables, the plot and the page of a comparison from its files ``models/*.json``.

    ``table.csv`` has a row per model: the means of the metrics in [0, 1]; ``parameters`` (a memory bank is none) and
    those that the optimizer was given; seconds of fitting (empty for a model that was only tested) and of testing,
    reading and scoring included; number of test images; and the settings that differ from the class's defaults. A class
    with several settings is numbered in the order of the tests. ``table.md`` is the same in percent, for reading,
    ``per_category.csv`` the same metrics per model and category, ``pixel_AP.png`` a plot of its pixel AP.
    ``report.html`` shows all of it, and for each category scores, curves and pictures of the models side by side.

    Args:
        directory: Folder of the comparison.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If one in ``models`` is no JSON.
    """
    directory = Path(directory)
    models = sorted(map(_read_figures, (directory / "models").glob("*.json")), key=lambda model: model["tested"])
    named, seen = {}, Counter[str]()
    for figures in models:
        seen[figures["model"]] += 1
        name = figures["model"] + (f" {seen[figures['model']]}" if seen[figures["model"]] > 1 else "")
        named[name] = figures
    means, categories = [], []
    for name, figures in named.items():
        *rows, (_, mean) = figures["table"].items()
        costs = {key: figures[key] for key in COSTS}
        means.append({"model": name, **mean, **costs, "settings": figures["settings"]})
        categories += [{"model": name, "category": category, **row} for category, row in rows]

    table = pd.DataFrame(means)[["model", *METRICS, *COSTS, *COUNTS, "settings"]]
    table = table.astype({"parameters": "Int64", "trainable_parameters": "Int64"})
    with replacing(directory / "table.csv") as draft:
        _cells(table).to_csv(draft, index=False)
    replace_text(directory / "table.md", _markdown(table))
    per_category = pd.DataFrame(categories)[["model", "category", *COUNTS, *METRICS]]
    with replacing(directory / "per_category.csv") as draft:
        _cells(per_category).to_csv(draft, index=False)
    pixel_ap: dict[str, dict[str, float]] = {name: {} for name in named}
    for row in per_category.astype({"pixel_AP": float}).to_dict("records"):
        pixel_ap[row["model"]][row["category"]] = 100 * row["pixel_AP"]
    with replacing(directory / "pixel_AP.png") as draft:
        bars = bar_chart(pixel_ap, label="pixel AP [%]", png=draft)
    _write_page(directory / "report.html", named, bars)


def _write_page(path: Path, models: dict[str, dict[str, Any]], bars: str) -> None:
    """Write the page of a comparison; models that were tested without pages have figures there alone."""
    rows: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, model in models.items():
        for category, row in model["table"].items():
            if category != MEAN:
                rows.setdefault(category, {})[name] = row
    categories: dict[str, dict[str, Any]] = {}
    for category, of_models in rows.items():
        found = {name: models[name].get("findings", {}).get(category) for name in of_models}
        drawn = {name: part for name, part in found.items() if part and (part["good"] or part["defective"])}
        pictures = {
            kind: {name: part["pictures"][kind][0] for name, part in drawn.items() if kind in part["pictures"]}
            for kind in KINDS
        }
        categories[category] = {
            "rows": of_models,
            "chart": comparison_chart(drawn, name=category) if drawn else "",
            "pictures": {kind: one for kind, one in pictures.items() if one},
        }
    spent = left_out = 0
    for category in worst_first({name: next(iter(of_models.values()))["pixel_AP"] for name, of_models in rows.items()}):
        shown = categories[category]["pictures"].values()
        spent += sum(len(one["source"]) for pictures in shown for one in pictures.values())
        if spent > PICTURE_BYTES and shown:
            categories[category]["pictures"] = {}
            left_out += 1
    write_page(
        path,
        "comparison",
        title=f"Comparison of {len(models)} models",
        subtitle=f"Folder {path.parent.name}, {len(categories)} categories",
        models={name: model | {"mean": model["table"][MEAN]} for name, model in models.items()},
        metrics=METRICS,
        bars=bars,
        categories=categories,
        left_out=left_out,
        headings=HEADINGS,
        facts={name: model["settings"] or "defaults" for name, model in models.items()} | versions(),
    )


def _read_figures(path: Path) -> dict[str, Any]:
    """Read the figures of a model."""
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} holds no figures of a model ({error}): delete it, and test that model again to have its row."
        raise ValueError(msg) from error
    return figures


def _settings(model: LightningModule) -> str:
    """Return the constructor's arguments that differ from the defaults, such as ``hidden_dim=64, seed=0``."""
    parameters = inspect.signature(type(model)).parameters
    return ", ".join(
        f"{name}={value}"
        for name, value in sorted(model.hparams.items())
        if name in parameters and value != parameters[name].default
    )


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts are safe in the cells of a CSV file."""
    texts = {name: table[name].map(cell) for name in ("model", "category", "settings") if name in table}
    return table.assign(**texts)


def _number(value: Any, pattern: str, factor: float = 1) -> str:
    """Format a figure, or a dash where there is none."""
    return "-" if pd.isna(value) else format(factor * value, pattern)


def _markdown(table: pd.DataFrame) -> str:
    """Format the table for reading: metrics in percent, parameters in millions."""
    header = ["model", *(key.replace("_", " ") for key in METRICS), "M parameters (trainable)", "fit s", "test s"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in table.to_dict("records"):
        metrics = [_number(row[key], ".2f", 100) for key in METRICS]
        everything, trainable = (_number(row[key], ".2f", 1e-6) for key in ("parameters", "trainable_parameters"))
        seconds = [_number(row[key], ".0f") for key in ("fit_seconds", "test_seconds")]
        lines.append([row["model"], *metrics, f"{everything} ({trainable})", *seconds])
    settings = [f"- {row['model']}: {row['settings'] or 'defaults'}" for row in table.to_dict("records")]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", "Settings:", "", *settings]) + "\n"
