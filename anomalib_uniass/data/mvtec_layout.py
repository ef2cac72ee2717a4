# SPDX-License-Identifier: Apache-2.0
"""Folders in the layout of MVTec AD, as people have them: any image format, any names, with or without masks."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd
from anomalib.data import AnomalibDataset, MVTecAD
from anomalib.data.utils import LabelName, Split

from anomalib_uniass.data.listing import by_ending, list_images, subfolders, visible
from anomalib_uniass.text import some

logger = logging.getLogger(__name__)

GOOD: Final = "good"
_TRAIN, _TEST, _MASKS = _SPLITS = ("train", "test", "ground_truth")
_MEANT_AS_GOOD: Final = frozenset({"good", "ok", "normal"})
_MASK_SUFFIX: Final = "_mask"
_MOST_PROBLEMS: Final = 5
_NO_MASKS: Final = (
    "Masks are images (png, tif, ...) of the size of their photographs, black where it is good. Draw the polygons of "
    "a JSON file with the tool that wrote it (LabelMe: labelme_export_json), save an array with Pillow: "
    "Image.fromarray((array > 0).astype('uint8') * 255).save(...). For image labels alone remove this folder."
)


class LayoutError(ValueError):
    """The folder of a category differs from the layout of MVTec AD; the message names the paths and what to do."""


class MVTecLayout(MVTecAD):
    """One category in the layout of MVTec AD, with images and masks in any format that Pillow opens.

    Reads ``ROOT/<category>/train/good``, ``test/good``, ``test/<defect>`` and ``ground_truth/<defect>`` as anomalib's
    ``MVTecAD`` reads PNG, downloads MVTec AD itself like it, and differs where that fails or drops files: endings may
    differ from file to file, in any case; names may have any letters; files may be symbolic links; without
    ``ground_truth`` there are image labels alone. Which files are images is said by
    :mod:`anomalib_uniass.data.listing`. Arguments are those of ``MVTecAD``.

    Attributes:
        left_out: After ``setup``, the visible files where images or masks belong that are none.
        not_read: After ``setup``, folders with images in the category's folder that the layout does not know, images
            that lie there, and folders that may not be read.

    Raises:
        LayoutError: In ``setup``, if the folder differs from the layout.
    """

    left_out: Sequence[Path] = ()
    not_read: Sequence[Path] = ()

    def _setup(self, _stage: str | None = None) -> None:
        """Read the folder."""
        folder = self.root.resolve() / self.category
        samples = read_category(folder)
        self.left_out, self.not_read = _what_is_left(folder)
        self.train_data = _dataset(samples, Split.TRAIN)
        self.test_data = _dataset(samples, Split.TEST)


def _dataset(samples: pd.DataFrame, split: Split) -> AnomalibDataset:
    dataset = AnomalibDataset()
    dataset.samples = samples[samples["split"] == split.value].reset_index(drop=True)
    return dataset


def is_category(folder: Path) -> bool:
    """Whether a folder is meant as a category: it has ``train``, ``test`` or ``ground_truth``, in any case."""
    # `glob` passes over what may not be read, such as `lost+found`.
    return folder.is_dir() and any(path.is_dir() and path.name.casefold() in _SPLITS for path in folder.glob("*"))


def explain_root(root: Path) -> str:
    """Say what was probably meant by a root that holds no category.

    Args:
        root: Folder that should hold the category folders; need not exist.

    Returns:
        A sentence, or nothing if there is no guess.
    """
    if not root.is_dir():
        return ""
    splits = [path for path in visible(root) if path.is_dir() and path.name.casefold() in (_TRAIN, _TEST)]
    if any(path.is_dir() and path.name.casefold() == GOOD for split in splits for path in split.glob("*")):
        home = root.resolve()
        return f"It looks like a category itself: give root={str(home.parent)!r} with categories=[{home.name!r}]."
    above = [path for path in visible(root) if path.is_dir() and any(map(is_category, path.glob("*")))]
    return f"Did you mean root={str(above[0])!r}?" if above else ""


def read_category(folder: Path) -> pd.DataFrame:
    """Read the folder of a category.

    A mask has the name of its image, with or without ``_mask`` behind, in any format. Hidden files and files that are
    no images are left out. Without any mask the task is classification.

    Args:
        folder: Folder with ``train``, ``test`` and, unless there are image labels alone, ``ground_truth``.

    Returns:
        Anomalib's frame of MVTec AD, sorted by image: ``path`` (the folder), ``split`` (``train`` or ``test``),
        ``label`` (``good`` or the defect), ``image_path``, ``label_index``, ``mask_path`` (None without a mask), and
        ``attrs["task"]``.

    Raises:
        LayoutError: If an image belongs nowhere, it is not clear which mask it has, or ``ground_truth`` holds
            annotations that are no images alone.
    """
    problems: list[str] = []
    train, test, masks = (_read_split(folder, split, problems) for split in _SPLITS)
    _check_labels(folder, train, test, problems)
    mask_of = _match_masks(folder, test, masks, problems) if masks else {}
    if not masks and set(test) != {GOOD}:
        _check_annotations(folder / _MASKS, problems)
    if problems:
        more = f"\nand {len(problems) - _MOST_PROBLEMS} more problems" if len(problems) > _MOST_PROBLEMS else ""
        raise LayoutError("\n".join(problems[:_MOST_PROBLEMS]) + more)
    if not train.get(GOOD):
        raise LayoutError(_nothing_in(folder / _TRAIN / GOOD, "training images"))
    if not test:
        raise LayoutError(_nothing_in(folder / _TEST, "test images"))

    images = [
        (str(folder), split, label, str(image), mask_of.get(image))
        for split, images_of in ((_TRAIN, train), (_TEST, test))
        for label, paths in images_of.items()
        for image in paths
    ]
    path, split, label, image_path, mask_path = zip(*images, strict=True)
    samples = pd.DataFrame({"path": path, "split": split, "label": label, "image_path": image_path})
    samples["label_index"] = [int(LabelName.NORMAL if name == GOOD else LabelName.ABNORMAL) for name in label]
    samples["mask_path"] = pd.Series(mask_path, dtype=object)  # pandas would make NaN of None
    samples = samples.sort_values("image_path", ignore_index=True)
    samples.attrs["task"] = "segmentation" if mask_of or set(test) == {GOOD} else "classification"
    return samples


def _read_split(folder: Path, split: str, problems: list[str]) -> dict[str, list[Path]]:
    """Return the images of a split by label, and note what does not lie where the layout wants it."""
    if not (folder / split).is_dir():
        named = [path for path in (visible(folder) if folder.is_dir() else ()) if path.name.casefold() == split]
        problems += [f"{path}: rename this folder to {split!r}." for path in named]
        return {}
    if loose := _images(folder / split):
        problems.append(
            f"{folder / split}: {len(loose)} images lie directly in this folder ({some(loose)}). Expected them in "
            f"{split}/<defect>" + ("." if split == _MASKS else f" or {split}/{GOOD}.")
        )
    labels: dict[str, list[Path]] = {}
    for path in subfolders(folder / split):
        inside = list_images(path).images
        if deeper := sorted({path / image.relative_to(path).parts[0] for image in inside if image.parent != path}):
            problems.append(
                f"{path}: holds folders with images ({some(deeper)}). Move the images up, or the folders away"
                + (", or read several masks per image with source='MVTecLOCO'." if split == _MASKS else ".")
            )
        if images := _images(path):
            labels[path.name] = images
    return labels


def _check_labels(
    folder: Path, train: Mapping[str, Sequence[Path]], test: Mapping[str, Sequence[Path]], problems: list[str]
) -> None:
    """Note folders of good images under another name, and masks among images."""
    for label in train:
        if label != GOOD:
            problems.append(
                f"{folder / _TRAIN / label}: training images must be good and lie in {_TRAIN}/{GOOD}; rename this "
                "folder or move it away."
            )
    for label in test:
        if label != GOOD and label.casefold() in _MEANT_AS_GOOD:
            problems.append(
                f"{folder / _TEST / label}: would be taken for a defect. Rename it to {GOOD!r} if its images are good."
            )
    for images in (*train.values(), *test.values()):
        stems = {image.stem for image in images}
        masks = [image for image in images if _stem_without_mask(image) in stems - {image.stem}]
        if masks:
            problems.append(
                f"{masks[0].parent}: masks lie among the images ({some(masks)}). Move them to {_MASKS}/<defect>."
            )


def _match_masks(
    folder: Path, test: Mapping[str, Sequence[Path]], masks: Mapping[str, Sequence[Path]], problems: list[str]
) -> dict[Path, str]:
    """Return the mask of each anomalous image, and note where it is missing or not clear."""
    mask_of: dict[Path, str] = {}
    without: list[Path] = []
    unused: list[Path] = []
    for label in sorted({*test, *masks} - {GOOD}):
        candidates: dict[str, list[Path]] = defaultdict(list)
        for mask in masks.get(label, ()):
            for stem in {mask.stem, _stem_without_mask(mask)}:
                candidates[stem].append(mask)
        images: dict[str, list[Path]] = defaultdict(list)
        for image in test.get(label, ()):
            images[image.stem].append(image)
        for stem, same in images.items():
            if len(same) > 1:
                problems.append(f"{some(same)}: images of one name; which has the mask? Rename one and its mask.")
            elif len(candidates[stem]) > 1:
                problems.append(f"{same[0]}: several masks ({some(candidates[stem])}). Keep one.")
            elif candidates[stem]:
                mask_of[same[0]] = str(candidates[stem][0])
            else:
                without += same
        used = {str(mask) for stem in images for mask in candidates[stem]}
        unused += [mask for mask in masks.get(label, ()) if str(mask) not in used]
    if without:
        no_images = list_images(folder / _MASKS).left_out
        problems.append(
            f"{len(without)} anomalous images of {folder} have no mask, others have one. Images without a mask: "
            f"{some(without)}."
            + (f" Masks without an image: {some(unused)}." if unused else "")
            + (f" {_MASKS} holds {by_ending(no_images, below=folder)}, which are no images." if no_images else "")
            + f" Expected {_MASKS}/<defect>/<name of the image> with or without {_MASK_SUFFIX!r}, in any format. "
            f"For image labels alone remove {_MASKS}."
        )
    elif unused:
        logger.warning("%s: %d masks have no image and are left out: %s", folder, len(unused), some(unused))
    if masks.get(GOOD):
        logger.warning("%s: masks of good images are left out", folder / _MASKS / GOOD)
    return mask_of


def _check_annotations(folder: Path, problems: list[str]) -> None:
    """Note annotations that are no images, without which metrics of pixels would be left out."""
    if folder.is_dir() and (files := list_images(folder).left_out):
        problems.append(f"{folder}: holds no mask, only {by_ending(files, below=folder)}. {_NO_MASKS}")


def _stem_without_mask(path: Path) -> str:
    return path.stem[: -len(_MASK_SUFFIX)] if path.stem.lower().endswith(_MASK_SUFFIX) else path.stem


def _images(folder: Path) -> list[Path]:
    """List the images that lie directly in a folder."""
    images = list_images(folder, deep=False).images
    if lost := [path for path in images if not path.exists()]:
        msg = f"{some(lost)}: links that lead nowhere. Fetch the files, or remove the links."
        raise LayoutError(msg)
    return images


def _what_is_left(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a category's splits that are no images, and the images that lie elsewhere in its folder."""
    left_out: list[Path] = []
    not_read: list[Path] = []
    for path in subfolders(folder):
        found = list_images(path)
        if path.name in _SPLITS:
            left_out += found.left_out
            not_read += found.closed
        elif found.images:
            not_read.append(path)
    return left_out, not_read + list_images(folder, deep=False).images


def _nothing_in(folder: Path, what: str) -> str:
    """Say that there are no images, and what there is instead."""
    if folder.is_dir():
        found = list_images(folder)
        files = found.images + found.left_out
        there = f"only {by_ending(files, below=folder)}" if files else "the folder is empty"
    else:
        there = "this is no folder" if folder.exists() else "the folder does not exist"
    return (
        f"No {what} in {folder}: {there}. Add images that Pillow opens (png, jpg, tif, bmp, webp, ...), or leave the "
        "category out of `categories`."
    )
