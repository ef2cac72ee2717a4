# SPDX-License-Identifier: Apache-2.0
"""Frozen feature pyramid: four levels of a pre-trained network at strides 2, 4, 8 and 16."""

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from anomalib_uniass.layers.backbone_weights import create_network, load_backbone_weights
from anomalib_uniass.layers.static_padding import freeze_padding
from anomalib_uniass.layers.transformer_levels import TransformerLevels, is_transformer

STRIDES = (2, 4, 8, 16)


class FeaturePyramid(nn.Module):
    """Frozen backbone, always in eval mode: ``(B, 3, H, W) -> [(B, C_i, H / s_i, W / s_i)]``, fine to coarse.

    The taps are levels 1 to 4, at strides 2, 4, 8 and 16; of a vision transformer, such as DINOv2 or DINOv3, groups of
    its blocks (:class:`~anomalib_uniass.layers.transformer_levels.TransformerLevels`).

    TensorFlow's dynamic SAME padding is replaced by the padding it takes at the network's native resolution
    (380 pixels for EfficientNet-B4), which is what the UniAS release computes with and what exports cleanly.

    Args:
        backbone: Any timm network that supports ``features_only`` and offers strides 2, 4, 8 and 16, or a plain vision
            transformer of timm.
        pre_trained: Load ImageNet weights; from timm's hub, or from ``weights`` if given.
        weights: A weights file or the name of an installed weights package
            (see :func:`~anomalib_uniass.layers.backbone_weights.load_backbone_weights`).
        image_size: Height H and width W of the images; transformers are made for one size.

    Attributes:
        channels: Channels of the returned taps, fine to coarse.
        mean: Normalisation mean of the network's training images, RGB in [0, 1].
        std: Normalisation standard deviation, likewise.

    Raises:
        ValueError: If timm does not know the backbone, or it lacks one of the strides.
        RuntimeError: If the weights cannot be fetched.
        FileNotFoundError: If ``weights`` names neither a file nor an installed package.
    """

    def __init__(
        self,
        backbone: str,
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] = (224, 224),
    ) -> None:
        super().__init__()
        if not timm.is_model(backbone):
            known = timm.list_models()
            close = [name for name in known if backbone in name][:5] or difflib.get_close_matches(backbone, known, n=5)
            msg = f"backbone must be a timm model name, got {backbone!r}. Similar names: {', '.join(close) or 'none'}."
            raise ValueError(msg)
        fetch = pre_trained and weights is None
        if is_transformer(backbone):
            network: Any = TransformerLevels(backbone, pre_trained=fetch, image_size=image_size)
            config = network.vit.pretrained_cfg
            if pre_trained and weights is not None:
                network.load(weights)
            self.channels: tuple[int, ...] = network.channels
        else:
            network = _create_trunk(backbone, pre_trained=fetch)
            config = network.pretrained_cfg
            if pre_trained and weights is not None:
                load_backbone_weights(network, backbone, weights)
            self.channels = tuple(network.feature_info.channels())
            freeze_padding(network, native_size=config["input_size"][-2:])
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.network: nn.Module = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Stay in eval mode: batch-norm statistics of the backbone never move."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        """Extract the taps.

        Args:
            image: Normalised images ``(B, 3, H, W)``, H and W multiples of 16.

        Returns:
            Features, fine to coarse.
        """
        return list(self.network(image))


def _create_trunk(backbone: str, *, pre_trained: bool) -> Any:
    """Build the timm trunk up to the stride-16 tap, a module with timm's ``feature_info`` and ``pretrained_cfg``."""
    taps = tuple(range(len(STRIDES)))
    try:
        network = create_network(backbone, pre_trained=pre_trained, features_only=True, out_indices=taps)
    except (AttributeError, IndexError, AssertionError) as error:
        msg = f"backbone must support timm's features_only with strides {STRIDES}; {backbone!r} does not: {error}"
        raise ValueError(msg) from error
    strides = tuple(network.feature_info.reduction())
    if strides != STRIDES:
        msg = f"backbone must offer features at strides {STRIDES}, but {backbone!r} has {strides}."
        raise ValueError(msg)
    if isinstance(network, EfficientNetFeatures):
        # It builds every stage; what lies behind the last tap is never used.
        network.blocks = network.blocks[: max(network._stage_out_idx)]
    return network
