#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# The same volume of 40 micrometre voxels as NIfTI and as NRRD, both with their unit in the header. SimpleITK converts
# the unit of NIfTI to millimetres and ignores the "space units" of NRRD: 0.04 and 40 mm. pynrrd drops letters beyond
# ASCII from headers, so that "µm" is read as "m", a million times as large. Most expect a unit to be read or refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 nibabel==5.4.2 pynrrd==1.1.3 SimpleITK==2.5.7
"$folder/env/bin/python" - "$folder" <<'PY'
import importlib.metadata
import sys
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import SimpleITK as sitk

folder = Path(sys.argv[1])
voxels = np.zeros((8, 8, 8), np.int16)
image = nib.Nifti1Image(voxels, np.diag([40.0, 40, 40, 1]))
image.header.set_xyzt_units("micron")
nib.save(image, folder / "scan.nii")
space = {"space": "left-posterior-superior", "space directions": 40 * np.eye(3), "space origin": [0, 0, 0]}
nrrd.write(str(folder / "scan.nrrd"), voxels, space | {"space units": ["um", "um", "um"]})
print("SimpleITK", sitk.__version__, "pynrrd", importlib.metadata.version("pynrrd"))
sizes = [sitk.ReadImage(str(folder / name)).GetSpacing()[0] for name in ("scan.nii", "scan.nrrd")]
print(f"SimpleITK: voxels of {sizes[0]:g} mm by the NIfTI file, {sizes[1]:g} mm by the NRRD file")
assert np.allclose(sizes, [0.04, 40]), "SimpleITK reads the units otherwise now"
content = (folder / "scan.nrrd").read_bytes().replace(b'"um" "um" "um"', '"µm" "µm" "µm"'.encode())
(folder / "micro.nrrd").write_bytes(content)
unit = nrrd.read_header(str(folder / "micro.nrrd"))["space units"]
print('pynrrd: "µm" is read as', unit)
assert unit == ["m", "m", "m"], "pynrrd reads it otherwise now"
PY
