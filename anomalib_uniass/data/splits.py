# SPDX-License-Identifier: Apache-2.0
"""Which training images are held out to validate: told by the name of each file, so that others change nothing.

Each image has a place in line: a hash of the seed and of its name below the root, without the ending. Of each category
those with the smallest hashes are held out. An image more or less thus moves one other at most, that at the border, and
the split is the same on every machine. Equal files (:mod:`anomalib_uniass.data.copies`), and files of one folder that
differ in their endings alone, which are mostly one photograph in several formats, count as one image and stay together.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

_PLACE_BYTES: Final = 8


def file_names(paths: Sequence[Path | str], root: Path, *, endings: bool = False) -> list[str]:
    """Return the names of files below a root, equal on every system.

    Args:
        paths: Files; of one that lies elsewhere the last two parts are its name.
        root: Folder that the names start from.
        endings: Whether the names keep their endings (``.png``).

    Returns:
        Names with forward slashes, in Unicode's composed form (NFC).
    """
    homes = [str(Path(os.path.abspath(root))), os.path.realpath(root)]  # noqa: PTH100  # links stay
    names = []
    for path in map(str, paths):
        absolute = Path(os.path.abspath(path))  # noqa: PTH100
        home = next((home for home in homes if absolute.is_relative_to(home)), None)
        name = Path(absolute.parent.name, absolute.name) if home is None else absolute.relative_to(home)
        names.append(unicodedata.normalize("NFC", (name if endings else name.with_suffix("")).as_posix()))
    return names


def places(names: Sequence[str], seed: int | str) -> npt.NDArray[np.uint64]:
    """Return the place in line of each name: a whole number below 2**64, spread evenly."""
    hashes = [
        # A name that is not UTF-8 has surrogates in Python.
        hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()[:_PLACE_BYTES]
        for name in names
    ]
    return np.array([int.from_bytes(digest, "big") for digest in hashes], dtype=np.uint64)


def held_out(
    categories: Sequence[str], names: Sequence[str], copies: Sequence[Sequence[int]] = (), *, ratio: float, seed: int
) -> list[int]:
    """Choose the images of each category that validate.

    Args:
        categories: Category of each image.
        names: Name of each image below the root, from :func:`file_names`.
        copies: Groups of images that are equal, of one category or several: they stay together, and the ratio counts
            them once.
        ratio: Fraction to hold out, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Sorted positions: of each category at least one image, and never all.

    Raises:
        ValueError: If a category has a single image, or none but copies of one; or if equal images of several
            categories leave one of them without images to train with.
    """
    owner = _together(names, copies)
    line: dict[int, int] = {}
    for i, place in enumerate(places(names, seed).tolist()):
        # The last place of its names: a copy that is added takes no image out of training.
        line[owner[i]] = max(place, line.get(owner[i], 0))
    chosen: set[int] = set()
    rows = pd.Series(list(categories), dtype=object)
    members = {category: list(indices) for category, indices in rows.groupby(rows, sort=False).indices.items()}
    for category, indices in members.items():
        different = sorted({owner[i] for i in indices}, key=lambda i: (line[i], names[i]))
        if len(different) < 2:
            what = "a single training image" if len(indices) == 1 else f"{len(indices)} training images, all equal"
            msg = (
                f"Category {category!r} has {what}; val_split_mode='from_train' needs two. "
                "Add images or use another val_split_mode."
            )
            raise ValueError(msg)
        count = min(max(round(ratio * len(different)), 1), len(different) - 1)
        chosen.update(different[:count])
    for category, indices in members.items():
        if chosen.issuperset(owner[i] for i in indices):
            msg = (
                f"All training images of category {category!r} are equal to images of other categories that validate. "
                "Remove the copies, or choose by `categories`."
            )
            raise ValueError(msg)
    return [i for i in range(len(names)) if owner[i] in chosen]


def _together(names: Sequence[str], copies: Sequence[Sequence[int]]) -> list[int]:
    """Return for each image the first of those that it stays together with: of its name, or of its content."""
    first = list(range(len(names)))

    def find(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    same_name: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        same_name[name].append(i)
    for group in (*same_name.values(), *copies):
        firsts = {find(i) for i in group}
        for i in firsts:
            first[i] = min(firsts)
    return [find(i) for i in range(len(names))]


def split_state(training: Sequence[str], validation: Sequence[str]) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of a split: 8 bytes for each image, from which no name can be read.

    Args:
        training: Names of the images that were learned.
        validation: Names of the images held out.

    Returns:
        ``training`` and ``validation``, int64.
    """
    return {"training": _marks(training), "validation": _marks(validation)}


def resumed(
    categories: Sequence[str],
    names: Sequence[str],
    copies: Sequence[Sequence[int]],
    chosen: Sequence[int],
    state: Mapping[str, Tensor],
) -> tuple[list[int], str]:
    """Go on with the split of a checkpoint: what its run learned never validates, and what it held out never trains.

    Args:
        categories: Category of each image.
        names: Name of each image below the root.
        copies: Groups of equal images; one that was learned keeps the others in training.
        chosen: Positions that :func:`held_out` would choose; decides on images that are new.
        state: What :func:`split_state` returned in the earlier run.

    Returns:
        Sorted positions of the images that validate, and what is not as it was in the earlier run, in words; empty if
        all is.

    Raises:
        ValueError: If all images of a category were learned, or none is left to train with.
    """
    marks, owner = _marks(names), torch.tensor(_together(names, copies))
    learned, validated = (
        torch.isin(owner, owner[torch.isin(marks, state[side])]) for side in ("training", "validation")
    )
    validated &= ~learned
    known = learned | validated
    wanted = torch.zeros(len(names), dtype=torch.bool)
    wanted[list(chosen)] = True
    validates = torch.where(known, validated, wanted)
    for category in dict.fromkeys(categories):
        own = torch.tensor([one == category for one in categories])
        if validates[own].all() or not validates[own].any():
            lack = "held out" if validates[own].all() else "learned"
            msg = (
                f"All {int(own.sum())} training images of category {category!r} were {lack} by the checkpoint's run. "
                "Put back the images that it had, add some, use its val_split_mode, or begin a new training."
            )
            raise ValueError(msg)
    return validates.nonzero().flatten().tolist(), _what_changed(marks, known, wanted, validates, state)


def _what_changed(marks: Tensor, known: Tensor, wanted: Tensor, validates: Tensor, state: Mapping[str, Tensor]) -> str:
    if not known.any():
        return (
            "The checkpoint's run knew none of the training images by their names below the root. If they are the same "
            "images under other names, it may have learned some that validate now; then begin a new training."
        )
    told = []
    new = ~known
    if new.any():
        told.append(f"{int(new.sum())} images are new, of which {int((new & validates).sum())} validate")
    if gone := int((~torch.isin(torch.cat([state["training"], state["validation"]]), marks)).sum()):
        told.append(f"{gone} are gone")
    if moved := int((wanted != validates).sum()):
        told.append(f"{moved} would change sides by today's images, seed and val_split_ratio, and keep theirs")
    if not told:
        return ""
    return (
        f"The validation split is the checkpoint's: {int((known & validates).sum())} images validate as before. "
        f"{'; '.join(told)}. Renamed images count as new. Begin a new training for another split."
    )


def _marks(names: Sequence[str]) -> Tensor:
    return torch.from_numpy(places(names, "name").view(np.int64))
