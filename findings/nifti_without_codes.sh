#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# A NIfTI file whose qform_code and sform_code are both 0, which the standard allows (method 1): nibabel turns the first
# axis round and puts the origin into the middle, SimpleITK turns the first two axes round and puts it into a corner. So
# the same voxel is in front for one and in the back for the other. Most expect one place, or a warning.
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

path = Path(sys.argv[1]) / "scan.nii"
voxels = np.zeros((40, 50, 60), np.int16)
image = nib.Nifti1Image(voxels, None)
image.header.set_zooms((1, 1, 1))
nib.save(image, path)
header = nib.load(path).header
assert header["qform_code"] == header["sform_code"] == 0
print("nibabel", nib.__version__, "SimpleITK", sitk.__version__)
voxel = [5, 45, 30]
by_nibabel = nib.affines.apply_affine(nib.load(path).affine, voxel)
x, y, z = sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint(voxel)
by_sitk = np.array([-x, -y, z])  # to right, anterior, superior
print("place of voxel", voxel, "in RAS, mm: nibabel", by_nibabel.tolist(), "SimpleITK", by_sitk.tolist())
assert by_nibabel.tolist() == [14.5, 20.5, 0.5], "nibabel places it elsewhere now"
assert by_sitk.tolist() == [-5, -45, 30], "SimpleITK places it elsewhere now"
print("in front of the middle for nibabel; behind it for SimpleITK, whose second axis leads back")
PY
