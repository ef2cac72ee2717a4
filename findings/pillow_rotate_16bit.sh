#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pillow: rotating a 16-bit image with BILINEAR or BICUBIC leaves an image of noise between 0 and 255.
#
# Mode `I;16` is what Pillow makes of 16-bit PNG and TIFF and of a uint16 array. `resize` interpolates it rightly, and
# `rotate` and `transform` with NEAREST too. With BILINEAR or BICUBIC the result is nearly black for eyes and for a
# network: a ramp of 0 to 6,300 moved by a quarter of a pixel should read 2825, 2925, 3025, and reads 91, 58, 166. The
# result still is of mode `I;16`, without a warning. So augmenting 12-bit photographs by rotation trains on noise. In
# mode `I` or `F` the same call is right: convert first.
#
# Guessed before: as right as `resize`. Seen with Pillow 13.0.0, numpy 2.4.6, Python 3.11.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import numpy as np
from PIL import Image

ramp = np.tile(np.arange(64, dtype=np.uint16) * 100, (64, 1))


def moved(image: Image.Image, how: Image.Resampling) -> np.ndarray:
    quarter = (1, 0, 0.25, 0, 1, 0)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, quarter, how)).astype(float)[:, 2:-2]


image = Image.fromarray(ramp)
assert image.mode == "I;16"
right = ramp[:, 2:-2] + 25.0
for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
    for mode in "IF":
        assert np.abs(moved(image.convert(mode), how) - right).max() < 10
    wrong = moved(image, how)
    assert wrong.max() < 256 and right.max() > 6000, (wrong.max(), right.max())
assert np.asarray(image.rotate(10, Image.Resampling.BILINEAR)).max() < 256
assert np.asarray(image.rotate(10, Image.Resampling.NEAREST)).max() > 6000
bilinear = moved(image, Image.Resampling.BILINEAR)
print("a 16-bit ramp moved by a quarter of a pixel: expected", right[5, 26:29], "Pillow", bilinear[5, 26:29])
EOF
