# SPDX-License-Identifier: Apache-2.0
"""Per-category metrics for the test run of any anomalib model."""

import logging
from pathlib import Path
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics.utilities import rank_zero_warn

from anomalib_uniass.categories import ALL, default_category, sample_categories
from anomalib_uniass.metrics.category_metrics import MEAN, CategoryMetrics
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.metrics.table import format_table, write_table

logger = logging.getLogger(__name__)

INCOMPLETE = Path("metrics", "incomplete")
"""Folder of the table of a test that ended early."""


class CategoryMetricsCallback(Callback):
    """Score raw maps per category in `test`; log the means, print the table and save it.

    Logs `mean_pixel_AP`, `mean_DSC`, `mean_pixel_F1Max`, `mean_AUPRO`, `mean_pixel_AUROC` and `mean_image_AUROC`
    (always all of them, NaN if undefined) and writes `metrics/per_category.csv` and `.json` below
    `trainer.default_root_dir`. Fitting, validation and prediction are left alone. The table of a test that ended early
    lies in `metrics/incomplete`.

    anomalib's post-processor normalises and clamps the maps of the batch in place, so this callback must run before it
    and moves itself to the front of `trainer.callbacks` if it does not.

    The category of an image comes from the column `category` of `datamodule.test_data.samples` if there is one; else
    all images belong to the datamodule's `category` or, if that is empty, to its name; without a datamodule to "all".

    In a distributed test the images that the sampler repeats, to give every process equally many, count once. They are
    known by their path.

    Attributes:
        table: Result of the last test (`CategoryMetrics.compute`), None before.
        precision_recall: Curves of its pixels (`CategoryMetrics.precision_recall`).
    """

    def __init__(self) -> None:
        self.table: dict[str, dict[str, float]] | None = None
        self.precision_recall: dict[str, list[tuple[float, float]]] = {}
        self._metric: CategoryMetrics | None = None
        self._count = 0
        self._category_of_path: dict[str, str] = {}
        self._default_category = ALL

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that no post-processor runs before this callback."""
        del pl_module
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        if any(isinstance(callback, PostProcessor) for callback in callbacks[: callbacks.index(self)]):
            # A new list: Lightning is iterating over the old one.
            reordered = [self, *(callback for callback in callbacks if callback is not self)]
            trainer.callbacks = reordered  # type: ignore[attr-defined]
            logger.info("%s moved before the post-processor to see raw anomaly maps", type(self).__name__)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the categories of the test set."""
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)
        self._category_of_path = sample_categories(getattr(datamodule, "test_data", None))
        self._default_category = default_category(datamodule)
        _warn_of_repeated_paths(datamodule, trainer.world_size)
        categories = set(self._category_of_path.values()) or {self._default_category}
        self._metric, self._count = CategoryMetrics(sorted(categories)), 0

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the raw predictions of the batch."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        if self._metric is None:
            msg = "on_test_batch_end came before on_test_epoch_start; add the callback before the test starts"
            raise RuntimeError(msg)
        anomaly_map, pred_score = batch.anomaly_map, batch.pred_score
        if pred_score is None and anomaly_map is not None:
            # The image score that anomalib derives for models that give none.
            pred_score = anomaly_map.flatten(1).amax(1)
        if pred_score is None or batch.gt_label is None:
            msg = (
                "expected pred_score or anomaly_map, and gt_label, in every test batch, got None; test on labelled data"
            )
            raise ValueError(msg)
        self._count += len(batch.gt_label)
        self._metric.update(
            anomaly_map=_to_mask_size(anomaly_map, batch.gt_mask),
            gt_mask=batch.gt_mask,
            pred_score=pred_score.flatten(),
            gt_label=batch.gt_label.flatten(),
            category=self.categories_of(batch),
            image=None if batch.image_path is None else [str(path) for path in batch.image_path],
        )

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute, log the means, print and save the table."""
        metric, self._metric = self._metric, None
        if metric is None:
            return
        map_size = metric.map_size
        self.table, self.precision_recall = metric.compute(), metric.precision_recall
        # Equal on all ranks; sync_dist only keeps Lightning from warning about it.
        pl_module.log_dict({f"mean_{key}": self.table[MEAN][key] for key in METRICS}, sync_dist=True)
        if trainer.is_global_zero:
            self._save(trainer, self.table, Path("metrics"), type(pl_module).__name__, map_size)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print and save the table of the images before the one that ended the test, if no other process has some."""
        metric, self._metric = self._metric, None
        if metric is None or not self._count or trainer.world_size > 1 or not isinstance(exception, Exception):
            return
        logger.warning("The test ended early. The table of the first %d images:", self._count)
        map_size = metric.map_size
        try:
            table = metric.compute()
        except (RuntimeError, ValueError) as error:  # perhaps what ended the test
            logger.warning("There is none: %s", error)
        else:
            self._save(trainer, table, INCOMPLETE, type(pl_module).__name__, map_size)

    def categories_of(self, batch: Any) -> list[str]:
        """Return the category of each image of a batch of the running test.

        Raises:
            ValueError: If an image is not in the datamodule's test set.
        """
        if not self._category_of_path:
            return [self._default_category] * len(batch.gt_label)
        paths = [str(path) for path in batch.image_path]
        missing = [path for path in paths if path not in self._category_of_path]
        if missing:
            msg = f"{missing[0]} is not in datamodule.test_data.samples; test with the datamodule that made the batches"
            raise ValueError(msg)
        return [self._category_of_path[path] for path in paths]

    def _save(
        self,
        trainer: Trainer,
        table: dict[str, dict[str, float]],
        place: Path,
        model: str,
        map_size: tuple[int, int] | None,
    ) -> None:
        """Save a table in a folder of the run's, and print it."""
        datamodule = getattr(trainer, "datamodule", None)
        datamodule_name = None if datamodule is None else type(datamodule).__name__
        directory = Path(trainer.default_root_dir) / place
        try:
            paths = write_table(table, directory, model=model, datamodule=datamodule_name, map_size=map_size)
        except OSError as error:
            logger.warning("per-category metrics could not be saved below %s: %s", directory, error)
        else:
            logger.debug("per-category metrics saved to %s and %s", *paths)
        console = Console()
        try:
            console.print(format_table(table, title=f"{model} per category", encoding=console.encoding))
        except OSError as error:  # such as a log on a disk that is full
            logger.warning("per-category metrics could not be printed: %s", error)


def _warn_of_repeated_paths(datamodule: LightningDataModule | None, processes: int) -> None:
    """Warn if images are listed several times and spread over processes, where such lines look like repeats."""
    samples = getattr(getattr(datamodule, "test_data", None), "samples", None)
    if processes == 1 or samples is None or "image_path" not in samples.columns:
        return
    repeated = samples["image_path"][samples["image_path"].duplicated()]
    if len(repeated):
        rank_zero_warn(
            f"The test samples list {repeated.nunique()} images several times, such as {repeated.iloc[0]}. With "
            f"{processes} processes they may count once. Test in one (--trainer.devices 1) to have every line counted.",
            UserWarning,
        )


def _to_mask_size(anomaly_map: Tensor | None, gt_mask: Tensor | None) -> Tensor | None:
    """Resize maps bilinearly to the masks; only odd models give maps of another size than their input."""
    if anomaly_map is None or gt_mask is None or anomaly_map.shape[-2:] == gt_mask.shape[-2:]:
        return anomaly_map
    maps = anomaly_map if anomaly_map.ndim == 4 else anomaly_map.unsqueeze(1)
    return F.interpolate(maps.to(torch.float32), size=gt_mask.shape[-2:], mode="bilinear", align_corners=False)
