# SPDX-License-Identifier: Apache-2.0
"""Paths of images below the folder that was given to a test or prediction."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import CombinedLoader


def current_datasets(trainer: Trainer) -> list[Any]:
    """Return the dataset behind each loader of a running test or prediction, None for what is no DataLoader."""
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    return [getattr(loader, "dataset", None) for loader in CombinedLoader(loaders, "sequential").flattened]


def given_folder(trainer: Trainer) -> Path | None:
    """Return the folder that the images of a running test or prediction were given by.

    This is the root of the datamodule; for a folder of images the one on the command line. Elsewhere, and for a single
    image, it is the deepest folder that holds all images: anomalib's ``PredictDataset`` keeps the files alone.

    Returns:
        An absolute path, or None if a dataset does not tell its files beforehand.
    """
    roots = _named_folders(trainer)
    folders = []
    for dataset in current_datasets(trainer):
        files = _files(dataset)
        if not files:
            return None
        deepest = _common(os.path.dirname(os.path.abspath(file)) for file in files)  # noqa: PTH100, PTH120  # links stay
        folders.append(next((root for root in roots if deepest.is_relative_to(root)), deepest))
    return _common(folders) if folders else None


def data_argument(trainer: Trainer) -> Path | None:
    """Return the file or folder that is ``--data`` on the command line, None if there is none or it is no path."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
    configs = [callback.config for callback in callbacks if isinstance(callback, SaveConfigCallback)]
    named = [config.get("data") for config in configs]
    return next((Path(name) for name in named if isinstance(name, (str, Path))), None)


def name_below(path: str | Path, folder: Path | None) -> Path:
    """Return the path of an image relative to a folder, its last two parts if it lies elsewhere or there is none."""
    path = Path(path)
    for absolute in (path.absolute(), path.parent.resolve() / path.name):
        if folder is not None and absolute.is_relative_to(folder):
            return absolute.relative_to(folder)
    return Path(path.parent.name, path.name)


def _files(dataset: object) -> list[str]:
    """Return the images of one of anomalib's datasets, nothing for others."""
    if isinstance(dataset, PredictDataset):
        return [str(file) for file in dataset.image_filenames]
    samples = getattr(dataset, "samples", None)
    return [] if samples is None else samples["image_path"].astype(str).tolist()


def _named_folders(trainer: Trainer) -> list[Path]:
    """Return the folders that the user named: on the command line of ``predict``, and as root of the datamodule."""
    named = [data_argument(trainer) if trainer.predicting else None]
    named.append(getattr(getattr(trainer, "datamodule", None), "root", None))
    return [Path(name).resolve() for name in named if isinstance(name, (str, Path)) and Path(name).is_dir()]


def _common(folders: Iterable[str | Path]) -> Path:
    return Path(os.path.commonpath(set(folders)))
