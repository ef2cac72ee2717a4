# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the official UniAS release, turned into ours.

``python -m anomalib_uniass.models.unias.official OFFICIAL.pth OURS.ckpt`` writes an anomalib checkpoint.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from anomalib_uniass.layers.backbone_weights import read_state_dict
from anomalib_uniass.models.conversion import OFFICIAL_BACKBONE, Rules, convert_state_dict, require, strip_module
from anomalib_uniass.models.unias.lightning_model import UniAS

HEAD_PREFIX = "sem_seg_head."

# Patterns of the release's names (behind its prefix) and ours, applied in turn.
_ENCODER = r"^pixel_decoder\.transformer\.encoder\.layers\.(\d)\."
_BLOCK = r"^predictor\.transformer_block\.(\d)\."
_RULES: Rules = (
    (r"^pixel_decoder\.adapter_(\d)\.norm\.", lambda m: f"pixel_decoder.levels.{3 - int(m[1])}.lateral_norm."),
    (r"^pixel_decoder\.adapter_(\d)\.", lambda m: f"pixel_decoder.levels.{3 - int(m[1])}.lateral_conv."),
    (r"^pixel_decoder\.layer_4\.", "pixel_decoder.deepest_conv."),
    (r"^pixel_decoder\.layer_(\d)\.norm\.", lambda m: f"pixel_decoder.levels.{3 - int(m[1])}.output_norm."),
    (r"^pixel_decoder\.layer_(\d)\.", lambda m: f"pixel_decoder.levels.{3 - int(m[1])}.output_conv."),
    (_ENCODER + r"self_attn\.", r"pixel_decoder.encoder.\1.self_attention.attention."),
    (_ENCODER + r"norm1\.", r"pixel_decoder.encoder.\1.self_attention.norm."),
    (_ENCODER + r"norm2\.", r"pixel_decoder.encoder.\1.feed_forward.norm."),
    (_ENCODER + r"linear", r"pixel_decoder.encoder.\1.feed_forward.linear"),
    (r"^predictor\.patch_embed\.(\d)\.proj\.", r"source_embedding.patch_embeds.\1."),
    (r"^predictor\.input_proj\.", "source_embedding.projections."),
    (r"^predictor\.level_embed_src\.", "source_embedding.level_embedding."),
    (r"^predictor\.spatial_query_feat\.", "query_generator.bank."),
    (r"^predictor\.spatial_query_embed\.", "decoder.query_embedding."),
    (r"^predictor\.feature_projector\.", "query_generator.feature_proj."),
    (
        r"^predictor\.query_processor\.channel_weight\.agg\.layers\.(\d)\.",
        lambda m: f"query_generator.channel_gate.mlp.{2 * int(m[1])}.",  # activations count as layers in ours
    ),
    (r"^predictor\.query_processor\.spatial_weight\.", "query_generator.spatial_gate."),
    (r"^predictor\.query_processor\.adaptor\.", "query_generator.mgg_cnn."),
    (r"^predictor\.layer_adaptors\.(\d)\.", r"decoder.blocks.\1.mgg_cnn."),
    (r"\.mgg_cnn\.conv0\.", ".mgg_cnn.chains.0."),
    (r"\.mgg_cnn\.conv1\.", ".mgg_cnn.chains.1.0."),
    (r"\.mgg_cnn\.conv(\d)\.", r".mgg_cnn.chains.\1."),
    (_BLOCK + r"(Spatial|Channel)", lambda m: f"decoder.blocks.{m[1]}.{m[2].lower()}."),
    (r"\.SelfAttnLayer\.self_attn\.", ".self_attention.attention."),
    (r"\.CrossAttnLayer\.multihead_attn\.", ".cross_attention.attention."),
    (r"\.SelfAttnLayer\.", ".self_attention."),
    (r"\.CrossAttnLayer\.", ".cross_attention."),
    (r"\.FFNLayer\.", ".feed_forward."),
    (r"^predictor\.decoder_norm\.", "norm."),
    (r"^predictor\.out_agg\.(\d)\.(\d)\.", lambda m: f"heads.{m[1]}.convs.{int(m[2]) - 1}."),
)


def convert_official_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict of the official UniAS code into one of :class:`UniASModel`.

    Both configurations of the release are known (with and without channel branch), at any width.

    Args:
        state_dict: The release's entries ``backbone.*`` and ``sem_seg_head.*``, with or without ``module.`` before.

    Returns:
        State dict of a :class:`~anomalib_uniass.models.unias.torch_model.UniASModel` built with
        :func:`official_arguments`.

    Raises:
        ValueError: If entries are unknown, missing or of another shape; the message lists them.
    """
    official = strip_module(state_dict)
    expected = UniAS(**official_arguments(official)).model.state_dict()
    return convert_state_dict(official, expected=expected, prefix=HEAD_PREFIX, rules=_RULES, release="UniAS")


def official_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the constructor arguments of :class:`UniAS` off an official state dict (without ``module.`` prefix).

    Raises:
        ValueError: If the entries that tell them are missing.
    """
    projection = f"{HEAD_PREFIX}pixel_decoder.input_proj.weight"
    linear = f"{HEAD_PREFIX}pixel_decoder.transformer.encoder.layers.0.linear1.weight"
    require(state_dict, [projection, linear], release="UniAS")
    return {
        "backbone": OFFICIAL_BACKBONE,
        "pre_trained": False,
        "hidden_dim": state_dict[projection].shape[0],
        "feedforward_dim": state_dict[linear].shape[0],
        "channel_branch": any(".Channel" in key for key in state_dict),
    }


def load_official_checkpoint(path: str | Path) -> UniAS:
    """Build UniAS from a checkpoint file of the official release.

    Args:
        path: File written by the release: a state dict, alone or under ``state_dict``.

    Raises:
        ValueError: If it is none of this release.
    """
    state_dict = read_state_dict(path)
    model = UniAS(**official_arguments(state_dict))
    model.model.load_state_dict(convert_official_state_dict(state_dict))
    return model


def main() -> None:
    """Turn an official checkpoint file into an anomalib checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path, help="checkpoint of the official UniAS release")
    parser.add_argument("target", type=Path, help="anomalib checkpoint to write, for `anomalib test --ckpt_path`")
    arguments = parser.parse_args()
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(load_official_checkpoint(arguments.source))
    trainer.save_checkpoint(arguments.target)


if __name__ == "__main__":
    main()
