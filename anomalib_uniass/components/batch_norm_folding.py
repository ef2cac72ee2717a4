# SPDX-License-Identifier: Apache-2.0
"""Batch norms of a frozen network, folded into the convolutions before them."""

import copy
from typing import cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anomalib_uniass.components.static_padding import StaticSameConv2d

CONVS = (nn.Conv2d, StaticSameConv2d)
"""Convolutions with their weight as it is; subclasses may change it in every call."""

EXACT = 0.3
"""Relative difference between rounding (0.03 at the last tap of EfficientNet-B4) and a batch norm left out (1)."""


@torch.no_grad()
def find_normed_convs(network: nn.Module, image: Tensor) -> dict[str, str]:
    """Return which convolution each batch norm follows directly, found by running the network.

    A convolution of the same block, that is: elsewhere its output might be used by more than the batch norm. Where it
    is nevertheless, as in networks whose first tap lies before a batch norm, nothing is folded: a copy with random
    statistics tells, for with the initial ones a batch norm changes nothing.

    Args:
        network: A network in evaluation mode.
        image: An input of it.

    Returns:
        Name of the batch norm by name of the convolution.
    """
    pairs = _find_neighbors(network, image)
    shuffled = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in shuffled.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 2), (norm.bias, -0.5, 0.5)
        ):  # fmt: skip
            if tensor is not None:
                tensor.uniform_(low, high, generator=generator)
    image = torch.randn(image.shape, generator=generator)
    folded, plain = fold_batch_norms(shuffled, pairs)(image), shuffled(image)
    exact = all((a - b).norm() < EXACT * b.norm() for a, b in zip(folded, plain, strict=True))
    return pairs if exact else {}


def _find_neighbors(network: nn.Module, image: Tensor) -> dict[str, str]:
    """Return the batch norm that is called on the output of each convolution of its block."""
    names = {module: name for name, module in network.named_modules()}
    producers: dict[int, tuple[str, Tensor]] = {}  # holding an output keeps its id from being given away
    pairs: dict[str, str] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        if type(module) in CONVS:
            producers[id(output)] = (name, output)
        elif id(inputs[0]) in producers:
            conv, _ = producers[id(inputs[0])]
            if conv.rpartition(".")[0] == name.rpartition(".")[0]:
                pairs[conv] = name

    convs = [module for module in names if type(module) in CONVS]
    norms = [module for module in names if isinstance(module, nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(record) for module in (*convs, *norms)]
    network(image)
    for hook in hooks:
        hook.remove()
    return pairs


def fold_batch_norms(network: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """Return a copy of a network without the batch norms that follow a convolution.

    Args:
        network: A network in evaluation mode.
        pairs: What :func:`find_normed_convs` returns.

    Returns:
        The copy. Its tensors are buffers outside the state dict, for they are the network's.
    """
    folded = copy.deepcopy(network)
    for conv_name, norm_name in pairs.items():
        conv = cast("nn.Conv2d", network.get_submodule(conv_name))
        norm = cast("nn.BatchNorm2d", network.get_submodule(norm_name))
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        activation = copy.deepcopy(norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, activation)
    for module in folded.modules():
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return folded.eval()
