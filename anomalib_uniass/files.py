# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from anomalib_uniass.text import storable


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what lies there at the end replaces `path` in one step.

    An earlier file stays as it was if anything fails, and nothing else is left behind.

    Args:
        path: File to write, or a folder that is new or empty, in a folder that exists. The yielded path has its name
            and lies in a scratch folder beside it.

    Raises:
        OSError: If it cannot be written; the message names `path`.
    """
    try:
        # A folder, not a temporary file: that one would be readable by its owner alone, and so would be the result.
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            draft = Path(scratch) / path.name
            yield draft
            draft.replace(path)
    except OSError as error:
        msg = f"cannot write {path}, an earlier file stays as it was: {error.strerror or error}"
        raise OSError(*(msg,) if error.errno is None else (error.errno, msg)) from error


def replace_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 in one step, see :func:`replacing`; bytes that are not UTF-8 become readable codes.

    Raises:
        OSError: If it cannot be written; the message names `path`.
    """
    with replacing(path) as draft:
        draft.write_text(storable(text), encoding="utf-8")
