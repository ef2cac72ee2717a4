# SPDX-License-Identifier: Apache-2.0
"""The sample dataset: real photographs from pip packages with generated defects, in MVTec AD layout.

The good images come from scikit-image's photographs (coins, brick, gravel) and from the cells that elpv-dataset labels
defect-free (solar_mono, solar_poly). Train and test images never share a pixel: each photograph is cut in two regions,
and solar cells of train and test belong to different modules, because the neighbours within a module are often sister
wafers with the same crystal pattern. The defects are generated here, on test images only. A defect is a function of
``(canvas, rng)`` that returns the changed image; its mask is computed from what visibly changed.

It is a set to try the tools on, not a benchmark: never compare its figures with those of MVTec AD or VisA. The solar
cells are licensed CC BY-NC-SA 4.0, for non-commercial use only.

    python benchmarks/sample_data/write.py datasets/inspection_sample
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from canvases import Canvas, Canvases, Gray, Mask, coin_canvases, solar_canvases, texture_canvases
from defects import chip, crack, fines, foreign, inactive, misplaced, scratch, shunt, stain, worn
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from anomalib_uniass.files import replacing

_VERSION = 1
_MANIFEST = "dataset.json"
_VISIBLE = 8  # grey levels
_MASK_AREA = (0.001, 0.12)  # fraction of the image
_MAX_DRAWS = 100

_LICENSES = {
    "coins": "scikit-image: Greek coins from Pompeii, no known copyright restrictions (Brooklyn Museum)",
    "brick": "scikit-image: CC0 (CC0Textures)",
    "gravel": "scikit-image: CC0 (CC0Textures)",
    "grass": "scikit-image: CC0 (DeviantArt, linolafett); foreign matter on brick and gravel",
    "solar_mono": "elpv-dataset (Deitsch et al.): CC BY-NC-SA 4.0",
    "solar_poly": "elpv-dataset (Deitsch et al.): CC BY-NC-SA 4.0",
}


Defect = Callable[[Canvas, Generator], Gray]


@dataclass(frozen=True)
class _Category:
    canvases: Canvases
    defects: dict[str, Defect]


_SOLAR_DEFECTS: dict[str, Defect] = {"chip": chip, "crack": crack, "inactive": inactive, "shunt": shunt}
_CATEGORIES = {
    "brick": _Category(
        partial(texture_canvases, "brick"),
        {"crack": crack, "foreign": foreign, "misplaced": misplaced, "stain": stain},
    ),
    "coins": _Category(coin_canvases, {"chip": chip, "scratch": scratch, "stain": stain, "worn": worn}),
    "gravel": _Category(
        partial(texture_canvases, "gravel"),
        {"fines": fines, "foreign": foreign, "oil": partial(stain, absorbed=(0.5, 0.8))},
    ),
    "solar_mono": _Category(partial(solar_canvases, "solar_mono"), _SOLAR_DEFECTS),
    "solar_poly": _Category(partial(solar_canvases, "solar_poly"), _SOLAR_DEFECTS),
}
SAMPLE_CATEGORIES = tuple(_CATEGORIES)


def _gray_levels(image: Gray) -> NDArray[np.uint8]:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _visible_change(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Mask:
    """Where two images differ visibly: small gaps closed, holes filled, specks dropped."""
    changed = np.abs(after.astype(np.int16) - before) >= _VISIBLE
    reach = max(1, before.shape[0] // 100)
    closed = ndimage.binary_closing(np.pad(changed, reach), iterations=reach)[reach:-reach, reach:-reach]
    labels, _ = ndimage.label(ndimage.binary_fill_holes(closed), structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return np.asarray((areas >= max(3, areas.max() / 50))[labels])


def _draw_defect(canvas: Canvas, defect: Defect, rng: Generator) -> tuple[NDArray[np.uint8], Mask]:
    """Draw until the visible area lies in the wanted range.

    Raises:
        RuntimeError: If no draw does.
    """
    good = _gray_levels(canvas.image)
    for _ in range(_MAX_DRAWS):
        image = _gray_levels(defect(canvas, rng))
        mask = _visible_change(good, image)
        if _MASK_AREA[0] <= mask.mean() <= _MASK_AREA[1]:
            return image, mask
    msg = f"No visible defect of {_MASK_AREA} of the image in {_MAX_DRAWS} draws on {canvas.origin}."
    raise RuntimeError(msg)


def _save(image: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def _write_category(
    root: Path, name: str, *, image_size: int, train: int, good: int, per_defect: int, seed: int
) -> dict[str, Mapping[str, object]]:
    """Write one category below ``root`` and return the origin of each image by its relative path."""
    category = _CATEGORIES[name]
    rng = np.random.default_rng([seed, *name.encode()])
    origins: dict[str, Mapping[str, object]] = {}

    def record(path: Path, canvas: Canvas) -> Path:
        origins[path.as_posix()] = canvas.origin
        return root / path

    for split, count in (("train", train), ("test", good)):
        for index, canvas in zip(range(count), category.canvases(split, image_size, rng), strict=False):
            _save(_gray_levels(canvas.image), record(Path(name, split, "good", f"{index:03}.png"), canvas))
    canvases = category.canvases("test", image_size, rng)
    for index in range(per_defect):
        for kind, defect in category.defects.items():
            canvas = next(canvases)
            image, mask = _draw_defect(canvas, defect, rng)
            _save(image, record(Path(name, "test", kind, f"{index:03}.png"), canvas))
            _save(255 * mask.astype(np.uint8), root / name / "ground_truth" / kind / f"{index:03}_mask.png")
    return origins


def _require_sources() -> None:
    """Fail before anything is written if the packages that hold the photographs are missing."""
    try:
        import elpv_dataset.utils  # noqa: F401
        import skimage.data  # noqa: F401
    except ImportError as error:
        msg = (
            "The sample dataset is made from the photographs in the packages scikit-image and elpv-dataset, "
            f"but {error.name} cannot be imported: pip install 'anomalib-uniass[demo]'"
        )
        raise ImportError(msg, name=error.name) from error


def _is_complete(root: Path, expected: dict[str, int]) -> bool:
    """Whether ``root`` holds this very set.

    Raises:
        FileExistsError: If it holds anything else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / _MANIFEST).read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        found = f"something without a readable {_MANIFEST}"
    if found == expected:
        return True
    msg = f"{root} should hold the sample dataset {expected}, but holds {found}: delete it or choose another folder."
    raise FileExistsError(msg)


def write_sample_dataset(
    root: Path, *, image_size: int = 256, train: int = 50, good: int = 12, per_defect: int = 7, seed: int = 0
) -> None:
    """Write the sample dataset in MVTec AD layout, or keep the same set if it is there already.

    Each of :data:`SAMPLE_CATEGORIES` gets ``train/good``, ``test/good``, ``test/DEFECT`` and
    ``ground_truth/DEFECT/NNN_mask.png`` (0 or 255). ``root/dataset.json`` records the parameters, the licences and each
    image's origin. The set is built beside ``root`` and renamed at the end, so ``root`` never holds half a set, and
    nothing existing is overwritten. Equal parameters give equal files (with equal versions of numpy, scipy, Pillow).

    Args:
        root: Folder to write; it is new, empty, or holds this very set.
        image_size: Width and height of the images in pixels, at least 64.
        train: Good images to train on, per category.
        good: Good test images per category.
        per_defect: Defective test images per category and kind of defect (three or four kinds each).
        seed: Seed of the crops, exposures and defects.

    Raises:
        ImportError: If scikit-image or elpv-dataset is missing.
        FileExistsError: If ``root`` holds another set or other files.
        OSError: If it cannot be written.
        ValueError: If a size or count is too small.
    """
    root = Path(root)
    parameters = {"image_size": image_size, "train": train, "good": good, "per_defect": per_defect, "seed": seed}
    lowest = {"image_size": 64, "train": 1, "good": 1, "per_defect": 1, "seed": 0}
    for name, value in parameters.items():
        if value < lowest[name]:
            msg = f"{name} must be at least {lowest[name]}, got {value}."
            raise ValueError(msg)
    expected = {"version": _VERSION, **parameters}
    if _is_complete(root, expected):
        return
    _require_sources()
    root.parent.mkdir(parents=True, exist_ok=True)
    with replacing(root) as building:
        origins: dict[str, Mapping[str, object]] = {}
        for name in SAMPLE_CATEGORIES:
            origins |= _write_category(building, name, **parameters)
        manifest = {"parameters": expected, "licenses": _LICENSES, "origins": origins}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if root.exists():
            root.rmdir()


def main() -> None:
    """Write the dataset to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # those of the function
    )
    parser.add_argument("folder", type=Path, help="a new or an empty folder; this very set is kept if it is there")
    parser.add_argument("--image-size", type=int, help="width and height of the images in pixels, at least 64")
    parser.add_argument("--train", type=int, help="good images to train on, per category")
    parser.add_argument("--good", type=int, help="good test images per category")
    parser.add_argument("--per-defect", type=int, help="defective test images per category and kind of defect")
    parser.add_argument("--seed", type=int, help="of the crops, exposures and defects")
    parameters = vars(parser.parse_args())
    folder = parameters.pop("folder")
    try:
        write_sample_dataset(folder, **parameters)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{folder} holds {', '.join(SAMPLE_CATEGORIES)}")


if __name__ == "__main__":
    main()
