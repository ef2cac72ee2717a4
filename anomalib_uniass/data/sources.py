# SPDX-License-Identifier: Apache-2.0
"""Anomalib's one-category datamodules as sources: which class, which categories, which of them are on disk."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, cast

import anomalib.data
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.models import ALLOWED_MODULES

from anomalib_uniass.data.listing import holds_files, subfolders
from anomalib_uniass.data.mvtec_layout import MVTecLayout, is_category

# Where a source keeps its category folders, relative to its root. The others keep them in the root itself.
# Kaputt has none: its categories are a column of its metadata.
_CATEGORY_PARENTS: Final[dict[str, tuple[str, ...]]] = {
    "Visa": (".", "visa_pytorch"),
    "RealIAD": ("realiad_256",),
    "Kaputt": (),
}
_NOT_IMAGES: Final = ("anomalib.data.datamodules.depth.", "anomalib.data.datamodules.video.")


def _is_source(candidate: object) -> bool:
    """Whether an object is an image datamodule class that reads one category below a root."""
    return (
        inspect.isclass(candidate)
        and issubclass(candidate, AnomalibDataModule)
        and not candidate.__module__.startswith(_NOT_IMAGES)
        and {"root", "category"} <= set(inspect.signature(candidate).parameters)
    )


def load_source(name: str) -> type[AnomalibDataModule]:
    """Find the datamodule class that reads one category.

    A name may come from a configuration file of somebody else, so nothing is imported for it, and thereby run, but
    what anomalib itself would import for a model.

    Args:
        name: Name of a class in ``anomalib.data`` (``"MVTecAD"``), or a full class path (``"my_package.MyData"``) in a
            module that is imported already, or in a package of ``anomalib.models.ALLOWED_MODULES``.

    Returns:
        An image datamodule class whose constructor takes ``root`` and ``category``.

    Raises:
        ValueError: If there is no such class, it does not read images of one category, or its module is neither
            imported nor allowed.
    """
    module, _, attribute = name.rpartition(".")
    candidate = getattr(_imported(module, name) if module else anomalib.data, attribute, None)
    if not _is_source(candidate):
        usable = sorted(key for key, value in vars(anomalib.data).items() if _is_source(value))
        msg = (
            f"source={name!r} is no image datamodule class with the arguments `root` and `category`. "
            f"Usable in anomalib.data: {', '.join(usable)}; or give a full class path."
        )
        raise ValueError(msg)
    return cast(type[AnomalibDataModule], candidate)


def _imported(module: str, name: str) -> ModuleType:
    """Return a module that is imported already or that anomalib's list allows to import."""
    if module in sys.modules:
        return sys.modules[module]
    parts = module.split(".")
    if not {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & ALLOWED_MODULES:
        msg = (
            f"source={name!r} is in a module that is not imported, and a configuration may not import any. If you "
            f"trust it write `import {module}` before, or `anomalib.models.ALLOWED_MODULES.add({parts[0]!r})`."
        )
        raise ValueError(msg)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        msg = f"source={name!r} cannot be imported: {error}"
        raise ValueError(msg) from error


def read_with(source: type[AnomalibDataModule], *, root: Path, category: str) -> AnomalibDataModule:
    """Make the datamodule of one category.

    Args:
        source: Class from :func:`load_source`; anomalib's ``MVTecAD`` is read by our :class:`MVTecLayout`.
        root: Root folder of the dataset.
        category: Name of the category.

    Returns:
        A datamodule whose ``prepare_data`` and ``_setup`` read the category.
    """
    reader = MVTecLayout if source is MVTecAD else source
    return reader(root=root, category=category)  # type: ignore[call-arg]


def has_mvtec_layout(source: type[AnomalibDataModule]) -> bool:
    """Whether a source is read by our :class:`MVTecLayout`."""
    return source is MVTecAD or issubclass(source, MVTecLayout)


def official_categories(source: type[AnomalibDataModule]) -> tuple[str, ...]:
    """Return the categories a source's own module names (``CATEGORIES``), empty if it names none."""
    for cls in source.__mro__:
        for module in (cls.__module__, cls.__module__.replace(".datamodules.", ".datasets.")):
            try:
                categories = getattr(importlib.import_module(module), "CATEGORIES", None)
            except ImportError:
                continue
            if categories:
                return tuple(categories)
    return ()


def category_folders(source: type[AnomalibDataModule], root: Path) -> dict[str, list[Path]]:
    """List the folders below a root that may be categories.

    Args:
        source: Datamodule class that reads them.
        root: Root folder of the dataset; need not exist.

    Returns:
        Folders by name, in the order of the names. Visa may have two per category, raw and converted.
    """
    folders: dict[str, list[Path]] = {}
    for parent in _CATEGORY_PARENTS.get(source.__name__, (".",)):
        if (root / parent).is_dir():
            for folder in subfolders(root / parent):
                folders.setdefault(folder.name, []).append(folder)
    return dict(sorted(folders.items()))


def present_categories(source: type[AnomalibDataModule], root: Path) -> list[str]:
    """List the categories found below a root.

    Args:
        source: Datamodule class that reads them.
        root: Root folder of the dataset; need not exist.

    Returns:
        Sorted names: in the layout of MVTec AD all folders that are meant as categories, complete or not; else those
        with a file below their ``train`` folder, and the source's official categories with a file anywhere below (VisA
        before its conversion, Real-IAD).
    """
    if has_mvtec_layout(source):
        return [name for name, (folder,) in category_folders(source, root).items() if is_category(folder)]
    official = official_categories(source)
    return [
        name
        for name, folders in category_folders(source, root).items()
        if any(holds_files(folder if name in official else folder / "train") for folder in folders)
    ]


def check_names(names: Sequence[str], known: Iterable[str], *, argument: str, context: str) -> None:
    """Reject category names nobody knows, and say what was probably meant.

    Args:
        names: Names to check.
        known: Names to choose from.
        argument: Name of the argument that gave ``names``, for the message.
        context: Where ``known`` comes from, for the message.

    Raises:
        ValueError: If a name is unknown or given twice.
    """
    known = sorted(set(known))
    problems = []
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            problems.append(f"{name!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    if problems:
        msg = f"{argument} names unknown categories: {', '.join(problems)}. Known from {context}: {', '.join(known)}."
        raise ValueError(msg)
    if len(set(names)) < len(names):
        msg = f"{argument} names a category twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}."
        raise ValueError(msg)
