# SPDX-License-Identifier: Apache-2.0
"""What is true of any model that trains here, whatever it learns."""
