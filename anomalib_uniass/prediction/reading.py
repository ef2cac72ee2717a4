# SPDX-License-Identifier: Apache-2.0
"""Images that this package does not read itself: checked beforehand, and read right where that can be done."""

import logging
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
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchvision.transforms.v2 import Identity

from anomalib_uniass.data.dataset import UnifiedDataset
from anomalib_uniass.data.images import check_image, image_suffixes, is_misread, read_image
from anomalib_uniass.data.opening import is_refused_by_pillow, shown_size
from anomalib_uniass.prediction.folder import complete_datasets
from anomalib_uniass.prediction.names import current_datasets
from anomalib_uniass.text import some_lines

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ImageReading(Callback):
    """See to it that images are read right where anomalib reads them.

    anomalib reads with ``convert("RGB")``, which makes 16-bit images white and leaves EXIF's orientation alone, and
    lists fewer formats than training reads. Of a folder the same files are predicted as would be trained on
    (:mod:`~anomalib_uniass.prediction.folder`). All are checked before the first is predicted, and those that anomalib
    misreads are read again; a file that changes in between is named. A
    datamodule of anomalib's own that has such files is refused: what it does to images afterwards cannot be repeated.
    Must stand before the pre-processor: models add it to their own callbacks. Datasets of other classes are taken to
    read right.
    """

    def __init__(self) -> None:
        self._misread: frozenset[str] = frozenset()
        self._checked: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a datamodule of anomalib's own that misreads images, and complete the images of a folder.

        Raises:
            ValueError: If there are such images; names up to five. If a folder to predict holds no images.
        """
        del pl_module
        if stage == TrainerFn.PREDICTING:
            complete_datasets(trainer)
        datamodule = getattr(trainer, "datamodule", None)
        subsets = [getattr(datamodule, name, None) for name in ("train_data", "val_data", "test_data")]
        suffixes = image_suffixes()
        files = {
            file
            for subset in subsets
            if isinstance(subset, AnomalibDataset) and not isinstance(subset, UnifiedDataset)
            for file in subset.samples["image_path"].astype(str)
            if Path(file).suffix.lower() in suffixes  # no videos
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
        self._checked = []
        files = _files(trainer)
        self._misread = check_files(files)
        anomalibs = [data for data in current_datasets(trainer) if type(data) is PredictDataset]
        check_sizes_for_anomalib([file for data in anomalibs for file in data.image_filenames])
        self._checked = files

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the files: a model may be pickled."""
        del trainer, pl_module
        self._checked = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the files that were whole when the prediction began and are not any more."""
        del pl_module
        if trainer.predicting and self._checked and isinstance(exception, Exception):
            problems = [problem for _, problem in _all(check_image, self._checked) if problem]
            if problems:
                logger.error(
                    "%d images changed or vanished after they were checked:\n%s\nReplace or remove them, and predict "
                    "again.",
                    len(problems),
                    some_lines(problems),
                )

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


def _files(trainer: Trainer) -> list[str]:
    """Return the images of all folders that are predicted."""
    datasets = current_datasets(trainer)
    return [str(file) for data in datasets if isinstance(data, PredictDataset) for file in data.image_filenames]


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


def check_sizes_for_anomalib(files: Sequence[Path | str]) -> None:
    """Refuse photographs that anomalib's own dataset of a folder cannot read: Pillow calls them decompression bombs.

    Raises:
        ValueError: If there are some; names up to five.
    """
    _raise_problems(
        [f"{file}: above Pillow's limit" for file in files if is_refused_by_pillow(shown_size(file))],
        f"of {len(files)} images are too large for anomalib's own reading of folders",
        "Predict them with --data PredictFolder --data.path FOLDER, or Engine.predict(dataset=PredictFolder(FOLDER)).",
    )


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
        msg = f"{len(problems)} {what}:\n{some_lines(problems)}\n{advice}"
        raise ValueError(msg)
