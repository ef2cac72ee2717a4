# SPDX-License-Identifier: Apache-2.0
"""Post-norm transformer layers, each a residual step of its own."""

from torch import Tensor, nn

DROPOUT = 0.1
"""Of attention weights, activations and outputs, in UniAS and UniAD alike."""


class AttentionLayer(nn.Module):
    """Multi-head attention with dropout, residual and post-norm: ``(B, N, D) -> (B, N, D)``.

    Args:
        dim: Width D of the tokens.
        heads: Number of attention heads; must divide `dim`.
    """

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout=DROPOUT, batch_first=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        tokens: Tensor,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend and add.

        Args:
            tokens: The residual stream ``(B, N, D)``; also query, key and value where these are not given.
            query: Tokens with their position ``(B, N, D)``.
            key: Keys with their position ``(B, M, D)``.
            value: Values ``(B, M, D)``.
            mask: Boolean ``(N, M)``, True = may NOT attend.
        """
        query = tokens if query is None else query
        key = tokens if key is None else key
        value = tokens if value is None else value
        return self.norm(tokens + self.dropout(self.attend(query, key, value, mask)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attended values ``(B, N, D)``."""
        attended, _ = self.attention(query, key, value, attn_mask=mask, need_weights=False)
        return attended


class FeedForwardLayer(nn.Module):
    """Two linear layers with ReLU, dropout, residual and post-norm: ``(B, N, D) -> (B, N, D)``.

    Args:
        dim: Width D of the tokens.
        hidden_dim: Width between the layers.
    """

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(DROPOUT)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform and add."""
        return self.norm(tokens + self.dropout(self.transform(tokens)))

    def transform(self, tokens: Tensor) -> Tensor:
        """Return what is added to the tokens, before its dropout."""
        hidden = self.activation(self.linear1(tokens))  # (B, N, hidden_dim)
        return self.linear2(self.dropout(hidden))


class EncoderLayer(nn.Module):
    """DETR's post-norm encoder layer: ``(B, N, D) -> (B, N, D)``; query and key carry the position, value does not."""

    def __init__(self, dim: int, *, heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.self_attention = AttentionLayer(dim, heads=heads)
        self.feed_forward = FeedForwardLayer(dim, hidden_dim=feedforward_dim)

    def forward(self, tokens: Tensor, *, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over the whole map or what the mask leaves of it, then transform every token.

        Args:
            tokens: Tokens ``(B, N, D)``.
            position: Position encoding ``(N, D)``.
            mask: Boolean ``(N, N)``, True = may NOT attend.
        """
        positioned = tokens + position
        tokens = self.self_attention(tokens, query=positioned, key=positioned, mask=mask)
        return self.feed_forward(tokens)
