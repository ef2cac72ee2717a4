# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category in anomalib's post-processing."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from anomalib_uniass.arguments import check_number
from anomalib_uniass.categories import (
    ALL,
    CategoryNames,
    category_of,
    default_category,
    folders_above,
    sample_categories,
)
from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.logs import warn
from anomalib_uniass.text import some
from anomalib_uniass.thresholds.calibration import (
    check_rate,
    image_thresholds,
    images_needed,
    outliers,
    pixel_thresholds,
)
from anomalib_uniass.thresholds.checks import check_thresholds
from anomalib_uniass.thresholds.decisions import are_finite, or_infinite
from anomalib_uniass.thresholds.good_images import (
    Columns,
    GoodImage,
    GoodImages,
    columns,
    join,
    map_tails,
    of_level,
    without_rounding,
)

logger = logging.getLogger(__name__)

IMAGE_FPR, PIXEL_FPR, GAMMA = 0.05, 0.0005, 0.5
"""Rates and exponent where none are asked for."""

CALIBRATE = (
    "Thresholds come from good validation images: train with some of every category (not with limit_val_batches=0), or "
    "calibrate the trained model with Engine.validate and save it with engine.trainer.save_checkpoint."
)


NEVER_GOOD = "They are never good, whatever their threshold"


class CategoryThresholdPostProcessor(PostProcessor):
    """Thresholds of each category at chosen false-positive rates, from the good validation images.

    The end of a training keeps score and map quantiles of training images, validation those of its good images
    (anomalous ones are left out); at its end the thresholds are set, see :mod:`anomalib_uniass.thresholds.calibration`.
    To resolve an image rate r takes 1 / r - 1 good validation images of the category, 19 for 5 %; with fewer the
    training images tell how scores spread, and a warning says so. The thresholds are as good as the validation images
    are new to the model and like those to come: :class:`~anomalib_uniass.data.Unified` holds them out of training by
    default. An image unlike all others of its category, such as a defective one among the good, sets no threshold and
    is named. A distributed validation joins the images of all processes; those that the sampler repeats, known by their
    path, count once.

    Scores and map values x >= 0 with threshold t become x^gamma / (x^gamma + t^gamma): in [0, 1), 0.5 at the threshold
    as everywhere in anomalib, in the order of x, and without the clamping of anomalib's own. Predicted labels and masks
    are what exceeds 0.5.

    The category of an image is the one its datamodule gives, else the one its folders tell, see
    :mod:`anomalib_uniass.categories`. Elsewhere, and in exported graphs, which see no path, the highest threshold of
    all categories holds: no category exceeds its rate by it; a warning after test and prediction says of how many
    images. `exported_thresholds` gives all thresholds in the units of exported outputs.

    What is not finite is never good: such a map value or score becomes infinite, and so does the score of an image with
    such a map value. A warning names the images.

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
            ``image_fpr`` and ``pixel_fpr``, and the number of good images by category (``images``); kept in
            checkpoints. None before the first validation.
        good: Scores and map quantiles of the good validation images by category; kept in checkpoints.
        learned: Those of training images; kept in checkpoints.
        categories: Names of the categories that it was trained or calibrated for, with thresholds or without; kept in
            checkpoints.

    Raises:
        ValueError: If a rate or `gamma` is out of range.
    """

    def __init__(self, *, image_fpr: float = IMAGE_FPR, pixel_fpr: float = PIXEL_FPR, gamma: float = GAMMA) -> None:
        super().__init__()
        check_number("gamma", gamma, above=0)
        self.image_fpr = check_rate("image_fpr", image_fpr)
        self.pixel_fpr = check_rate("pixel_fpr", pixel_fpr)
        self.gamma = gamma
        self.calibration: dict[str, Any] | None = None
        self.categories: list[str] = []
        self.good: dict[str, Columns] = {}
        self.learned: dict[str, Columns] = {}
        self._good: GoodImages = defaultdict(list)
        self._learned: GoodImages = defaultdict(list)
        self._category_of_path: dict[str, str] = {}
        self._default_category = ALL
        self._not_finite: list[str] = []
        self._unmatched: Counter[str] = Counter()
        self._good_in_test: Counter[tuple[str, bool]] = Counter()
        self._is_calibrated_anew = False
        self._has_warned = False

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "gamma", "calibration", "categories", "good", "learned")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the configuration; a checkpoint of another post-processor brings its one threshold only.

        Raises:
            ValueError: If thresholds are missing or not finite; names the entry.
        """
        self.calibration = None
        self.categories, self.good, self.learned = [], {}, {}
        if (calibration := config.get("calibration")) is not None:
            check_thresholds(calibration, "calibration of the checkpoint")
        asked = self.gamma
        super().load_checkpoint_config(config)
        if asked not in (self.gamma, GAMMA):
            warn(f"gamma is {self.gamma:g} as the checkpoint has it, not {asked:g} as asked for: train with that.")

    # --- Calibration ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the categories of the images from the datamodule."""
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)
        subsets = (getattr(datamodule, subset, None) for subset in ("train_data", "val_data", "test_data"))
        self._category_of_path |= sample_categories(*subsets)
        self._default_category = default_category(datamodule)
        self._not_finite, self._unmatched, self._good_in_test = [], Counter(), Counter()
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
        check_decisions(self)
        self._warn_of_other_rates()
        warn(missing_thresholds(self, self._categories_of(trainer, "test_data")))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which categories have no thresholds; those of a folder of images are not known."""
        del pl_module
        check_decisions(self)
        self._warn_of_other_rates()
        known = getattr(trainer, "datamodule", None) is not None
        warn(missing_thresholds(self, self._categories_of(trainer, "test_data") if known else ()))

    def _warn_of_other_rates(self) -> None:
        """Say that the thresholds are of other rates than were asked for; the defaults ask for nothing."""
        if self.calibration is None:
            return
        for name, default in (("image_fpr", IMAGE_FPR), ("pixel_fpr", PIXEL_FPR)):
            asked, made = getattr(self, name), self.calibration[name]
            if asked not in (made, default):
                warn(
                    f"The thresholds were made for {name}={made:g}, as the checkpoint has them, not for the {asked:g} "
                    f"that was asked for. {CALIBRATE}"
                )

    def _categories_of(self, trainer: Trainer, *subsets: str) -> list[str]:
        """Return the categories of subsets of the datamodule; a single one where it knows none."""
        datamodule = getattr(trainer, "datamodule", None)
        told = sample_categories(*(getattr(datamodule, subset, None) for subset in subsets))
        return sorted(set(told.values())) or [self._default_category]

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
        """Keep the scores of the good images of a batch, and the tails of their maps."""
        del trainer, pl_module, args, kwargs
        self._keep(outputs, self._good)

    def learn(self, batch: ImageBatch) -> None:
        """Keep the same of a batch of training images, with the raw score and map of the trained model.

        Each process of a distributed run gives its share; :meth:`end_learning` joins them.
        """
        self._keep(batch, self._learned)

    def end_learning(self) -> None:
        """Take the training images of :meth:`learn` for those that the weights have learned from."""
        self.learned = columns(join(self._learned))
        self._learned.clear()

    def _keep(self, batch: ImageBatch, kept: GoodImages) -> None:
        finite = cast("Tensor", are_finite(batch)).tolist()
        tails = map_tails(cast("Tensor", batch.anomaly_map).nan_to_num()).cpu()
        scores = cast("Tensor", batch.pred_score).flatten().tolist()
        categories = [category or self._default_category for category in self.categories_of(batch)]
        anomalous = [False] * len(scores) if batch.gt_label is None else batch.gt_label.flatten().tolist()
        images = map(GoodImage, _paths(batch), scores, tails)
        for category, image, is_anomalous, is_finite in zip(categories, images, anomalous, finite, strict=True):
            if not is_finite:
                self._not_finite.append(image.path)
            elif not is_anomalous:
                kept[category].append(image)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds of all categories, and the fallback to the highest of them."""
        del trainer, pl_module
        good = without_rounding(join(self._good))
        self._good.clear()
        self._warn_of_values_not_finite("validation", "They set no thresholds")
        if not good:
            logger.warning("No good images in the validation set: the thresholds stay as they are.")
            return
        self._is_calibrated_anew = True
        self.good = columns(good)
        self.calibrate()
        self._warn_of_outliers(good)
        self._warn_of_few_images({category: len(images) for category, images in good.items()})

    def calibrate(self, *, kept: Mapping[str, Any] | None = None) -> None:
        """Take the thresholds of all categories from the good images that are known, for the rates asked for.

        Args:
            kept: Calibration whose thresholds stay for categories without known images.

        Raises:
            ValueError: If none is known.
        """
        if not self.good:
            msg = f"There are no good images to take thresholds from. {CALIBRATE}"
            raise ValueError(msg)
        stay = {
            level: {name: each for name, each in (kept or {}).get(level, {}).items() if name not in self.good}
            for level in ("image", "pixel", "images")
        }
        self.calibration = {
            level: stay[level] | thresholds(of_level(self.good, level), rate, learned=of_level(self.learned, level))
            for level, thresholds, rate in (
                ("image", image_thresholds, self.image_fpr),
                ("pixel", pixel_thresholds, self.pixel_fpr),
            )
        } | {
            "image_fpr": self.image_fpr,
            "pixel_fpr": self.pixel_fpr,
            "images": stay["images"] | {category: len(images["image"]) for category, images in self.good.items()},
        }
        self._image_threshold.fill_(max(self.calibration["image"].values()))
        self._pixel_threshold.fill_(max(self.calibration["pixel"].values()))

    def _warn_of_outliers(self, good: GoodImages) -> None:
        """Name the images that are unlike the other good ones of their category: they set no thresholds."""
        found = outliers(of_level(self.good, "image"), learned=of_level(self.learned, "image"))
        paths = [good[category][row].path for category, rows in found.items() for row in rows]
        if paths:
            warn(
                f"{len(paths)} validation images have far higher scores than the other good ones of their category: "
                f"{some(paths)}. They set no thresholds. Look at them: they may be defective, dark or another product."
            )

    def _warn_of_values_not_finite(self, stage: str, follows: str) -> None:
        """Name the images that had scores or maps that are no numbers."""
        paths = sorted(path for part in of_all_processes(self._not_finite) for path in part)
        self._not_finite = []
        if paths:
            warn(
                f"{len(paths)} images of the {stage} have scores or maps that are not finite (NaN or infinite): "
                f"{some(paths)}. {follows}: the model has diverged, or the images hold such values."
            )

    def _warn_of_unknown_categories(self) -> None:
        """Say of how many images no category was known, and what decided."""
        unmatched: Counter[str] = sum(of_all_processes(self._unmatched), Counter())
        self._unmatched = Counter()
        if not unmatched or self.calibration is None or len(self.calibration["image"]) == 1:
            return  # a single category has the one threshold that there is
        folders = some([f"{folder!r} ({count})" for folder, count in sorted(unmatched.items())])
        image, pixel = (_highest(self.calibration, level) for level in ("image", "pixel"))
        warn(
            f"The category of {unmatched.total()} images is not known, by folder: {folders}. No folder above them is "
            f"called like exactly one of {', '.join(sorted(self.calibration['image']))}. The highest thresholds of all "
            f"decided, that of {image} for images and that of {pixel} for pixels: images of other categories pass for "
            "good more easily. Give images in folders called like their categories."
        )

    def _warn_of_false_alarms(self) -> None:
        """Say which thresholds most of the good test images exceed: they were not taken from images like these."""
        good: Counter[tuple[str, bool]] = sum(of_all_processes(self._good_in_test), Counter())
        self._good_in_test = Counter()
        counts = {name: (good[name, True], good[name, True] + good[name, False]) for name, _ in sorted(good)}
        exceeded = [
            f"{name} ({above} of {all_})" for name, (above, all_) in counts.items() if name and 2 * above > all_
        ]
        if exceeded and self.calibration is not None:
            asked = self.calibration.get("image_fpr", self.image_fpr)
            warn(
                f"Most good test images exceed the threshold of their category: {', '.join(exceeded)}. {100 * asked:g} "
                "% were asked for. The held-out images were not new to the model (copies of training images), too few, "
                "or of another kind than the test images."
            )

    def _warn_of_few_images(self, counts: dict[str, int]) -> None:
        """Say once per run which categories have too few images for the image rate."""
        needed = images_needed(self.image_fpr)
        few = [f"{category} ({count})" for category, count in counts.items() if count < needed]
        if few and not self._has_warned:
            logger.warning(
                "An image false-positive rate of %g takes %d good validation images of a category to resolve. Fewer "
                "have: %s. Their thresholds take the spread from %s, and hold on average. Hold out more images "
                "(val_split_ratio) or ask for a higher image_fpr.",
                self.image_fpr, needed, ", ".join(few),
                "the training images" if self.learned else f"the {sum(counts.values())} validation images of all",
            )  # fmt: skip
            self._has_warned = True

    # --- Prediction ---

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalise scores and maps and decide by the highest thresholds; without thresholds leave all as it is."""
        if not torch.compiler.is_compiling() and not has_thresholds(self):
            predictions = super().forward(predictions)
            return predictions._replace(pred_label=None, pred_mask=None)
        found = super().forward(predictions)
        if (finite := are_finite(predictions)) is None or found.pred_score is None:
            return found
        score = or_infinite(found.pred_score, finite.reshape(found.pred_score.shape))
        label = None if found.pred_label is None else score > self.normalized_image_threshold
        return found._replace(pred_score=score, pred_label=label)

    def post_process_batch(self, batch: ImageBatch) -> None:  # type: ignore[override]  # any batch in anomalib
        """Normalise scores and maps and decide by the thresholds of the categories; without any leave all as it is."""
        paths = _paths(batch)
        if (finite := are_finite(batch)) is not None:
            self._not_finite += [path for path, is_finite in zip(paths, finite.tolist(), strict=True) if not is_finite]
        if not has_thresholds(self):
            return
        unknown = [path for path, name in zip(paths, self.categories_of(batch), strict=True) if name is None]
        self._unmatched.update((folders_above(path)[-1:] or [""])[0] if path else "" for path in unknown)
        super().post_process_batch(batch)
        if batch.pred_label is None:
            return
        if finite is not None:
            batch.pred_label = batch.pred_label | ~finite.reshape(batch.pred_label.shape)
        if batch.gt_label is not None:
            labels = (values.flatten().tolist() for values in (batch.pred_label, batch.gt_label))
            for name, is_flagged, is_anomalous in zip(self.thresholds_of(batch), *labels, strict=True):
                if not is_anomalous:
                    self._good_in_test[name, bool(is_flagged)] += 1

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the images that had scores or maps that are no numbers, and those of no known category."""
        del trainer, pl_module
        self._warn_of_values_not_finite("test", NEVER_GOOD)
        self._warn_of_unknown_categories()
        self._warn_of_false_alarms()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the images that had scores or maps that are no numbers, and those of no known category."""
        del trainer, pl_module
        self._warn_of_values_not_finite("prediction", NEVER_GOOD)
        self._warn_of_unknown_categories()

    def normalize_batch(self, batch: ImageBatch) -> None:  # type: ignore[override]  # any batch in anomalib
        """Normalise scores ``(B,)`` and maps ``(B, 1, H, W)`` or ``(B, H, W)``, each by its category's threshold."""
        count = len(cast("Tensor", batch.pred_score))
        images, pixels = self.image_threshold.repeat(count), self.pixel_threshold.repeat(count)
        for row, category in enumerate(self._calibrated(batch)):
            if self.calibration is not None and category is not None:
                images[row] = self.calibration["image"][category]
                pixels[row] = self.calibration["pixel"][category]
        finite = cast("Tensor", are_finite(batch))
        score = cast("Tensor", self._scale(batch.pred_score, images))
        batch.pred_score = or_infinite(score, finite.reshape(score.shape))
        batch.anomaly_map = self._scale(batch.anomaly_map, pixels)

    def categories_of(self, batch: ImageBatch) -> list[str | None]:
        """Return the category of each image of a batch, None where it is unknown."""
        return [category_of(path, self._category_of_path, self._names) for path in _paths(batch)]

    def thresholds_of(self, batch: ImageBatch) -> list[str]:
        """Return the category whose image threshold decides of each image of a batch, "" without a calibration."""
        if self.calibration is None:
            return [""] * len(_paths(batch))
        highest = _highest(self.calibration, "image")
        return [category or highest for category in self._calibrated(batch)]

    @property
    def _names(self) -> CategoryNames:
        """Names of the categories that have thresholds."""
        return CategoryNames(() if self.calibration is None else self.calibration["image"])

    def _calibrated(self, batch: ImageBatch) -> list[str | None]:
        """Return the category with thresholds that each image of a batch belongs to, None where there is none."""
        names = self._names
        return [None if category is None else names.match(category) for category in self.categories_of(batch)]

    def exported_thresholds(self) -> dict[str, Any] | None:
        """Return the thresholds of all categories in the units of exported outputs, None without a calibration.

        They lie in (0, 0.5], for exported graphs normalise by the highest. A category's label is
        ``pred_score > image[category]``, its mask ``anomaly_map > pixel[category]``.
        """
        check_decisions(self)
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
        divisor = torch.where(unknown, torch.ones_like(total), total)
        return or_infinite(torch.where(unknown, values, own), values.isfinite(), divisor)


def check_decisions(post_processor: nn.Module | None) -> None:
    """Refuse thresholds that nothing can be decided by; having none at all is no error.

    Raises:
        ValueError: If a threshold of :class:`CategoryThresholdPostProcessor` is missing, not finite or negative.
    """
    if not isinstance(post_processor, CategoryThresholdPostProcessor):
        return
    if post_processor.calibration is not None:
        check_thresholds(post_processor.calibration, "calibration of the model")
    for level, threshold in (("image", post_processor.image_threshold), ("pixel", post_processor.pixel_threshold)):
        if threshold.isinf() or threshold < 0 or (threshold.isnan() and post_processor.calibration is not None):
            msg = (
                f"The {level} threshold of all categories is {float(threshold):g}, which decides nothing. Calibrate "
                "the model anew (Engine.validate)."
            )
            raise ValueError(msg)


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
    calibrated = own._names
    without = [name for name in names if calibrated.match(name) is None]
    if not without:
        return None
    image, pixel = (_highest(own.calibration, level) for level in ("image", "pixel"))
    return (
        f"There are no thresholds for {', '.join(without)}: the highest of the others hold, that of {image} for images "
        f"and that of {pixel} for pixels. {CALIBRATE}"
    )


def _highest(calibration: dict[str, Any], level: str) -> str:
    """Return the category with the highest threshold."""
    return max(calibration[level], key=calibration[level].get)


def _paths(batch: ImageBatch) -> list[str]:
    """Return the path of each image of a batch, "" where it has none."""
    return [str(path) for path in batch.image_path or [""] * len(cast("Tensor", batch.pred_score))]
