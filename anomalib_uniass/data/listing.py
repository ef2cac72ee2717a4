# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are images: one rule for training, test, calibration and prediction, on every machine.

An image is a visible file with one of the endings that Pillow itself registers, in any case. The machine's table of
MIME types plays no part. Visible files that are no images are left out, and named by ending and count.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from anomalib_uniass.data.images import image_suffixes
from anomalib_uniass.text import some

# What systems, archives and network drives put beside images: thumbnails and the like, often under names of images.
_OF_SYSTEMS: Final = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)
_MOST_ENDINGS: Final = 20


class Listing(NamedTuple):
    """What lies in a folder and the folders below it.

    Attributes:
        images: Image files, sorted by path; among them may be links that lead nowhere.
        left_out: Visible files that are no images by their ending, and what is no file at all (pipes, sockets).
        closed: Folders that may not be read.
    """

    images: list[Path]
    left_out: list[Path]
    closed: list[Path]


def is_hidden(path: Path) -> bool:
    """Whether a file or folder belongs to a program and not to the dataset (``.DS_Store``, ``._000.png``)."""
    return path.name.startswith(".") or path.name.casefold() in _OF_SYSTEMS


def visible(folder: Path) -> list[Path]:
    """List the visible files and folders that lie directly in a folder, sorted.

    Raises:
        OSError: If the folder does not exist or may not be read.
    """
    return sorted(path for path in folder.iterdir() if not is_hidden(path))


def subfolders(folder: Path) -> list[Path]:
    """List the visible folders that lie directly in a folder, sorted, without links to itself or to one above.

    Raises:
        OSError: If the folder does not exist or may not be read.
    """
    home = Path(os.path.realpath(folder))
    above = {home, *home.parents}
    return [path for path in visible(folder) if path.is_dir() and Path(os.path.realpath(path)) not in above]


def list_images(folder: Path, *, deep: bool = True) -> Listing:
    """Sort the visible files of a folder into images and others.

    Links to folders are followed; each real folder is visited once, so that a link to the folder that holds it, or to
    one above, leads nowhere. An image that lies in a folder and behind a link to it comes under the folder's own name.

    Args:
        folder: Folder to search.
        deep: Whether to search the folders below, too.

    Raises:
        OSError: If ``folder`` itself does not exist or may not be read.
    """
    suffixes = image_suffixes()
    found = Listing([], [], [])
    for path, ordinary in _files(folder, deep=deep, closed=found.closed):
        is_image = path.suffix.lower() in suffixes and (ordinary or not path.exists())
        (found.images if is_image else found.left_out).append(path)
    return Listing(*map(sorted, found))


def holds_files(folder: Path) -> bool:
    """Whether there is a visible file in a folder or below; False if it does not exist or may not be read."""
    try:
        return folder.is_dir() and any(ordinary for _, ordinary in _files(folder, deep=True, closed=[]))
    except PermissionError:
        return False


def _files(folder: Path, *, deep: bool, closed: list[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield what is no folder, and whether it is a file that is there; note which folders may not be read."""
    home = Path(os.path.realpath(folder))
    seen = set(home.parents)
    folders = [folder]
    links: list[Path] = []  # they come last: an image keeps the name of its real folder
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        real = Path(os.path.realpath(current))
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(current) as entries:
                inside = sorted((entry for entry in entries if not is_hidden(Path(entry.name))), key=lambda e: e.name)
        except PermissionError:
            if current == folder:
                raise
            closed.append(current)
            continue
        for entry in inside:
            path = current / entry.name
            if not _is(entry.is_dir):
                yield path, _is(entry.is_file)
            elif deep:
                (links if entry.is_symlink() else folders).append(path)


def _is(kind: Callable[[], bool]) -> bool:
    """Ask what an entry is; unlike those of a path, its methods raise on a link to itself."""
    try:
        return kind()
    except OSError:
        return False


def by_ending(files: Iterable[Path], *, below: Path | None = None) -> str:
    """Tell files by ending and count, the most frequent first, each ending with one of its files.

    Args:
        files: Files to tell.
        below: Folder to which the paths of the examples are relative; None tells them in full.

    Returns:
        Text such as ``12 .dcm (bolt/train/good/1.dcm, ...), 1 without ending (bolt/test/good/README)``.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        ordinary = file.is_file() or not file.exists()
        groups[(file.suffix.lower() or "without ending") if ordinary else "no files but pipes or the like"].append(file)
    told = []
    for ending, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        first = group[0].relative_to(below) if below is not None and group[0].is_relative_to(below) else group[0]
        told.append(f"{len(group)} {ending} ({first.as_posix()}{', ...' if len(group) > 1 else ''})")
    return some(told, most=_MOST_ENDINGS)
