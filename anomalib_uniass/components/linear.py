# SPDX-License-Identifier: Apache-2.0
"""Linear layers of tokens by the kernels of convolutions."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

MINIMAL_WEIGHTS = 2**15  # from here on the kernels outweigh what a convolution costs besides


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``: ``(B, N, C) -> (B, N, C')``.

    On a CPU as a 1x1 convolution: PyTorch leaves those to oneDNN, which uses AVX-512 wherever there is some, and matrix
    products to MKL, which does so on Intel's processors only.

    Args:
        x: Tokens.
        weight: Weight ``(C', C)``.
        bias: Bias ``(C',)``.
    """
    if not runs_on_cpu(x) or weight.numel() < MINIMAL_WEIGHTS:
        return F.linear(x, weight, bias)
    maps = x.contiguous().mT[:, :, None]  # (B, C, 1, N), channels last
    return F.conv2d(maps, weight[:, :, None, None], bias)[:, :, 0].mT


def runs_on_cpu(x: Tensor) -> bool:
    """Tell whether operators on a tensor run on a CPU here and now, and are not compiled or exported."""
    return x.is_cpu and not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()
