# SPDX-License-Identifier: Apache-2.0
"""What a backbone makes of images of one size, found without computing it."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call

Shape = tuple[int, ...]


def check_levels(
    network: nn.Module, backbone: str, *, image_size: tuple[int, int], expected: Sequence[Shape], exact: bool
) -> None:
    """Refuse a backbone that cannot take images of a size, or makes levels of other shapes of them.

    timm tells the strides of a network, but some cannot keep them: windows and position tables are made for one size
    of image, and convolutions without padding lose a margin.

    Args:
        network: The backbone in eval mode: ``(B, 3, H, W) -> [(B, C_i, H_i, W_i)]``.
        backbone: Its timm name, for the message.
        image_size: Height and width of the images.
        expected: Shapes ``(1, C_i, H_i, W_i)`` of the levels of one image.
        exact: Whether the levels must have these heights and widths; else they need only be there.

    Raises:
        ValueError: If it does; names backbone, sizes and shapes, and says what to do.
    """
    height, width = image_size
    advice = "Take another image_size, such as the one it was trained with, or another backbone, such as resnet50."
    config = getattr(network, "pretrained_cfg", None)
    if config is not None:
        advice = advice.replace("with,", f"with ({config['input_size'][-2]} x {config['input_size'][-1]}),")
    try:
        found = _shapes(network, image_size)
    except Exception as error:  # each network refuses a size in its own way
        msg = (
            f"backbone {backbone!r} cannot take images of image_size ({height}, {width}). It ends in "
            f"{type(error).__name__}: {error} Expected levels of {_shown(expected)}. {advice}"
        )
        raise ValueError(msg) from error
    if exact and found != list(expected):
        msg = (
            f"backbone {backbone!r} makes levels of {_shown(found)} of images of image_size ({height}, {width}); "
            f"expected {_shown(expected)}. {advice}"
        )
        raise ValueError(msg)


def _shapes(network: nn.Module, image_size: tuple[int, int]) -> list[Shape]:
    """Return the shapes of the levels of one image."""
    weights = [*network.named_parameters(), *network.named_buffers()]
    try:  # shapes alone: nothing is computed
        levels = functional_call(
            network, {name: value.to("meta") for name, value in weights}, torch.empty(1, 3, *image_size, device="meta")
        )
    except Exception:  # a network may hold tensors that do not count as its own
        like = next(value for _, value in weights)
        levels = network(torch.zeros(1, 3, *image_size, dtype=like.dtype, device=like.device))
    return [tuple(level.shape) for level in levels]


def _shown(shapes: Sequence[Shape]) -> str:
    """Show channels, heights and widths."""
    return ", ".join("x".join(map(str, shape[1:])) for shape in shapes)
