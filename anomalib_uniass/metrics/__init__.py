# SPDX-License-Identifier: Apache-2.0
"""Per-category segmentation metrics on raw anomaly maps, for any anomalib model."""

from anomalib_uniass.metrics.callback import CategoryMetricsCallback
from anomalib_uniass.metrics.category_metrics import CategoryMetrics
from anomalib_uniass.metrics.functional import (
    BinaryCurve,
    aupro,
    auroc,
    average_precision,
    binary_curve,
    dice_score,
    dice_threshold,
    f1_max,
    image_metrics,
    label_regions,
    pixel_metrics,
)
from anomalib_uniass.metrics.table import format_table, write_table

__all__ = [
    "BinaryCurve",
    "CategoryMetrics",
    "CategoryMetricsCallback",
    "aupro",
    "auroc",
    "average_precision",
    "binary_curve",
    "dice_score",
    "dice_threshold",
    "f1_max",
    "format_table",
    "image_metrics",
    "label_regions",
    "pixel_metrics",
    "write_table",
]
