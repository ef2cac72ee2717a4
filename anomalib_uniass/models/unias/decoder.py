# SPDX-License-Identifier: Apache-2.0
"""Spatial-channel decoder: one block per level, query tokens carried from block to block."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.folding import FoldingModule
from anomalib_uniass.components.mgg_cnn import MultiGranularityGatedCNN
from anomalib_uniass.components.neighbor_mask import neighbor_mask
from anomalib_uniass.components.position_encoding import sine_position_encoding_2d
from anomalib_uniass.components.transformer import AttentionLayer, FeedForwardLayer

HEADS = 4


class SourceEmbedding(FoldingModule):
    """Embed every memory level on the deepest grid: ``[(B, D, H_i, W_i)] -> [(B, N, D)]``, coarse to fine.

    A patch embedding and a 1x1 convolution behind it are one linear map: one convolution with folded weights. In
    training the weights are folded once a step, which pays for batches of some images.

    Args:
        hidden_dim: Width D; an even number.
        levels: Number of levels.
    """

    def __init__(self, hidden_dim: int, *, levels: int) -> None:
        super().__init__([f"folded_{kind}_{level}" for level in range(1, levels) for kind in ("weight", "bias")])
        widths = [hidden_dim, *(hidden_dim * (level + 1) // 2 for level in range(1, levels))]
        self.patch_embeds = nn.ModuleList([nn.Identity()])
        saved_per_position = folding_cost = 0  # multiply-adds
        for level in range(1, levels):
            stride = 2**level
            patch = stride**2 * hidden_dim
            saved_per_position += patch * widths[level] + widths[level] * hidden_dim - patch * hidden_dim
            folding_cost += hidden_dim * widths[level] * patch
            self.patch_embeds.append(nn.Conv2d(hidden_dim, widths[level], kernel_size=stride, stride=stride))
        self.projections = nn.ModuleList(nn.Conv2d(width, hidden_dim, kernel_size=1) for width in widths)
        self.level_embedding = nn.Embedding(levels, hidden_dim)
        self._break_even = folding_cost / saved_per_position

    def forward(self, memory: Sequence[Tensor]) -> list[Tensor]:
        """Patch-embed, project and add the level embedding, in the cheaper form."""
        return self.form(memory[0][:, 0].numel())(memory)

    def form(self, positions: int) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Return the cheaper form of :meth:`forward`, its weights folded.

        Args:
            positions: Tokens of the whole batch and a level; in training they share the cost of folding.
        """
        if not torch.is_grad_enabled():
            return partial(self.folded, folded=self.folded_ahead())
        return partial(self.folded, folded=self.fold()) if positions > self._break_even else self.plain

    def plain(self, memory: Sequence[Tensor]) -> list[Tensor]:
        """Compute the embedding as it is written in the paper."""
        maps = [embed(y) for embed, y in zip(self.patch_embeds, memory, strict=True)]
        return self._add_level([project(x) for project, x in zip(self.projections, maps, strict=True)])

    def folded(self, memory: Sequence[Tensor], folded: Sequence[Tensor]) -> list[Tensor]:
        """Compute the embedding with the folded weights and biases of :meth:`fold`."""
        weights, biases = folded[::2], folded[1::2]
        maps = [self.projections[0](memory[0])]
        for y, weight, bias in zip(memory[1:], weights, biases, strict=True):
            maps.append(F.conv2d(y, weight, bias, stride=weight.shape[-2:]))
        return self._add_level(maps)

    def fold(self) -> tuple[Tensor, ...]:
        """Fold projections and patch embeddings, differentiably and in full precision.

        Returns:
            Weight ``(D, D, 2^i, 2^i)`` and bias ``(D,)`` of level 1, of level 2 and so on.
        """
        folded: list[Tensor] = []
        with torch.autocast(self.level_embedding.weight.device.type, enabled=False):
            for embed, project in zip(self.patch_embeds[1:], self.projections[1:], strict=True):
                (kernel, kernel_bias), (weight, bias) = embed.parameters(), project.parameters()
                patches, matrix = kernel.permute(0, 2, 3, 1), weight.flatten(1)  # channels last, as the maps are
                product = (matrix @ patches.flatten(1)).unflatten(1, patches.shape[1:])
                folded += [product.permute(0, 3, 1, 2), matrix @ kernel_bias + bias]
        return tuple(folded)

    def _add_level(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [
            x.flatten(2).transpose(1, 2) + level for x, level in zip(maps, self.level_embedding.weight, strict=True)
        ]


class SpatialChannelDecoder(nn.Module):
    """Decode the queries level by level: ``(B, N, D), [(B, N, D)] -> [(B, N, D)]``, coarse to fine.

    Args:
        hidden_dim: Width D.
        feedforward_dim: Width of all feed-forward layers.
        grid_size: Height and width of the token grid, N = h * w.
        levels: Number of levels.
        channel_branch: Run the channel branch beside the spatial one (the release's VisA configuration does not).
        heads: Attention heads; must divide D, and N if there is a channel branch.
        dropout: Dropout of attention and feed-forward layers.
    """

    position: Tensor
    neighbor_mask: Tensor

    def __init__(
        self,
        hidden_dim: int,
        *,
        feedforward_dim: int,
        grid_size: tuple[int, int],
        levels: int,
        channel_branch: bool = True,
        heads: int = HEADS,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = grid_size
        self.query_embedding = nn.Embedding(height * width, hidden_dim)  # one table for all blocks
        self.register_buffer("position", sine_position_encoding_2d(height, width, hidden_dim), persistent=False)
        self.register_buffer("neighbor_mask", neighbor_mask(height, width), persistent=False)
        self.blocks = nn.ModuleList(
            SpatialChannelDecoderBlock(
                hidden_dim,
                feedforward_dim=feedforward_dim,
                grid_size=grid_size,
                channel_branch=channel_branch,
                heads=heads,
                dropout=dropout,
            )
            for _ in range(levels)
        )

    def forward(self, queries: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
        """Return the tokens after every block."""
        tokens, outputs = queries, []
        for block, source in zip(self.blocks, sources, strict=True):
            tokens = block(
                tokens,
                source,
                position=self.position,
                query_embedding=self.query_embedding.weight,
                mask=self.neighbor_mask,
            )
            outputs.append(tokens)
        return outputs


class SpatialChannelDecoderBlock(nn.Module):
    """One decoder block: a spatial and a channel transformer side by side, then the MGG-CNN.

    Arguments as for :class:`SpatialChannelDecoder`.
    """

    def __init__(
        self,
        hidden_dim: int,
        *,
        feedforward_dim: int,
        grid_size: tuple[int, int],
        channel_branch: bool,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        height, width = grid_size
        self.grid_size = grid_size
        self.spatial = DecoderBranch(hidden_dim, heads=heads, feedforward_dim=feedforward_dim, dropout=dropout)
        self.channel = (
            DecoderBranch(height * width, heads=heads, feedforward_dim=feedforward_dim, dropout=dropout)
            if channel_branch
            else None
        )
        self.mgg_cnn = MultiGranularityGatedCNN(hidden_dim, hidden_dim)

    def forward(
        self, tokens: Tensor, source: Tensor, *, position: Tensor, query_embedding: Tensor, mask: Tensor
    ) -> Tensor:
        """Decode one level.

        Args:
            tokens: Query tokens ``(B, N, D)``.
            source: Source tokens of the level ``(B, N, D)``.
            position: Position encoding of the sources ``(N, D)``.
            query_embedding: Learned position embedding of the queries ``(N, D)``.
            mask: Neighbour mask ``(N, N)``, True = may NOT attend.
        """
        positioned = source + position
        decoded = self.spatial(tokens, key=positioned, value=source, query_embedding=query_embedding, mask=mask)
        if self.channel is not None:
            decoded = decoded + self.channel(tokens.mT, key=positioned.mT, value=source.mT).mT
        maps = decoded.mT.unflatten(2, self.grid_size)  # (B, D, h, w)
        return self.mgg_cnn(maps).flatten(2).mT


class DecoderBranch(nn.Module):
    """Cross-attention to the source, self-attention, feed-forward: ``(B, N, D) -> (B, N, D)``.

    The channel branch runs it on transposed tokens: D channels of width N.
    """

    def __init__(self, dim: int, *, heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.cross_attention = AttentionLayer(dim, heads=heads, dropout=dropout)
        self.self_attention = AttentionLayer(dim, heads=heads, dropout=dropout)
        self.feed_forward = FeedForwardLayer(dim, hidden_dim=feedforward_dim, dropout=dropout)

    def forward(
        self,
        tokens: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        query_embedding: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to `key` and `value`, then to itself; queries and own keys carry the embedding."""
        tokens = self.cross_attention(tokens, query=_add(tokens, query_embedding), key=key, value=value, mask=mask)
        embedded = _add(tokens, query_embedding)
        tokens = self.self_attention(tokens, query=embedded, key=embedded, mask=mask)
        return self.feed_forward(tokens)


def _add(tokens: Tensor, embedding: Tensor | None) -> Tensor:
    return tokens if embedding is None else tokens + embedding
