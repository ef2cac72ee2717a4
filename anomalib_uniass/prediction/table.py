# SPDX-License-Identifier: Apache-2.0
"""The table of a prediction: a score, a label and the defective regions of every image."""

import csv
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import cv2
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor
from torchvision.transforms.v2 import CenterCrop, Compose

from anomalib_uniass.categories import sample_categories
from anomalib_uniass.data.opening import shown_size
from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.failures import Failures
from anomalib_uniass.files import replacing
from anomalib_uniass.prediction.names import current_datasets, given_folder, name_below
from anomalib_uniass.results import PREDICTIONS
from anomalib_uniass.text import cell
from anomalib_uniass.thresholds.decisions import are_finite, decision_thresholds
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor

logger = logging.getLogger(__name__)

MOST_REGIONS = 20
MUCH_MEMORY = 1_000_000_000
"""Bytes of predictions that are kept to be returned, from which on their number is said."""
NOT_FINITE = "not finite"
"""Label of an image whose score or map is NaN or infinite: it is never good."""


class Row(NamedTuple):
    """One image of the table, as text."""

    path: str
    category: str
    score: str
    threshold: str
    label: str
    regions: str
    threshold_of: str


class PredictionTable(Callback):
    """Write ``predictions.csv`` into the run's folder (``trainer.default_root_dir``) after every prediction.

    One row per image, sorted by path:

    * ``path``, below the folder that was given (:func:`~anomalib_uniass.prediction.names.given_folder`);
    * ``category``, as the post-processor finds it, empty where it is unknown;
    * ``score``, the image score as anomalib's post-processor leaves it: normalised, with the category's threshold at
      0.5;
    * ``threshold`` of these scores: 0.5, or what the post-processor's ``image_sensitivity`` makes of it;
    * ``label``: ``defective`` if ``score > threshold``, else ``good``; ``not finite`` if score or map are NaN or
      infinite, which is never good;
    * ``regions``: the 8-connected regions of the predicted mask, up to 20, the largest first, as a JSON list of
      ``[x, y, width, height, area]`` in pixels of the image file as it is shown, from its top left. The mask has a
      threshold of its own, so that a good image can have regions;
    * ``threshold_of``, the category whose threshold decided: its own, or the one with the highest threshold of all
      where ``category`` is empty or has none.

    Without thresholds ``threshold``, ``label``, ``regions`` and ``threshold_of`` are empty; ``regions`` also where the
    image has gone.
    Paths and categories that are not UTF-8 or look like formulas are written as :mod:`anomalib_uniass.text` says. A
    prediction that ends early leaves the rows that it had. Must stand behind the post-processor: models add it to their
    own callbacks.

    anomalib's command has no use for the predictions themselves, so they are let go after each batch. In Python
    ``Engine.predict`` returns them all, photographs and maps; with ``return_predictions=False`` it keeps nothing but
    the table, and the pictures on the disk.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._no_size = Failures(logger, "No regions")
        self._folder: Path | None = None
        self._category_of_path: dict[str, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that paths are relative to, and the categories that datasets tell."""
        self._rows = {}
        self._folder = given_folder(trainer)
        if any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.predict_loop.return_predictions = False  # the command line's: it drops what is returned
        self._category_of_path = sample_categories(*current_datasets(trainer))
        if _crops(pl_module.pre_processor):
            logger.warning("The pre-processor crops images: %s will name no regions.", PREDICTIONS)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the rows of a batch."""
        if trainer.predict_loop.return_predictions and args[1] == 0 and not self._rows:
            _say_what_is_kept(outputs, sum(trainer.num_predict_batches))
        del args, kwargs
        if outputs.image_path is None or outputs.pred_score is None:
            return
        post_processor = cast("PostProcessor | None", pl_module.post_processor)
        thresholds = decision_thresholds(post_processor)
        scores = outputs.pred_score.flatten().cpu()
        numbers = scores.to(torch.promote_types(scores.dtype, torch.float32)).numpy()  # NumPy has no bfloat16
        categories, deciding = self._categories(post_processor, outputs)
        finite = cast("Tensor", are_finite(outputs)).tolist()
        masks = None if thresholds.mask is None or _crops(pl_module.pre_processor) else outputs.pred_mask
        for index, path in enumerate(map(str, outputs.image_path)):
            threshold, label, regions = "", "", ""
            if thresholds.image is not None:
                threshold = str(thresholds.image)
                label = "defective" if numbers[index] > thresholds.image else "good"
            if not finite[index]:
                label = NOT_FINITE
            if masks is not None and (size := self._size(path)) is not None:
                regions = json.dumps(_regions(masks[index], size))
            name = name_below(path, self._folder).as_posix()
            self._rows[path] = Row(
                name,
                category=categories[index],
                score=str(numbers[index]),
                threshold=threshold,
                label=label,
                regions=regions,
                threshold_of=deciding[index] if threshold else "",
            )

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the rows of all processes and write them."""
        del pl_module
        self._no_size.end()
        rows = {path: row for part in of_all_processes(self._rows) for path, row in part.items()}
        self._rows = {}
        if not trainer.is_global_zero:
            return
        if not rows:
            logger.warning("There is no %s: the predictions have no scores, or their images no paths.", PREDICTIONS)
            return
        self._save(trainer, rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what a prediction has found before it ended, unless other processes have part of it."""
        del pl_module, exception
        rows, self._rows = self._rows, {}
        if rows and trainer.world_size == 1:
            logger.warning("The prediction ended early, after %d images.", len(rows))
            self._save(trainer, rows)

    def _save(self, trainer: Trainer, rows: dict[str, Row]) -> None:
        """Write rows, or say why not."""
        file = Path(trainer.default_root_dir) / PREDICTIONS
        try:
            _write(rows.values(), file)
        except OSError as error:
            logger.warning("The predictions could not be saved to %s: %s", file, error)
        else:
            logger.info("Scores and regions of %d images: %s", len(rows), file)

    def _size(self, path: str) -> tuple[int, int] | None:
        """Return width and height of an image as it is shown, None where that cannot be told."""
        try:
            return shown_size(path) if Path(path).is_file() else None
        except (OSError, ValueError) as error:
            self._no_size.add(path, error)
            return None

    def _categories(self, post_processor: PostProcessor | None, batch: ImageBatch) -> tuple[list[str], list[str]]:
        """Return the category of each image of a batch, and whose threshold decides of it; empty where unknown."""
        if isinstance(post_processor, CategoryThresholdPostProcessor):
            categories = [category or "" for category in post_processor.categories_of(batch)]
            return categories, post_processor.thresholds_of(batch)
        paths = [str(path) for path in batch.image_path or []]
        return [self._category_of_path.get(path, "") for path in paths], [""] * len(paths)


def _say_what_is_kept(batch: ImageBatch, batches: float) -> None:
    """Warn if the predictions of all batches take much memory, judged by the first one."""
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    size = batches * sum(tensor.nbytes for tensor in tensors)
    if MUCH_MEMORY < size < math.inf:
        logger.warning(
            "Engine.predict returns all predictions, which take %.1f GB of memory until then. "
            "With return_predictions=False they are let go; %s and the pictures are written all the same.",
            *(size / 1e9, PREDICTIONS),
        )


def _regions(mask: Tensor, size: tuple[int, int]) -> list[list[int]]:
    """Return ``[x, y, width, height, area]`` of the regions of a mask ``(H, W)`` or ``(1, H, W)``.

    Args:
        mask: Predicted mask, bool.
        size: Width and height of the image that it stands for; the boxes are in its pixels.
    """
    plane = mask.reshape(mask.shape[-2:]).to("cpu", torch.uint8).numpy()
    across, down = size[0] / plane.shape[1], size[1] / plane.shape[0]
    _, _, found, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
    boxes = []
    for x, y, width, height, area in sorted(found[1:].tolist(), key=lambda region: -region[-1])[:MOST_REGIONS]:
        left, top = min(round(x * across), size[0] - 1), min(round(y * down), size[1] - 1)
        wide, high = max(round((x + width) * across) - left, 1), max(round((y + height) * down) - top, 1)
        boxes.append([left, top, wide, high, min(max(round(area * across * down), 1), wide * high)])
    return boxes


def _crops(pre_processor: object) -> bool:
    """Say whether the maps of a model show a part of the image only."""
    transform = pre_processor.transform if isinstance(pre_processor, PreProcessor) else None
    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    return any(isinstance(step, CenterCrop) for step in steps)


def _write(rows: Iterable[Row], file: Path) -> None:
    """Write the table."""
    cells = sorted(
        row._replace(path=cell(row.path), category=cell(row.category), threshold_of=cell(row.threshold_of))
        for row in rows
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(Row._fields)
        writer.writerows(cells)
