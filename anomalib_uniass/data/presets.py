# SPDX-License-Identifier: Apache-2.0
"""The two benchmarks of the UniAS paper."""

from pathlib import Path
from typing import Any

from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC_CATEGORIES
from anomalib.data.datasets.image.visa import CATEGORIES as VISA_CATEGORIES

from anomalib_uniass.data.unified import Unified


class MVTec(Unified):
    """MVTec AD, all 15 categories: 3,629 training and 1,725 test images.

    Dataset: P. Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129, 2021 (CC BY-NC-SA 4.0); downloaded by
    anomalib if ``root`` does not exist. Protocol: W. Ma et al., "Towards Accurate Unified Anomaly Segmentation", WACV
    2025. The augmentation per category of its release is set in ``configs/mvtec.yaml``, not here.

    Args:
        root: Folder that holds the category folders.
        categories: Subset of the official categories; None demands all 15.
        arguments: All further arguments of :class:`Unified`, with its defaults.
    """

    def __init__(
        self, *, root: Path | str | None = "./datasets/MVTecAD", categories: list[str] | None = None, **arguments: Any
    ) -> None:
        # anomalib's command line finds the further arguments in the call.
        super().__init__(
            source="MVTecAD",
            root=root,
            categories=list(MVTEC_CATEGORIES) if categories is None else categories,
            **arguments,
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
        arguments: All further arguments of :class:`Unified`, with its defaults.
    """

    def __init__(
        self, *, root: Path | str | None = "./datasets/visa", categories: list[str] | None = None, **arguments: Any
    ) -> None:
        # anomalib's command line finds the further arguments in the call.
        super().__init__(
            source="Visa",
            root=root,
            categories=list(VISA_CATEGORIES) if categories is None else categories,
            **arguments,
        )
