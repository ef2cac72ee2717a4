# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: the backward pass computes again what is large and cheap, the fine memory maps above all."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anomalib_uniass.acceleration.constants import runs_on_cpu
from anomalib_uniass.acceleration.source_embedding import FoldedSourceEmbedding
from anomalib_uniass.layers.transformer import AttentionLayer, FeedForwardLayer
from anomalib_uniass.models.unias.pixel_decoder import FPNPixelDecoder
from anomalib_uniass.models.unias.source_embedding import SourceEmbedding

Embed = Callable[[list[Tensor]], list[Tensor]]
"""A source embedding: memory maps, coarse to fine, to source tokens."""

PART_BYTES = 2**25
"""Size of the finest memory map above which it is computed for part of the batch's images at a time.

Caches of a CPU do not hold larger maps, and the allocator fetches them from the system anew.
"""


class CheckpointedAttentionLayer(AttentionLayer):
    """An attention layer that keeps query, key and value alone.

    Args:
        plain: The layer.
    """

    def __init__(self, plain: AttentionLayer) -> None:
        nn.Module.__init__(self)
        self.attention, self.dropout, self.norm = plain.attention, plain.dropout, plain.norm

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attended values ``(B, N, D)``."""
        return _recompute(super().attend, query, key, value, mask)


class CheckpointedFeedForwardLayer(FeedForwardLayer):
    """A feed-forward layer that keeps its tokens alone.

    Args:
        plain: The layer.
    """

    def __init__(self, plain: FeedForwardLayer) -> None:
        nn.Module.__init__(self)
        self.linear1, self.activation, self.linear2 = plain.linear1, plain.activation, plain.linear2
        self.dropout, self.norm = plain.dropout, plain.norm

    def transform(self, tokens: Tensor) -> Tensor:
        """Return what is added to the tokens, before its dropout."""
        return _recompute(super().transform, tokens)


def checkpointed_embed(
    pixel_decoder: FPNPixelDecoder, source_embedding: SourceEmbedding | FoldedSourceEmbedding, inputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Compute :meth:`~anomalib_uniass.models.unias.torch_model.UniASModel.embed`, keeping less for the backward pass.

    What is kept of a fine level is its convolved map. Normalising and rectifying it again is cheap, and so are
    upsampling and lateral map before it.

    Args:
        pixel_decoder: The pixel decoder.
        source_embedding: The source embedding.
        inputs: Decoder inputs ``[(B, 2 C_i, H_i, W_i)]``, fine to coarse.

    Returns:
        The deepest memory map ``(B, D, h, w)`` and the source tokens ``[(B, N, D)]``, coarse to fine.
    """
    *fine, deepest = inputs
    embed: Embed = source_embedding
    if isinstance(source_embedding, FoldedSourceEmbedding):
        embed = partial(source_embedding, folded=source_embedding.folded())  # once for all images
    encoded = pixel_decoder.encode(deepest)
    batch = (encoded, *reversed(fine))
    if not runs_on_cpu(deepest):  # a graph is not cut, for its batch may have any size
        return encoded, _embed_part(pixel_decoder, embed, *batch)
    images = _images_at_a_time(pixel_decoder, fine[0])
    parts = [_embed_part(pixel_decoder, embed, *part) for part in zip(*(x.split(images) for x in batch), strict=True)]
    return encoded, parts[0] if len(parts) == 1 else [torch.cat(sources) for sources in zip(*parts, strict=True)]


def _images_at_a_time(pixel_decoder: FPNPixelDecoder, finest: Tensor) -> int:
    image_bytes = pixel_decoder.deepest_conv.out_channels * finest[0, 0].numel() * finest.element_size()
    return max(1, PART_BYTES // image_bytes)


def _embed_part(pixel_decoder: FPNPixelDecoder, embed: Embed, encoded: Tensor, *fine: Tensor) -> list[Tensor]:
    """Return the source tokens of some images from their encoded map and the inputs of the levels, coarse to fine."""
    levels: Any = pixel_decoder.levels
    memory = [encoded]
    for level, x in zip(levels[:-1], fine[:-1], strict=True):
        memory.append(level.activate(_recompute(level.fuse, x, memory[-1])))
    fused = _recompute(levels[-1].fuse, fine[-1], memory[-1])
    return _recompute(_activate_and_embed, levels[-1].activate, embed, memory, fused)


def _activate_and_embed(
    activate: Callable[[Tensor], Tensor], embed: Embed, memory: list[Tensor], fused: Tensor
) -> list[Tensor]:
    return embed([*memory, activate(fused)])


def _recompute(function: Callable[..., Any], *inputs: object) -> Any:
    """Call a function, keeping none of its intermediate results for the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False) if torch.is_grad_enabled() else function(*inputs)
