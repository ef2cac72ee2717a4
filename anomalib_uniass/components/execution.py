# SPDX-License-Identifier: Apache-2.0
"""How operators run here and now."""

import torch
from torch import Tensor


def runs_eagerly() -> bool:
    """Tell whether operators run as they are called, and are not compiled or exported."""
    return not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()


def runs_on_cpu(x: Tensor) -> bool:
    """Tell whether operators on a tensor run on a CPU, as they are called."""
    return x.is_cpu and runs_eagerly()
