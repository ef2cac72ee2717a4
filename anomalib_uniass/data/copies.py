# SPDX-License-Identifier: Apache-2.0
"""Files that are equal byte for byte: copies of one image, which must not train on one side and judge on the other."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from anomalib_uniass.text import some

_SAMPLE: Final = 4096
_BLOCK: Final = 1 << 20


def equal_files(paths: Sequence[Path | str]) -> list[list[int]]:
    """Find files of equal content.

    Files of one size are compared by a few kilobytes, and those that agree by a hash of all their bytes; others are not
    read. The same pixels in another format or with other metadata are no equal file: to find those every image would
    have to be decoded and kept.

    Args:
        paths: Files; those that cannot be read are equal to none.

    Returns:
        Groups of positions in ``paths``, at least two in each, in the order of ``paths``.
    """
    groups = [list(range(len(paths)))]
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        for told in (_size, _sample, _hash):
            groups = [finer for group in _told(groups, paths, told, pool) for finer in group]
    return sorted(groups)


def tell_copies(
    groups: Sequence[Sequence[int]], *, names: Sequence[str], labels: Sequence[int], training: int
) -> list[str]:
    """Say what is wrong with equal images.

    Args:
        groups: From :func:`equal_files`.
        names: Name of each image.
        labels: Label of each image.
        training: Number of training images, which are the first.

    Returns:
        Up to three sentences: on copies in training, on copies of training images elsewhere, and on copies with another
        label.
    """
    repeated = [alike for group in groups if len(alike := [i for i in group if i < training]) > 1]
    leaked = [group for group in groups if group[0] < training <= group[-1]]
    unclear = [group for group in groups if len({labels[i] for i in group}) > 1]
    found = (
        (
            sum(len(group) - 1 for group in repeated),
            "training images are copies of others. They weigh more, and stay on one side of the validation split",
            repeated,
        ),
        (
            sum(i >= training for group in leaked for i in group),
            "images of the test or validation set are copies of training images, so that their scores are too low",
            leaked,
        ),
        (sum(map(len, unclear)), "images are equal and have different labels", unclear),
    )
    return [
        f"{count} {what}. Equal files: {some(' = '.join(names[i] for i in group) for group in alike)}. "
        "Remove the copies, unless they are meant."
        for count, what, alike in found
        if alike
    ]


def _told(
    groups: Iterable[Sequence[int]],
    paths: Sequence[Path | str],
    told: Callable[[Path | str], Hashable],
    pool: ThreadPoolExecutor,
) -> Iterable[list[list[int]]]:
    """Part each group into those that a function tells apart, and leave out what is alone then."""
    groups = list(groups)
    found = iter(pool.map(told, [paths[position] for group in groups for position in group]))
    for group in groups:
        finer: dict[Hashable, list[int]] = defaultdict(list)
        for position in group:
            if (value := next(found)) is not None:
                finer[value].append(position)
        yield [same for same in finer.values() if len(same) > 1]


def _size(path: Path | str) -> int | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _sample(path: Path | str) -> bytes | None:
    """Return a hash of bytes from the middle and the end, where pictures of one camera differ if they do."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            middle = file.read(_SAMPLE)
            file.seek(max(size - _SAMPLE, 0))
            return hashlib.sha256(middle + file.read(_SAMPLE)).digest()
    except OSError:
        return None


def _hash(path: Path | str) -> bytes | None:
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()
