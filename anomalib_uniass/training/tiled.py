# SPDX-License-Identifier: Apache-2.0
"""What models of tiles do otherwise as anomalib models: pre-processing, export and calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from anomalib.models.components import AnomalibModule

from anomalib_uniass.deploy.pre_processor import AntialiasedPreProcessor
from anomalib_uniass.layers.seeding import seeded
from anomalib_uniass.layers.tiling import make_tiling

if TYPE_CHECKING:
    import openvino as ov

    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only


class TiledMixin(Base):
    """A model that takes large images by tiles, by its own arguments or by anomalib's ``TilerConfigurationCallback``.

    Expects ``self.model``, a :class:`~anomalib_uniass.layers.tiling.TiledModel`, and the constructor arguments
    ``tile_size`` and ``stride``.
    """

    model: Any

    def follow_tiler(self) -> None:
        """Leave images as large as they are where anomalib's callback has set tiles.

        Raises:
            TypeError: If the pre-processor is not the model's own.
        """
        tiling = self.model.tiling
        if tiling is None or self.hparams["tile_size"] is not None:
            return
        if not isinstance(self.pre_processor, AntialiasedPreProcessor):
            msg = f"Tiles need the model's own pre-processor (pre_processor=True), got {self.pre_processor}."
            raise TypeError(msg)
        self.hparams["tile_size"], self.hparams["stride"] = tiling.tile_size, tiling.stride  # kept in checkpoints
        self.pre_processor.resize_to(None)
        if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
            datamodule._update_augmentations()  # was set up before the callback, with a resize of whole images

    @contextmanager
    def exported_network(self, input_size: tuple[int, int] | None) -> Iterator[None]:
        """Export all tiles of photographs of one size, or a single tile: whoever runs that cuts and blends."""
        tiling, pre_processor = self.model.tiling, cast("AntialiasedPreProcessor", self.pre_processor)
        if tiling is None or input_size is not None:
            yield
            return
        self.model.tiling = None
        pre_processor.resize_to(self.model.image_size)
        try:
            yield
        finally:
            self.model.tiling = tiling
            pre_processor.resize_to(None)

    def calibration_inputs(self, graph: "ov.Model", images: list[np.ndarray]) -> list[np.ndarray]:
        """Return tiles of the images for a graph of a single tile, else the images ``(1, 3, H, W)`` themselves."""
        tiling = make_tiling(self.hparams["tile_size"], self.hparams["stride"])
        if tiling is None or graph.input(0).partial_shape[2].is_static:
            return images
        with seeded(0):
            return [tiling.random_tiles(torch.from_numpy(image)).numpy() for image in images]
