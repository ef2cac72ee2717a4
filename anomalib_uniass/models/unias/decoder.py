# SPDX-License-Identifier: Apache-2.0
"""Spatial-channel decoder: one block per level, query tokens carried from block to block."""

from collections.abc import Sequence

from torch import Tensor, nn

from anomalib_uniass.layers.mgg_cnn import MultiGranularityGatedCNN
from anomalib_uniass.layers.neighbor_mask import neighbor_mask
from anomalib_uniass.layers.position_encoding import sine_position_encoding_2d
from anomalib_uniass.layers.transformer import AttentionLayer, FeedForwardLayer

HEADS = 4
"""Attention heads; they must divide D, and N where there is a channel branch."""


class SpatialChannelDecoder(nn.Module):
    """Decode the queries level by level: ``(B, N, D), [(B, N, D)] -> [(B, N, D)]``, coarse to fine.

    Args:
        hidden_dim: Width D.
        feedforward_dim: Width of all feed-forward layers.
        grid_size: Height and width of the token grid, N = h * w.
        levels: Number of levels.
        channel_branch: Run the channel branch beside the spatial one (the release's VisA configuration does not).
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
    ) -> None:
        super().__init__()
        height, width = grid_size
        self.grid_size = grid_size
        self.spatial = DecoderBranch(hidden_dim, feedforward_dim=feedforward_dim)
        self.channel = DecoderBranch(height * width, feedforward_dim=feedforward_dim) if channel_branch else None
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

    def __init__(self, dim: int, *, feedforward_dim: int) -> None:
        super().__init__()
        self.cross_attention = AttentionLayer(dim, heads=HEADS)
        self.self_attention = AttentionLayer(dim, heads=HEADS)
        self.feed_forward = FeedForwardLayer(dim, hidden_dim=feedforward_dim)

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
