# SPDX-License-Identifier: Apache-2.0
"""Weights derived from others, such as linear layers folded into one: in every step, or once as constants."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# A folded form must save this factor of multiply-adds: it moves more memory for each of them than a convolution.
FOLD_GAIN = 2


class FoldingModule(nn.Module):
    """A module that keeps folded weights as constants (buffers outside the state dict) for inference.

    Evaluation mode, loading and a move to another device or precision fold anew, so that an exporter meets constants.
    :meth:`fold_ahead` notices what has changed since, but for writes to a parameter's ``data``, which PyTorch does not
    count: these need the next call of :meth:`eval`.

    Args:
        constants: Names of the buffers, or of modules that hold such, in the order of :meth:`fold`.

    Attributes:
        folds_ahead: Whether inference uses the folded weights at all.
    """

    def __init__(self, constants: Sequence[str]) -> None:
        super().__init__()
        self.constants = tuple(constants)
        for name in self.constants:
            self.register_buffer(name, None, persistent=False)
        self.folds_ahead = True
        self._folded_version: tuple[int, ...] | None = None
        self.register_load_state_dict_post_hook(_fold_anew)

    def fold(self) -> tuple[Tensor | nn.Module, ...]:
        """Fold the weights, differentiably and in full precision."""
        raise NotImplementedError

    def fold_ahead(self) -> None:
        """Bring the constants up to date with the state dict."""
        if torch.compiler.is_compiling() or not self.folds_ahead:
            return
        version = tuple(tensor._version for tensor in self.state_dict(keep_vars=True).values())
        if version != self._folded_version:
            with torch.inference_mode(False), torch.no_grad():
                for name, constant in zip(self.constants, self.fold(), strict=True):
                    setattr(self, name, constant)
            self._folded_version = version

    def folded_ahead(self) -> tuple[Tensor, ...]:
        """Return the constants, up to date with the state dict."""
        self.fold_ahead()
        return tuple(self.get_buffer(name) for name in self.constants)

    def train(self, mode: bool = True) -> "FoldingModule":
        """Switch mode; evaluation folds anew."""
        super().train(mode)
        if not mode:
            _fold_anew(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FoldingModule":
        """Move to another device or precision, and fold anew there: rounded constants would stay rounded."""
        super()._apply(fn, recurse)
        if self._folded_version is not None:
            _fold_anew(self)
        return self


def _fold_anew(module: FoldingModule, _: object = None) -> None:
    """Fold whatever the versions say: tensors that were assigned or moved start at an old one."""
    module._folded_version = None
    module.fold_ahead()
