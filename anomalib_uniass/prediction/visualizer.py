# SPDX-License-Identifier: Apache-2.0
"""anomalib's pictures of predictions, each under the path of its image."""

import errno
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_uniass.data.images import is_misread, read_image
from anomalib_uniass.failures import Failures
from anomalib_uniass.prediction.names import given_folder, name_below

logger = logging.getLogger(__name__)

ROOM = 64_000_000
"""Bytes of the disk that pictures leave to what counts more: the table, the page, a checkpoint."""

LONGEST_NAME = 255
"""Bytes that the usual file systems allow in a name."""


class PathVisualizer(ImageVisualizer):
    """anomalib's pictures, kept apart by the whole path of their images below the folder that was given.

    anomalib names a picture after its image's last folder or what it takes for the dataset's, so that images of one
    name in different folders overwrite each other. Here the picture of ``FOLDER/a/1.png`` is ``images/a/1.png``, and
    for a datamodule ``images/<category>/test/<defect>/1.png``. Images that anomalib misreads (16 bit, turned by EXIF)
    are shown as the model sees them. An ending in which no picture can be written gets another one: ``1.psd.png``.

    A picture that cannot be drawn or saved, for its image has gone or the disk is full, is told and left out; the run
    goes on. None is drawn while fewer than `ROOM` bytes are free.

    Arguments as for :class:`anomalib.visualization.ImageVisualizer`.
    """

    _folder: Path | None = None
    _written: dict[Path, str]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that names are relative to."""
        del pl_module
        self._folder, self._written = given_folder(trainer), {}
        self._failures = Failures(logger, "No picture")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that names are relative to."""
        self.on_test_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the names: a model may be pickled."""
        del trainer, pl_module
        self._folder, self._written = None, {}
        self._failures.end()
        del self._failures

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the names: a model may be pickled."""
        self.on_test_end(trainer, pl_module)

    def visualize(
        self, predictions: ImageItem | NumpyImageItem | ImageBatch | NumpyImageBatch
    ) -> Image.Image | list[Image.Image | None] | None:
        """Draw predictions as anomalib does, on images that are read right.

        Args:
            predictions: An item, or a batch of B.

        Returns:
            The picture, None where there is nothing to draw; a list of B for a batch of several.
        """
        if isinstance(predictions, ImageBatch) and len(predictions) > 1:
            return [self._picture(item) for item in predictions]
        if isinstance(predictions, ImageBatch):
            return self._picture(next(iter(predictions)))
        return self._picture(predictions) if isinstance(predictions, ImageItem) else super().visualize(predictions)

    def _picture(self, item: ImageItem) -> Image.Image | None:
        """Draw one item; anomalib reads its file again, unless there is none."""
        if item.image_path is not None and is_misread(item.image_path):
            item = item.update(in_place=False, image=read_image(item.image_path), image_path=None)
        return super().visualize(item)  # type: ignore[return-value]  # a picture of an item

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save a picture of every image of a batch; images without a path get none."""
        del pl_module, outputs, batch_idx, dataloader_idx
        directory = Path(trainer.default_root_dir) / "images" if self.output_dir is None else Path(self.output_dir)
        for item in batch:
            if item.image_path is None:
                continue
            try:
                self._save(item, directory / self._name(item.image_path))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                self._failures.add(item.image_path, error)

    def _save(self, item: ImageItem, path: Path) -> None:
        """Draw an item and save it, if there is room; Pillow removes what it cannot finish."""
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(path.parent)
        if disk.free < ROOM and disk.total:  # some network drives tell neither
            raise OSError(errno.ENOSPC, f"only {disk.free / 1e6:.0f} MB are free, and the tables go first", str(path))
        if (picture := self._picture(item)) is not None:
            picture.save(path)

    def _name(self, image_path: str) -> Path:
        """Return the picture's path below its folder, another one for every image."""
        name = name_below(image_path, self._folder)
        if name.suffix.lower() not in IMG_EXTENSIONS:
            name = name.with_name(f"{name.name}.png")
        if len(os.fsencode(name.name)) > LONGEST_NAME:
            code = f"_{zlib.crc32(os.fsencode(image_path)):08x}{name.suffix}"
            while len(os.fsencode(name.name)) > LONGEST_NAME - len(code):
                name = name.with_name(name.name[:-1])
            name = name.with_name(f"{name.name}{code}")
        while self._written.setdefault(name, image_path) != image_path:
            name = name.with_stem(f"{name.stem}_")
        return name
