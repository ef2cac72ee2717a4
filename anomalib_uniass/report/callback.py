# SPDX-License-Identifier: Apache-2.0
"""A page for every test, beside the table."""

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anomalib_uniass.distribution import of_all_processes
from anomalib_uniass.failures import Failures
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.metrics.category_metrics import MEAN
from anomalib_uniass.metrics.functional import METRICS
from anomalib_uniass.report.charts import category_chart
from anomalib_uniass.report.gallery import KINDS, Example, Gallery, Maps, TestedImage, picture, reduce_map
from anomalib_uniass.report.page import HEADINGS, PICTURE_BYTES, versions, worst_first, write_page
from anomalib_uniass.text import one_line
from anomalib_uniass.thresholds.decisions import decision_thresholds

logger = logging.getLogger(__name__)

MOST_OF_A_KIND = 4


class Picture(TypedDict):
    """A picture of a page."""

    path: str
    score: float
    source: str


class CategoryFindings(TypedDict):
    """What a test found in a category, for pages.

    Attributes:
        good: Scores of good images.
        defective: Scores of defective ones.
        threshold: Score above which an image is called defective, None without one.
        curve: Points (recall, precision) of the pixels.
        pictures: Pictures by kind.
    """

    good: list[float]
    defective: list[float]
    threshold: float | None
    curve: list[tuple[float, float]]
    pictures: dict[str, list[Picture]]


class ReportCallback(Callback):
    """Write ``metrics/report.html`` below ``trainer.default_root_dir`` after every test, of any anomalib model.

    The page holds the table of :class:`~anomalib_uniass.metrics.CategoryMetricsCallback`, which must be among the
    trainer's callbacks, and for every category the image scores with the threshold, the precision-recall curve of its
    pixels, and its worst misses, worst false alarms and surest hits. Scores and maps are those that the post-processor
    leaves, so this callback must run after it and moves itself to the end of the trainer's callbacks.

    Args:
        read_image: Reads an image file, ``(3, H, W)`` in [0, 1].
        notes: Returns a sentence for some categories, called after a test.

    Attributes:
        findings: What the last test found by category, on the first process.
    """

    def __init__(self, read_image: Callable[[str], Tensor], *, notes: Callable[[], dict[str, str]] = dict) -> None:
        self.findings: dict[str, CategoryFindings] = {}
        self._read_image = read_image
        self._notes = notes
        self._images: dict[str, TestedImage] = {}
        self._gallery = Gallery(MOST_OF_A_KIND)
        self._not_drawn = Failures(logger, "No picture on the page")
        self._metrics: CategoryMetricsCallback | None = None
        self._start = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the end of the callbacks, and forget an earlier test."""
        del pl_module
        self._start = time.monotonic()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        # A new list: Lightning is iterating over the old one.
        reordered = [*(callback for callback in callbacks if callback is not self), self]
        trainer.callbacks = reordered  # type: ignore[attr-defined]
        self._metrics = next((one for one in callbacks if isinstance(one, CategoryMetricsCallback)), None)
        self._images, self.findings = {}, {}
        self._gallery = Gallery(MOST_OF_A_KIND)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep scores, and the maps of the most telling images."""
        del outputs, args
        if self._metrics is None or batch.pred_score is None:
            return
        threshold = decision_thresholds(getattr(pl_module, "post_processor", None)).image
        scores, labels = batch.pred_score.flatten().float().tolist(), batch.gt_label.flatten().tolist()
        unnamed = [f"image {batch_idx}.{index} of process {trainer.global_rank}" for index in range(len(scores))]
        paths = unnamed if batch.image_path is None else [str(path) for path in batch.image_path]
        for i, category in enumerate(self._metrics.categories_of(batch)):
            is_flagged = None if threshold is None else scores[i] > float(threshold)
            image = TestedImage(paths[i], category, scores[i], bool(labels[i]), is_flagged)
            self._images[image.path] = image
            self._gallery.add(image, lambda i=i: _maps(batch, i))  # type: ignore[misc]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join what all processes found, and write the page."""
        metrics = self._metrics
        if metrics is None or metrics.table is None:
            return
        parts = of_all_processes((self._images, self._gallery))
        images = {path: image for found, _ in parts for path, image in found.items()}
        gallery = parts[0][1].merge(found for _, found in parts[1:])
        self._images, self._gallery = {}, Gallery(MOST_OF_A_KIND)
        if not trainer.is_global_zero or not images:
            return
        threshold = decision_thresholds(getattr(pl_module, "post_processor", None)).image
        test = _Test(
            list(images.values()), gallery, None if threshold is None else float(threshold), metrics.precision_recall
        )
        directory = Path(trainer.default_root_dir) / "metrics"
        try:
            self.findings = self._find(test, {name: row for name, row in metrics.table.items() if name != MEAN})
            directory.mkdir(parents=True, exist_ok=True)
            facts = _facts(trainer, pl_module, time.monotonic() - self._start)
            _write(directory / "report.html", metrics.table, self.findings, test, facts, self._notes())
        except (OSError, ValueError) as error:  # it must not cost the test
            logger.warning("The page of the test, %s, could not be written: %s", directory / "report.html", error)
        else:
            logger.debug("The test as a page: %s", directory / "report.html")

    def _find(self, test: "_Test", table: dict[str, dict[str, float]]) -> dict[str, CategoryFindings]:
        """Return what is drawn, by category."""
        scores: dict[tuple[str, bool], list[float]] = defaultdict(list)
        for image in test.images:
            scores[image.category, image.is_defective].append(image.score)
        findings = {
            name: CategoryFindings(
                good=scores[name, False],
                defective=scores[name, True],
                threshold=test.threshold,
                curve=test.curves.get(name, []),
                pictures={},
            )
            for name in table
        }
        names = worst_first({name: row["pixel_AP"] for name, row in table.items()})
        spent = 0
        # Every category has its first picture of each kind before one has its second.
        for place, name, kind in itertools.product(range(MOST_OF_A_KIND), names, KINDS):
            examples = test.gallery.examples.get((name, kind), [])
            if place < len(examples) and spent < PICTURE_BYTES:
                drawn = self._draw(examples[place], highest=_highest(test.gallery, name))
                if drawn is not None:
                    findings[name]["pictures"].setdefault(kind, []).append(drawn)
                    spent += len(drawn["source"])
        self._not_drawn.end()
        return findings

    def _draw(self, example: Example, *, highest: float) -> Picture | None:
        """Draw an example; an image that has gone or cannot be read is told, and has none."""
        path = Path(example.image.path)
        try:
            image = self._read_image(str(path))
        except (OSError, ValueError) as error:
            self._not_drawn.add(str(path), error)
            return None
        return Picture(
            path=one_line(Path(*path.parts[-3:]).as_posix()),
            score=example.image.score,
            source=picture(image, example.maps, highest=highest),
        )


def _highest(gallery: Gallery, category: str) -> float:
    """Return the value that is brightest in the maps of a category."""
    examples = [example for kind in KINDS for example in gallery.examples.get((category, kind), [])]
    if examples[0].image.is_flagged is not None:
        return 1.0  # normalised maps have their threshold at 0.5
    maps = [example.maps.anomaly_map for example in examples if example.maps.anomaly_map is not None]
    return max((float(one.max()) for one in maps), default=1.0) or 1.0


class _Test(NamedTuple):
    """What all processes of a test found."""

    images: list[TestedImage]
    gallery: Gallery
    threshold: float | None
    curves: dict[str, list[tuple[float, float]]]


def _maps(batch: Any, index: int) -> Maps:
    """Return the maps of an image of a batch."""
    whole = (batch.anomaly_map, batch.pred_mask, batch.gt_mask)
    return Maps(*(None if values is None else reduce_map(values[index]) for values in whole))


def _write(
    path: Path,
    table: dict[str, dict[str, float]],
    findings: dict[str, CategoryFindings],
    test: _Test,
    facts: dict[str, str],
    notes: dict[str, str],
) -> None:
    """Write the page of a test."""
    decisions = {name: _decisions([image for image in test.images if image.category == name]) for name in findings}
    categories = {
        name: {
            "chart": category_chart(found["good"], found["defective"], found["threshold"], found["curve"], name=name),
            "text": " ".join(filter(None, (decisions[name], notes.get(name)))),
            "pictures": found["pictures"],
        }
        for name, found in findings.items()
        if found["good"] or found["defective"]
    }
    write_page(
        path,
        "test",
        title=f"{facts['model']} on {facts['data']}",
        subtitle=" ".join([f"Test of {len(test.images)} images, {facts['date']}.", _decisions(test.images)]).strip(),
        table=table,
        mean=MEAN,
        metrics=METRICS,
        categories=categories,
        left_out=sum(
            not found["pictures"] and any(test.gallery.examples.get((name, kind)) for kind in KINDS)
            for name, found in findings.items()
        ),
        headings=HEADINGS,
        threshold_text="There are no thresholds, so that no image is called defective."
        if test.threshold is None
        else f"An image is called defective above {test.threshold:g}, the dashed line.",
        facts=facts,
    )


def _decisions(images: list[TestedImage]) -> str:
    """Say how many images were decided rightly; nothing without decisions."""
    if any(image.is_flagged is None for image in images):
        return ""
    defective, good = ([image for image in images if image.is_defective is label] for label in (True, False))
    return (
        f"{sum(bool(image.is_flagged) for image in defective)} of {len(defective)} defective images are found, "
        f"{sum(bool(image.is_flagged) for image in good)} of {len(good)} good ones are false alarms."
    )


def _facts(trainer: Trainer, pl_module: LightningModule, seconds: float) -> dict[str, str]:
    """Return what the page says of the run."""
    datamodule = getattr(trainer, "datamodule", None)
    root = getattr(datamodule, "root", None)
    hparams = {name: value for name, value in pl_module.hparams.items() if not callable(value)}
    return {
        "model": type(pl_module).__name__,
        "data": str(getattr(datamodule, "name", None) or type(datamodule).__name__),
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "seconds": f"{seconds:.0f}, reading and scoring included",
        "device": str(pl_module.device),
        **({} if root is None else {"folder": str(root)}),
        **{f"model.{name}": str(value) for name, value in hparams.items()},
        **versions(),
    }
