# SPDX-License-Identifier: Apache-2.0
"""Post-norm transformer layers, each a residual step of its own."""

from itertools import groupby

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.components.dropout import Dropout
from anomalib_uniass.components.execution import runs_on_cpu
from anomalib_uniass.components.linear import linear
from anomalib_uniass.components.recomputation import recompute


class AttentionLayer(nn.Module):
    """Multi-head attention with dropout, residual and post-norm: ``(B, N, D) -> (B, N, D)``.

    Args:
        dim: Width D of the tokens.
        heads: Number of attention heads; must divide `dim`.
        dropout: Dropout of the attention weights and of the output.
    """

    def __init__(self, dim: int, *, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.dropout = Dropout(dropout)
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
        attended = recompute(self._attend, query, key, value, mask)
        return self.norm(tokens + self.dropout(attended))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Compute PyTorch's attention; on a CPU step by step, with faster linear layers and dropout."""
        attention = self.attention
        if not runs_on_cpu(query):
            return attention(query, key, value, attn_mask=mask, need_weights=False)[0]
        q, k, v = (
            x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for x in self._project(query, key, value)
        )
        if self.training:  # PyTorch has no fused kernel with dropout on a CPU
            scores = q * q.shape[-1] ** -0.5 @ k.mT
            scores = scores if mask is None else scores.masked_fill(mask, float("-inf"))
            attended = self.dropout(scores.softmax(dim=-1)) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else ~mask)
        return linear(attended.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Project query, key and value, neighbours that are the same tensor at once."""
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        first, projected = 0, list[Tensor]()
        for _, group in groupby((query, key, value), key=id):
            inputs = list(group)
            rows = slice(first, first := first + len(inputs) * self.attention.embed_dim)
            projected += linear(inputs[0], weight[rows], bias[rows]).chunk(len(inputs), dim=2)
        return projected


class FeedForwardLayer(nn.Module):
    """Two linear layers with ReLU, dropout, residual and post-norm: ``(B, N, D) -> (B, N, D)``.

    Args:
        dim: Width D of the tokens.
        hidden_dim: Width between the layers.
        dropout: Dropout behind the activation and of the output.
    """

    def __init__(self, dim: int, *, hidden_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.activation = nn.ReLU()
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform and add."""
        transformed = recompute(self._transform, tokens)
        return self.norm(tokens + self.dropout(transformed))

    def _transform(self, tokens: Tensor) -> Tensor:
        hidden = self.activation(linear(tokens, self.linear1.weight, self.linear1.bias))
        return linear(self.dropout(hidden), self.linear2.weight, self.linear2.bias)


class EncoderLayer(nn.Module):
    """DETR's post-norm encoder layer: ``(B, N, D) -> (B, N, D)``; query and key carry the position, value does not."""

    def __init__(self, dim: int, *, heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = AttentionLayer(dim, heads=heads, dropout=dropout)
        self.feed_forward = FeedForwardLayer(dim, hidden_dim=feedforward_dim, dropout=dropout)

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
