# SPDX-License-Identifier: Apache-2.0
"""Patchcore (Roth et al., CVPR 2022) with a bounded memory bank."""
