# SPDX-License-Identifier: Apache-2.0
"""Linear layers of tokens by the kernels of convolutions."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MINIMAL_WEIGHTS = 2**15  # from here on the kernels outweigh what a convolution costs besides


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``: ``(B, N, C) -> (B, N, C')``.

    Computed as a 1x1 convolution: PyTorch leaves those to oneDNN, which uses AVX-512 wherever there is some, and matrix
    products to MKL, which does so on Intel's processors only.

    Args:
        x: Tokens.
        weight: Weight ``(C', C)``.
        bias: Bias ``(C',)``.
    """
    if weight.numel() < MINIMAL_WEIGHTS:
        return F.linear(x, weight, bias)
    maps = x.contiguous().mT.unsqueeze(2)  # (B, C, 1, N), channels last
    return F.conv2d(maps, weight.view(*weight.shape, 1, 1), bias).squeeze(2).mT
