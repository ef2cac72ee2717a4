# SPDX-License-Identifier: Apache-2.0
"""Multi-granularity gated CNN (MGG-CNN)."""

from torch import Tensor, nn


class MultiGranularityGatedCNN(nn.Module):
    """Sum of GELU-gated convolution chains of growing receptive field: ``(B, C, H, W) -> (B, C', H, W)``.

    ``GELU(1x1) + GELU(3x3) + GELU(3x3 3x3) + GELU(3x3 3x3 3x3)``, zero padding, no activation inside a chain.

    Args:
        in_channels: Channels C.
        out_channels: Channels C'.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.chains = nn.ModuleList([nn.Conv2d(in_channels, out_channels, kernel_size=1)])
        for length in (1, 2, 3):
            first = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            rest = [nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1) for _ in range(length - 1)]
            self.chains.append(nn.Sequential(first, *rest))
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Add up the granularities."""
        fine_to_coarse = [self.activation(chain(x)) for chain in self.chains]
        return fine_to_coarse[0] + fine_to_coarse[1] + fine_to_coarse[2] + fine_to_coarse[3]
