# SPDX-License-Identifier: Apache-2.0
"""What the decisions of a test were worth: found, missed, false alarms and outlines, at the model's own thresholds."""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.distribution import joined, of_all_processes
from anomalib_uniass.files import replace_text
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.metrics.category_metrics import MEAN
from anomalib_uniass.text import cell, one_line

logger = logging.getLogger(__name__)

COUNTS = ("good", "false_alarms", "defective", "found")
SHARES = (
    "recall", "false_alarm_rate", "false_alarm_rate_low", "false_alarm_rate_high",
    "pixel_precision", "pixel_recall", "pixel_F1", "pixel_F1Max", "pixel_F1_over_F1Max",
)  # fmt: skip


class Decision(NamedTuple):
    """What was decided of an image, and how many of its pixels right: 0 without masks."""

    path: str
    category: str
    is_defective: bool
    is_flagged: bool
    true_positives: int
    false_positives: int
    false_negatives: int


class DecisionsCallback(Callback):
    """Count what a test decided at the model's own thresholds, print it and save it in `metrics/decisions.csv`.

    For any model of anomalib, beside a :class:`~anomalib_uniass.metrics.CategoryMetricsCallback`, which names the
    categories, and behind the post-processor, which decides. Where nothing is decided there is no table.

    Attributes:
        table: Counts and shares by category, the mean last; None before a test. Shares are NaN where undefined.
    """

    def __init__(self) -> None:
        self.table: dict[str, dict[str, float]] | None = None
        self._decisions: list[Decision] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the end of the callbacks, and forget an earlier test."""
        del pl_module
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        # A new list: Lightning is iterating over the old one.
        trainer.callbacks = [*(one for one in callbacks if one is not self), self]  # type: ignore[attr-defined]
        self.table, self._decisions = None, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the decisions of a batch."""
        del pl_module, outputs, batch_idx, dataloader_idx
        metrics = _metrics(trainer)
        if metrics is None or batch.pred_label is None or batch.gt_label is None:
            return
        labels = (values.flatten().bool().tolist() for values in (batch.gt_label, batch.pred_label))
        paths = [""] * len(batch.gt_label) if batch.image_path is None else map(str, batch.image_path)
        pixels = _pixel_counts(batch.pred_mask, batch.gt_mask, count=len(batch.gt_label))
        rows = zip(paths, metrics.categories_of(batch), *labels, pixels, strict=True)
        self._decisions += [Decision(*row, *counts) for *row, counts in rows]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the table of the decisions of all processes, print and save it."""
        del pl_module
        decisions = joined(of_all_processes(self._decisions))
        self._decisions = []
        metrics = _metrics(trainer)
        if not decisions or metrics is None:
            return
        best = {name: row.get("pixel_F1Max", math.nan) for name, row in (metrics.table or {}).items()}
        self.table = decision_table(decisions, best)
        if trainer.is_global_zero:
            self._save(trainer, _asked(trainer))

    def _save(self, trainer: Trainer, asked: Mapping[str, Any]) -> None:
        table = self.table or {}
        path = Path(trainer.default_root_dir) / "metrics" / "decisions.csv"
        columns = [*COUNTS, *SHARES]
        rows = [
            {
                "category": cell(name),
                **{key: int(row[key]) if key in COUNTS else row[key] for key in columns},
                **{key: asked.get(key) for key in ("image_fpr", "pixel_fpr")},
                "calibration_images": asked.get("images", {}).get(name),
            }
            for name, row in table.items()
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, pd.DataFrame(rows).to_csv(index=False, na_rep="nan"))
        except OSError as error:
            logger.warning("decisions could not be saved: %s", error)
        console = Console()
        try:
            console.print(format_decisions(table, encoding=console.encoding))
        except OSError as error:  # such as a log on a disk that is full
            logger.warning("decisions could not be printed: %s", error)


def decision_table(decisions: Iterable[Decision], best: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return counts and shares by category, the mean of the shares and the sum of the counts last.

    Precision, recall and F1 of the pixels are over all images of a category, as pixel F1-max is.

    Args:
        decisions: What was decided of each image.
        best: Pixel F1-max of the categories and of their mean.
    """
    frame = pd.DataFrame(decisions)
    rows = {str(name): _row(group, best.get(str(name), math.nan)) for name, group in frame.groupby("category")}
    totals = {key: sum(row[key] for row in rows.values()) for key in COUNTS}
    means = {key: float(pd.Series([row[key] for row in rows.values()]).mean()) for key in SHARES}
    low, high = clopper_pearson(int(totals["false_alarms"]), int(totals["good"]))
    means |= {"false_alarm_rate_low": low, "false_alarm_rate_high": high}  # of all images together
    means["pixel_F1_over_F1Max"] = _share(means["pixel_F1"], means["pixel_F1Max"])
    return rows | {MEAN: totals | means}


def clopper_pearson(count: int, of: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share that was seen `count` times `of` times (Clopper and Pearson, 1934).

    Returns:
        Lower and upper limit; NaN where nothing was seen.
    """
    if not of:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, of - count + 1))
    high = 1.0 if count == of else float(beta.ppf(1 - tail, count + 1, of - count))
    return low, high


def format_decisions(table: Mapping[str, Mapping[str, float]], *, encoding: str = "utf-8") -> Table:
    """Format a table for `rich.print`, in percent; NaN is shown as "-".

    Args:
        table: Rows of :func:`decision_table`.
        encoding: What the terminal can show; other letters of a name are escaped.
    """
    output = Table(
        title="Decisions at the model's own thresholds",
        box=box.SIMPLE,
        caption="percent; 95 % interval; F1 of the pixels, and of the best one that any threshold gives",
    )
    output.add_column("category", overflow="fold")
    for header in ("defective\nfound", "false\nalarms", "interval", "pixel\nF1", "F1 over\nF1Max"):
        output.add_column(header, justify="right")
    for name, row in table.items():
        if name == MEAN:
            output.add_section()
        interval = (
            "-"
            if math.isnan(row["false_alarm_rate_low"])
            else f"{_percent(row['false_alarm_rate_low'])} to {_percent(row['false_alarm_rate_high'])}"
        )
        output.add_row(
            escape(one_line(name, encoding)),
            f"{int(row['found'])} of {int(row['defective'])}",
            f"{int(row['false_alarms'])} of {int(row['good'])}",
            interval,
            _percent(row["pixel_F1"]),
            _percent(row["pixel_F1_over_F1Max"]),
        )
    return output


def _row(group: pd.DataFrame, best: float) -> dict[str, float]:
    defective, flagged = group["is_defective"], group["is_flagged"]
    counts = {
        "good": int((~defective).sum()),
        "false_alarms": int((~defective & flagged).sum()),
        "defective": int(defective.sum()),
        "found": int((defective & flagged).sum()),
    }
    low, high = clopper_pearson(counts["false_alarms"], counts["good"])
    hits, alarms, misses = (int(group[key].sum()) for key in ("true_positives", "false_positives", "false_negatives"))
    f1 = _share(2 * hits, 2 * hits + alarms + misses) if hits + misses else math.nan
    return counts | {
        "recall": _share(counts["found"], counts["defective"]),
        "false_alarm_rate": _share(counts["false_alarms"], counts["good"]),
        "false_alarm_rate_low": low,
        "false_alarm_rate_high": high,
        "pixel_precision": _share(hits, hits + alarms) if hits + misses else math.nan,
        "pixel_recall": _share(hits, hits + misses),
        "pixel_F1": f1,
        "pixel_F1Max": best,
        "pixel_F1_over_F1Max": _share(f1, best),
    }


def _pixel_counts(predicted: Tensor | None, truth: Tensor | None, *, count: int) -> list[tuple[int, int, int]]:
    """Return true positives, false positives and false negatives of each image."""
    if predicted is None or truth is None:
        return [(0, 0, 0)] * count
    marked, real = (mask.reshape(count, 1, *mask.shape[-2:]).float() for mask in (predicted, truth))
    if marked.shape != real.shape:
        marked = F.interpolate(marked, size=real.shape[-2:], mode="nearest")
    pairs = ((marked * real), (marked * (1 - real)), ((1 - marked) * real))
    sums = torch.stack([pair.flatten(1).sum(dim=1, dtype=torch.float64) for pair in pairs], dim=1)
    return [(int(hits), int(alarms), int(misses)) for hits, alarms, misses in sums.tolist()]


def _metrics(trainer: Trainer) -> CategoryMetricsCallback | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, CategoryMetricsCallback)), None)


def _asked(trainer: Trainer) -> Mapping[str, Any]:
    """Return the rates that thresholds were made for, and on how many images, where the post-processor tells."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((one for one in callbacks if isinstance(one, PostProcessor)), None)
    return getattr(found, "calibration", None) or {}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"
