# SPDX-License-Identifier: Apache-2.0
"""Constants made of a module's parameters, such as convolutions folded into one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Folded(nn.Module):
    """A module that keeps folded weights as constants, buffers outside the state dict, while it is in evaluation mode.

    They are made on the way into evaluation mode, after loading, and after a move to another device or precision. In
    training mode there are none: weights are folded anew in every step, and there is nothing to go stale or to send to
    other processes.

    Args:
        names: Names of the buffers, in the order of :meth:`fold`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in self.names:
            self.register_buffer(name, None, persistent=False)
        self.register_load_state_dict_post_hook(_fold_anew)

    def fold(self) -> tuple[Tensor, ...]:
        """Fold the weights, differentiably and in their own precision whatever the autocast."""
        raise NotImplementedError

    def folded(self) -> tuple[Tensor, ...]:
        """Return the constants, or fold anew where there are none or gradients are to flow through them."""
        if self.training or torch.is_grad_enabled():
            return self.fold()
        return tuple(self.get_buffer(name) for name in self.names)

    def train(self, mode: bool = True) -> "Folded":
        """Switch mode: make the constants for evaluation, drop them for training."""
        super().train(mode)
        # As the parameters are: constants that were made in inference mode could not be used outside.
        with torch.inference_mode(next(self.parameters()).is_inference()), torch.no_grad():
            constants = [None] * len(self.names) if mode else self.fold()
            for name, constant in zip(self.names, constants, strict=True):
                setattr(self, name, constant)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Folded":
        """Move to another device or precision, then make the constants of the moved weights."""
        super()._apply(fn, recurse)
        return self.train(self.training)


def _fold_anew(module: Folded, _: object) -> None:
    module.train(module.training)


def runs_on_cpu(x: Tensor) -> bool:
    """Tell whether operators on a tensor run on a CPU, as they are called: not compiled, not exported."""
    return x.is_cpu and not torch.compiler.is_compiling() and not torch.onnx.is_in_onnx_export()
