# SPDX-License-Identifier: Apache-2.0
"""Resized images in memory, so that every epoch after the first reads no file."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import Resize, Transform
from torchvision.tv_tensors import Image

logger = logging.getLogger(__name__)
_SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; a container's may be as small as 64 MB


class ImageCache:
    """Images ``(3, H, W)`` of float32, shared by all worker processes and filled as they are read.

    Make it before the workers start. A copy of a dataset shares its cache.

    Args:
        count: Number of images.
        resize: Resize that the kept images have been through, checked by :func:`fixed_resize`.

    Raises:
        MemoryError: If there is too little shared memory.
    """

    def __init__(self, count: int, resize: Resize) -> None:
        height, width = resize.size
        gigabytes = count * 3 * height * width * 4 / 1e9
        need = f"cache_images needs {gigabytes:.2f} GB of shared memory for {count} images of {height} x {width}"
        if _SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(_SHARED_MEMORY).free / 1e9) < gigabytes:
            msg = f"{need}, {_SHARED_MEMORY} has {free:.2f}. Enlarge it (docker run --shm-size) or leave it out."
            raise MemoryError(msg)
        logger.info("%s.", need)
        self.resize = resize
        self.images = torch.empty(count, 3, height, width).share_memory_()
        self.filled = torch.zeros(count, dtype=torch.bool).share_memory_()

    def __deepcopy__(self, memo: dict[int, object]) -> ImageCache:
        """Share the images: anomalib copies whole datasets to take some rows of them."""
        return self

    def get(self, index: int, read: Callable[[], Tensor]) -> Image:
        """Return a copy of an image ``(3, H, W)``; ``read`` reads and resizes it if it is not here yet."""
        if not self.filled[index]:
            self.images[index] = read()
            self.filled[index] = True
        return Image(self.images[index].clone())


def fixed_resize(augmentations: Transform | None, *, rotated: bool) -> Resize:
    """Return the resize that images may be cached behind, which must commute with the flips and rotations after it.

    Args:
        augmentations: All that a dataset does to an image after flips and rotations.
        rotated: Whether images are rotated by quarter turns.

    Raises:
        ValueError: If that is anything but one bilinear or bicubic resize to a fixed size, a square if rotated.
    """
    found = f"got {augmentations}"
    if augmentations is None:
        found = "got none: neither does the model resize (or none is attached), nor is there augmentations=Resize(...)"
    elif type(augmentations) is Resize and augmentations.size is not None and len(augmentations.size) == 2:
        height, width = augmentations.size
        # Nearest neighbours are not symmetric. Older torchvisions keep the mode as an enumeration, newer as a string.
        if getattr(augmentations.interpolation, "value", augmentations.interpolation) in ("bilinear", "bicubic"):
            if height == width or not rotated:
                return augmentations
            found += " and categories to rotate, which needs height = width"
    msg = (
        "cache_images keeps resized images, so training images must be resized by one bilinear or bicubic "
        f"Resize((height, width)) and have no other augmentation than hflip, vflip and rotate; {found}. "
        "Change that or leave cache_images out."
    )
    raise ValueError(msg)
