# SPDX-License-Identifier: Apache-2.0
"""Resizing that is the same computation in training, testing and the exported graph."""

from typing import cast

from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from anomalib_uniass.layers.antialiased_resize import antialiased_resize


class AntialiasedPreProcessor(PreProcessor):
    """Antialiased bilinear resize and normalisation, exported as they are: ``(B, 3, H, W) -> (B, 3, h, w)``.

    anomalib drops the antialiasing on export, because ONNX and OpenVINO have no such operator; predictions on large
    images then differ from those that were tested. Here the exported graph holds the resize as two products with
    triangle-filter matrices, which are computed from the size of the input.

    Args:
        transform: A resize to (height, width) with antialiasing, then a normalisation; or the latter alone, for a model
            that works on tiles of the image.

    Raises:
        ValueError: If `transform` is anything else.
    """

    def __init__(self, transform: Compose) -> None:
        steps = transform.transforms if isinstance(transform, Compose) else []
        kinds = [type(step) for step in steps]
        if kinds not in ([Resize, Normalize], [Normalize]) or (kinds[0] is Resize and len(steps[0].size) != 2):
            msg = f"AntialiasedPreProcessor takes Compose([Resize((height, width)), Normalize(...)]), got {transform}."
            raise ValueError(msg)
        super().__init__(transform)

    def resize_to(self, size: tuple[int, int] | None) -> None:
        """Resize to another size from now on; None leaves images as large as they are."""
        *_, normalize = self._steps
        resize = [] if size is None else [Resize(size, antialias=True)]
        self.transform = self.export_transform = Compose([*resize, normalize])

    @property
    def _steps(self) -> list[Transform]:
        return list(cast("Compose", self.transform).transforms)

    def forward(self, batch: Tensor) -> Tensor:
        """Resize and normalise RGB images in [0, 1]; used by inferencers and exported graphs."""
        *resize, normalize = self._steps
        # The other way round is the same (both are affine), but OpenVINO 2026.4 cannot compile it for fixed sizes: it
        # fuses the normalisation into the products.
        batch = normalize(batch)
        return antialiased_resize(batch, resize[0].size) if resize else batch
