# SPDX-License-Identifier: Apache-2.0
"""Thresholds per category, calibrated on good images."""
