# SPDX-License-Identifier: Apache-2.0
"""Transformer layers for CPUs: linear layers by the kernels of convolutions, dropout that waits for no numbers."""

from itertools import groupby

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.dropout import Dropout
from anomalib_uniass.acceleration.linear import linear
from anomalib_uniass.layers.transformer import AttentionLayer, FeedForwardLayer


class CPUAttentionLayer(nn.Module):
    """An attention layer step by step: ``(B, N, D) -> (B, N, D)``.

    Args:
        plain: The layer.
    """

    def __init__(self, plain: AttentionLayer) -> None:
        super().__init__()
        self.attention, self.dropout, self.norm = plain.attention, Dropout(plain.dropout.p), plain.norm

    def forward(
        self,
        tokens: Tensor,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend and add; arguments as for :meth:`AttentionLayer.forward`."""
        inputs = [tokens if x is None else x for x in (query, key, value)]
        q, k, v = (
            x.unflatten(2, (self.attention.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for x in self._project(inputs)
        )
        if self.training:  # PyTorch has no fused kernel with dropout on a CPU
            scores = q * q.shape[-1] ** -0.5 @ k.mT
            scores = scores if mask is None else scores.masked_fill(mask, float("-inf"))
            attended = self.dropout(scores.softmax(dim=-1)) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else ~mask)
        output = self.attention.out_proj
        return self.norm(tokens + self.dropout(linear(attended.transpose(1, 2).flatten(2), output.weight, output.bias)))

    def _project(self, inputs: list[Tensor]) -> list[Tensor]:
        """Project query, key and value, neighbours that are the same tensor at once."""
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        first, projected = 0, list[Tensor]()
        for _, group in groupby(inputs, key=id):
            same = list(group)
            rows = slice(first, first := first + len(same) * self.attention.embed_dim)
            projected += linear(same[0], weight[rows], bias[rows]).chunk(len(same), dim=2)
        return projected


class CPUFeedForwardLayer(nn.Module):
    """A feed-forward layer: ``(B, N, D) -> (B, N, D)``.

    Args:
        plain: The layer.
    """

    def __init__(self, plain: FeedForwardLayer) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm = plain.linear1, plain.linear2, plain.norm
        self.dropout = Dropout(plain.dropout.p)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform and add."""
        hidden = linear(tokens, self.linear1.weight, self.linear1.bias).relu()
        return self.norm(tokens + self.dropout(linear(self.dropout(hidden), self.linear2.weight, self.linear2.bias)))
