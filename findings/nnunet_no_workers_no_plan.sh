#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# What the setting that makes nnU-Net train without worker processes does to its planning: the planner takes the number of
# worker processes for its number of threads, and 0 threads there are not.
#
#   bash findings/nnunet_no_workers_no_plan.sh              # installs nnunetv2 into a temporary folder (with torch, several GB)
#   PYTHON=.venv-nnunet/bin/python bash findings/nnunet_no_workers_no_plan.sh    # or takes an environment that has this version
set -euo pipefail
VERSION=2.8.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON="$work/venv/bin/python"
  "$PYTHON" -m pip install --quiet "nnunetv2==$VERSION"
fi
export nnUNet_raw="$work/raw" nnUNet_preprocessed="$work/preprocessed" nnUNet_results="$work/results"
"$PYTHON" -W ignore - "$VERSION" <<'END'
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np

version = sys.argv[1]
found = importlib.metadata.version("nnunetv2")
assert found == version, f"this is nnunetv2 {found}, not {version}; see whether it is as below"
folder = Path(os.environ["nnUNet_raw"]) / "Dataset001_Balls"
grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"))
for case in range(3):
    ball = (((grid - 20) ** 2).sum(0) < (6 + case) ** 2).astype(np.uint8)
    image = (100 * ball + np.random.default_rng(case).normal(size=ball.shape)).astype(np.float32)
    for kind, name, values in (("imagesTr", f"ball_{case}_0000", image), ("labelsTr", f"ball_{case}", ball)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / kind / f"{name}.nii.gz")
about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "numTraining": 3, "file_ending": ".nii.gz"}
(folder / "dataset.json").write_text(json.dumps(about))

commands = Path(sys.executable).parent  # as nnU-Net installs them
run = {"env": os.environ, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
subprocess.run([commands / "nnUNetv2_extract_fingerprint", "-d", "1", "-np", "1"], check=True, **run)
print(f"nnunetv2 {version}, three volumes, fingerprint, then nnUNetv2_plan_experiment -d 1:")
said = {}
for workers in ("1", "0"):
    os.environ["nnUNet_n_proc_DA"] = workers
    done = subprocess.run([commands / "nnUNetv2_plan_experiment", "-d", "1"], **run)
    said[workers] = "a plan" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    print(f"  nnUNet_n_proc_DA={workers}: {said[workers]}")
assert said["1"] == "a plan", "this has changed"
assert "set_num_threads" in said["0"], "this has changed"
print("most expect: the same plan, since the variable names the worker processes of augmentation, which planning has not,")
print("  and nnU-Net trains with 0 of them (in the process itself), as one sets it where /dev/shm is small")
print("why it matters: a container that sets it once for all stops at nnUNetv2_plan_experiment; set it for training alone")
END
