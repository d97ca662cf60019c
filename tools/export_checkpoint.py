# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write a bundle's weights for the reference's downstream code, as safetensors, or as a model for nnU-Net.

  python tools/export_checkpoint.py mae_resenc_l                          # models/pretrained_encoder.pt
  python tools/export_checkpoint.py mae_resenc_l --source pretraining_state.pt    # with the method's own layers
  python tools/export_checkpoint.py mae_resenc_l --format safetensors     # this project's names, receipt as metadata
  python tools/export_checkpoint.py mae_resenc_l --format nnunet          # models/model.pt, as a folder for nnU-Net

The checkpoint has the reference's names, aliases included, and its adaptation plan, inside and beside it. Tokens of
Primus are in the order that today's downstream Primus reads, first spatial axis slowest, and the plan says so in
token_order, which tools/import_checkpoint.py obeys.

The folder for nnU-Net has plans.json, dataset.json and fold_0/checkpoint_final.pth: preprocessing, patch and classes as
model.json says them. nnU-Net builds a ResEnc-L of any size from the plans, and Primus in its four sizes S, B, M and L.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.checkpoints.settings import ExportCheckpoint
from tools.commanding.running import main

__all__ = ["export_checkpoint"]


def export_checkpoint(settings: ExportCheckpoint) -> None:
    """Export weights."""
    from tools.checkpoints.exporting import export_checkpoint as run

    run(settings)


if __name__ == "__main__":
    main(export_checkpoint, __doc__)
