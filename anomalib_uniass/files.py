# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from anomalib_uniass.text import storable

LOCK = ".writer"
"""File in a scratch folder that its writer holds locked: the system lets go of it however the writer ends."""

SECONDS_UNTIL_STALE = 3600
"""Age of a scratch folder without a lock, as version 0.2 made them, from which on its writer is taken for dead."""

_SCRATCH = re.compile(r"\.(?P<name>.+)-[a-z0-9_]{8}")  # as `tempfile` makes names


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what lies there at the end replaces `path` in one step.

    An earlier file stays as it was if anything fails, and nothing else is left behind. What a killed writer of `path`
    left is removed.

    Args:
        path: File to write, or a folder that is new or empty, in a folder that exists. The yielded path has its name
            and lies in a scratch folder beside it.

    Raises:
        OSError: If it cannot be written; the message names `path`.
    """
    try:
        remove_stale_drafts(path.parent, path.name)
        # A folder, not a temporary file: that one would be readable by its owner alone, and so would be the result.
        with (
            TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", ignore_cleanup_errors=True) as scratch,
            ExitStack() as held,
        ):
            with suppress(OSError, NotImplementedError):  # there are file systems without locks
                held.enter_context(FileLock(Path(scratch, LOCK)))
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


def remove_stale_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers of :func:`replacing` left in a folder; drafts of living ones stay.

    Args:
        folder: The folder; its subfolders are not searched.
        name: Name of the file whose drafts are looked for; None takes those of all files.
    """
    try:
        entries = list(folder.iterdir())
    except OSError:  # it is for the writer to complain
        return
    for scratch in entries:
        found = _SCRATCH.fullmatch(scratch.name)
        if found and name in (None, found["name"]) and _is_draft_of_dead_writer(scratch, found["name"]):
            shutil.rmtree(scratch, ignore_errors=True)


def _is_draft_of_dead_writer(scratch: Path, name: str) -> bool:
    """Tell whether a path is a scratch folder whose writer is gone; what holds anything else is the user's."""
    try:
        if scratch.is_symlink() or {entry.name for entry in scratch.iterdir()} - {name, LOCK}:
            return False
        lock = scratch / LOCK
        if not lock.exists() or time.time() - lock.stat().st_mtime < 0.1:  # a living writer may be about to lock it
            return time.time() - scratch.stat().st_mtime > SECONDS_UNTIL_STALE
        with FileLock(lock, blocking=False):
            return True
    except (OSError, Timeout, NotImplementedError):
        return False
