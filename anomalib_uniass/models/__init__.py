# SPDX-License-Identifier: Apache-2.0
"""Models of the plugin."""
