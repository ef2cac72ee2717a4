# SPDX-License-Identifier: Apache-2.0
"""Thresholds that come from a file: complete and finite, or refused by the name of the file and of the entry."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

LEVELS: Final = ("image", "pixel")
ADVICE: Final = "Calibrate the model anew (Engine.validate), or export it again."


def check_thresholds(content: object, source: Path | str) -> dict[str, Any]:
    """Return thresholds per category as they are kept in checkpoints and beside exported models.

    Args:
        content: What was read: thresholds by category under ``image`` and under ``pixel``, and other entries.
        source: File, or what else they come from, for the message.

    Raises:
        ValueError: If a level or the threshold of a category is missing, or is no finite number of at least 0. A score
            is never above NaN or infinity: with such a threshold every image would be good.
    """
    if not isinstance(content, Mapping):
        msg = f"{source}: expected thresholds of categories by 'image' and 'pixel', got {_shown(content)}. {ADVICE}"
        raise ValueError(msg)
    for level in LEVELS:
        found = content.get(level)
        if not isinstance(found, Mapping) or not found:
            got = _shown(found) if level in content else "no such entry"
            msg = f"{source}: expected thresholds of all categories under {level!r}, got {got}. {ADVICE}"
            raise ValueError(msg)
        for category, threshold in found.items():
            is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
            if not is_number or not math.isfinite(threshold) or threshold < 0:
                msg = (
                    f"{source}: the {level} threshold of {category!r} must be a finite number of at least 0, got "
                    f"{_shown(threshold)}: with it nothing would be decided right. {ADVICE}"
                )
                raise ValueError(msg)
    if missing := sorted(set(content["image"]) ^ set(content["pixel"]), key=str):
        without = next(level for level in LEVELS if missing[0] not in content[level])
        msg = f"{source}: there is no {without} threshold of {missing[0]!r}. {ADVICE}"
        raise ValueError(msg)
    return dict(content)


def read_thresholds(file: Path) -> dict[str, Any]:
    """Read the thresholds beside an exported model.

    Args:
        file: ``category_thresholds.json``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no JSON, or its thresholds are not complete or not finite; names file and entry.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one too
        msg = f"{file}: no JSON in UTF-8 ({error}). {ADVICE}"
        raise ValueError(msg) from error
    return check_thresholds(content, file)


def _shown(value: object) -> str:
    """Return a value as it can stand in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
