# SPDX-License-Identifier: Apache-2.0
"""From image sizes to token grids."""

from torch import Tensor

from anomalib_uniass.layers.backbone import STRIDES

STRIDE = STRIDES[-1]


def token_grid(image_size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the deepest tap, which holds the tokens.

    Args:
        image_size: Height and width of the input in pixels.

    Raises:
        ValueError: If they are not multiples of the deepest stride.
    """
    height, width = image_size
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        msg = f"image_size must hold multiples of {STRIDE}, got {image_size}."
        raise ValueError(msg)
    return height // STRIDE, width // STRIDE


def check_image_size(image: Tensor, expected: tuple[int, int]) -> None:
    """Refuse images of another size than a model was built for.

    Args:
        image: Images ``(B, 3, H, W)``.
        expected: Height and width of the model's input.

    Raises:
        ValueError: If they differ.
    """
    if tuple(image.shape[-2:]) != expected:
        msg = f"Expected images of size {expected}, got {tuple(image.shape[-2:])}: set `image_size`."
        raise ValueError(msg)
