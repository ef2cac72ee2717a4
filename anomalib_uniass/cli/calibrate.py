# SPDX-License-Identifier: Apache-2.0
"""Take the thresholds of a trained model anew, without training: from other good images, or for other rates.

    anomalib-uniass calibrate CKPT --data DIR --out NEW.ckpt

DIR holds a folder of good images for each category, or with ``--category NAME`` good images of that one. Categories
without images keep those that they were calibrated with. Without ``--data`` the known images set thresholds for other
rates. The new checkpoint differs from the old one in its thresholds alone; export it again.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from anomalib_uniass.categories import SPLITS, CategoryNames, normal_form
from anomalib_uniass.cli.validate_export import MODELS
from anomalib_uniass.files import replacing
from anomalib_uniass.prediction.folder import PredictFolder
from anomalib_uniass.text import some
from anomalib_uniass.thresholds.calibration import check_rate, images_needed
from anomalib_uniass.thresholds.post_processor import CategoryThresholdPostProcessor
from anomalib_uniass.training.checkpoint_io import WholeCheckpointIO


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(
        prog="anomalib-uniass calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="folder of good images that the model has not learned from")
    parser.add_argument("--category", help="category of all these images; else the folder in DIR tells it")
    parser.add_argument("--image_fpr", type=float, help="share of good images to call defective, as before by default")
    parser.add_argument("--pixel_fpr", type=float, help="share of their pixels, likewise")
    parser.add_argument("--model", choices=MODELS, default="UniAS", help="class of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    args = parser.parse_args(arguments)
    if args.category is not None and args.data is None:
        parser.error("--category needs --data: the folder of good images of that category")
    try:
        model = MODELS[args.model].load_from_checkpoint(args.checkpoint, map_location="cpu", visualizer=False)
        post_processor = model.post_processor
        if not isinstance(post_processor, CategoryThresholdPostProcessor):
            parser.error(f"the checkpoint has no thresholds per category, but a {type(post_processor).__name__}")
        old = post_processor.calibration or {}
        for name in ("image_fpr", "pixel_fpr"):
            asked = getattr(args, name)
            rate = old.get(name, getattr(post_processor, name)) if asked is None else check_rate(f"--{name}", asked)
            setattr(post_processor, name, rate)
        if args.data is not None:
            score(model, good_images(args.data, args.category, post_processor.categories))
        check_rates(post_processor, old)
        post_processor.calibrate(kept=old)
        save(model, args.checkpoint, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for line in told(old, post_processor.calibration or {}):
        print(line)
    print(f"Checkpoint: {args.out}")
    return 0


def good_images(folder: Path, category: str | None, known: Sequence[str]) -> PredictFolder:
    """Return the images of a folder with their categories, in a frame ``samples`` as datasets of anomalib have it.

    Args:
        folder: Folder that is searched.
        category: Category of all images; None takes the folders in `folder` for categories.
        known: Categories that the model knows, which are found in other spellings.

    Raises:
        OSError: If there is no such folder.
        ValueError: If there are no images, images of no category, or images in folders of defects.
    """
    dataset = PredictFolder(folder)
    names = CategoryNames(known)
    rows = []
    for path in map(Path, dataset.image_filenames):
        inside = path.relative_to(folder).parts[:-1] if folder.is_dir() else ()
        if category is None and not inside:
            msg = f"{path} lies in no folder of a category. Give --category NAME, or folders called like categories."
            raise ValueError(msg)
        name = inside[0] if category is None else category
        rows.append((str(path), names.match(name) or name, _is_of_defect(inside)))
    if defective := [path for path, _, is_defective in rows if is_defective]:
        msg = (
            f"{len(defective)} images lie in folders of defects or masks: {some(defective)}. Thresholds come from good "
            "images alone. Give the folder of these."
        )
        raise ValueError(msg)
    dataset.samples = pd.DataFrame([row[:2] for row in rows], columns=["image_path", "category"])  # type: ignore[attr-defined]
    return dataset


def score(model: AnomalibModule, dataset: PredictFolder) -> None:
    """Give the images to the post-processor of a model, which keeps those of the other categories."""
    post_processor = model.post_processor
    assert isinstance(post_processor, CategoryThresholdPostProcessor)  # for mypy
    kept, categories = post_processor.good, post_processor.categories
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False)
        engine.validate(model, datamodule=cast("AnomalibDataModule", _Good(dataset)), verbose=False)
    post_processor.good = kept | post_processor.good
    post_processor.categories = sorted({*categories, *post_processor.good})


def check_rates(post_processor: CategoryThresholdPostProcessor, old: Mapping[str, Any]) -> None:
    """Refuse other rates for categories whose images are not known: checkpoints of version 0.2 kept none.

    Raises:
        ValueError: If there are such categories.
    """
    unknown = sorted(set(old.get("image", {})) - set(post_processor.good))
    rates = {name: getattr(post_processor, name) for name in ("image_fpr", "pixel_fpr")}
    if unknown and any(old[name] != rate for name, rate in rates.items()):
        msg = (
            f"The checkpoint knows no good images of {some(unknown)}, so that other rates need some of each. Give "
            "them all with --data, or leave the rates as they are."
        )
        raise ValueError(msg)


def save(model: AnomalibModule, source: Path, target: Path) -> None:
    """Write a checkpoint with the thresholds of a model and all else of another checkpoint.

    Raises:
        OSError: If it cannot be written.
    """
    content = WholeCheckpointIO().load_checkpoint(source)
    content["anomalib_post_processor_config"] = cast("PostProcessor", model.post_processor).checkpoint_config()
    content["state_dict"] |= {
        name: value for name, value in model.state_dict().items() if name.startswith("post_processor.")
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as draft:
        torch.save(content, draft)


def told(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a table of the thresholds before and now, and how many images the rate takes."""
    needed = images_needed(new["image_fpr"])
    rows = [
        {
            "category": category,
            "images": new["images"].get(category),
            **{
                f"{level} {time}": calibration.get(level, {}).get(category)
                for level in ("image", "pixel")
                for time, calibration in (("before", old), ("now", new))
            },
        }
        for category in sorted(new["image"])
    ]
    table = pd.DataFrame(rows).to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.3g}")
    return [
        f"Thresholds for {100 * new['image_fpr']:g} % of good images and {100 * new['pixel_fpr']:g} % of their pixels:",
        *table.splitlines(),
        f"A category with {needed} images or more shows the image rate by itself; with fewer it is estimated from the "
        "spread of the training images.",
    ]


class _Good(LightningDataModule):
    """Good images as a validation set."""

    def __init__(self, dataset: PredictFolder) -> None:
        super().__init__()
        self.val_data = dataset

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_data, collate_fn=self.val_data.collate_fn)


def _is_of_defect(folders: Sequence[str]) -> bool:
    """Tell whether folders below a category are those of defects or masks in the layout of MVTec AD."""
    return any(
        normal_form(folder) == "ground_truth"
        or (SPLITS.fullmatch(above) is not None and normal_form(folder) not in ("good", "ok", "normal"))
        for above, folder in zip(("", *folders), folders, strict=False)
    )
