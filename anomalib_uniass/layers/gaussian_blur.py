# SPDX-License-Identifier: Apache-2.0
"""Gaussian blur with a reflected border."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class GaussianBlur2d(nn.Module):
    """Blur every channel: ``(B, C, H, W) -> (B, C, H, W)``.

    anomalib's own class of this name cannot take a state dict for more than one channel; here the kernel is a
    constant that is not part of it.

    Args:
        kernel_size: Odd number of pixels.
        sigma: Standard deviation in pixels.
    """

    kernel: Tensor

    def __init__(self, *, kernel_size: int, sigma: float) -> None:
        super().__init__()
        offset = torch.arange(kernel_size, dtype=torch.float32) - kernel_size // 2
        weight = torch.exp(-offset.square() / (2 * sigma**2))
        weight = weight / weight.sum()
        self.register_buffer("kernel", torch.outer(weight, weight)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve depthwise."""
        channels, radius = x.shape[1], self.kernel.shape[-1] // 2
        padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
        return F.conv2d(padded, self.kernel.to(x.dtype).expand(channels, -1, -1, -1), groups=channels)
