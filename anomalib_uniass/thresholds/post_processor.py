# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category in anomalib's post-processing."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from anomalib_uniass.arguments import check_number
from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.thresholds.calibration import (
    check_rate,
    image_thresholds,
    images_needed,
    map_histograms,
    pixel_thresholds,
)

logger = logging.getLogger(__name__)

CALIBRATE = (
    "Thresholds come from good validation images: train with some of every category (not with limit_val_batches=0), or "
    "calibrate the trained model with Engine.validate and save it with engine.trainer.save_checkpoint."
)


class _GoodImage(NamedTuple):
    """What validation keeps of a good image: its path or "", its score and the histogram of its map."""

    path: str
    score: float
    histogram: Tensor


class CategoryThresholdPostProcessor(PostProcessor):
    """Thresholds of each category at chosen false-positive rates, from the good validation images.

    Validation keeps the score and a histogram of the raw map of every good image (anomalous ones are left out) and
    sets the thresholds at its end, see :mod:`anomalib_uniass.thresholds.calibration`. To resolve an image rate r takes
    1 / r - 1 good validation images of the category, 99 for 1 %; with fewer the spread is borrowed from all categories
    and a warning says so. The thresholds are as good as these images are new to the model and like those to come:
    :class:`~anomalib_uniass.data.Unified` holds them out of training by default. A distributed validation joins the
    images of all processes; those that the sampler repeats, known by their path, count once.

    Scores and map values x >= 0 with threshold t become x^gamma / (x^gamma + t^gamma): in [0, 1), 0.5 at the threshold
    as everywhere in anomalib, in the order of x, and without the clamping of anomalib's own. Predicted labels and masks
    are what exceeds 0.5.

    The category of an image is the one its datamodule gives, else the nearest folder above it that has the name of a
    category. Elsewhere, and in exported graphs, which see no path, the highest threshold of all categories holds: no
    category exceeds its rate by it. `exported_thresholds` gives all thresholds in the units of exported outputs.

    Without any calibration scores and maps stay raw, and labels and masks are left out. A warning says so after
    training, in test, prediction and export, and names categories that have no thresholds of their own.

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
        categories: Names of the categories that it was trained or calibrated for, with thresholds or without; kept in
            checkpoints.

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
        self.categories: list[str] = []
        self._good: dict[str, list[_GoodImage]] = defaultdict(list)
        self._category_of_path: dict[str, str] = {}
        self._default_category = "all"
        self._not_finite = 0
        self._is_calibrated_anew = False
        self._has_warned = False

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "gamma", "calibration", "categories")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the configuration; a checkpoint of another post-processor brings its one threshold only."""
        self.calibration = None
        self.categories = []
        super().load_checkpoint_config(config)

    # --- Calibration ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the categories of the images from the datamodule."""
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)
        for subset in ("val_data", "test_data"):
            samples = getattr(getattr(datamodule, subset, None), "samples", None)
            if samples is not None and "category" in samples.columns:
                self._category_of_path |= dict(zip(samples["image_path"], samples["category"], strict=True))
        name = getattr(datamodule, "category", None) or getattr(datamodule, "name", None)
        self._default_category = name if isinstance(name, str) else "all"
        self._has_warned = self._is_calibrated_anew = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the categories that should get thresholds, after a checkpoint brought those of an earlier run."""
        del pl_module
        self.categories = self._categories_of(trainer, "train_data", "val_data")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the categories that should get thresholds: a trained model may be calibrated for other ones."""
        self.on_fit_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which categories of the test have no thresholds."""
        del pl_module
        warn(missing_thresholds(self, self._categories_of(trainer, "test_data")))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which categories have no thresholds; those of a folder of images are not known."""
        del pl_module
        known = getattr(trainer, "datamodule", None) is not None
        warn(missing_thresholds(self, self._categories_of(trainer, "test_data") if known else ()))

    def _categories_of(self, trainer: Trainer, *subsets: str) -> list[str]:
        """Return the categories of subsets of the datamodule; a single one where it knows none."""
        datamodule, names = getattr(trainer, "datamodule", None), set()
        for subset in subsets:
            samples = getattr(getattr(datamodule, subset, None), "samples", None)
            if samples is not None and "category" in samples.columns:
                names |= set(samples["category"])
        return sorted(names) or [self._default_category]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what a training or calibration left without thresholds; forget the paths, for a model may be pickled."""
        del trainer, pl_module
        self._category_of_path = {}
        if stage in ("fit", "validate"):
            warn(missing_thresholds(self))
            if self.calibration is not None and not self._is_calibrated_anew:
                warn(f"The thresholds are of an earlier validation, perhaps of other weights. {CALIBRATE}")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget images of a validation that was interrupted."""
        del trainer, pl_module
        self._good.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the scores and map histograms of the good images of a batch."""
        del trainer, pl_module, args, kwargs
        finite = _are_finite(outputs).tolist()
        histograms = map_histograms(outputs.anomaly_map.nan_to_num()).cpu()
        scores = outputs.pred_score.flatten().tolist()
        categories = self._categories(outputs, default=self._default_category)
        anomalous = [False] * len(scores) if outputs.gt_label is None else outputs.gt_label.flatten().tolist()
        images = map(_GoodImage, _paths(outputs), scores, histograms)
        for category, image, is_anomalous, is_finite in zip(categories, images, anomalous, finite, strict=True):
            if not is_finite:
                self._not_finite += 1
            elif not is_anomalous:
                self._good[cast("str", category)].append(image)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds of all categories, and the fallback to the highest of them."""
        del trainer, pl_module
        good = _of_all_processes(self._good)
        self._good.clear()
        self._warn_of_values_not_finite("validation")
        if not good:
            logger.warning("No good images in the validation set: the thresholds stay as they are.")
            return
        self._is_calibrated_anew = True
        scores = {category: torch.tensor([image.score for image in images]) for category, images in good.items()}
        histograms = {category: torch.stack([image.histogram for image in images]) for category, images in good.items()}
        self.calibration = {
            "image": image_thresholds(scores, self.image_fpr),
            "pixel": pixel_thresholds(histograms, self.pixel_fpr),
            "image_fpr": self.image_fpr,
            "pixel_fpr": self.pixel_fpr,
        }
        self._image_threshold.fill_(max(self.calibration["image"].values()))
        self._pixel_threshold.fill_(max(self.calibration["pixel"].values()))
        self._warn_of_few_images({category: len(images) for category, images in good.items()})

    def _warn_of_values_not_finite(self, stage: str) -> None:
        """Say how many images had scores or maps that are no numbers."""
        count, self._not_finite = self._not_finite, 0
        if count:
            logger.warning(
                "%d images of the %s have scores or maps that are not finite (NaN or infinite). They set no thresholds "
                "and count as good: the model has diverged, or the images hold such values.", count, stage,
            )  # fmt: skip

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

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores and maps and decide by the highest thresholds; without thresholds leave all as it is."""
        if not torch.compiler.is_compiling() and not has_thresholds(self):
            predictions = super().forward(predictions)
            return predictions._replace(pred_label=None, pred_mask=None)
        return super().forward(predictions)

    def post_process_batch(self, batch: ImageBatch) -> None:  # type: ignore[override]  # any batch in anomalib
        """Normalise scores and maps and decide by the thresholds of the categories; without any leave all as it is."""
        self._not_finite += int((~_are_finite(batch)).sum())
        if has_thresholds(self):
            super().post_process_batch(batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many images had scores or maps that are no numbers."""
        del trainer, pl_module
        self._warn_of_values_not_finite("test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many images had scores or maps that are no numbers."""
        del trainer, pl_module
        self._warn_of_values_not_finite("prediction")

    def normalize_batch(self, batch: ImageBatch) -> None:  # type: ignore[override]  # any batch in anomalib
        """Normalise scores ``(B,)`` and maps ``(B, 1, H, W)`` or ``(B, H, W)``, each by its category's threshold."""
        count = len(cast("Tensor", batch.pred_score))
        images, pixels = self.image_threshold.repeat(count), self.pixel_threshold.repeat(count)
        for row, category in enumerate(self.categories_of(batch)):
            if self.calibration is not None and category in self.calibration["image"]:
                images[row] = self.calibration["image"][category]
                pixels[row] = self.calibration["pixel"][category]
        batch.pred_score = self._scale(batch.pred_score, images)
        batch.anomaly_map = self._scale(batch.anomaly_map, pixels)

    def categories_of(self, batch: ImageBatch) -> list[str | None]:
        """Return the category of each image of a batch, None where it is unknown."""
        return self._categories(batch, default=None)

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
        paths = _paths(batch)
        return [self._category_of_path.get(path) or self._category_of_folder(path) or default for path in paths]

    def _category_of_folder(self, path: str | Path) -> str | None:
        """Return the nearest folder above a file that is named like a calibrated category."""
        known: Iterable[str] = () if self.calibration is None else self.calibration["image"]
        return next((parent.name for parent in Path(path).parents if parent.name in known), None)


def has_thresholds(post_processor: PostProcessor) -> bool:
    """Tell whether a post-processor has thresholds for images and pixels."""
    return not bool(post_processor.image_threshold.isnan() | post_processor.pixel_threshold.isnan())


def missing_thresholds(post_processor: nn.Module | None, categories: Sequence[str] = ()) -> str | None:
    """Say what a post-processor has no thresholds for, and what follows; None if nothing is missing.

    Args:
        post_processor: Any post-processor of anomalib. Without one, or with a module that is none, nothing is missed.
        categories: Names of categories whose images come, beside those the post-processor knows.
    """
    if not isinstance(post_processor, PostProcessor):
        return None
    own = post_processor if isinstance(post_processor, CategoryThresholdPostProcessor) else None
    names = sorted({*categories, *(own.categories if own else ())})
    of_names = f" for {', '.join(names)}" if names else " for any category"
    if not has_thresholds(post_processor):
        follows = (
            "scores and maps stay raw, and predicted labels and masks are left out"
            if own
            else "anomalib compares raw scores and maps with 0.5, so that predicted labels and masks mean nothing"
        )
        return f"There are no thresholds{of_names}: {follows}. {CALIBRATE}"
    if own is None:
        return None
    if own.calibration is None:
        return f"The checkpoint brings one threshold{of_names}: it was made with another post-processor. {CALIBRATE}"
    without = [name for name in names if name not in own.calibration["image"]]
    if not without:
        return None
    image, pixel = (max(own.calibration[level], key=own.calibration[level].get) for level in ("image", "pixel"))
    return (
        f"There are no thresholds for {', '.join(without)}: the highest of the others hold, that of {image} for images "
        f"and that of {pixel} for pixels. {CALIBRATE}"
    )


@rank_zero_only
def warn(message: str | None) -> None:
    """Log a warning, by one process of a distributed run; nothing if there is no message."""
    if message is not None:
        logger.warning("%s", message)


def _are_finite(batch: ImageBatch) -> Tensor:
    """Tell which images of a batch have a finite score and map: ``(B,)``."""
    scores, maps = cast("Tensor", batch.pred_score), batch.anomaly_map
    finite = scores.flatten().isfinite()
    return finite if maps is None else finite & maps.flatten(1).isfinite().all(1)


def _paths(batch: ImageBatch) -> list[str]:
    """Return the path of each image of a batch, "" where it has none."""
    return [str(path) for path in batch.image_path or [""] * len(cast("Tensor", batch.pred_score))]


def _of_all_processes(good: dict[str, list[_GoodImage]]) -> dict[str, list[_GoodImage]]:
    """Join what the processes of a distributed run kept, without images that an earlier process has too.

    The sampler repeats images until every process has equally many; a process by itself gets no repeats.
    """
    joined: dict[str, list[_GoodImage]] = defaultdict(list)
    seen: set[str] = set()
    for part in of_all_processes(dict(good)):
        for category, images in part.items():
            joined[category] += [image for image in images if image.path not in seen]
        seen |= {image.path for images in part.values() for image in images if image.path}
    return dict(joined)
