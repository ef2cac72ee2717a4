# SPDX-License-Identifier: Apache-2.0
"""Learned position embedding and layer-wise query decoder."""

import torch
from torch import Tensor, nn

from anomalib_uniass.layers.transformer import AttentionLayer, FeedForwardLayer


class LearnedPositionEmbedding2d(nn.Module):
    """Learned embedding of an image grid, tokens in row-major order: ``() -> (N, D)``, N = h * w.

    The first half of the channels embeds the column, the second half the row.

    Args:
        grid_size: Height h and width w.
        dim: Width D, an even number.
    """

    def __init__(self, grid_size: tuple[int, int], dim: int) -> None:
        super().__init__()
        height, width = grid_size
        self.row_embedding = nn.Embedding(height, dim // 2)
        self.column_embedding = nn.Embedding(width, dim // 2)
        nn.init.uniform_(self.row_embedding.weight)
        nn.init.uniform_(self.column_embedding.weight)

    def forward(self) -> Tensor:
        """Return the embedding of every token."""
        rows, columns = self.row_embedding.weight, self.column_embedding.weight
        column = columns[None].expand(rows.shape[0], -1, -1)  # (h, w, D / 2)
        row = rows[:, None].expand(-1, columns.shape[0], -1)
        return torch.cat([column, row], dim=2).flatten(0, 1)


class QueryDecoderLayer(nn.Module):
    """Decoder layer with its own learned queries: ``(B, N, D) x 2 -> (B, N, D)``.

    The queries read the encoder's memory, then what the previous layer made of it. As no residual leads from the
    input to the output, the layer cannot just pass its input on.

    Args:
        dim: Width D of the tokens.
        tokens: Number N of tokens, and of queries.
        heads: Number of attention heads; must divide `dim`.
        feedforward_dim: Width of the feed-forward layer.
    """

    def __init__(self, dim: int, *, tokens: int, heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.query_embedding = nn.Embedding(tokens, dim)
        self.memory_attention = AttentionLayer(dim, heads=heads)
        self.previous_attention = AttentionLayer(dim, heads=heads)
        self.feed_forward = FeedForwardLayer(dim, hidden_dim=feedforward_dim)

    def forward(self, previous: Tensor, memory: Tensor, *, position: Tensor, mask: Tensor) -> Tensor:
        """Decode once more.

        Args:
            previous: Output of the previous layer ``(B, N, D)``; the memory for the first.
            memory: Output of the encoder ``(B, N, D)``.
            position: Position embedding ``(N, D)``, for queries and keys.
            mask: Neighbour mask ``(N, N)``, True = may NOT attend.
        """
        queries = self.query_embedding.weight.expand_as(memory)
        for attention, source in ((self.memory_attention, memory), (self.previous_attention, previous)):
            queries = attention(queries, query=queries + position, key=source + position, value=source, mask=mask)
        return self.feed_forward(queries)
