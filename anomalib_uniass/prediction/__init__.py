# SPDX-License-Identifier: Apache-2.0
"""What a prediction leaves behind: pictures and a table under the paths of their images, which are read right."""

from anomalib_uniass.prediction.folder import PredictFolder
from anomalib_uniass.prediction.mixin import PredictionMixin
from anomalib_uniass.prediction.table import PredictionTable
from anomalib_uniass.prediction.visualizer import PathVisualizer

__all__ = ["PathVisualizer", "PredictFolder", "PredictionMixin", "PredictionTable"]
