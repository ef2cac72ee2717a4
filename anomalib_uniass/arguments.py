# SPDX-License-Identifier: Apache-2.0
"""Checks of constructor arguments where no command line has made them: in Python, or in a benchmark's YAML."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

MOST_PIXELS = 4096
"""Longest side of the images that a model works at: attention compares all of its (side / 16)^2 tokens."""

LARGEST_SEED = 2**32 - 1


def check_whole(name: str, value: object, *, at_least: int) -> None:
    """Refuse anything but a whole number from `at_least` on.

    Raises:
        ValueError: If `value` is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        msg = f"{name} must be a whole number, at least {at_least}, got {_shown(value)}."
        raise ValueError(msg)


def check_seed(value: object) -> None:
    """Refuse anything but what torch, NumPy and Lightning all take for a seed.

    Raises:
        ValueError: If `value` is something else.
    """
    check_whole("seed", value, at_least=0)
    if int(value) > LARGEST_SEED:  # type: ignore[call-overload]
        msg = f"seed must be at most {LARGEST_SEED}, got {value}."
        raise ValueError(msg)


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Refuse anything but a finite number of a range.

    Args:
        name: Name of the argument, for the message.
        value: Its value.
        above: Lower bound that is not allowed itself.
        at_least: Lower bound that is.
        below: Upper bound that is not allowed itself.
        at_most: Upper bound that is.

    Raises:
        ValueError: If `value` is something else.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and above < number < below and at_least <= number <= at_most):
        bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        msg = f"{name} must be a number {allowed}, got {_shown(value)}."
        raise ValueError(msg)


def check_text(name: str, value: object) -> None:
    """Refuse anything but a string.

    Raises:
        ValueError: If `value` is something else.
    """
    if not isinstance(value, str):
        msg = f"{name} must be a string, got {_shown(value)}."
        raise ValueError(msg)


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False: a string such as "false" would count as true.

    Raises:
        ValueError: If `value` is something else.
    """
    if not isinstance(value, bool):
        msg = f"{name} must be true or false, got {_shown(value)}."
        raise ValueError(msg)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a misspelt choice.

    Raises:
        ValueError: If `value` is not among the `known`.
    """
    if value not in known:
        msg = f"{name} must be one of {', '.join(known)}, got {value!r}."
        raise ValueError(msg)


def parse_image_size(image_size: object) -> tuple[int, int]:
    """Return (height, width) as plain integers, from whatever sequence YAML made of them.

    Raises:
        ValueError: If it is no pair of whole numbers from 1 to 4096.
    """
    sides = () if isinstance(image_size, str | Mapping) or not hasattr(image_size, "__iter__") else tuple(image_size)
    if len(sides) != 2:
        msg = f"image_size must be (height, width) such as (224, 224), got {_shown(image_size)}."
        raise ValueError(msg)
    for name, side in zip(("height", "width"), sides, strict=True):
        check_whole(f"The {name} of image_size", side, at_least=1)
        if side > MOST_PIXELS:
            msg = (
                f"The {name} of image_size must not exceed {MOST_PIXELS} pixels, got {side}. It is the size the model "
                "works at; images of any size are resized to it."
            )
            raise ValueError(msg)
    return int(sides[0]), int(sides[1])


def _shown(value: object) -> str:
    """Show a value; YAML reads some numbers as strings, and a string does not look like one in a message."""
    if not isinstance(value, str):
        return repr(value)
    hint = " (write numbers without quotes; YAML takes 1e-3 for a string, 0.001 for a number)"
    return f"the string {value!r}{hint if _is_number(value) else ''}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
