#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# OpenCV: whether a 16-bit TIFF comes as a negative depends on the flag of imread.
#
# A grey TIFF may say that 0 is white (PhotometricInterpretation 0, WhiteIsZero), as scanners and X-ray line detectors
# do. OpenCV turns it round at 8 bits, whatever the flag. At 16 bits `IMREAD_GRAYSCALE` turns it round,
# `IMREAD_UNCHANGED` and `IMREAD_ANYDEPTH`, which one takes to keep the depth, do not: the preview is right and the data
# are its negative.
#
# Guessed before: OpenCV looks at the tag at 8 bits, and at 16 bits never. Seen with opencv-python-headless 5.0.0.93,
# tifffile 2026.3.3, numpy 2.4.6, Python 3.11.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    opencv-python-headless==5.0.0.93 tifffile==2026.3.3 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import cv2
import numpy as np
import tifffile

FLAGS = ("IMREAD_GRAYSCALE", "IMREAD_ANYDEPTH", "IMREAD_UNCHANGED")
brighter = {}
for depth in (8, 16):
    dtype = np.dtype(f"uint{depth}")
    half_and_half = np.zeros((4, 4), dtype)
    half_and_half[:, 2:] = np.iinfo(dtype).max
    tifffile.imwrite("grey.tif", half_and_half, photometric="miniswhite")  # white on the left, black on the right
    for flag in FLAGS:
        read = cv2.imread("grey.tif", getattr(cv2, flag))
        brighter[depth, flag] = "left" if read[0, 0] > read[0, 3] else "right"
assert brighter == {
    (8, "IMREAD_GRAYSCALE"): "left",
    (8, "IMREAD_ANYDEPTH"): "left",
    (8, "IMREAD_UNCHANGED"): "left",
    (16, "IMREAD_GRAYSCALE"): "left",
    (16, "IMREAD_ANYDEPTH"): "right",
    (16, "IMREAD_UNCHANGED"): "right",
}, brighter
print("white is on the left; at 16 bits it is", ", ".join(f"{brighter[16, flag]} by {flag}" for flag in FLAGS))
EOF
