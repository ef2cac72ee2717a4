# SPDX-License-Identifier: Apache-2.0
"""Images that this package does not read itself: checked beforehand, and read right where that can be done."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

import torch
from anomalib.data import ImageBatch, ImageItem, PredictDataset
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import read_image as anomalib_read_image
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Identity

from anomalib_uniass.data.dataset import UnifiedDataset
from anomalib_uniass.data.images import check_image, is_misread, read_image
from anomalib_uniass.prediction.names import current_datasets

MOST_NAMED = 5

T = TypeVar("T")


class ImageReading(Callback):
    """See to it that images are read right where anomalib reads them.

    anomalib reads with ``convert("RGB")``, which makes 16-bit images white and leaves EXIF's orientation alone. All
    files of a folder are checked before the first is predicted, and those that anomalib misreads are read again. A
    datamodule of anomalib's own that has such files is refused: what it does to images afterwards cannot be repeated.
    Must stand before the pre-processor: models add it to their own callbacks. Datasets of other classes are taken to
    read right.
    """

    def __init__(self) -> None:
        self._misread: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a datamodule of anomalib's own that misreads images.

        Raises:
            ValueError: If there are such images; names up to five.
        """
        del pl_module, stage
        datamodule = getattr(trainer, "datamodule", None)
        subsets = [getattr(datamodule, name, None) for name in ("train_data", "val_data", "test_data")]
        files = {
            file
            for subset in subsets
            if isinstance(subset, AnomalibDataset) and not isinstance(subset, UnifiedDataset)
            for file in subset.samples["image_path"].astype(str)
            if Path(file).suffix.lower() in IMG_EXTENSIONS  # no videos
        }
        name = type(datamodule).__name__
        _raise_problems(
            _all(_difference, sorted(files)),
            f"of {len(files)} images cannot be read by {name}",
            f"Save them as 8-bit RGB, upright; or train with Unified(source={name!r}), which reads 16 bits and EXIF.",
        )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check all files.

        Raises:
            ValueError: If some cannot be read, or not rightly; names up to five.
        """
        del pl_module
        datasets = current_datasets(trainer)
        files = [str(file) for data in datasets if isinstance(data, PredictDataset) for file in data.image_filenames]
        self._misread = check_files(files)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Read the images of a batch again if anomalib misreads one of them."""
        del pl_module, batch_idx
        paths = batch.image_path if self._misread else None
        if paths is None or self._misread.isdisjoint(paths):
            return
        dataset: PredictDataset = current_datasets(trainer)[dataloader_idx]
        transform = dataset.transform or Identity()
        items = [ImageItem(image=transform(read_image(path)), image_path=path) for path in paths]
        # Collated as before: images of several sizes take that of the largest.
        batch.image = dataset.collate_fn(items).image.to(cast("Tensor", batch.image))


def check_files(files: Sequence[Path | str]) -> frozenset[str]:
    """Check that images can be read, and read right.

    Args:
        files: Images in any format that Pillow reads.

    Returns:
        Those that anomalib's own reader may give other pixels of.

    Raises:
        ValueError: If some cannot; names up to five.
    """
    problems = [problem for _, problem in _all(check_image, files)]
    _raise_problems(problems, f"of {len(files)} images cannot be predicted", "Replace or remove these files.")
    return frozenset(str(file) for file, wrong in zip(files, _all(is_misread, files), strict=True) if wrong)


def _difference(path: Path | str) -> str | None:
    """Say what is wrong with a file that anomalib reads, None if nothing is."""
    if not is_misread(path):
        return None
    try:
        right = read_image(path)
    except ValueError as error:
        return str(error)
    if torch.equal(right, cast("Tensor", anomalib_read_image(path, as_tensor=True))):
        return None
    return f"{path}: has 16 bits, or is to be turned as its EXIF tells"


def _all(function: Callable[[Path | str], T], files: Sequence[Path | str]) -> list[T]:
    """Apply a function to all files, in few threads: images that must be decoded are in memory at full size."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, files))


def _raise_problems(found: Sequence[str | None], what: str, advice: str) -> None:
    """Raise a ValueError that names up to five problems, if there are some."""
    problems = [problem for problem in found if problem]
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:MOST_NAMED])
        more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
        msg = f"{len(problems)} {what}:{shown}{more}\n{advice}"
        raise ValueError(msg)
