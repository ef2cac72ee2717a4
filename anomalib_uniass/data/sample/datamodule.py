# SPDX-License-Identifier: Apache-2.0
"""The sample dataset as a datamodule."""

from collections.abc import Sequence
from pathlib import Path

from anomalib_uniass.data.sample.writer import SAMPLE_CATEGORIES, write_sample_dataset
from anomalib_uniass.data.unified import Unified


class InspectionSample(Unified):
    """Coins, brick, gravel and two kinds of solar cells with generated defects; to try things, not a benchmark.

    ``prepare_data`` writes it from images that pip packages carry (extra ``demo``); the solar cells are licensed
    CC BY-NC-SA 4.0.

    Args:
        root: Folder to write to and read from.
        categories: Subset of the five categories; None takes all.
        train_batch_size: See :class:`~anomalib_uniass.data.Unified`, as for all further arguments.
        eval_batch_size: Images per validation and test batch.
        num_workers: Worker processes per data loader.
        hflip: Categories flipped left and right in training.
        vflip: Categories flipped up and down in training.
        rotate: Categories rotated by quarter turns in training.
        val_split_ratio: Fraction of each category's training images kept for validation, in (0, 1).
        seed: Seed of that split.
        comparison: Folder of a comparison to which every tested model adds its row.
    """

    def __init__(
        self,
        *,
        root: Path | str = "./datasets/inspection_sample",
        categories: list[str] | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        hflip: list[str] | None = None,
        vflip: list[str] | None = None,
        rotate: list[str] | None = None,
        val_split_ratio: float = 0.05,
        seed: int | None = 0,
        comparison: Path | str | None = None,
    ) -> None:
        super().__init__(
            source="MVTecAD",
            root=root,
            categories=categories,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            hflip=hflip,
            vflip=vflip,
            rotate=rotate,
            val_split_ratio=val_split_ratio,
            seed=seed,
            comparison=comparison,
        )

    def _official_categories(self) -> Sequence[str]:
        return SAMPLE_CATEGORIES

    def prepare_data(self) -> None:
        """Write the dataset unless it is there.

        Raises:
            ImportError: If a package of the extra ``demo`` is missing.
            FileExistsError: If ``root`` holds something else.
        """
        write_sample_dataset(self.root)
        super().prepare_data()
