# SPDX-License-Identifier: Apache-2.0
"""Weights of the official UniAD release, turned into ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anomalib_uniass.layers.token_grid import STRIDE
from anomalib_uniass.models.conversion import OFFICIAL_BACKBONE, Rules, convert_state_dict, require, strip_module
from anomalib_uniass.models.uniad.lightning_model import UniAD

NETWORK_PREFIX = "reconstruction."

# Patterns of the release's names (behind its prefix) and ours, applied in turn.
_ENCODER = r"^transformer\.encoder\.layers\.(\d)\."
_DECODER = r"^transformer\.decoder\.layers\.(\d)\."
_RULES: Rules = (
    (r"^pos_embed\.row_embed\.", "position.row_embedding."),
    (r"^pos_embed\.col_embed\.", "position.column_embedding."),
    (_ENCODER + r"self_attn\.", r"encoder.\1.self_attention.attention."),
    (_ENCODER + r"norm1\.", r"encoder.\1.self_attention.norm."),
    (_ENCODER + r"norm2\.", r"encoder.\1.feed_forward.norm."),
    (_ENCODER + r"linear", r"encoder.\1.feed_forward.linear"),
    (_DECODER + r"learned_embed\.", r"decoder.\1.query_embedding."),
    (_DECODER + r"self_attn\.", r"decoder.\1.memory_attention.attention."),
    (_DECODER + r"norm1\.", r"decoder.\1.memory_attention.norm."),
    (_DECODER + r"multihead_attn\.", r"decoder.\1.previous_attention.attention."),
    (_DECODER + r"norm2\.", r"decoder.\1.previous_attention.norm."),
    (_DECODER + r"norm3\.", r"decoder.\1.feed_forward.norm."),
    (_DECODER + r"linear", r"decoder.\1.feed_forward.linear"),
    (r"^transformer\.decoder\.norm\.", "norm."),
)


def convert_official_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict of the official UniAD code into one of :class:`UniADModel`, at any width and token grid.

    Verified against the release's own numbers: names and meaning of the entries of the reconstruction network. The
    prefixes are those of the release's configuration, and its backbone is the one that UniAS took over; a published
    checkpoint file was not at hand.

    Args:
        state_dict: The release's entries ``backbone.*`` and ``reconstruction.*``, with or without ``module.`` before.

    Returns:
        State dict of a :class:`~anomalib_uniass.models.uniad.torch_model.UniADModel` built with
        :func:`official_arguments`.

    Raises:
        ValueError: If entries are unknown, missing or of another shape; the message lists them.
    """
    official = strip_module(state_dict)
    expected = UniAD(**official_arguments(official)).model.state_dict()
    return convert_state_dict(official, expected=expected, prefix=NETWORK_PREFIX, rules=_RULES, release="UniAD")


def official_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the constructor arguments of :class:`UniAD` off an official state dict (without ``module.`` prefix).

    Raises:
        ValueError: If the entries that tell them are missing.
    """
    projection = f"{NETWORK_PREFIX}input_proj.weight"
    linear = f"{NETWORK_PREFIX}transformer.encoder.layers.0.linear1.weight"
    axes = [f"{NETWORK_PREFIX}pos_embed.{axis}_embed.weight" for axis in ("row", "col")]
    require(state_dict, [projection, linear, *axes], release="UniAD")
    return {
        "backbone": OFFICIAL_BACKBONE,
        "pre_trained": False,
        "image_size": tuple(STRIDE * state_dict[axis].shape[0] for axis in axes),
        "hidden_dim": state_dict[projection].shape[0],
        "feedforward_dim": state_dict[linear].shape[0],
    }
