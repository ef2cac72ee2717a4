# SPDX-License-Identifier: Apache-2.0
"""UniAS for anomalib: one anomaly segmentation model for all categories.

Importing the package registers its models and datamodules with anomalib; nothing else happens at import.
"""

from anomalib_uniass.data import MVTec, Unified, VisA
from anomalib_uniass.models.patchcore.lightning_model import BoundedPatchcore
from anomalib_uniass.models.uniad.lightning_model import UniAD
from anomalib_uniass.models.unias.lightning_model import UniAS
from anomalib_uniass.models.unias.official import convert_official_state_dict, load_official_checkpoint
from anomalib_uniass.registration import register

__all__ = [
    "BoundedPatchcore",
    "MVTec",
    "UniAD",
    "UniAS",
    "Unified",
    "VisA",
    "convert_official_state_dict",
    "load_official_checkpoint",
    "register",
]

register()
