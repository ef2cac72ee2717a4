# SPDX-License-Identifier: Apache-2.0
"""The two benchmarks of the UniAS paper."""

from pathlib import Path

from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC_CATEGORIES
from anomalib.data.datasets.image.visa import CATEGORIES as VISA_CATEGORIES
from anomalib.data.utils import ValSplitMode
from torchvision.transforms.v2 import Transform

from anomalib_uniass.data.unified import Unified


class MVTec(Unified):
    """MVTec AD, all 15 categories: 3,629 training and 1,725 test images.

    Dataset: P. Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129, 2021 (CC BY-NC-SA 4.0); downloaded by
    anomalib if ``root`` does not exist. Protocol: W. Ma et al., "Towards Accurate Unified Anomaly Segmentation", WACV
    2025. The augmentation per category of its release is set in ``configs/mvtec.yaml``, not here.

    Args:
        root: Folder that holds the category folders.
        categories: Subset of the official categories; None demands all 15.
        train_batch_size: See :class:`Unified`, as for all further arguments.
        eval_batch_size: Images per validation and test batch.
        num_workers: Worker processes per data loader.
        hflip: Categories flipped left and right in training.
        vflip: Categories flipped up and down in training.
        rotate: Categories rotated by quarter turns in training.
        train_augmentations: Further transform of the training images.
        val_augmentations: Transform of the validation images.
        test_augmentations: Transform of the test images.
        augmentations: Transform for each of the three that is not given.
        val_split_mode: Where the validation images come from.
        val_split_ratio: Fraction of the split images, in (0, 1).
        seed: Seed of the split; None draws anew each time.
        comparison: Folder of a comparison to which every tested model adds its row.
        cache_images: Keep resized training images in memory.
    """

    def __init__(
        self,
        *,
        root: Path | str | None = "./datasets/MVTecAD",
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
    ) -> None:
        super().__init__(
            source="MVTecAD",
            root=root,
            categories=list(MVTEC_CATEGORIES) if categories is None else categories,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            hflip=hflip,
            vflip=vflip,
            rotate=rotate,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
            comparison=comparison,
            cache_images=cache_images,
        )


class VisA(Unified):
    """VisA, all 12 categories in its own 1-class split: 8,659 training and 2,162 test images.

    Dataset: Y. Zou et al., "SPot-the-Difference Self-supervised Pre-training for Anomaly Detection and Segmentation",
    ECCV 2022 (CC BY 4.0); downloaded by anomalib if ``root`` does not exist, and converted once. Protocol: W. Ma et
    al., "Towards Accurate Unified Anomaly Segmentation", WACV 2025. The augmentation per category of its release
    is set in ``configs/visa.yaml``, not here.

    Args:
        root: Folder that holds the raw category folders and ``split_csv``, or their conversion ``visa_pytorch``.
        categories: Subset of the official categories; None demands all 12.
        train_batch_size: See :class:`Unified`, as for all further arguments.
        eval_batch_size: Images per validation and test batch.
        num_workers: Worker processes per data loader.
        hflip: Categories flipped left and right in training.
        vflip: Categories flipped up and down in training.
        rotate: Categories rotated by quarter turns in training.
        train_augmentations: Further transform of the training images.
        val_augmentations: Transform of the validation images.
        test_augmentations: Transform of the test images.
        augmentations: Transform for each of the three that is not given.
        val_split_mode: Where the validation images come from.
        val_split_ratio: Fraction of the split images, in (0, 1).
        seed: Seed of the split; None draws anew each time.
        comparison: Folder of a comparison to which every tested model adds its row.
        cache_images: Keep resized training images in memory.
    """

    def __init__(
        self,
        *,
        root: Path | str | None = "./datasets/visa",
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
    ) -> None:
        super().__init__(
            source="Visa",
            root=root,
            categories=list(VISA_CATEGORIES) if categories is None else categories,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            hflip=hflip,
            vflip=vflip,
            rotate=rotate,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
            comparison=comparison,
            cache_images=cache_images,
        )
