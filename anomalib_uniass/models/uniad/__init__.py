# SPDX-License-Identifier: Apache-2.0
"""UniAD (You et al., NeurIPS 2022)."""
