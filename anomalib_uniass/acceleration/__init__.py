# SPDX-License-Identifier: Apache-2.0
"""Exact rewrites of the plain models that compute the same in less time or memory.

:func:`accelerate` replaces modules of a model by ones that hold the same parameters under the same names, so that
state dicts, optimizers and exported names stay. To undo it, build the plain model and load the state dict.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from anomalib_uniass.acceleration.attention import CPUMultiheadAttention
from anomalib_uniass.acceleration.dropout import Dropout
from anomalib_uniass.acceleration.heads import fold_head
from anomalib_uniass.acceleration.memory import (
    CheckpointedAttentionLayer,
    CheckpointedFeedForwardLayer,
    checkpointed_embed,
)
from anomalib_uniass.acceleration.pixel_decoder import fold_level
from anomalib_uniass.acceleration.source_embedding import FoldedSourceEmbedding
from anomalib_uniass.layers.transformer import AttentionLayer, FeedForwardLayer
from anomalib_uniass.models.unias.heads import ReconstructionHead
from anomalib_uniass.models.unias.pixel_decoder import FPNLevel
from anomalib_uniass.models.unias.source_embedding import SourceEmbedding
from anomalib_uniass.models.unias.torch_model import UniASModel

LARGE_MAP = 2**20
"""Numbers in an image's finest memory map from which on it is not kept: 12,544 pixels of 84 channels, at 224 px."""


def _heads(model: UniASModel) -> None:
    _replace(model, {ReconstructionHead: partial(fold_head, grid_size=model.grid_size)})


def _embedding(model: UniASModel) -> None:
    _replace(model, {FPNLevel: fold_level, SourceEmbedding: FoldedSourceEmbedding})


def _dropout(model: UniASModel) -> None:
    _replace(model, {nn.Dropout: lambda plain: Dropout(plain.p), nn.MultiheadAttention: CPUMultiheadAttention})


def _layout(model: UniASModel) -> None:
    model.to(memory_format=torch.channels_last)


def _memory(model: UniASModel) -> None:
    height, width = model.grid_size
    scale = 2 ** len(model.pixel_decoder.levels)
    if height * width * scale**2 * model.pixel_decoder.deepest_conv.out_channels < LARGE_MAP:
        return
    _replace(model, {AttentionLayer: CheckpointedAttentionLayer, FeedForwardLayer: CheckpointedFeedForwardLayer})
    embed = partial(checkpointed_embed, model.pixel_decoder, model.source_embedding)
    model.embed = embed  # type: ignore[method-assign]


REWRITES: dict[str, Callable[[UniASModel], None]] = {
    "layout": _layout,
    "heads": _heads,
    "embedding": _embedding,
    "dropout": _dropout,
    "memory": _memory,
}


def accelerate(model: UniASModel, rewrites: Iterable[str] = REWRITES) -> None:
    """Rewrite a model in place.

    Args:
        model: A plain model.
        rewrites: Names of the rewrites.
    """
    # Where the model was made: tensors that are made in inference mode could not be trained with.
    with torch.inference_mode(next(model.parameters()).is_inference()):
        for name in rewrites:
            REWRITES[name](model)


def _replace(model: nn.Module, rewrites: dict[type, Callable[..., nn.Module]]) -> None:
    """Replace modules by type."""
    for name, module in list(model.named_modules()):
        if (rewrite := rewrites.get(type(module))) is not None:
            rewritten = rewrite(module)
            if rewritten is not module:
                model.set_submodule(name, rewritten.train(module.training))
