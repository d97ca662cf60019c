#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# nibabel reads as many bytes of a .nii.gz as the header asks for and stops in front of the checksum of the gzip stream.
# So most single flipped bits in the voxels of a valid file, of a bad disk or copy, give other voxels and no word, where
# "gzip -t" notices every one. Most expect that a format with a checksum is checked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet numpy==2.4.6 nibabel==5.4.2
"$folder/env/bin/python" - "$folder" <<'PY'
import gzip
import random
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

path = Path(sys.argv[1]) / "scan.nii.gz"
voxels = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
whole, draw = path.read_bytes(), random.Random(1)
silent = told = by_gzip = 0
for _ in range(300):
    content = bytearray(whole)
    content[draw.randrange(1000, len(content) - 8)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    try:
        silent += not np.array_equal(nib.load(path).get_fdata(dtype=np.float32), voxels)
    except Exception:
        told += 1
    try:
        gzip.decompress(bytes(content))
    except Exception:
        by_gzip += 1
print("nibabel", nib.__version__)
print(f"300 files with one flipped bit: nibabel refuses {told} and returns other voxels for {silent}; gzip refuses {by_gzip}")
assert by_gzip == 300
assert silent > 100, "nibabel notices them now"
PY
