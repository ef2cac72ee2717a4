# SPDX-License-Identifier: Apache-2.0
"""One datamodule for all categories of an anomaly detection dataset."""

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import TestSplitMode, ValSplitMode
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import RandomCrop, Transform

from anomalib_uniass.arguments import check_choice, check_flag, check_number, check_seed, check_text, check_whole
from anomalib_uniass.data.checks import check_samples, images_without_mask
from anomalib_uniass.data.copies import equal_files, tell_copies
from anomalib_uniass.data.dataset import UnifiedDataset, category_augmentation
from anomalib_uniass.data.defect_sizes import what_gets_lost
from anomalib_uniass.data.image_cache import ImageCache, fixed_resize
from anomalib_uniass.data.images import read_image
from anomalib_uniass.data.listing import by_ending
from anomalib_uniass.data.mvtec_layout import LayoutError, MVTecLayout, explain_root
from anomalib_uniass.data.opening import MAX_MEGAPIXELS
from anomalib_uniass.data.sources import (
    category_folders,
    check_names,
    has_mvtec_layout,
    load_source,
    official_categories,
    present_categories,
    read_with,
)
from anomalib_uniass.data.splits import file_names, held_out, resumed, split_state
from anomalib_uniass.logs import QuietRun, install_log_filters, quiet
from anomalib_uniass.metrics import CategoryMetricsCallback
from anomalib_uniass.metrics.category_metrics import MEAN
from anomalib_uniass.report.callback import ReportCallback
from anomalib_uniass.report.comparison import ComparisonCallback
from anomalib_uniass.report.decisions import DecisionsCallback
from anomalib_uniass.report.summary import RunSummary
from anomalib_uniass.results import run_folder
from anomalib_uniass.text import some

logger = logging.getLogger(__name__)


class Unified(AnomalibDataModule):
    """All categories of a dataset in one, to train and test one unified model.

    Reads each category with anomalib's own datamodule (its download, its split, its masks) and joins them. The frames
    ``train_data.samples`` and ``test_data.samples`` tell each sample's ``category``. Adds the metrics per category to
    the trainer. Before training it checks every image and mask.

    Own data: photographs in MVTec AD layout (``ROOT/<category>/train/good``, ``test/good``, ``test/<defect>``,
    ``ground_truth/<defect>``) are read by the default source whatever the categories are called, in any format that
    Pillow opens, masks likewise; see :class:`~anomalib_uniass.data.mvtec_layout.MVTecLayout`. Without any
    ``ground_truth`` the labels of the images are all there is, and metrics of pixels are left out.

    Validation: the default ``val_split_mode="from_train"`` takes ``val_split_ratio`` of each category's training images
    (at least one, never all), so that nothing is chosen on the test set. It holds no anomalies: UniAS and UniAD take
    their thresholds per category from it, other models of anomalib the highest normal score of all categories.
    ``"same_as_test"`` gives anomalib's usual thresholds, tuned on the test set. Metrics without a threshold (AUROC, AP)
    do not depend on it. Which images are held out follows from each file's name, so that an image more or less moves
    one other at most; files that are equal byte for byte stay together and are named
    (:mod:`~anomalib_uniass.data.splits`). A training that goes on from a checkpoint keeps its split, and says what
    changed.

    Args:
        source: Name in ``anomalib.data`` (``MVTecAD``, ``Visa``, ``MVTecLOCO``, ``BTech``, ``MPDD``, ...) or full class
            path of the image datamodule that reads one category; import its module before (see
            :func:`~anomalib_uniass.data.sources.load_source`).
        root: Root folder of the dataset; None takes the source's default.
        categories: Categories to join. None takes those found below ``root``, or if there is no ``root`` yet the
            official ones of the source (but MVTec AD is downloaded only to its default ``root``, or for categories
            that are named here). Quote numbers in YAML (``"01"``).
        train_batch_size: Images per training batch.
        eval_batch_size: Images per validation and test batch.
        num_workers: Worker processes per data loader.
        hflip: Categories whose training images are flipped left and right with probability 0.3.
        vflip: Categories whose training images are flipped up and down with probability 0.3.
        rotate: Categories whose training images are rotated by 0, 90, 180 or 270 degrees with equal chances.
        train_augmentations: Further transform of the training images.
        val_augmentations: Transform of the validation images.
        test_augmentations: Transform of the test images.
        augmentations: Transform for each of the three that is not given.
        val_split_mode: ``from_train``, ``same_as_test``, ``from_test``, ``synthetic``, or ``from_dir`` for sources that
            bring validation images (MVTecLOCO, MVTecAD2, BMAD, Kaputt). ``synthetic`` images belong to no category.
        val_split_ratio: Fraction of the split images, in (0, 1).
        seed: Seed of the split; None draws anew each time, and differently in each process of a distributed run.
        comparison: Folder of a comparison to which every model tested on this data adds its row (``table.csv``,
            ``table.md``, ``per_category.csv``, ``pixel_AP.png``); see
            :class:`~anomalib_uniass.report.comparison.ComparisonCallback`.
        cache_images: Read and resize the training images in the first epoch alone and keep them in memory that all
            workers share (each process of a distributed run has its own): 12 bytes per pixel, 2.2 GB for MVTec AD at
            224 x 224. Pays where a GPU waits for few CPU cores; not on a CPU, where the model takes far longer than
            reading. Numbers are the same but for rounding (below 1e-5) in flipped and rotated images. Needs a resize
            to a fixed size (the models' own), a square for ``rotate``, and no ``train_augmentations``.
        max_megapixels: Millions of pixels that an image or a mask may have; more are refused before anything is read.
            Reading takes 12 bytes per pixel in each worker, 3.6 GB at the default of 300. Pillow's own limit, which is
            one for the whole process, is neither asked nor changed.

    Raises:
        ValueError: If the source, a category or the validation split is unknown or out of range, if a category has the
            name of the table's last row, ``mean``, or if ``cache_images`` would freeze an augmentation.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Padim
        >>> datamodule = Unified(source="MVTecAD", root="./my_parts")  # doctest: +SKIP
        >>> Engine().train(Padim(), datamodule=datamodule)  # doctest: +SKIP
    """

    train_data: UnifiedDataset

    def __init__(
        self,
        *,
        source: str = "MVTecAD",
        root: Path | str | None = None,
        categories: list[str] | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        hflip: list[str] | None = None,
        vflip: list[str] | None = None,
        rotate: list[str] | None = None,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.05,
        seed: int | None = 0,
        comparison: Path | str | None = None,
        cache_images: bool = False,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        install_log_filters(self)
        check_choice("val_split_mode", val_split_mode, [mode.value for mode in ValSplitMode])
        if ValSplitMode(val_split_mode) == ValSplitMode.NONE:
            msg = (
                "val_split_mode='none' cannot work: anomalib takes its thresholds from a validation set. "
                "Use 'from_train' (default) to keep it off the test set."
            )
            raise ValueError(msg)
        check_number("val_split_ratio", val_split_ratio, above=0, below=1)
        check_whole("train_batch_size", train_batch_size, at_least=1)
        check_whole("eval_batch_size", eval_batch_size, at_least=1)
        check_whole("num_workers", num_workers, at_least=0)
        if seed is not None:
            check_seed(seed)
        check_flag("cache_images", cache_images)
        check_number("max_megapixels", max_megapixels, above=0)
        check_text("source", source)
        if comparison is not None:
            check_text("comparison", str(comparison) if isinstance(comparison, Path) else comparison)
        for name, transform in (
            ("train_augmentations", train_augmentations),
            ("val_augmentations", val_augmentations),
            ("test_augmentations", test_augmentations),
            ("augmentations", augmentations),
        ):
            if transform is not None and not isinstance(transform, Transform):
                msg = f"{name} must be a transform of torchvision.transforms.v2, got {transform!r}."
                raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.source = load_source(source)
        # Without a root the source says where it keeps its data.
        self.root: Path = self.source().root if root is None else Path(root)  # type: ignore[attr-defined, call-arg]
        self.categories = self._choose_categories(categories)
        # A misspelt root must not fetch 5 GB of somebody else's parts.
        self._on_disk_only = has_mvtec_layout(self.source) and root is not None and categories is None
        self.hflip = self._known_names(hflip, "hflip")
        self.vflip = self._known_names(vflip, "vflip")
        self.rotate = self._known_names(rotate, "rotate")
        self.comparison = comparison
        self.cache_images = cache_images
        self.max_megapixels = max_megapixels
        if cache_images and self.train_augmentations is not None:
            # A model may bring another resize, but does not take steps out.
            fixed_resize(self.train_augmentations, rotated=False)
        self._checked = False
        self._copies: list[list[int]] = []
        self._earlier_split: dict[str, Any] = {}

    def _known_names(self, names: Sequence[str] | None, argument: str) -> list[str]:
        """Turn an argument into a list of category names that the source or the root folder knows."""
        if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
            msg = f"{argument} must be a list of category names, got {names!r}."
            raise TypeError(msg)
        known = {*official_categories(self.source), *category_folders(self.source, self.root)}
        # An umlaut may be one character or two: macOS writes names of folders otherwise than people type them.
        typed = {unicodedata.normalize("NFC", name): name for name in known}
        names = [
            name if name in known else typed.get(unicodedata.normalize("NFC", name), name)
            for name in map(str, names or ())
        ]
        context = f"{self.source.__name__} and the folders of {self.root}"
        if not self.root.is_dir():
            context = f"{self.source.__name__} ({self.root} does not exist)"
        elif has_mvtec_layout(self.source) and (guess := explain_root(self.root)):
            context += f" ({guess})"
        check_names(names, known, argument=argument, context=context)
        return names

    def _choose_categories(self, categories: Sequence[str] | None) -> list[str]:
        """Return the categories to join: the given ones, those on disk, or the official ones."""
        if categories is not None:
            chosen = self._known_names(categories, "categories")
        else:
            chosen = present_categories(self.source, self.root) or list(official_categories(self.source))
        if not chosen:
            msg = (
                f"No categories to read: categories={categories!r}, and {self.source.__name__} finds none below "
                f"{self.root}. Give at least one category, or the folder that holds the category folders as root."
            )
            raise ValueError(msg)
        if MEAN in chosen:
            msg = (
                f"No category can be called {MEAN!r}: the row of the mean in tables of metrics has this name. "
                f"Rename the folder {self.root / MEAN}, or leave it out of `categories`."
            )
            raise ValueError(msg)
        return chosen

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the root folder.

        Anomalib names the results folder after it. Its visualizer looks for it in each image path and keeps what
        follows, the category included, so that pictures of different categories do not overwrite each other.
        """
        return self.root.resolve().name

    def prepare_data(self) -> None:
        """Let the source download or convert what it needs, once, if there is no data below ``root`` yet.

        Raises:
            FileNotFoundError: If ``root`` holds other folders than those asked for, or is given and holds no category
                in the layout of MVTec AD; nothing is downloaded then.
        """
        self._check_folders()
        with quiet(self.source.__module__, level=logging.WARNING):  # "Found the dataset.", of every category
            for part in self._parts().values():
                part.prepare_data()
        if self.trainer is not None and self.trainer.is_global_zero:
            run_folder(self.trainer).open(self.trainer)

    def _check_folders(self) -> None:
        """Refuse a root that holds data, but not all that is asked for; the source would download everything again."""
        folders = category_folders(self.source, self.root)
        present = present_categories(self.source, self.root)
        guess = explain_root(self.root) if has_mvtec_layout(self.source) and not present else ""
        if self._on_disk_only and not present:
            there = "does not exist" if not self.root.exists() else "holds no category"
            msg = (
                f"root {self.root} {there}. " + (f"{guess} " if guess else "") + "Expected the folders "
                f"{self.root}/<category>/train/good and test. To download MVTec AD use the datamodule MVTec."
            )
            raise FileNotFoundError(msg)
        missing = [category for category in self.categories if category not in present]
        if folders and missing:
            found = f"the categories {', '.join(present)}" if present else f"no category, only {', '.join(folders)}"
            msg = (
                f"{self.root} lacks {len(missing)} of {len(self.categories)} categories, or their training images: "
                f"{', '.join(missing)}. It holds {found}. " + (f"{guess} " if guess else "") + "Give a subset in "
                f"`categories`, add the folders, or give another `root`; if it does not exist, {self.source.__name__} "
                "downloads or explains how to."
            )
            raise FileNotFoundError(msg)

    def _parts(self) -> dict[str, AnomalibDataModule]:
        """Make the source's datamodule of each category."""
        return {category: read_with(self.source, root=self.root, category=category) for category in self.categories}

    def _setup(self, _stage: str | None = None) -> None:
        """Read all categories and join them."""
        self._check_folders()
        parts = self._parts()
        self._read(parts)
        _agree_on_task(parts)
        self.train_data = self._join({category: part.train_data for category, part in parts.items()}, "training")
        self.test_data = self._join({category: part.test_data for category, part in parts.items()}, "test")
        subsets = [self.train_data, self.test_data]
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            missing = [category for category, part in parts.items() if not hasattr(part, "val_data")]
            if missing:
                msg = (
                    f"val_split_mode='from_dir', but {self.source.__name__} has no validation images of its own for "
                    f"{', '.join(missing)}. Use 'from_train'."
                )
                raise ValueError(msg)
            self.val_data = self._join({category: part.val_data for category, part in parts.items()}, "validation")
            subsets.append(self.val_data)
        if not self._checked:
            self._tell_what_is_left_out(parts.values())
            for subset in subsets:
                check_samples(
                    subset.samples, needs_masks=subset.task == "segmentation", max_megapixels=self.max_megapixels
                )
        self._find_copies(subsets, tell=not self._checked)
        self._checked = True

    def _read(self, parts: Mapping[str, AnomalibDataModule]) -> None:
        """Let the source read every category, and say which one if it fails."""
        problems = []
        for category, part in parts.items():
            try:
                part._setup()
            except LayoutError as error:
                problems.append(str(error))
            except Exception as error:  # a source may raise anything
                folders = category_folders(self.source, self.root).get(category, [])
                unmasked = [str(image) for folder in folders for image in images_without_mask(folder)]
                hint = f"\nImages without a mask: {', '.join(unmasked[:5])}." if unmasked else ""
                msg = f"{self.source.__name__} cannot read category {category!r} below {self.root}: {error}{hint}"
                raise RuntimeError(msg) from error
        if problems:
            raise LayoutError("\n".join(problems))

    def _join(self, datasets: Mapping[str, AnomalibDataset], purpose: str) -> UnifiedDataset:
        """Join the datasets of all categories, none of which may be empty."""
        empty = [category for category, dataset in datasets.items() if not len(dataset)]
        if empty:
            msg = (
                f"No {purpose} images below {self.root} in: {', '.join(empty)}. "
                "Add images, or leave these out of `categories`."
            )
            raise ValueError(msg)
        home = self.root.resolve()
        for category, dataset in datasets.items():
            dataset.samples = _below(dataset.samples, link=home / category)
        return UnifiedDataset.join(datasets)

    def _tell_what_is_left_out(self, parts: Iterable[AnomalibDataModule]) -> None:
        """Name the files of all categories that are not read."""
        home = self.root.resolve()
        readers = [part for part in parts if isinstance(part, MVTecLayout)]
        if left_out := [path for part in readers for path in part.left_out]:
            logger.warning(
                "Left out, for they are no images by their endings, %d files below %s: %s. Images have endings that "
                "Pillow opens (png, jpg, tif, bmp, webp, ...).",
                len(left_out),
                self.root,
                by_ending(left_out, below=home),
            )
        if not_read := [path for part in readers for path in part.not_read]:
            logger.warning(
                "Not read, for a category holds train, test and ground_truth alone, or for lack of permission: %s.",
                some(not_read),
            )

    def _find_copies(self, subsets: Sequence[UnifiedDataset], *, tell: bool) -> None:
        """Find equal files, the training images first, and say which there are."""
        samples = pd.concat([subset.samples for subset in subsets], ignore_index=True)
        self._copies = equal_files(samples["image_path"].tolist())
        if tell and self._copies:
            names = file_names(samples["image_path"], self.root, endings=True)
            for line in tell_copies(
                self._copies, names=names, labels=samples["label_index"].tolist(), training=len(subsets[0])
            ):
                logger.warning(line)

    def _create_test_split(self) -> None:
        """Keep the source's test set whole."""

    def _create_val_split(self) -> None:
        """Create the validation set; ``from_train`` draws from each category by itself."""
        if self.val_split_mode != ValSplitMode.FROM_TRAIN:
            super()._create_val_split()
            return
        self._everything = self.train_data
        self._split()

    def _split(self) -> None:
        """Hold out images to validate, as the checkpoint's run did if there is one."""
        samples = self._everything.samples
        categories, names = samples["category"].tolist(), file_names(samples["image_path"], self.root)
        copies = [group for found in self._copies if len(group := [i for i in found if i < len(samples)]) > 1]
        seed = int(torch.randint(2**32, ()).item()) if self.seed is None else self.seed
        rows = held_out(categories, names, copies, ratio=self.val_split_ratio, seed=seed)
        if self._earlier_split:
            rows, changes = resumed(categories, names, copies, rows, self._earlier_split)
            if changes:
                logger.warning(changes)
        rest = sorted(set(range(len(samples))) - set(rows))
        self.train_data = self._everything.subsample(rest)  # type: ignore[assignment]
        self.val_data = self._everything.subsample(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: which images train and which validate.

        Returns:
            From :func:`~anomalib_uniass.data.splits.split_state`; empty before ``setup``.
        """
        if not hasattr(self, "val_data"):
            return {}
        training, validation = (
            file_names(data.samples["image_path"], self.root) for data in (self.train_data, self.val_data)
        )
        return split_state(training, validation)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the split of a checkpoint's run in training and validation, and say what changed since.

        Args:
            state_dict: What :meth:`state_dict` returned in that run.

        Raises:
            ValueError: If no image of a category is left to validate, or to train with.
        """
        matters = self.trainer is None or self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)
        if matters and self.val_split_mode == ValSplitMode.FROM_TRAIN:
            self._earlier_split = state_dict
            if hasattr(self, "_everything"):
                self._split()
                self._update_augmentations()

    def _update_augmentations(self) -> None:
        """Update the augmentations of each subset; those per category go to the training set alone."""
        super()._update_augmentations()
        augmentations = {
            category: category_augmentation(
                hflip=category in self.hflip, vflip=category in self.vflip, rotate=category in self.rotate
            )
            for category in self.categories
        }
        self.train_data.category_augmentations = {
            category: augmentation for category, augmentation in augmentations.items() if augmentation is not None
        }

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the data, and add metrics per category, page and comparison to an attached trainer.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; all subsets are made in any case.

        Raises:
            FileNotFoundError: If ``root`` holds data but lacks a category.
            RuntimeError: If the source cannot read a category.
            ValueError: If a category is empty or differs from the layout, if some categories have masks and others
                have none, or if a file cannot be used.
        """
        super().setup(stage)
        if self.trainer is not None:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, CategoryMetricsCallback) for callback in callbacks):
                # First of all, so that it sees the raw anomaly maps before anomalib normalises them.
                callbacks.insert(0, CategoryMetricsCallback())
            if not any(isinstance(callback, ReportCallback) for callback in callbacks):
                callbacks.append(ReportCallback(read_image, notes=self._small_defects))
            if not any(isinstance(callback, DecisionsCallback) for callback in callbacks):
                callbacks.append(DecisionsCallback())  # behind the post-processor
            if self.comparison and not any(isinstance(callback, ComparisonCallback) for callback in callbacks):
                callbacks.insert(0, ComparisonCallback(self.comparison))
            run_folder(self.trainer)
            if not any(isinstance(callback, RunSummary) for callback in callbacks):
                callbacks += [QuietRun(), RunSummary()]

    def train_dataloader(self) -> DataLoader[object]:
        """Make the loader of the training images, and their cache if there is none for this resize.

        Raises:
            MemoryError: If there is too little shared memory for the cache.
            ValueError: If ``cache_images`` is set and the training images are not resized to a fixed size, or to one
                that is no square and ``rotate`` names a category; or if tiles that are no squares would be rotated.
        """
        self._ask_for_earlier_split()
        data = self.train_data
        tile = self._tile_size()
        if tile is not None and tile[0] != tile[1] and not set(self.categories).isdisjoint(self.rotate):
            msg = f"rotate turns tiles, so they must be squares, got tile_size {tile}. Leave `rotate` out."
            raise ValueError(msg)
        data.crop = None if tile is None else RandomCrop(tile)  # in the worker: a batch of photographs is large
        if self.cache_images:
            resize = fixed_resize(data.augmentations, rotated=not set(self.categories).isdisjoint(self.rotate))
            if data.image_cache is None or data.image_cache.resize is not resize:
                data.image_cache = None  # frees the old one first
                data.image_cache = ImageCache(len(data), resize)
        return super().train_dataloader()

    def _ask_for_earlier_split(self) -> None:
        """Warn of a checkpoint that does not tell which images its run learned."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING or self.trainer.ckpt_path is None:
            return
        if self.val_split_mode == ValSplitMode.FROM_TRAIN and not self._earlier_split:
            logger.warning(
                "%s does not tell which images its run learned (it is of version 0.2.0, or was trained on other data "
                "than a %s). Some may validate now, which makes thresholds too low. Begin a new training to be sure.",
                self.trainer.ckpt_path,
                type(self).__name__,
            )

    def val_dataloader(self) -> DataLoader[object]:
        """Make the loader of the validation images; those for tiles come one by one, for they may differ in size."""
        with self._photographs_one_by_one():
            return super().val_dataloader()

    def test_dataloader(self) -> DataLoader[object]:
        """Make the loader of the test images; those for tiles come one by one, for they may differ in size."""
        with self._photographs_one_by_one():
            return super().test_dataloader()

    @contextmanager
    def _photographs_one_by_one(self) -> Iterator[None]:
        """Make loaders of single images, if they are for tiles; a later model has its batches again."""
        asked = self.eval_batch_size
        self.eval_batch_size = asked if self._tile_size() is None else 1
        try:
            yield
        finally:
            self.eval_batch_size = asked

    def _small_defects(self) -> dict[str, str]:
        """Say of which categories defects get small at the size of the tested model, if it tells that size."""
        network = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        image_size = getattr(network, "image_size", None)
        if image_size is None:
            return {}
        losses = what_gets_lost(self.test_data.samples, image_size, tile_size=self._tile_size())
        return {category: f"{loss.text[0].upper()}{loss.text[1:]}" for category, loss in losses.items()}

    def _tile_size(self) -> tuple[int, int] | None:
        """Return the tiles of the model that is trained or tested, if it has some."""
        tiling = getattr(getattr(getattr(self.trainer, "lightning_module", None), "model", None), "tiling", None)
        return None if tiling is None else tiling.tile_size


def _agree_on_task(parts: Mapping[str, AnomalibDataModule]) -> None:
    """Let categories without anomalous images take the task of the others, which must be the same.

    Raises:
        ValueError: If some categories have masks and others have none.
    """
    without = [category for category, part in parts.items() if part.test_data.task == TaskType.CLASSIFICATION]
    rest = [category for category in parts if category not in without]
    masked = [category for category in rest if parts[category].test_data.has_anomalous]
    if without and masked:
        msg = (
            f"All categories must have masks, or none. With masks: {', '.join(masked)}. Without: {', '.join(without)}. "
            "Add the masks, or choose by `categories`."
        )
        raise ValueError(msg)
    if without:
        logger.warning("There are no masks, only labels of images: metrics of pixels are left out.")
        for part in (parts[category] for category in rest):
            for data in (part.train_data, part.test_data):
                data.samples.attrs["task"] = TaskType.CLASSIFICATION.value


def _below(samples: pd.DataFrame, *, link: Path) -> pd.DataFrame:
    """Give paths below a category folder that is a symbolic link the name they have below the root.

    Sources resolve links, so such images would lie outside the root, where the visualizer cannot tell categories apart.
    """
    target = link.resolve()
    if target == link:
        return samples

    def rename(path: object) -> object:
        if isinstance(path, list):
            return [rename(one) for one in path]
        if isinstance(path, str) and Path(path).is_relative_to(target):
            return str(link / Path(path).relative_to(target))
        return path

    # Not `map`, which makes NaN of None.
    masks = pd.Series([rename(path) for path in samples["mask_path"]], index=samples.index, dtype=object)
    return samples.assign(image_path=samples["image_path"].map(rename), mask_path=masks)
