# SPDX-License-Identifier: Apache-2.0
"""The folded source embedding against the plain form, which is the release's (test_unias_parity.py)."""

import pytest
import torch
from torch import Tensor

from anomalib_uniass.models.unias.decoder import SourceEmbedding

LEVELS = 4


def make_embedding(width: int = 32) -> tuple[SourceEmbedding, list[Tensor]]:
    torch.manual_seed(0)
    memory = [torch.randn(2, width, 3 * 2**level, 4 * 2**level) for level in range(LEVELS)]
    return SourceEmbedding(width, levels=LEVELS), memory


def test_folded_equals_plain_in_values_and_gradients() -> None:
    embedding, memory = make_embedding()
    memory = [y.requires_grad_() for y in memory]
    plain, folded = embedding.plain(memory), embedding.folded(memory, embedding.fold())
    variables = [*embedding.parameters(), *memory]
    for a, b in zip(plain, folded, strict=True):
        assert a.shape == (2, 12, 32)
        assert (a - b).abs().max() / a.abs().max() < 1e-5
    weights = [torch.randn_like(a) for a in plain]
    for a, b in zip(
        torch.autograd.grad(plain, variables, weights), torch.autograd.grad(folded, variables, weights), strict=True
    ):
        assert (a - b).norm() / a.norm() < 1e-4


def test_inference_uses_constants_that_follow_the_parameters() -> None:
    embedding, memory = make_embedding()
    assert not any(name.startswith("folded") for name in embedding.state_dict())
    embedding.eval()
    assert embedding.folded_weight_3.shape == (32, 32, 8, 8)
    with torch.no_grad():
        embedding.projections[3].weight.mul_(2)  # in place, without any call that announces it
        torch.testing.assert_close(embedding(memory), embedding.plain(memory), rtol=1e-4, atol=1e-5)
        weights = {name: value * 2 for name, value in embedding.state_dict().items()}
        embedding.load_state_dict(weights, assign=True)
        torch.testing.assert_close(embedding(memory), embedding.plain(memory), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("positions", "name"), [(196, "plain"), (8 * 196, "folded")])
def test_training_folds_for_batches_that_pay(positions: int, name: str) -> None:
    """At full width the weights of a step cost as much to fold as some 2.7 images of 14 x 14 tokens save."""
    embedding = SourceEmbedding(256, levels=LEVELS)
    form = embedding.form(positions)
    assert getattr(form, "func", form) == getattr(embedding, name)
