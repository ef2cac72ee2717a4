# SPDX-License-Identifier: Apache-2.0
"""Which category an image has: what its dataset tells, else a folder above it that is called like a category.

Names are compared as people read them: accents composed or not, capitals and blanks at the ends make no difference.
Where two categories differ in nothing else, only their exact names count.
"""

import ntpath
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Final

import pandas as pd

ALL: Final = "all"
"""Category of images of which nothing is told."""

SPLITS: Final = re.compile(r"(train|test|val|validation|ground_truth)(_public|_private|_private_mixed)?", re.IGNORECASE)
"""Folders between a category and its defects, as datasets in the layout of MVTec AD have them."""


def normal_form(name: str) -> str:
    """Return what two spellings of one name have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


class CategoryNames:
    """Names of the categories that a model knows, found again in other spellings.

    Args:
        names: The names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        forms = Counter(map(normal_form, self._names))
        self._by_form = {form: name for name in self._names if forms[form := normal_form(name)] == 1}

    def match(self, name: str) -> str | None:
        """Return the category with a name, None if there is none or several differ from it equally little."""
        return name if name in self._names else self._by_form.get(normal_form(name))

    def of_path(self, path: str | Path) -> str | None:
        """Return the category that the folders above a file tell.

        In the layout ``<category>/test/<defect>/`` it is the category, whatever the defect is called. Elsewhere it is
        the nearest folder with the name of a category. Links count by their own names.

        Args:
            path: Path of an image, relative to the working folder or absolute, of any system; need not exist.

        Returns:
            None if no folder is called like a category.
        """
        if not str(path):
            return None
        folders = folders_above(path)
        matches = [self.match(folder) for folder in folders]
        for split in range(len(folders) - 2, 0, -1):
            if SPLITS.fullmatch(folders[split]) and matches[split - 1] is not None:
                return matches[split - 1]
        return next((match for match in reversed(matches) if match is not None), None)


def folders_above(path: str | Path) -> list[str]:
    """Return the names of the folders above a file, the nearest last, with ``..`` resolved and links as they are."""
    text = str(path)
    is_of_windows = "\\" in text and "/" not in text  # a list made there may be read here
    file = PureWindowsPath(ntpath.normpath(text)) if is_of_windows else Path(os.path.abspath(text))  # noqa: PTH100
    return [folder.name for folder in reversed(file.parents) if folder.name]


def sample_categories(*datasets: object) -> dict[str, str]:
    """Return the category by path of all images that datasets tell one of, in the column ``category``.

    Args:
        datasets: Datasets with a frame ``samples``, as anomalib's; others tell nothing.
    """
    told: dict[str, str] = {}
    for dataset in datasets:
        samples = getattr(dataset, "samples", None)
        if samples is not None and "category" in samples.columns:
            told |= dict(zip(samples["image_path"].astype(str), samples["category"].astype(str), strict=True))
    return told


def row_categories(samples: pd.DataFrame, *, default: str = ALL) -> pd.Series:
    """Return the category of each row of a frame of samples, with its index; the default where it tells none."""
    column = samples["category"] if "category" in samples else [default] * len(samples)
    return pd.Series(list(column), index=samples.index, dtype=str)


def default_category(datamodule: object | None) -> str:
    """Return the category of images whose dataset tells none: the datamodule's own, or its name."""
    if datamodule is None:
        return ALL
    name = getattr(datamodule, "category", None) or getattr(datamodule, "name", None)
    return name if isinstance(name, str) else type(datamodule).__name__


def category_of(path: str | Path, told: Mapping[str, str], names: CategoryNames) -> str | None:
    """Return what is told of an image, else what its folders tell; None if neither does."""
    return told.get(str(path)) or names.of_path(path)
