# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make a bundle for your own classes and channels from a pre-trained encoder, ready for training and MONAI Label.

  python tools/new_task.py mae_resenc_l --labels "gray matter,white matter" --output bundles_of_mine/brain_tissue
  python tools/new_task.py mae_primus_m --labels "edema,core" --channels "T1,FLAIR" --output glioma
  python tools/new_task.py mae_resenc_l --labels lesion --from_scratch true --output lesion
  python tools/new_task.py mae_resenc_l --model trained/model.pt --output ready    # of what you fine-tuned already

The folder runs on its own: metadata, training and inference agree on labels and channels, the encoder is fitted to
them, and its receipt lies beside it. The name of the folder is the name of the bundle. What the class 0 is need not be
said: it is the background.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.exporting.settings import NewTask

__all__ = ["new_task"]


def new_task(settings: NewTask) -> None:
    """Make a bundle for a task."""
    from tools.exporting.new_task import new_task as run

    run(settings)


if __name__ == "__main__":
    main(new_task, __doc__)
