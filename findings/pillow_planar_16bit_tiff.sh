#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pillow: a 16-bit colour TIFF that stores its channels one after the other becomes stripes.
#
# TIFF allows colours pixel by pixel or plane by plane (PlanarConfiguration 2, as some cameras and many scientific
# programs write). By planes and without compression, Pillow takes the two bytes of a value for two pixels, and reads
# the left half of the picture alone: of a picture of one colour, red 1000, it makes columns of 232 and 3 (1000 = 3 *
# 256 + 232), in mode RGB, without a warning. The same planes compressed, and colours pixel by pixel, give the high
# byte, 3, everywhere. With 8 bits it is right.
#
# Guessed before: the high byte, as everywhere else in Pillow. Seen with Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6,
# Python 3.11.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import numpy as np
import tifffile
from PIL import Image


def read(dtype: type, colour: tuple[int, int, int], compression: str | None = None) -> np.ndarray:
    """Return what Pillow makes of a picture of one colour that is stored by planes."""
    planes = np.empty((3, 4, 8), dtype)
    planes[:] = np.array(colour, dtype)[:, None, None]
    tifffile.imwrite("colour.tif", planes, photometric="rgb", planarconfig="separate", compression=compression)
    assert np.array_equal(tifffile.imread("colour.tif"), planes)
    return np.asarray(Image.open("colour.tif"))


assert (read(np.uint8, (10, 20, 30)) == (10, 20, 30)).all()
assert (read(np.uint16, (1000, 2000, 3000), "deflate") == (3, 7, 11)).all()
striped = read(np.uint16, (1000, 2000, 3000))
assert (striped[:, 0::2] == (232, 208, 184)).all() and (striped[:, 1::2] == (3, 7, 11)).all(), striped[0]
print("16-bit red of 1000, stored by planes; a row of it in Pillow:", striped[0, :, 0])
EOF
