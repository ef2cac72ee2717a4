# SPDX-License-Identifier: Apache-2.0
"""Datamodules that join all categories of a dataset for one unified model."""

from anomalib_uniass.data.dataset import UnifiedDataset
from anomalib_uniass.data.presets import MVTec, VisA
from anomalib_uniass.data.unified import Unified

__all__ = ["MVTec", "Unified", "UnifiedDataset", "VisA"]
