# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category in anomalib's post-processing."""

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed

from anomalib_uniass.arguments import check_number
from anomalib_uniass.components.calibration import (
    check_rate,
    image_thresholds,
    images_needed,
    map_histograms,
    pixel_thresholds,
)

logger = logging.getLogger(__name__)


class CategoryThresholdPostProcessor(PostProcessor):
    """Thresholds of each category at chosen false-positive rates, from the good validation images.

    Validation keeps the score and a histogram of the raw map of every good image (anomalous ones are left out) and
    sets the thresholds at its end, see :mod:`anomalib_uniass.components.calibration`. To resolve an image rate r takes
    1 / r - 1 good validation images of the category, 99 for 1 %; with fewer the spread is borrowed from all categories
    and a warning says so. The thresholds are as good as these images are new to the model and like those to come:
    :class:`~anomalib_uniass.data.Unified` holds them out of training by default.

    Scores and map values x >= 0 with threshold t become x^gamma / (x^gamma + t^gamma): in [0, 1), 0.5 at the threshold
    as everywhere in anomalib, in the order of x, and without the clamping of anomalib's own. Predicted labels and masks
    are what exceeds 0.5.

    The category of an image is the one its datamodule gives, else the nearest folder above it that has the name of a
    category. Elsewhere, and in exported graphs, which see no path, the highest threshold of all categories holds: no
    category exceeds its rate by it. `exported_thresholds` gives all thresholds in the units of exported outputs.

    Calibrate a trained model anew, on other images or for other rates::

        model = UniAS.load_from_checkpoint(path, post_processor=CategoryThresholdPostProcessor(image_fpr=0.05))
        engine.validate(model, datamodule=datamodule)
        engine.trainer.save_checkpoint(path)  # and Engine.export as usual

    Args:
        image_fpr: Share of good images to call anomalous, in (0, 1).
        pixel_fpr: Share of the pixels of good images to call anomalous, in (0, 1).
        gamma: Exponent of the normalisation, above 0; small ones suit scores that span orders of magnitude.

    Attributes:
        calibration: Raw thresholds by category and the rates they were made for, with the keys ``image``, ``pixel``,
            ``image_fpr`` and ``pixel_fpr``; kept in checkpoints. None before the first validation.

    Raises:
        ValueError: If a rate or `gamma` is out of range.
    """

    def __init__(self, *, image_fpr: float = 0.01, pixel_fpr: float = 0.001, gamma: float = 0.5) -> None:
        super().__init__()
        check_number("gamma", gamma, above=0)
        self.image_fpr = check_rate("image_fpr", image_fpr)
        self.pixel_fpr = check_rate("pixel_fpr", pixel_fpr)
        self.gamma = gamma
        self.calibration: dict[str, Any] | None = None
        self._good: dict[str, list[tuple[float, Tensor]]] = defaultdict(list)
        self._category_of_path: dict[str, str] = {}
        self._default_category = "all"
        self._has_warned = False

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "gamma", "calibration")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the configuration; a checkpoint of another post-processor brings its one threshold only."""
        self.calibration = None
        super().load_checkpoint_config(config)

    # --- Calibration ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the categories of the validation and test images from the datamodule."""
        del pl_module, stage
        datamodule = getattr(trainer, "datamodule", None)
        for subset in ("val_data", "test_data"):
            samples = getattr(getattr(datamodule, subset, None), "samples", None)
            if samples is not None and "category" in samples.columns:
                self._category_of_path |= dict(zip(samples["image_path"], samples["category"], strict=True))
        name = getattr(datamodule, "category", None) or getattr(datamodule, "name", None)
        self._default_category = name if isinstance(name, str) else "all"
        self._has_warned = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the paths: a model may be pickled."""
        del trainer, pl_module, stage
        self._category_of_path = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget images of a validation that was interrupted."""
        del trainer, pl_module
        self._good.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the scores and map histograms of the good images of a batch."""
        del trainer, pl_module, args, kwargs
        histograms = map_histograms(outputs.anomaly_map).cpu()
        scores = outputs.pred_score.flatten().tolist()
        categories = self._categories(outputs, default=self._default_category)
        anomalous = [False] * len(scores) if outputs.gt_label is None else outputs.gt_label.flatten().tolist()
        for category, score, histogram, is_anomalous in zip(categories, scores, histograms, anomalous, strict=True):
            if not is_anomalous:
                self._good[cast("str", category)].append((score, histogram))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds of all categories, and the fallback to the highest of them."""
        del trainer, pl_module
        good = _of_all_processes(self._good)
        self._good.clear()
        if not good:
            logger.warning("No good images in the validation set: the thresholds stay as they are.")
            return
        scores = {category: torch.tensor([score for score, _ in images]) for category, images in good.items()}
        histograms = {category: torch.stack([counts for _, counts in images]) for category, images in good.items()}
        self.calibration = {
            "image": image_thresholds(scores, self.image_fpr),
            "pixel": pixel_thresholds(histograms, self.pixel_fpr),
            "image_fpr": self.image_fpr,
            "pixel_fpr": self.pixel_fpr,
        }
        self._image_threshold.fill_(max(self.calibration["image"].values()))
        self._pixel_threshold.fill_(max(self.calibration["pixel"].values()))
        self._warn_of_few_images({category: len(images) for category, images in good.items()})

    def _warn_of_few_images(self, counts: dict[str, int]) -> None:
        """Say once per run which categories have too few images for the image rate."""
        needed = images_needed(self.image_fpr)
        few = [f"{category} ({count})" for category, count in counts.items() if count < needed]
        if few and not self._has_warned:
            logger.warning(
                "An image false-positive rate of %g takes %d good validation images of a category to resolve. Fewer "
                "have: %s. Their thresholds borrow the spread of all %d images and hold on average at best. Hold out "
                "more images (val_split_ratio) or ask for a higher image_fpr.",
                self.image_fpr, needed, ", ".join(few), sum(counts.values()),
            )  # fmt: skip
            self._has_warned = True

    # --- Prediction ---

    def normalize_batch(self, batch: ImageBatch) -> None:  # type: ignore[override]  # any batch in anomalib
        """Normalise scores ``(B,)`` and maps ``(B, 1, H, W)`` or ``(B, H, W)``, each by its category's threshold."""
        count = len(cast("Tensor", batch.pred_score))
        images, pixels = self.image_threshold.repeat(count), self.pixel_threshold.repeat(count)
        for row, category in enumerate(self._categories(batch, default=None)):
            if self.calibration is not None and category in self.calibration["image"]:
                images[row] = self.calibration["image"][category]
                pixels[row] = self.calibration["pixel"][category]
        batch.pred_score = self._scale(batch.pred_score, images)
        batch.anomaly_map = self._scale(batch.anomaly_map, pixels)

    def exported_thresholds(self) -> dict[str, Any] | None:
        """Return the thresholds of all categories in the units of exported outputs, None without a calibration.

        They lie in (0, 0.5], for exported graphs normalise by the highest. A category's label is
        ``pred_score > image[category]``, its mask ``anomaly_map > pixel[category]``.
        """
        if self.calibration is None:
            return None
        fallback = {"image": self.image_threshold, "pixel": self.pixel_threshold}
        normalized = {
            level: {
                category: float(cast("Tensor", self._scale(threshold.new_tensor([raw]), threshold)))
                for category, raw in self.calibration[level].items()
            }
            for level, threshold in fallback.items()
        }
        return self.calibration | normalized | {"units": "normalised outputs of the exported model"}

    def _normalize(  # type: ignore[override]  # static in anomalib, where it takes everything from its arguments
        self, preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor
    ) -> Tensor | None:
        """Normalise in exported graphs, by a threshold for all."""
        del norm_min, norm_max
        return self._scale(preds, threshold)

    def _scale(self, values: Tensor | None, threshold: Tensor) -> Tensor | None:
        """Normalise ``(B, ...)`` by a scalar threshold or by ``(B,)``; leave values alone where it is NaN."""
        if values is None:
            return None
        threshold = threshold.reshape(-1, *[1] * (values.ndim - 1))
        unknown = threshold.isnan()
        own, limit = values.clamp_min(0).pow(self.gamma), threshold.pow(self.gamma)
        total = (own + limit).clamp_min(torch.finfo(own.dtype).tiny)  # where both are zero nothing exceeds
        # The division comes last: OpenVINO drops a choice whose outcome it knows, and the name of the output with it.
        return torch.where(unknown, values, own) / torch.where(unknown, torch.ones_like(total), total)

    def _categories(self, batch: ImageBatch, *, default: str | None) -> list[str | None]:
        """Return the category of each image of a batch."""
        paths = batch.image_path or [""] * len(cast("Tensor", batch.pred_score))
        return [self._category_of_path.get(str(path)) or self._category_of_folder(path) or default for path in paths]

    def _category_of_folder(self, path: str | Path) -> str | None:
        """Return the nearest folder above a file that is named like a calibrated category."""
        known: Iterable[str] = () if self.calibration is None else self.calibration["image"]
        return next((parent.name for parent in Path(path).parents if parent.name in known), None)


def _of_all_processes(good: dict[str, list[tuple[float, Tensor]]]) -> dict[str, list[tuple[float, Tensor]]]:
    """Join what the processes of a distributed run kept."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return dict(good)
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, dict(good))
    joined: dict[str, list[tuple[float, Tensor]]] = defaultdict(list)
    for part in parts:
        for category, images in part.items():
            joined[category] += images
    return dict(joined)
