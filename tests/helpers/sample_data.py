# SPDX-License-Identifier: Apache-2.0
"""The writer of the sample dataset, which lies beside the benchmarks and is not installed."""

from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "sample_data"

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(FOLDER)  # its modules import each other as those of a script do
    write = import_module("write")
    canvases = import_module("canvases")


def write_small_sample(root: Path, *, train: int = 3) -> Path:
    """Write the sample dataset with few small images, or skip the test where a package with the photographs is missing.

    Args:
        root: Folder to write to.
        train: Training images per category.

    Returns:
        ``root``.
    """
    for package in ("elpv_dataset", "skimage"):
        pytest.importorskip(package)
    write.write_sample_dataset(root, image_size=64, train=train, good=1, per_defect=1)
    return root
