# SPDX-License-Identifier: Apache-2.0
"""UniAS (Ma et al., WACV 2025)."""
