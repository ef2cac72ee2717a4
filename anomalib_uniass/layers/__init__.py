# SPDX-License-Identifier: Apache-2.0
"""Layers that UniAS and UniAD share, as the papers write them."""
