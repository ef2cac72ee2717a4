# SPDX-License-Identifier: Apache-2.0
"""Models that fit in a moment."""

from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize

from anomalib_uniass import UniAD, UniAS

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "pre_trained": False,
    "image_size": (128, 128),
    "hidden_dim": 32,
    "feedforward_dim": 32,
}
"""Arguments of the smallest UniAS and UniAD that are of use."""


def tiny_padim(*, visualizer: bool) -> Padim:
    """Build a PaDiM without weights for images of 32 x 32."""
    return Padim(
        backbone="resnet18",
        layers=["layer1"],
        pre_trained=False,
        n_features=8,
        pre_processor=PreProcessor(Resize((32, 32))),
        visualizer=visualizer,
    )


def loss_on_unseen(model: UniAS | UniAD, datamodule: AnomalibDataModule) -> float:
    """Return the training loss on the good test images, which no training has seen, without jitter and dropout."""
    datamodule.setup()
    images = torch.stack([item.image for item in datamodule.test_data if not item.gt_label])
    with torch.no_grad():
        loss = model.loss(*model.model.eval().reconstruct(model.pre_processor.transform(images)))
    model.train()
    return float(loss)
