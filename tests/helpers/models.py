# SPDX-License-Identifier: Apache-2.0
"""Models of anomalib that fit in a moment."""

from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize


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
