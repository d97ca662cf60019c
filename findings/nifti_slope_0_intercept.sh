#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# A NIfTI file with scl_slope 0 and scl_inter -1024. The standard scales voxels "if the scl_slope field is nonzero", so
# they mean what is stored. nibabel reads them so; SimpleITK adds the intercept. One reader's air is the other's water.
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
print("nibabel", nib.__version__, "SimpleITK", sitk.__version__)
for slope in (0.0, np.nan):
    header = nib.Nifti1Header()
    header.set_data_shape((4, 4, 4))
    header.set_data_dtype(np.int16)
    header.set_qform(np.eye(4), code=1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, -1024, 352
    path.write_bytes(header.binaryblock + bytes(4) + np.full(64, 1024, np.int16).tobytes())
    ours = float(nib.load(path).get_fdata().mean())
    theirs = float(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).mean())
    print(f"stored 1024, scl_slope {slope:g}, scl_inter -1024: nibabel {ours:g}, SimpleITK {theirs:g}")
    assert (ours, theirs) == (1024, 0), "they read it otherwise now"
PY
