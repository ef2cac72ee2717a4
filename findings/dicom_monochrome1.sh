#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# DICOM: SimpleITK turns MONOCHROME1 round, pydicom does not, so that a void is bright in one and dark in the other.
#
# X-ray detectors write castings and welds as MONOCHROME1 (0 is white) as well as MONOCHROME2, at times both in one
# archive. SimpleITK gives 4095 - value for MONOCHROME1 of 12 bits, pydicom's `pixel_array` the stored value for both. A
# model that is trained on arrays of the one and served arrays of the other sees negatives, and the types and shapes say
# nothing of it. To be sure, read PhotometricInterpretation and turn round yourself what pydicom gives.
#
# Guessed before: both give stored values here, as a matter of display (SimpleITK leaves the window alone too). Seen
# with SimpleITK 2.5.7, pydicom 3.0.2, numpy 2.4.6, Python 3.11.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    simpleitk==2.5.7 pydicom==3.0.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

stored = np.tile(np.array([0, 1, 2048, 4095], np.uint16), (4, 1))


def write(path: str, interpretation: str) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset(path, {}, file_meta=meta)
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.Modality, image.SamplesPerPixel, image.PhotometricInterpretation = "DX", 1, interpretation
    image.Rows, image.Columns = stored.shape
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelData = stored.tobytes()
    image.save_as(path, enforce_file_format=True)


for interpretation in ("MONOCHROME1", "MONOCHROME2"):
    path = f"{interpretation}.dcm"
    write(path, interpretation)
    by_pydicom = pydicom.dcmread(path).pixel_array
    by_simpleitk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))[0]
    assert np.array_equal(by_pydicom, stored)
    assert by_simpleitk.dtype == by_pydicom.dtype and by_simpleitk.shape == by_pydicom.shape
    expected = 4095 - stored if interpretation == "MONOCHROME1" else stored
    assert np.array_equal(by_simpleitk, expected), by_simpleitk[0]
    if interpretation == "MONOCHROME1":
        print("MONOCHROME1, stored", stored[0], "pydicom", by_pydicom[0], "SimpleITK", by_simpleitk[0])
EOF
