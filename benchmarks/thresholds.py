# SPDX-License-Identifier: Apache-2.0
"""Do thresholds per category keep the false-positive rate they were asked for? Beside anomalib's thresholds.

Takes a checkpoint and the dataset it was trained on (MVTec AD layout), runs the model once over all images, and gives
its raw maps to the post-processors as a validation run would:

* `held_out`: calibrated on the good images that the training held out, measured on all good test images. What a user
  gets; the images are few.
* `half_of_test`: calibrated on a random half of the good test images of each category, measured on the other half,
  averaged over several draws. Never seen in training and of the same kind: the honest check of the method.
* `training`: calibrated on training images, which the model has learned: what not to do.

anomalib's thresholds are one for all categories: on good images alone the highest score (`held_out`), and tuned for F1
on the labels of the test set (`all_of_test`, anomalib's `same_as_test`), which is no fair competitor.

    python benchmarks/thresholds.py --root DIR --checkpoint CKPT
"""

import argparse
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from speed_report import Row, machine, table
from torch import Tensor
from torch.utils.data import DataLoader

import anomalib_uniass
from anomalib_uniass import Unified
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from anomalib_uniass.training.steps import ReconstructionMixin

RATES = ((0.01, 0.001), (0.05, 0.005), (0.1, 0.01), (0.2, 0.02))
"""Asked rates of images and of pixels."""

MEASURES = ("image_fpr", "pixel_fpr", "image_recall", "pixel_recall")
COLUMNS = (
    "thresholds", "calibrated_on", "images", "asked_image_fpr", "image_fpr", "worst_image_fpr", "image_recall",
    "asked_pixel_fpr", "pixel_fpr", "worst_pixel_fpr", "pixel_recall",
)  # fmt: skip
NO_MODULE = cast("LightningModule", None)  # the post-processors' hooks do not look at it


@dataclass(frozen=True)
class Images:
    """Images of a category.

    Args:
        paths: Their files.
        maps: Raw maps ``(n, 1, H, W)``.
        scores: Raw scores ``(n,)``.
        anomalous: Their labels ``(n,)``.
        masks: Their defects ``(n, H, W)``.
    """

    paths: list[str]
    maps: Tensor
    scores: Tensor
    anomalous: Tensor
    masks: Tensor

    def take(self, rows: Tensor) -> "Images":
        """Return some of the images."""
        paths = [self.paths[row] for row in rows.tolist()]
        return Images(paths, self.maps[rows], self.scores[rows], self.anomalous[rows], self.masks[rows])

    def batch(self) -> ImageBatch:
        """Return them as anomalib's post-processors take them."""
        return ImageBatch(
            image=torch.zeros(len(self.paths), 3, 1, 1),
            image_path=self.paths,
            anomaly_map=self.maps,
            pred_score=self.scores,
            gt_label=self.anomalous,
            gt_mask=self.masks,
        )


def main() -> None:
    """Measure and write `thresholds.json` and `thresholds.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="dataset in MVTec AD layout")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint trained on it")
    parser.add_argument("--model", choices=("UniAS", "UniAD"), default="UniAS", help="model of the checkpoint")
    parser.add_argument("--val-split-ratio", type=float, default=0.05, help="what its training held out")
    parser.add_argument("--draws", type=int, default=20, help="random halves of the good test images")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    arguments = parser.parse_args()

    logging.getLogger("anomalib_uniass").setLevel(logging.ERROR)  # that there are few images is the point here
    datamodule = Unified(root=arguments.root, val_split_ratio=arguments.val_split_ratio, num_workers=0)
    datamodule.setup()
    model = getattr(anomalib_uniass, arguments.model).load_from_checkpoint(
        arguments.checkpoint, evaluator=False, visualizer=False
    )
    model.post_processor = None  # raw maps
    categories = {
        str(row.image_path): str(row.category)
        for subset in (datamodule.train_data, datamodule.val_data, datamodule.test_data)
        for row in subset.samples.itertuples()
    }
    subsets = {
        "training": raw_predictions(model, datamodule.train_data, categories),
        "held_out": raw_predictions(model, datamodule.val_data, categories),
        "test": raw_predictions(model, datamodule.test_data, categories),
    }
    results: Row = {"machine": machine(torch.device("cpu"), torch.get_num_threads())}
    results["rows"] = measure_all(subsets, draws=arguments.draws)
    results["summary"] = summary(results["rows"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "thresholds.json"
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results, arguments.draws))
    print(path.with_suffix(".md").read_text())


def raw_predictions(model: ReconstructionMixin, dataset: Any, categories: Mapping[str, str]) -> dict[str, Images]:
    """Return a dataset's raw maps and scores by category, with masks at the maps' size."""
    dataset.category_augmentations = {}  # of the training images
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn)
    with TemporaryDirectory() as folder:
        engine = Engine(accelerator="cpu", logger=False, default_root_dir=folder)
        batches = cast("list[ImageBatch]", engine.predict(model, dataloaders=loader, return_predictions=True))
    paths = [str(path) for batch in batches for path in batch.image_path or ()]
    maps, scores, labels, masks = (
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("anomaly_map", "pred_score", "gt_label", "gt_mask")
    )
    everything = Images(paths, maps, scores.flatten(), labels.flatten().bool(), masks.bool())
    rows = defaultdict(list)
    for row, path in enumerate(paths):
        rows[categories[path]].append(row)
    return {category: everything.take(torch.tensor(rows[category])) for category in sorted(rows)}


def measure_all(subsets: Mapping[str, Mapping[str, Images]], *, draws: int) -> list[Row]:
    """Return a row for each kind of threshold, calibration set and pair of rates."""
    test = subsets["test"]
    rows = []
    for image_fpr, pixel_fpr in RATES:

        def ours(image_fpr: float = image_fpr, pixel_fpr: float = pixel_fpr) -> PostProcessor:
            return CategoryThresholdPostProcessor(image_fpr=image_fpr, pixel_fpr=pixel_fpr)

        asked = {"thresholds": "per category", "asked_image_fpr": image_fpr, "asked_pixel_fpr": pixel_fpr}
        for source in ("held_out", "training"):
            rows.append(asked | calibrate_and_measure(ours, [(subsets[source], test)]) | {"calibrated_on": source})
        halves = (half_of_good(test, seed) for seed in range(draws))
        rows.append(asked | calibrate_and_measure(ours, halves) | {"calibrated_on": "half_of_test"})
        print(f"asked {image_fpr} of images, {pixel_fpr} of pixels: done", flush=True)
    asked = {"thresholds": "anomalib", "asked_image_fpr": None, "asked_pixel_fpr": None}
    for source, images in (("held_out", subsets["held_out"]), ("all_of_test", test)):
        rows.append(asked | calibrate_and_measure(PostProcessor, [(images, test)]) | {"calibrated_on": source})
    return rows


def half_of_good(test: Mapping[str, Images], seed: int) -> tuple[dict[str, Images], dict[str, Images]]:
    """Return a random half of each category's good images, and the other half with the anomalous ones."""
    generator = torch.Generator().manual_seed(seed)
    first, second = {}, {}
    for category, images in test.items():
        good, anomalous = (~images.anomalous).nonzero().flatten(), images.anomalous.nonzero().flatten()
        order = good[torch.randperm(len(good), generator=generator)]
        first[category] = images.take(order[: len(good) // 2])
        second[category] = images.take(torch.cat([order[len(good) // 2 :], anomalous]))
    return first, second


def calibrate_and_measure(
    make: Callable[[], PostProcessor], splits: Iterable[tuple[Mapping[str, Images], Mapping[str, Images]]]
) -> Row:
    """Calibrate on the first and measure on the second images of each split; return means over the splits.

    Args:
        make: Makes a post-processor.
        splits: Images to calibrate on and to measure on.
    """
    results, count = [], 0
    for calibration, test in splits:
        post_processor = make()
        calibrate(post_processor, calibration)
        count = round(fmean(int((~images.anomalous).sum()) for images in calibration.values()))
        results.append({category: measure(post_processor, images) for category, images in test.items()})
    categories = {
        category: {name: round(fmean(result[category][name] for result in results), 6) for name in MEASURES}
        for category in results[0]
    }
    row: Row = {name: round(fmean(values[name] for values in categories.values()), 6) for name in MEASURES}
    worst = {f"worst_{name}": max(values[name] for values in categories.values()) for name in MEASURES[:2]}
    return row | worst | {"images": count, "categories": categories}


def calibrate(post_processor: PostProcessor, images: Mapping[str, Images]) -> None:
    """Give images to a post-processor as a validation run does."""
    rows = [(path, category) for category, batch in images.items() for path in batch.paths]
    dataset = SimpleNamespace(samples=pd.DataFrame(rows, columns=["image_path", "category"]))
    trainer = cast("Trainer", SimpleNamespace(datamodule=SimpleNamespace(val_data=dataset)))
    post_processor.setup(trainer, NO_MODULE, "validate")
    post_processor.on_validation_epoch_start(trainer, NO_MODULE)
    for batch in images.values():
        post_processor.on_validation_batch_end(trainer, NO_MODULE, batch.batch())
    post_processor.on_validation_epoch_end(trainer, NO_MODULE)


def measure(post_processor: PostProcessor, images: Images) -> dict[str, float]:
    """Return false-positive rates on the good, and recalls on the anomalous images of a category."""
    predicted = images.batch()
    post_processor.post_process_batch(predicted)
    labels = cast("Tensor", predicted.pred_label).flatten()
    masks = cast("Tensor", predicted.pred_mask).reshape(images.masks.shape)
    good = ~images.anomalous
    shares = (labels[good], masks[good], labels[images.anomalous], masks[images.masks])
    return {name: float(share.float().mean()) for name, share in zip(MEASURES, shares, strict=True)}


def summary(rows: list[Row]) -> dict[str, float]:
    """Return achieved over asked rates of thresholds calibrated on half of the good test images."""
    return {
        f"{level}_fpr_over_asked_at_{row[f'asked_{level}_fpr']:g}": round(
            row[f"{level}_fpr"] / row[f"asked_{level}_fpr"], 3
        )
        for row in rows
        if row["calibrated_on"] == "half_of_test"
        for level in ("image", "pixel")
    }


def markdown(results: Row, draws: int) -> str:
    """Return all results as Markdown."""
    host = results["machine"]
    halves = [row for row in results["rows"] if row["calibrated_on"] == "half_of_test"]
    text = [
        "# Thresholds: achieved against asked false-positive rates",
        f"{host['cpu']}; commit {host['commit']}, {host['date']}; "
        + ", ".join(f"{name} {number}" for name, number in host["versions"].items()),
        "Means over the categories; `worst`: of the category with the highest rate; `images`: good images per category "
        "to calibrate on; `recall`: share of anomalous images, and of their defect pixels, that exceed the threshold. "
        f"`half_of_test` is averaged over {draws} draws. `held_out`: good images left out of training. `training`: "
        "images the model learned. `all_of_test`: tuned for F1 on the test labels, as anomalib's `same_as_test`.",
        table(results["rows"], COLUMNS),
    ]
    for level in ("image", "pixel"):
        rows = [
            {"category": category} | {f"{row[f'asked_{level}_fpr']:g}": row["categories"][category][f"{level}_fpr"]
            for row in halves}
            for category in halves[0]["categories"]
        ]  # fmt: skip
        text += [f"## Achieved {level} rates by category, `half_of_test`, by asked rate", table(rows, tuple(rows[0]))]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main()
