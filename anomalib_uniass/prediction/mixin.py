# SPDX-License-Identifier: Apache-2.0
"""What the models of this package do in ``predict`` beyond anomalib's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anomalib.models.components import AnomalibModule
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback

from anomalib_uniass.prediction.reading import ImageReading
from anomalib_uniass.prediction.table import PredictionTable
from anomalib_uniass.prediction.visualizer import PathVisualizer
from anomalib_uniass.results import RunFolder, run_folder

LABEL_SIZE = 16
"""Pixels of the letters on a picture's panels: by itself anomalib cuts off "Image + Anomaly Map"."""

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    Base = object  # a plain mixin at run time: anomalib lists direct subclasses of AnomalibModule only


class PredictionMixin(Base):
    """Images read right, pictures under the paths of their images, and a table of all, in a folder of the run's own."""

    def prepare_data(self) -> None:
        """Choose the folder of the results: here one process alone is asked, and nothing has been written yet."""
        super().prepare_data()
        if self.trainer.is_global_zero:
            run_folder(self.trainer).open(self.trainer)

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Return anomalib's visualizer with names that keep all pictures apart."""
        return PathVisualizer(text_config={"size": LABEL_SIZE})

    def configure_callbacks(self) -> Sequence[Callback]:
        """Put the reading before anomalib's pre-processor, and what looks at results behind its post-processor."""
        callbacks = super().configure_callbacks()
        callbacks = callbacks if isinstance(callbacks, Sequence) else [callbacks]
        return [ImageReading(), *callbacks, PredictionTable(), RunFolder()]
