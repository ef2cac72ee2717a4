# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's SAME padding, fixed for one image size."""

from collections.abc import Sequence

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn


def freeze_padding(network: nn.Module, *, native_size: Sequence[int]) -> None:
    """Replace dynamic SAME padding by its value at the network's native resolution, in place.

    Args:
        network: timm network, such as TensorFlow's ports of EfficientNet.
        native_size: Height and width that it was trained with.
    """
    dynamic = {name: module for name, module in network.named_modules() if isinstance(module, Conv2dSame)}
    if not dynamic:
        return
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sizes[module] = (inputs[0].shape[-2], inputs[0].shape[-1])

    hooks = [module.register_forward_pre_hook(record) for module in dynamic.values()]
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, *native_size))
    for hook in hooks:
        hook.remove()
    for name, module in dynamic.items():
        network.set_submodule(name, StaticSameConv2d(module, input_size=sizes[module]))


class StaticSameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding fixed for one input size: ``(B, C, H, W) -> (B, C', H / s, W / s)``.

    Args:
        conv: The convolution to take parameters and geometry from.
        input_size: Height and width whose SAME padding is applied to inputs of every size.
    """

    def __init__(self, conv: nn.Conv2d, *, input_size: tuple[int, int]) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        (top, bottom), (left, right) = (
            (total // 2, total - total // 2)
            for total in map(get_same_padding, input_size, conv.kernel_size, conv.stride, conv.dilation)
        )
        if (top, left) == (bottom, right):
            self.padding = (top, left)  # symmetric: the convolution pads by itself
            self.explicit_padding = (0, 0, 0, 0)
        else:
            self.explicit_padding = (left, right, top, bottom)

    def forward(self, input: Tensor) -> Tensor:
        """Pad and convolve ``(B, C, H, W)``."""
        if any(self.explicit_padding):
            input = nn.functional.pad(input, self.explicit_padding)
        return super().forward(input)
