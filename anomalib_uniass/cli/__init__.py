# SPDX-License-Identifier: Apache-2.0
"""The commands of this package, a file each; `anomalib_uniass.__main__` finds them."""
