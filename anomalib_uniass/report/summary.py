# SPDX-License-Identifier: Apache-2.0
"""The last lines of a run: where everything is, and what comes next."""

import math
import shlex
import time
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from anomalib_uniass.logs import from_here
from anomalib_uniass.metrics.callback import CategoryMetricsCallback
from anomalib_uniass.report.comparison import ComparisonCallback

POOLED = ("image_", "pixel_")
"""How the names of anomalib's own metrics begin."""


class RunSummary(Callback):
    """Print at the end of a training where its checkpoint is, at the end of a test where table and page are.

    Lightning's table of the same metrics, in fractions and with ten digits, is left out after a test that printed the
    table per category; what only the former has, anomalib's metrics of all categories together, follows the latter in
    percent too.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._written: list[tuple[str, Path]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the time: files of an earlier test may lie in the same folder."""
        del trainer, pl_module
        self._start, self._written = time.time(), []

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print anomalib's metrics in percent, and find what was written."""
        del pl_module
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        if not any(isinstance(one, CategoryMetricsCallback) and one.table for one in callbacks):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        pooled = {name: value for name, value in metrics.items() if name.startswith(POOLED)}
        if all(name in pooled or name.startswith("mean_") for name in metrics):  # else it has more to tell
            trainer.test_loop.verbose = False
        if not trainer.is_global_zero:
            return
        if pooled:
            print("All categories together, as anomalib counts, percent: " + _percents(pooled))
        folder = Path(trainer.default_root_dir) / "metrics"
        for word, name in (("Table", "per_category.csv"), ("Page", "report.html")):
            path = folder / name
            if path.is_file() and path.stat().st_mtime >= self._start - 2:  # seconds that a file system may round to
                self._written.append((word, path))
        for one in callbacks:
            if isinstance(one, ComparisonCallback):
                self._written.append(("Comparison", one.directory / "report.html"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the last lines, behind those of all other callbacks."""
        if not trainer.is_global_zero or stage not in ("fit", "test"):
            return
        checkpoint = _checkpoint(trainer)
        if stage == "fit":
            if checkpoint is not None:
                print(f"Trained: {from_here(checkpoint)} (for --ckpt_path of test, predict, export)")
            return
        if not self._written:
            return
        lines = [f"{word + ':':<12}{from_here(path)}" for word, path in self._written]
        lines[0] += " (fractions)" if self._written[0][0] == "Table" else ""
        if checkpoint is not None:
            command = f"--model {type(pl_module).__name__} --ckpt_path {shlex.quote(from_here(checkpoint))}"
            lines += [
                f"{'Checkpoint:':<12}{from_here(checkpoint)}",
                f"{'Next:':<12}anomalib predict {command} --data IMAGES",
                f"{'':<12}anomalib export {command} --export_type openvino",
            ]
        print("\n".join(lines))


def _percents(metrics: dict[str, float]) -> str:
    """Return fractions in percent, such as ``image AUROC 99.10``."""
    return ", ".join(
        f"{name.replace('_', ' ')} {'-' if math.isnan(value) else f'{100 * value:.2f}'}"
        for name, value in sorted(metrics.items())
    )


def _checkpoint(trainer: Trainer) -> Path | None:
    """Return what the training saved last, else what was tested."""
    for callback in cast("list[ModelCheckpoint]", trainer.checkpoint_callbacks):
        saved = getattr(callback, "best_model_path", "")
        if saved and Path(saved).is_file():
            return Path(saved)
    tested = trainer.ckpt_path
    return Path(tested) if tested and Path(tested).is_file() else None
