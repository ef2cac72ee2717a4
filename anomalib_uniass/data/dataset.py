# SPDX-License-Identifier: Apache-2.0
"""Several categories of one anomalib dataset as a single dataset."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import ImageItem, MVTecLOCODataset
from anomalib.data.dataclasses import DatasetItem
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import LabelName
from torch import Tensor
from torchvision.transforms.v2 import Compose, Identity, RandomChoice, RandomRotation, Transform
from torchvision.transforms.v2 import RandomHorizontalFlip as HFlip
from torchvision.transforms.v2 import RandomVerticalFlip as VFlip
from torchvision.tv_tensors import Mask

from anomalib_uniass.data.image_cache import ImageCache
from anomalib_uniass.data.images import read_image
from anomalib_uniass.data.masks import read_mask

FLIP_PROBABILITY = 0.3


def category_augmentation(*, hflip: bool, vflip: bool, rotate: bool) -> Transform | None:
    """Build the augmentation the release of UniAS gives to one category.

    Image and mask are transformed together, losslessly, and the draws come from torch's generator.

    Args:
        hflip: Flip left and right with probability 0.3.
        vflip: Flip up and down with probability 0.3.
        rotate: Rotate by 0, 90, 180 or 270 degrees, each with probability 1/4.

    Returns:
        The transform, or None if the category gets no augmentation.
    """
    steps: list[Transform] = []
    if hflip:
        steps.append(HFlip(FLIP_PROBABILITY))
    if vflip:
        steps.append(VFlip(FLIP_PROBABILITY))
    if rotate:
        turns = [RandomRotation((angle, angle), expand=True) for angle in (90, 180, 270)]
        steps.append(RandomChoice([Identity(), *turns]))
    return Compose(steps) if steps else None


class UnifiedDataset(AnomalibDataset):
    """Samples of several categories.

    ``samples`` is the frame of the source with one more column, ``category``. Images and masks are read by
    :mod:`anomalib_uniass.data.images`, several masks of an image (MVTec LOCO) into one; a source from outside anomalib
    that has a ``__getitem__`` of its own reads its items itself. Make one with :meth:`join`.

    Args:
        reader: Dataset of the source class that holds the joined samples and reads the items.

    Attributes:
        category_augmentations: Transform of (image, mask) by category, applied before ``augmentations``, which holds
            the resize. A category that is not listed gets none.
        image_cache: Keeps resized normal images as long as ``augmentations`` is the cache's resize; the category's
            transform then comes after the resize, with which it must commute. Other samples come without a cache.
        crop: Transform of (image, mask) before all others, such as a tile at random.
    """

    def __init__(self, reader: AnomalibDataset) -> None:
        super().__init__()
        self.reader = reader
        self.category_augmentations: dict[str, Transform] = {}
        self.image_cache: ImageCache | None = None
        self.crop: Transform | None = None

    @classmethod
    def join(cls, parts: Mapping[str, AnomalibDataset]) -> UnifiedDataset:
        """Join the datasets of several categories.

        Args:
            parts: Datasets of one class by category, none of them empty.

        Returns:
            Their samples in one dataset, sorted by image path.

        Raises:
            ValueError: If some categories have masks and others have none.
        """
        tasks = {category: part.task.value for category, part in parts.items()}
        if len(set(tasks.values())) > 1:
            msg = f"All categories must have the same task, either all with masks or all without. Got {tasks}."
            raise ValueError(msg)
        reader = copy.copy(next(iter(parts.values())))
        frames = [part.samples.assign(category=category) for category, part in parts.items()]
        samples = pd.concat(frames, ignore_index=True)
        samples.attrs["task"] = next(iter(tasks.values()))
        reader.samples = samples
        return cls(reader)

    @property
    def samples(self) -> pd.DataFrame:
        """Frame of all samples: the source's columns and ``category``."""
        return self.reader.samples

    @samples.setter
    def samples(self, samples: pd.DataFrame) -> None:
        self.reader.samples = samples
        self.image_cache = None  # its rows are those of the samples before

    @property
    def collate_fn(self) -> Callable[[Any], Any]:
        """Collate function of the source."""
        return self.reader.collate_fn

    def __getitem__(self, index: int) -> DatasetItem[Any]:
        """Read one item, augmented as its category and the datamodule ask.

        Args:
            index: Position in ``samples``.

        Returns:
            Image ``(3, H, W)`` in [0, 1], mask ``(H, W)`` if the task is segmentation, label and paths.

        Raises:
            RuntimeError: If the image or its mask cannot be read right.
        """
        sample = self.samples.iloc[index]
        augmentation = self.category_augmentations.get(sample.category)
        cache = self.image_cache
        if cache is None or cache.resize is not self.augmentations or sample.label_index != LabelName.NORMAL:
            return self._read(index, self.crop, augmentation, self.augmentations)
        image = cache.get(index, lambda: cast("Tensor", self._read(index, cache.resize).image))
        if augmentation is not None:
            image = augmentation(image)
        return ImageItem(
            image=image,
            gt_mask=Mask(torch.zeros(image.shape[-2:])) if self.task == "segmentation" else None,
            gt_label=torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
        )

    def _read(self, index: int, *steps: Transform | None) -> DatasetItem[Any]:
        """Read an item and transform image and mask."""
        transforms = [step for step in steps if step is not None]
        augmentations = Compose(transforms) if transforms else None
        if type(self.reader).__getitem__ in (AnomalibDataset.__getitem__, MVTecLOCODataset.__getitem__):
            return self._read_item(index, augmentations or Identity())
        # A copy, because the reader's augmentations differ from one item to the next.
        reader = copy.copy(self.reader)
        reader.augmentations = augmentations
        try:
            return reader[index]
        except (OSError, SyntaxError) as error:  # Pillow reports a broken PNG as SyntaxError
            raise self._unreadable(index, error) from error

    def _read_item(self, index: int, augmentations: Transform) -> ImageItem:
        """Read an item as anomalib's image datasets do, but for the files that they misread."""
        sample = self.samples.iloc[index]
        masks = [sample.mask_path] if isinstance(sample.mask_path, str) else sample.mask_path
        segmentation = self.task == TaskType.SEGMENTATION
        try:
            image = read_image(sample.image_path)
            mask = Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
            if segmentation and sample.label_index == LabelName.ABNORMAL:
                mask = Mask(torch.stack([read_mask(path) for path in masks]).amax(dim=0))
        except ValueError as error:
            raise self._unreadable(index, error) from error
        image, mask = augmentations(image, mask) if segmentation else (augmentations(image), None)
        unknown = sample.label_index == LabelName.UNKNOWN
        return ImageItem(
            image=image,
            gt_mask=None if unknown else mask,
            gt_label=None if unknown else torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=masks[0] if isinstance(masks, list) and masks else None,
        )

    def _unreadable(self, index: int, error: Exception) -> RuntimeError:
        """Make the error that says which image or mask of which category cannot be read."""
        sample = self.samples.iloc[index]
        return RuntimeError(
            f"Cannot read image {sample.image_path} or its mask {sample.mask_path!r} (category {sample.category!r}): "
            f"{error}\nIt could be read when the run began. Put it back or take it out, and start again: "
            "a training goes on from its last checkpoint (ckpt_path)."
        )
