# SPDX-License-Identifier: Apache-2.0
"""Export: checks before, the resize in the graph, thresholds beside, INT8 where it keeps the defects."""
