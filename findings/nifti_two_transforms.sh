#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# A NIfTI file with a qform (code 1, scanner) and another sform (code 2, aligned), as registration tools write: nibabel
# takes the sform, SimpleITK the qform; with sform code 1 both take the sform. With axes of the sform 0.1 degrees off
# right angles SimpleITK takes the qform for every code. And where both take the sform, SimpleITK takes the voxel sizes
# from pixdim. Most expect that one file has one place, or a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 nibabel==5.4.2 SimpleITK==2.5.7
"$folder/env/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

sitk.ProcessObject.SetGlobalWarningDisplay(False)
path = Path(sys.argv[1]) / "scan.nii"
print("nibabel", nib.__version__, "SimpleITK", sitk.__version__)


def places(sform, code, pixdim=1.0):
    """Return where both put the voxel (10, 0, 0), in RAS."""
    header = nib.Nifti1Header()
    header.set_data_shape((20, 20, 20))
    header.set_data_dtype(np.int16)
    header.set_qform(np.eye(4), code=1)
    header.set_sform(sform, code=code)
    header["pixdim"][1:4] = pixdim
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(4 + 2 * 8000))
    x, y, z = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint([10, 0, 0])
    return np.round(nib.affines.apply_affine(nib.load(path).affine, [10, 0, 0]), 3).tolist(), [-x, -y, z]


moved = np.eye(4)
moved[:3, 3] = 0, 0, 25
for code, other in ((1, 25.0), (2, 0.0), (3, 0.0), (4, 0.0)):
    ours, theirs = places(moved, code)
    print(f"qform code 1, sform code {code} 25 mm higher: nibabel z = {ours[2]:g}, SimpleITK z = {theirs[2]:g}")
    assert (ours[2], theirs[2]) == (25, other), "they agree otherwise now"
sheared = moved.copy()
sheared[1, 0] = np.tan(np.deg2rad(0.1))
ours, theirs = places(sheared, 1)
print(f"the same with axes 0.1 degrees off right angles, sform code 1: nibabel {ours[2]:g}, SimpleITK {theirs[2]:g}")
assert (ours[2], theirs[2]) == (25, 0)
wide = moved @ np.diag([2, 2, 2, 1])
ours, theirs = places(wide, 1)
print(f"an sform of 2 mm beside a pixdim of 1 mm, voxel 10: nibabel {ours[0]:g} mm from the first, SimpleITK {theirs[0]:g}")
assert (ours[0], theirs[0]) == (20, 10)
PY
