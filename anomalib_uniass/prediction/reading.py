# SPDX-License-Identifier: Apache-2.0
"""Images of a folder that is predicted: checked beforehand, and read right."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

from anomalib.data import ImageBatch, ImageItem, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.transforms.v2 import Identity

from anomalib_uniass.data.images import check_image, is_misread, read_image
from anomalib_uniass.prediction.names import current_datasets

MOST_NAMED = 5


class ImageReading(Callback):
    """Check all files of a folder before the first is predicted, and read again those that anomalib misreads.

    anomalib's ``PredictDataset`` reads with ``convert("RGB")``, which makes 16-bit images white and leaves EXIF's
    orientation alone. Must stand before the pre-processor: models add it to their own callbacks. Datasets of other
    classes are taken to read right.
    """

    def __init__(self) -> None:
        self._misread: frozenset[str] = frozenset()

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
    # Few threads, for images that must be decoded to be judged are in memory at full size.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        problems = [problem for _, problem in pool.map(check_image, files) if problem]
        if not problems:
            misread = pool.map(is_misread, files)
            return frozenset(str(file) for file, is_wrong in zip(files, misread, strict=True) if is_wrong)
    shown = "".join(f"\n  - {problem}" for problem in problems[:MOST_NAMED])
    more = f"\n  and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
    msg = f"{len(problems)} of {len(files)} images cannot be predicted:{shown}{more}\nReplace or remove these files."
    raise ValueError(msg)
