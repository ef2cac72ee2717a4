# SPDX-License-Identifier: Apache-2.0
"""Resizing that is the same computation in training, testing and the exported graph."""

from typing import cast

import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize


class AntialiasedPreProcessor(PreProcessor):
    """Antialiased bilinear resize and normalisation, exported as they are: ``(B, 3, H, W) -> (B, 3, h, w)``.

    anomalib drops the antialiasing on export, because ONNX and OpenVINO have no such operator; predictions on large
    images then differ from those that were tested. Here the exported graph holds the resize as two products with
    triangle-filter matrices, which are computed from the size of the input.

    Args:
        transform: A resize to (height, width) with antialiasing, then a normalisation.

    Raises:
        ValueError: If `transform` is anything else.
    """

    def __init__(self, transform: Compose) -> None:
        steps = transform.transforms if isinstance(transform, Compose) else []
        if [type(step) for step in steps] != [Resize, Normalize] or len(steps[0].size) != 2:
            msg = f"AntialiasedPreProcessor takes Compose([Resize((height, width)), Normalize(...)]), got {transform}."
            raise ValueError(msg)
        super().__init__(transform)

    def forward(self, batch: Tensor) -> Tensor:
        """Resize and normalise RGB images in [0, 1]; used by inferencers and exported graphs."""
        resize, normalize = cast("Compose", self.transform).transforms
        # The other way round is the same (both are affine), but OpenVINO 2026.4 cannot compile it for fixed sizes: it
        # fuses the normalisation into the products.
        return antialiased_resize(normalize(batch), resize.size)


def antialiased_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``(B, C, H, W)`` bilinearly with antialiasing, as torchvision does, by matrix products alone."""
    exporting = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    if not exporting and tuple(x.shape[-2:]) == tuple(size):
        return x
    rows = _triangle_filter(x[0, 0, :, 0], size[0])
    columns = _triangle_filter(x[0, 0, 0, :], size[1])
    return rows @ x @ columns.T


def _triangle_filter(axis: Tensor, size: int) -> Tensor:
    """Return the weights ``(size, n)`` that resample an axis of n pixels; tensors only, for n may be symbolic.

    Whole numbers up to the division: positions such as 300.5 do not exist in bfloat16, which OpenVINO computes in by
    itself on many CPUs. Between 0 and 1 before they are summed, for sums of the whole numbers are beyond float16.
    """
    ordinals = torch.ones_like(axis, dtype=torch.int64).cumsum(0)
    count = ordinals[-1]
    centers = count * (2 * torch.arange(size, device=axis.device) + 1)
    distances = (size * (2 * ordinals - 1) - centers[:, None]).abs()  # in units of half a pixel over `size`
    height = 2 * count.clamp_min(size)
    weights = (height - distances).clamp_min(0).to(axis.dtype) / height.to(axis.dtype)
    return weights / weights.sum(dim=1, keepdim=True)
