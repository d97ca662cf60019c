# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Turn a public checkpoint, or one that nnssl made, into a bundle's pre-trained encoder, with a receipt.

  python tools/import_checkpoint.py mae_resenc_l                            # the published weights, from Hugging Face
  python tools/import_checkpoint.py mae_resenc_l --source checkpoint_final.pth
  python tools/import_checkpoint.py mae_primus_m --source owner/name@revision
  python tools/import_checkpoint.py mae_primus_m --source https://host/checkpoint_final.pth --token_order straight
  python tools/import_checkpoint.py mae_resenc_l --source nnUNet_results/Dataset001_X/nnUNetTrainer__...__3d_fullres
  python tools/import_checkpoint.py --list                                  # public checkpoints that are known

It writes models/pretrained_encoder.pt of the bundle, which its train config reads, and pretrained_encoder.json beside
it: where the weights come from and what became of each tensor. An earlier file there is kept under another name.
Without network access, put checkpoint_final.pth into bundles/<bundle>/models/openmind/ and run the first command.
A folder of models that nnU-Net trained (a residual encoder U-Net that halves all axes alike) becomes models/model.pt,
or one for each fold, with a model.json by which inference.yaml predicts as nnU-Net does.

What pre-trained it, and under which licence, is what the file, the list, its model card or you say (--method,
--licence, --citation), else unknown, and the receipt says so; the order of the tokens of Primus is never assumed.

Nothing in the file is executed: tensors and plain values only. A file that is damaged, of another bundle, or does not
cover the encoder is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.checkpoints.settings import ImportCheckpoint
from tools.commanding.running import main

__all__ = ["import_checkpoint"]


def import_checkpoint(settings: ImportCheckpoint) -> None:
    """Import a checkpoint."""
    from tools.checkpoints.importing import import_checkpoint as run

    run(settings)


if __name__ == "__main__":
    main(import_checkpoint, __doc__)
