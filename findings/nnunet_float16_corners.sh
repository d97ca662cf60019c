#!/usr/bin/env bash
# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
# What nnU-Net's sliding window makes of logits at the edges and corners of a volume: its sums are float16, in which the
# smallest weights of its Gaussian are lost.
#
#   bash findings/nnunet_float16_corners.sh              # installs nnunetv2 into a temporary folder (with torch, several GB)
#   PYTHON=.venv-nnunet/bin/python bash findings/nnunet_float16_corners.sh    # or takes an environment that has this version
set -euo pipefail
VERSION=2.8.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${PYTHON:-}" ]; then
  python3 -m venv "$work/venv"
  PYTHON="$work/venv/bin/python"
  "$PYTHON" -m pip install --quiet "nnunetv2==$VERSION"
fi
export nnUNet_raw="$work" nnUNet_preprocessed="$work" nnUNet_results="$work"
"$PYTHON" -W ignore - "$VERSION" <<'END'
import contextlib
import importlib.metadata
import io
import sys

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

version = sys.argv[1]
found = importlib.metadata.version("nnunetv2")
assert found == version, f"this is nnunetv2 {found}, not {version}; see whether it is as below"
LOGITS = (0.40, 0.48)  # everywhere: class 1 wins


class Constant(torch.nn.Module):
    def forward(self, x):
        return torch.tensor(LOGITS).view(1, 2, 1, 1, 1) * torch.ones_like(x)


plans = PlansManager({"configurations": {"3d_fullres": {"architecture": {}, "patch_size": [128, 128, 128]}}})
labels = {"labels": {"background": 0, "lesion": 1}}
with contextlib.redirect_stdout(io.StringIO()):
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    configuration = plans.get_configuration("3d_fullres")
    predictor.manual_initialization(Constant(), plans, configuration, None, labels, "nnUNetTrainer", None)
    with torch.inference_mode():
        logits = predictor.predict_sliding_window_return_logits(torch.zeros(1, 128, 128, 128)).float()
segmentation = predictor.label_manager.convert_logits_to_segmentation(logits)
lost = segmentation == 0
print(f"nnunetv2 {version}, one tile of 128^3 voxels, a network that gives {LOGITS} at every voxel:")
for name, place in (("middle", (64, 64, 64)), ("face", (0, 64, 64)), ("edge", (0, 0, 64)), ("corner", (0, 0, 0))):
    print(f"  {name:6} logits {[round(float(value), 3) for value in logits[(slice(None), *place)]]}")
print(f"  class 1 wins everywhere, and is predicted in all but {int(lost.sum()):,} of {lost.numel():,} voxels")
assert logits[:, 0, 0, 0].tolist() == [0.0, 0.0], "this has changed"
assert [round(value, 2) for value in logits[:, 64, 64, 64].tolist()] == [0.4, 0.48], "this has changed"
assert lost[0, 0, 0] and not lost[64, 64, 64] and 1000 < int(lost.sum()) < 500000, "this has changed"
print("most expect: 0.4 and 0.48 at every voxel, and class 1, since a mean of equal numbers is that number")
print("why it matters: what touches the border of a volume (or of its part that is not 0) near a corner is predicted")
print("  by rounded logits, ties go to the background; another program with the same weights gives other labels there")
END
