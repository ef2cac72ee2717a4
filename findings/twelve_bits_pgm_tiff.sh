#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Twelve bits: Pillow multiplies by 16 in PGM and not in TIFF, OpenCV in TIFF and not in PGM.
#
# The same 12-bit picture, white 4095, as PGM (maxval 4095) and as TIFF (BitsPerSample 12). Pillow reads white as 65535
# from the PGM and as 4095 from the TIFF, OpenCV the other way round: 4095 and 65520. So neither "divide by 4095" nor
# "divide by 65535" is right for one library, or for one format: a camera's frames that are kept as PGM and tested as
# TIFF differ by a factor of 16 in both, in opposite directions.
#
# Guessed before: each library has its own rule, and keeps to it. Seen with Pillow 13.0.0, opencv-python-headless
# 5.0.0.93, tifffile 2026.3.3, imagecodecs 2026.3.6, numpy 2.4.6, Python 3.11.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pillow==13.0.0 opencv-python-headless==5.0.0.93 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

frame = np.tile(np.array([0, 1024, 2048, 4095], np.uint16), (4, 1))
Path("frame.pgm").write_bytes(b"P5\n4 4\n4095\n" + frame.astype(">u2").tobytes())
tifffile.imwrite("frame.tif", frame, bitspersample=12, photometric="minisblack")
assert np.array_equal(tifffile.imread("frame.tif"), frame)

white = {
    (name, path): int(read(path).max())
    for path in ("frame.pgm", "frame.tif")
    for name, read in {
        "Pillow": lambda path: np.asarray(Image.open(path)),
        "OpenCV": lambda path: cv2.imread(path, cv2.IMREAD_UNCHANGED),
    }.items()
}
assert white == {
    ("Pillow", "frame.pgm"): 65535,
    ("Pillow", "frame.tif"): 4095,
    ("OpenCV", "frame.pgm"): 4095,
    ("OpenCV", "frame.tif"): 65520,
}, white
print("white of 12 bits:", ", ".join(f"{name} {path} {value}" for (name, path), value in white.items()))
EOF
