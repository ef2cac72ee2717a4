# SPDX-License-Identifier: Apache-2.0
"""Pseudo-defects: what the segmentation head learns from, for there are no real ones (not in the paper)."""

import torch
from anomalib.data.utils.generators.perlin import generate_perlin_noise
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

GOOD_SHARE = 0.2
"""Share of the images that stay good."""

MOST = 3
"""Defects of an image, at most."""

SMALLEST = 8
"""Pixels of the smallest defect."""


def add_pseudo_defects(images: Tensor) -> tuple[Tensor, Tensor]:
    """Put pseudo-defects into four fifths of a batch of good images, one to three each.

    Their shapes are spots and lines of Perlin noise within a random window (as in DRAEM, Zavrtanik et al., ICCV 2021);
    within them an image becomes another one, itself at another place, brighter, darker or blurred.

    Args:
        images: Normalised images ``(B, 3, H, W)``.

    Returns:
        Images likewise, and masks ``(B, 1, H, W)`` of 0 and 1.
    """
    defective, masks = images.clone(), images.new_zeros(len(images), 1, *images.shape[2:])
    for number in range(len(images)):
        if torch.rand(()) < GOOD_SHARE:
            continue
        for _ in range(1 + _whole(MOST)):
            mask = _shape(images)
            if mask.sum() < SMALLEST:
                continue
            opacity = _between(0.4, 1) * F.avg_pool2d(mask[None], 3, stride=1, padding=1)[0]  # of soft borders
            defective[number].lerp_(_filling(images, number), opacity)
            masks[number] = masks[number].maximum(mask)
    return defective, masks


def _shape(images: Tensor) -> Tensor:
    """Return the mask of a defect, ``(1, H, W)`` of 0 and 1."""
    height, width = images.shape[2:]
    noise = generate_perlin_noise(height, width, device=images.device)
    if torch.rand(()) < 0.4:  # a line, 1 to 4 pixels wide, where the noise is zero
        slope = torch.stack(torch.gradient(noise)).norm(dim=0).clamp_min(1e-6)
        mask = noise.abs() / slope < _between(0.5, 2)
    else:
        mask = noise > noise.quantile(1 - min(0.9, 4 * 10 ** _between(-2.6, -0.9)))
    rows, columns = (_window(length).to(images.device) for length in (height, width))
    return (mask & rows[:, None] & columns).to(images.dtype)[None]


def _window(length: int) -> Tensor:
    """Return a random stretch of a line, an eighth to three quarters of it: ``(length,)`` of truth values."""
    size = round(length * _between(1 / 8, 3 / 4))
    start = _whole(length - size)
    places = torch.arange(length)
    return (places >= start) & (places < start + size)


def _filling(images: Tensor, number: int) -> Tensor:
    """Return what fills the defect of an image: ``(3, H, W)``."""
    image, choice = images[number], torch.rand(())
    shift = [_whole(length) for length in image.shape[1:]]
    if choice < 0.35:
        return images[_whole(len(images))].roll(shift, dims=(1, 2))
    if choice < 0.55:
        return image.roll(shift, dims=(1, 2))
    if choice < 0.85:
        return image + (1 if torch.rand(()) < 0.5 else -1) * _between(0.25, 1.5)
    return F.avg_pool2d(image[None], 9, stride=1, padding=4, count_include_pad=False)[0]


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _whole(below: int) -> int:
    return int(torch.randint(below, ()))
