# SPDX-License-Identifier: Apache-2.0
"""Do thresholds per category keep what they promise, and what do they find? From a few good images, drawn many times.

Takes a checkpoint and the dataset it was trained on (MVTec AD layout), and runs the model once over all images. Then,
many times: a few good images of each category that the model has not learned from (held out of training, or good test
images) set the thresholds, and all other good images and the defective ones are decided by them.

* `ours`: the place of the new images, the spread of the training images.
* `without training images`: the spread of the new images of all categories, as in a checkpoint of version 0.2.
* `highest`: the highest score and map value of the new images.
* `SuperADD`: the rule of anomalib's SuperADDPostProcessor, per category: their 95th percentile, times 1.421 for pixels.

MEBin of anomalib sets no threshold from good images; it is not measured: its search over a category's maps takes hours.

    python benchmarks/thresholds.py --name inspection --root DIR --checkpoint CKPT
    python benchmarks/thresholds.py --name demo --root DIR --checkpoint CKPT
"""

import argparse
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from speed_report import Row, machine, table
from torch import Tensor
from torch.utils.data import DataLoader

import anomalib_uniass
from anomalib_uniass import Unified
from anomalib_uniass.thresholds.calibration import image_thresholds, pixel_thresholds
from anomalib_uniass.thresholds.good_images import map_tails
from anomalib_uniass.thresholds.post_processor import IMAGE_FPR, PIXEL_FPR
from anomalib_uniass.training.steps import ReconstructionMixin

IMAGE_RATES = (0.1, 0.05, 0.01)
PIXEL_RATES = (0.005, 0.001, 0.0005)
COLUMNS = (
    "rule", "asked", "achieved", "worst_category", "recall", "recall_without_false_alarm",
    "F1", "F1Max", "F1_over_F1Max",
)  # fmt: skip
OUTLIERS = (10.0, 1000.0)
"""Factors on score and map of a calibration image that is defective, dark or broken."""

Rule = Callable[[Mapping[str, Tensor], float, Mapping[str, Tensor]], dict[str, float]]
"""Values of new good images by category (scores, or tails of maps), asked rate and values of training images."""

IMAGE_RULES: dict[str, Rule] = {
    "ours": lambda new, rate, learned: image_thresholds(new, rate, learned=learned),
    "without training images": lambda new, rate, _: image_thresholds(new, rate),
    "highest": lambda new, *_: {category: float(scores.max()) for category, scores in new.items()},
    "SuperADD": lambda new, *_: {category: float(scores.quantile(0.95)) for category, scores in new.items()},
}
PIXEL_RULES: dict[str, Rule] = {
    "ours": lambda new, rate, learned: pixel_thresholds(new, rate, learned=learned),
    "without training images": lambda new, rate, _: pixel_thresholds(new, rate),
    "highest": lambda new, *_: {category: float(tails.max()) for category, tails in new.items()},
    "SuperADD": lambda new, *_: {name: 1.421 * each for name, each in pixel_thresholds(new, 0.05).items()},
}


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


def main() -> None:
    """Measure and write `thresholds.json` and `thresholds.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the dataset in the results; others there stay")
    parser.add_argument("--root", type=Path, required=True, help="dataset in MVTec AD layout")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint trained on it")
    parser.add_argument("--model", choices=("UniAS", "UniAD"), default="UniAS", help="model of the checkpoint")
    parser.add_argument("--val-split-ratio", type=float, default=0.05, help="what its training held out")
    parser.add_argument("--images", type=int, default=3, help="good images of a category to calibrate on")
    parser.add_argument("--draws", type=int, default=20, help="times they are drawn")
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
    learned, held_out, test = (
        raw_predictions(model, subset, categories)
        for subset in (datamodule.train_data, datamodule.val_data, datamodule.test_data)
    )
    found = measure(learned, joined(held_out, test), images=arguments.images, draws=arguments.draws)

    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "thresholds.json"
    results: Row = json.loads(path.read_text()) if path.exists() else {"datasets": {}}
    host = {"machine": machine(torch.device("cpu"), torch.get_num_threads())}
    results["datasets"][arguments.name] = host | {"images": arguments.images, "draws": arguments.draws} | found
    results["summary"] = summary(results["datasets"])
    path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
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


def joined(held_out: Mapping[str, Images], test: Mapping[str, Images]) -> dict[str, Images]:
    """Return all images that the model did not learn from."""
    return {
        category: Images(
            [*held_out[category].paths, *images.paths],
            *(
                torch.cat([getattr(held_out[category], name), getattr(images, name)])
                for name in ("maps", "scores", "anomalous", "masks")
            ),
        )
        if category in held_out
        else images
        for category, images in test.items()
    }


def measure(learned: Mapping[str, Images], new: Mapping[str, Images], *, images: int, draws: int) -> Row:
    """Return rows of image thresholds and of pixel thresholds, means over the draws, and what an outlier moves.

    Args:
        learned: Training images by category.
        new: All others.
        images: Good images of a category that set its thresholds.
        draws: Times they are drawn.
    """
    known = {category: (each.scores, map_tails(each.maps)) for category, each in learned.items()}
    tails = {category: map_tails(each.maps) for category, each in new.items()}
    curves = {category: Curve(each) for category, each in new.items()}
    levels = (("image", IMAGE_RULES, IMAGE_RATES), ("pixel", PIXEL_RULES, PIXEL_RATES))
    found: dict[tuple[str, str, float], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    shifts: list[float] = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        few, rest = {}, {}
        for category, each in new.items():
            good = (~each.anomalous).nonzero().flatten()
            order = good[torch.randperm(len(good), generator=generator)]
            few[category], rest[category] = order[:images], order[images:]
        values = {
            "image": {category: each.scores[few[category]] for category, each in new.items()},
            "pixel": {category: tails[category][few[category]] for category in new},
        }
        for index, (level, rules, rates) in enumerate(levels):
            of_level = {category: both[index] for category, both in known.items()}
            for rule, thresholds in rules.items():
                for rate in rates:
                    for category, threshold in thresholds(values[level], rate, of_level).items():
                        decided = decide_images if level == "image" else decide_pixels
                        row = decided(new[category], curves[category], rest[category], threshold)
                        found[level, rule, rate][category].append(row)
            if index == 0:
                shifts += [shift_by_outlier(values[level], of_level, draw, factor) for factor in OUTLIERS]
    rows: Row = {"image": [], "pixel": [], "outlier_shift": max(shifts)}
    for (level, rule, rate), by_category in found.items():
        means = {
            category: {name: fmean(row[name] for row in drawn) for name in drawn[0]}
            for category, drawn in by_category.items()
        }
        row = {name: round(fmean(each[name] for each in means.values()), 5) for name in next(iter(means.values()))}
        worst = round(max(each["achieved"] for each in means.values()), 5)
        if "F1" in row:
            row["F1_over_F1Max"] = round(row["F1"] / row["F1Max"], 4)
        rows[level].append({"rule": rule, "asked": rate} | row | {"worst_category": worst, "categories": means})
    return rows


class Curve:
    """Pixels of a category's images in bins of map values, so that thresholds are measured at once.

    Args:
        images: All images of the category.
    """

    def __init__(self, images: Images) -> None:
        maps = images.maps.flatten(1).double().clamp_min(1e-30).log()
        self.edges = torch.linspace(float(maps.min()), float(maps.max()), 4000, dtype=torch.float64)
        masks = images.masks.flatten(1)
        self.good = torch.stack([self._above(values) for values in maps])  # of all pixels of each image
        self.defect = self._above(maps[masks])
        rows = images.anomalous.nonzero().flatten()
        self.background = self.good[rows].sum(dim=0) - self.defect
        self.pixels = maps.shape[1]

    def _above(self, values: Tensor) -> Tensor:
        """Return how many of some values lie above each edge."""
        return len(values) - torch.searchsorted(values.sort().values, self.edges, right=True)

    def at(self, threshold: float) -> int:
        """Return the bin of a threshold."""
        edge = torch.searchsorted(self.edges, torch.tensor(max(threshold, 1e-30), dtype=torch.float64).log())
        return min(int(edge), len(self.edges) - 1)

    def f1(self, good: Tensor) -> Tensor:
        """Return the F1 score of the pixels at every edge, over the defective images and some good ones."""
        wrong = self.background + self.good[good].sum(dim=0)
        return 2 * self.defect / (self.defect + wrong + self.defect[0]).clamp_min(1)


def decide_images(images: Images, curve: Curve, good: Tensor, threshold: float) -> Row:
    """Return shares of images above a threshold, and of defective ones above all good ones."""
    del curve
    scores, defective = images.scores[good], images.scores[images.anomalous]
    return {
        "achieved": float((scores > threshold).double().mean()),
        "recall": float((defective > threshold).double().mean()),
        "recall_without_false_alarm": float((defective > scores.max()).double().mean()),
    }


def decide_pixels(images: Images, curve: Curve, good: Tensor, threshold: float) -> Row:
    """Return the share of good pixels above a threshold, and F1 there and at best."""
    del images
    place, scores = curve.at(threshold), curve.f1(good)
    return {
        "achieved": float(curve.good[good, place].double().mean() / curve.pixels),
        "F1": float(scores[place]),
        "F1Max": float(scores.max()),
    }


def shift_by_outlier(values: Mapping[str, Tensor], learned: Mapping[str, Tensor], draw: int, factor: float) -> float:
    """Return by which share at most a bad image in one category moves the threshold of another."""
    spoilt = sorted(values)[draw % len(values)]
    bad = torch.cat([values[spoilt][:-1], values[spoilt][-1:] * factor])
    before, after = (image_thresholds(each, IMAGE_FPR, learned=learned) for each in (values, {**values, spoilt: bad}))
    return max(abs(after[category] / before[category] - 1) for category in values if category != spoilt)


def summary(datasets: Mapping[str, Row]) -> dict[str, float]:
    """Return what counts, flat; figures of the dataset `demo` begin with its name."""
    flat: dict[str, float] = {}
    for name, found in datasets.items():
        begin = "" if name == "inspection" else f"{name}_"
        image = {row["asked"]: row for row in found["image"] if row["rule"] == "ours"}
        pixel = {row["asked"]: row for row in found["pixel"] if row["rule"] == "ours"}[PIXEL_FPR]
        own = image[IMAGE_FPR]
        flat |= {
            f"{begin}fpr10_mean": image[0.1]["achieved"],
            f"{begin}fpr10_worst": image[0.1]["worst_category"],
            f"{begin}fpr1_mean": image[0.01]["achieved"],
            f"{begin}fpr1_worst": image[0.01]["worst_category"],
            f"{begin}own_fpr": own["achieved"],
            f"{begin}own_recall": own["recall"],
            f"{begin}recall_gap": round(own["recall_without_false_alarm"] - own["recall"], 5),
            f"{begin}own_f1": pixel["F1"],
            f"{begin}own_f1_over_f1max": pixel["F1_over_F1Max"],
            f"{begin}outlier_shift": round(found["outlier_shift"], 5),
        }
    return flat


def markdown(results: Row) -> str:
    """Return all results as Markdown."""
    text = [
        "# Thresholds from few good images",
        "`asked` and `achieved`: share of good images (of their pixels) called defective, mean over the categories; "
        "`worst_category`: of the category with the highest share; `recall`: share of defective images found; "
        "`recall_without_false_alarm`: share above every good image of its draw; F1 of the pixels at "
        "the threshold, and at the best one. Rates by default: "
        f"{100 * IMAGE_FPR:g} % of the images, {100 * PIXEL_FPR:g} % of the pixels.",
    ]
    for name, found in results["datasets"].items():
        host = found["machine"]
        text += [
            f"## {name}: {found['images']} good images of a category, drawn {found['draws']} times",
            f"{host['cpu']}; commit {host['commit']}, {host['date']}; "
            + ", ".join(f"{each} {number}" for each, number in host["versions"].items()),
        ]
        for level in ("image", "pixel"):
            columns = [column for column in COLUMNS if column in found[level][0]]
            text += [f"### {level.capitalize()}s", table(found[level], tuple(columns))]
        text.append(
            f"A calibration image with {OUTLIERS[0]:g} or {OUTLIERS[1]:g} times its score moves thresholds of other "
            f"categories by {100 * found['outlier_shift']:.1f} % at most."
        )
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main()
