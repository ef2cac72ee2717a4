# SPDX-License-Identifier: Apache-2.0
"""A sample dataset of real photographs with generated defects that needs no download beyond pip."""

from anomalib_uniass.data.sample.datamodule import InspectionSample
from anomalib_uniass.data.sample.writer import SAMPLE_CATEGORIES, write_sample_dataset

__all__ = ["SAMPLE_CATEGORIES", "InspectionSample", "write_sample_dataset"]
