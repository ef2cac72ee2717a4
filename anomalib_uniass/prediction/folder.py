# SPDX-License-Identifier: Apache-2.0
"""The images of a folder that is predicted: those that training reads (:mod:`anomalib_uniass.data.listing`).

anomalib lists files of nine endings, hidden ones too, and looks into no linked folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from anomalib.data import ImageItem, PredictDataset
from anomalib.data.utils import get_image_filenames
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import SequentialSampler
from torchvision.transforms.v2 import Transform

from anomalib_uniass.data.images import read_image
from anomalib_uniass.data.listing import Listing, by_ending, list_images
from anomalib_uniass.prediction.names import data_argument
from anomalib_uniass.text import some

logger = logging.getLogger(__name__)


class PredictFolder(PredictDataset):
    """The images of a folder, or one image, in any format that training reads, read as training reads them.

    The stock command and ``Engine.predict`` find the same images of a folder by themselves, unless none of them has
    one of anomalib's nine endings (png, jpg, jpeg, bmp, tif, tiff, webp, ppm, pgm), where anomalib itself stops. Then
    give this: ``--data PredictFolder --data.path FOLDER``, or ``Engine.predict(dataset=PredictFolder(FOLDER))``.

    Args:
        path: Folder, which is searched with all folders below, or image file.
        transform: Transform of each image; models bring their own resize.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If the folder holds no images, or links that lead nowhere.
    """

    def __init__(self, path: str | Path, transform: Transform | None = None) -> None:
        torch.utils.data.Dataset.__init__(self)  # not that of the base, which lists files by its own rule
        path = Path(path)
        if not path.exists():
            msg = f"There is no {path}. Give a folder of images, or an image."
            raise FileNotFoundError(msg)
        self.image_filenames = _images(path, list_images(path)) if path.is_dir() else [path]
        self.transform = transform

    def __getitem__(self, index: int) -> ImageItem:
        """Read an image ``(3, H, W)`` in [0, 1].

        Raises:
            ValueError: If it cannot be read right.
        """
        path = self.image_filenames[index]
        image = read_image(path)
        return ImageItem(image=self.transform(image) if self.transform else image, image_path=str(path))


def complete_datasets(trainer: Trainer) -> None:
    """Give anomalib's datasets of folders the images that training would read; before Lightning counts them.

    The folder is the one on the command line. Elsewhere, for anomalib keeps the files alone, it is the deepest that
    holds them all, and only if they are all that anomalib finds there: a choice of the user's stays as it is.

    Raises:
        ValueError: If a folder holds no visible images, or links that lead nowhere.
    """
    source = trainer.predict_loop._data_source.instance
    if not hasattr(source, "predict_step") and not hasattr(source, "predict_dataloader"):
        for loader in CombinedLoader(source, "sequential").flattened:
            dataset = getattr(loader, "dataset", None)
            if type(dataset) is PredictDataset and isinstance(loader.sampler, SequentialSampler):
                _complete(dataset, data_argument(trainer))


def _complete(dataset: PredictDataset, given: Path | None) -> None:
    files = [Path(file) for file in dataset.image_filenames]
    if given is not None and not given.is_dir():
        return
    # anomalib resolves some paths.
    folders = [_deepest(files)] if given is None else [given, Path(os.path.abspath(given)), given.resolve()]  # noqa: PTH100
    folder = next((one for one in folders if one and all(file.is_relative_to(one) for file in files)), None)
    if folder is None:
        return
    if given is not None or (len(files) > 1 and set(files) == set(get_image_filenames(folder))):
        dataset.image_filenames = _images(folder, list_images(folder))
    elif len(files) == 1 and (others := _only_ours(folder, files)):
        logger.warning(
            "%s alone is predicted. If its folder was meant: it holds %d images that anomalib does not list (%s). "
            "Give dataset=PredictFolder(%r).",
            files[0],
            len(others),
            by_ending(others, below=folder),
            str(folder),
        )


def _images(folder: Path, found: Listing) -> list[Path]:
    """Return the images of a folder, and name what is left out."""
    if lost := [path for path in found.images if not path.exists()]:
        msg = f"{some(lost)}: links that lead nowhere. Fetch the files, or remove the links."
        raise ValueError(msg)
    told = by_ending(found.left_out, below=folder)
    if not found.images:
        msg = f"There are no images in {folder}" + (f", only {told}." if told else ", or they are hidden.")
        raise ValueError(msg)
    if told:
        logger.warning("Not predicted, for they are no images by their endings, in %s: %s.", folder, told)
    if found.closed:
        logger.warning("Not predicted, for lack of permission: %s.", some(found.closed))
    return found.images


def _only_ours(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Return the images of a folder that anomalib does not list, if it lists no others than the given ones."""
    return [] if set(get_image_filenames(folder)) != set(files) else sorted({*list_images(folder).images} - {*files})


def _deepest(files: Iterable[Path]) -> Path | None:
    """Return the deepest folder that holds all files, as they are written."""
    try:
        return Path(os.path.commonpath([file.parent for file in files]))
    except ValueError:  # some relative, some absolute
        return None
