# SPDX-License-Identifier: Apache-2.0
"""Levels of a vision transformer, for a feature pyramid."""

from importlib import import_module
from itertools import pairwise
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.layers.backbone_weights import create_network, read_state_dict, resolve_weights

LEVELS = 4
TRANSFORMERS = ("vision_transformer", "eva")
"""Modules of timm with plain vision transformers: DINOv2 is among the former, DINOv3 among the latter."""


def is_transformer(backbone: str) -> bool:
    """Return whether a timm network is a vision transformer with one grid of tokens."""
    return timm.models.is_model_in_modules(backbone, TRANSFORMERS)


class TransformerLevels(nn.Module):
    """Four groups of a vision transformer's blocks: ``(B, 3, H, W) -> [(B, D, H / s, W / s)]``, s = 2, 4, 8, 16.

    A transformer keeps one grid of tokens from its first block to its last. Its blocks are cut into four groups of
    neighbours; a level is the mean of a group's tokens (as Dinomaly groups them, Guo et al., CVPR 2025), the first
    group's the finest, interpolated to the level's grid.

    Args:
        backbone: timm name of the transformer, such as ``vit_small_patch14_dinov2.lvd142m``.
        pre_trained: Load weights from timm's hub.
        image_size: Height H and width W of the images. They are resized to the nearest multiples of the patch.
    """

    def __init__(self, backbone: str, *, pre_trained: bool, image_size: tuple[int, int]) -> None:
        super().__init__()
        patch = create_network(backbone, pre_trained=False, num_classes=0, depth=1).patch_embed.patch_size
        self.size = tuple(max(1, round(length / p)) * p for length, p in zip(image_size, patch, strict=True))
        # Made for one size, whose position embeddings do not change: resampling them is not for exported graphs.
        self.vit = create_network(
            backbone, pre_trained=pre_trained, num_classes=0, img_size=self.size, dynamic_img_size=False
        )
        depth = len(self.vit.blocks)
        bounds = [round(depth * level / LEVELS) for level in range(LEVELS + 1)]
        self.groups = [slice(*pair) for pair in pairwise(bounds)]
        self.channels: tuple[int, ...] = (self.vit.embed_dim,) * LEVELS

    def load(self, weights: str | Path) -> None:
        """Load weights in timm's layout or the transformer's own; position embeddings are resampled.

        Raises:
            FileNotFoundError: If ``weights`` names neither a file nor an installed package.
            ValueError: If they do not fit.
        """
        path = resolve_weights(weights)
        convert = import_module(type(self.vit).__module__).checkpoint_filter_fn
        source = convert(read_state_dict(path), self.vit)
        wanted = self.vit.state_dict()
        unfit = [name for name, value in wanted.items() if name not in source or source[name].shape != value.shape]
        if unfit:
            msg = f"{path} does not fit the transformer: {', '.join(unfit[:5])} missing or of another shape."
            raise ValueError(msg)
        self.vit.load_state_dict({name: source[name] for name in wanted})

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the levels, fine to coarse."""
        height, width = image.shape[2:]
        if (height, width) != self.size:
            image = F.interpolate(image, size=self.size, mode="bilinear")
        blocks = self.vit.forward_intermediates(image, norm=True, intermediates_only=True)  # [(B, D, h, w)]
        levels = [torch.stack(blocks[group]).mean(dim=0) for group in self.groups]
        sizes = [(height // stride, width // stride) for stride in (2, 4, 8, 16)]
        return [F.interpolate(x, size=size, mode="bilinear") for x, size in zip(levels, sizes, strict=True)]
