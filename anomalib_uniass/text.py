# SPDX-License-Identifier: Apache-2.0
r"""Names of files and categories as text: valid wherever they are written, on one line, no formulas.

Python keeps the bytes of a file name that are not UTF-8 as lone surrogates, which no UTF-8 file can hold and no
terminal can show. Here they become ``\udcXX`` with XX the byte in hexadecimal, so that the name can be found again.
"""

from collections.abc import Iterable

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001  # full width counts too
"""What a cell begins with that spreadsheets take for a formula."""

MOST_NAMED = 5
"""Things that a message names."""


def storable(text: str) -> str:
    r"""Return a text as UTF-8 can hold it: what it cannot becomes ``\udcXX``, everything else stays."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str, encoding: str = "utf-8") -> str:
    r"""Return a text for terminals and logs: line ends, control characters and the like become ``\n``, ``\x1b`` ….

    Args:
        text: Text, such as the name of a file.
        encoding: What the terminal or the file can show.
    """
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def cell(text: str) -> str:
    """Return a text for a cell of a CSV file: storable, and with an apostrophe before what looks like a formula.

    Spreadsheets compute cells that begin with one of `FORMULA_SIGNS`, whatever quotes stand around them. Numbers are no
    text: write them as they are.
    """
    return storable(f"'{text}" if text.startswith(FORMULA_SIGNS) else text)


def some(things: Iterable[object], *, most: int = MOST_NAMED) -> str:
    """Name the first of many things, and count the others."""
    texts = [one_line(str(thing)) for thing in things]  # a name may be no UTF-8
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def some_lines(lines: Iterable[str], *, most: int = MOST_NAMED) -> str:
    """Name the first of many things on a line each, and count the others."""
    lines = [one_line(line) for line in lines]
    more = f"\n  and {len(lines) - most} more" if len(lines) > most else ""
    return "\n".join(f"  - {line}" for line in lines[:most]) + more
