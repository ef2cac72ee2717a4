# SPDX-License-Identifier: Apache-2.0
"""Frozen feature pyramid: four levels of a pre-trained network at strides 2, 4, 8 and 16."""

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from anomalib_uniass.layers.backbone_check import check_levels
from anomalib_uniass.layers.backbone_weights import create_network, load_backbone_weights
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.layers.static_padding import freeze_padding
from anomalib_uniass.layers.transformer_levels import TransformerLevels, is_transformer

STRIDES = (2, 4, 8, 16)


class FeaturePyramid(nn.Module):
    """Frozen backbone, always in eval mode: ``(B, 3, H, W) -> [(B, C_i, H / s_i, W / s_i)]``, fine to coarse.

    The taps are levels 1 to 4, at strides 2, 4, 8 and 16; of a vision transformer, such as DINOv2 or DINOv3, groups of
    its blocks (:class:`~anomalib_uniass.layers.transformer_levels.TransformerLevels`).

    TensorFlow's dynamic SAME padding is replaced by the padding it takes at the network's native resolution
    (380 pixels for EfficientNet-B4), which is what the UniAS release computes with and what exports cleanly.

    Weights of timm's hub are fetched when they are first needed: by a forward pass, when the state is asked for, or by
    :meth:`fetch_weights`. Where a checkpoint is loaded before that, nothing is fetched at all.

    Args:
        backbone: Any timm network that supports ``features_only`` and offers strides 2, 4, 8 and 16, or a plain vision
            transformer of timm.
        pre_trained: Take ImageNet weights; from timm's hub, or from ``weights`` if given.
        weights: A weights file or the name of an installed weights package
            (see :func:`~anomalib_uniass.layers.backbone_weights.load_backbone_weights`).
        image_size: Height H and width W of the images; transformers are made for one size.
        exact: Refuse a network whose levels are not exactly ``H / s_i`` by ``W / s_i``; False is for models that resize
            them.

    Attributes:
        channels: Channels of the returned taps, fine to coarse.
        mean: Normalisation mean of the network's training images, RGB in [0, 1].
        std: Normalisation standard deviation, likewise.

    Raises:
        ValueError: If timm does not know the backbone, it lacks one of the strides or cannot take images of this size,
            or there are ``weights`` without ``pre_trained``.
        FileNotFoundError: If ``weights`` names neither a file nor an installed package.
    """

    awaits_weights: bool = False
    """Whether the weights of timm's hub are still to be fetched; until then they are random."""

    def __init__(
        self,
        backbone: str,
        *,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] = (224, 224),
        exact: bool = True,
    ) -> None:
        super().__init__()
        if not timm.is_model(backbone):
            known = timm.list_models()
            close = [name for name in known if backbone in name][:5] or difflib.get_close_matches(backbone, known, n=5)
            msg = f"backbone must be a timm model name, got {backbone!r}. Similar names: {', '.join(close) or 'none'}."
            raise ValueError(msg)
        if weights is not None and not pre_trained:
            msg = (
                f"weights={str(weights)!r} and pre_trained=False contradict each other: random weights, or those? "
                "Leave pre_trained out to load them, or weights (null in YAML and on the command line)."
            )
            raise ValueError(msg)
        self.backbone = backbone
        self.image_size = image_size
        network = self._create(pre_trained=False)
        if isinstance(network, TransformerLevels):
            config = network.vit.pretrained_cfg
            self.channels: tuple[int, ...] = network.channels
            if weights is not None:
                network.load(weights)
        else:
            config = network.pretrained_cfg
            self.channels = tuple(network.feature_info.channels())
            if weights is not None:
                load_backbone_weights(network, backbone, weights)
            freeze_padding(network, native_size=config["input_size"][-2:])
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.network: nn.Module = network.requires_grad_(False)
        self.awaits_weights = pre_trained and weights is None
        self.eval()
        check_levels(
            self.network,
            backbone,
            image_size=image_size,
            expected=[
                (1, c, image_size[0] // s, image_size[1] // s) for c, s in zip(self.channels, STRIDES, strict=True)
            ],
            exact=exact,
        )

    def _create(self, *, pre_trained: bool) -> Any:
        """Build the network with random weights, or those of timm's hub."""
        if is_transformer(self.backbone):
            return TransformerLevels(self.backbone, pre_trained=pre_trained, image_size=self.image_size)
        return _create_trunk(self.backbone, pre_trained=pre_trained)

    def fetch_weights(self) -> None:
        """Fetch the weights of timm's hub, unless they are here or others came.

        Raises:
            RuntimeError: If they cannot be fetched.
        """
        if not self.awaits_weights:
            return
        with seeded(0):  # timm draws random weights first: other random numbers stay as they are
            fetched = self._create(pre_trained=True)
        # Where the network was made: what was made in inference mode changes nowhere else.
        with torch.inference_mode(next(self.network.parameters()).is_inference()):
            self.network.load_state_dict(fetched.state_dict())
        self.awaits_weights = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Have the weights before the state tells them."""
        self.fetch_weights()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Spare the fetching where all weights come from a state."""
        names = {f"{prefix}network.{name}" for name in self.network.state_dict()}
        if names <= state_dict.keys():
            self.awaits_weights = False
        elif names & state_dict.keys():
            self.fetch_weights()  # what comes goes on top
        super()._load_from_state_dict(state_dict, prefix, *args)

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

        Raises:
            RuntimeError: If the weights are still to be fetched and cannot be.
        """
        self.fetch_weights()
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
