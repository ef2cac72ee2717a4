# SPDX-License-Identifier: Apache-2.0
"""State dicts of official releases, renamed to ours."""

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from anomalib_uniass.layers.backbone_weights import match_by_order

OFFICIAL_BACKBONE = "tf_efficientnet_b4.aa_in1k"
BACKBONE_PREFIX = "backbone."

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions of the release's names and their replacements, applied in turn."""


def convert_state_dict(
    official: Mapping[str, Tensor], *, expected: Mapping[str, Tensor], prefix: str, rules: Rules, release: str
) -> dict[str, Tensor]:
    """Rename the entries of an official state dict; the backbone's are matched by order and shape.

    Args:
        official: Official entries, without ``module.`` before.
        expected: State dict of our model in the same configuration.
        prefix: Prefix of all official entries that are not the backbone's.
        rules: Renaming of what comes behind the prefix.
        release: Name of the release, for messages.

    Returns:
        State dict with the keys and shapes of `expected`.

    Raises:
        ValueError: If entries are unknown, missing or of another shape; the message lists them.
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    backbone = {k.removeprefix(BACKBONE_PREFIX): v for k, v in official.items() if k.startswith(BACKBONE_PREFIX)}
    source = f"the official {release} backbone"
    for key, value in match_by_order(backbone, backbone=OFFICIAL_BACKBONE, source=source).items():
        if (ours := f"backbone.network.{key}") in expected:  # what lies behind the last tap is not used
            converted[ours] = value
    for key, value in official.items():
        if key.startswith(BACKBONE_PREFIX):
            continue
        ours = _rename(key.removeprefix(prefix), rules) if key.startswith(prefix) else key
        if ours in expected:
            converted[ours] = value
        else:
            unknown.append(key)
    missing = sorted(expected.keys() - converted.keys())
    misshapen = [
        f"{key}: {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in converted.items()
        if value.shape != expected[key].shape
    ]
    if unknown or missing or misshapen:
        msg = f"Not a {release} state dict. Unknown: {unknown}. Missing (our names): {missing}. Misshapen: {misshapen}."
        raise ValueError(msg)
    return converted


def strip_module(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the ``module.`` that distributed training puts before every key."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def require(state_dict: Mapping[str, Tensor], keys: Sequence[str], *, release: str) -> None:
    """Refuse a state dict that lacks the entries which tell its configuration.

    Raises:
        ValueError: If it does; the message lists them.
    """
    absent = [key for key in keys if key not in state_dict]
    if absent:
        msg = f"Not an official {release} state dict. Missing: {absent}; its first keys are {list(state_dict)[:3]}."
        raise ValueError(msg)


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
