# SPDX-License-Identifier: Apache-2.0
"""Attention whose dropout does not make training on a CPU wait."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_uniass.acceleration.constants import runs_on_cpu
from anomalib_uniass.acceleration.dropout import Dropout


class CPUMultiheadAttention(nn.MultiheadAttention):
    """PyTorch's attention, step by step in training on a CPU, where PyTorch has no fused kernel with dropout.

    Args:
        plain: The attention, batch first.
    """

    def __init__(self, plain: nn.MultiheadAttention) -> None:
        super().__init__(plain.embed_dim, plain.num_heads, batch_first=True, device="meta")
        self.in_proj_weight, self.in_proj_bias, self.out_proj = plain.in_proj_weight, plain.in_proj_bias, plain.out_proj
        self.dropout = plain.dropout
        self.weight_dropout = Dropout(plain.dropout)

    def forward(  # type: ignore[override]  # what the layers use of PyTorch's
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, need_weights: Literal[False]
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: ``(B, N, D), (B, M, D), (B, M, D) -> (B, N, D)``, and no weights."""
        if not (self.training and runs_on_cpu(query)):
            return super().forward(query, key, value, attn_mask=attn_mask, need_weights=need_weights)
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, float("-inf"))
        attended = self.weight_dropout(scores.softmax(dim=-1)) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None
