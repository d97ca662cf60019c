# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Train nnU-Net itself and this collection from scratch on the same cases, and score both on cases neither has seen.

  python tools/beside_nnunet.py FOLDER --labels "['background','anterior','posterior']"
  python tools/beside_nnunet.py FOLDER --train 40 --test 60 --seeds 3 --epochs 25 --iterations 20
  python tools/beside_nnunet.py FOLDER --trainers nnUNetTrainer,nnUNetTrainerNoDeepSupervision    # swap a part there
  python tools/beside_nnunet.py FOLDER --variants "{'ours, no flips': {'flip_probability': 0}}"   # or here

FOLDER holds labelled cases as train.yaml reads them. nnU-Net runs in an environment of its own (.venv-nnunet, made on
first use) and plans for the training cases with its residual encoder. Its plan is made narrow, so that a CPU trains it
in minutes. What the plan then says of spacing, patch, batch and network is what train.yaml is told, as are epochs,
iterations and the learning rate; all else is what each of the two ships. The last weights of both predict the unseen
cases, and one evaluation scores them.

Arms take turns, each on one thread. Seconds are of the processor and of training iterations alone: reading, augmenting
and learning. Each arm and seed has a folder below runs/, so that a comparison that was cut goes on with the same
command. It writes comparison.md and comparison.json, and with --page the table into a page.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.comparing.settings import BesideNnunet

__all__ = ["beside_nnunet"]


def beside_nnunet(settings: BesideNnunet) -> None:
    """Train both, and say how far apart they are."""
    from tools.comparing.comparison import beside_nnunet as run

    run(settings)


if __name__ == "__main__":
    main(beside_nnunet, __doc__)
