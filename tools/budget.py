# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a run needs of a GPU, without one: memory, work, what the loader must deliver, and hours on named GPUs.

  python tools/budget.py mae_resenc_l                                     # pre-training as published
  python tools/budget.py mae_resenc_l --gpu 24                            # what fits 24 GiB, as settings to paste
  python tools/budget.py mae_primus_m --workflow train --labels "['background','lesion']" --patch_size "[128,128,128]"
  python tools/budget.py voco_resenc_l --processes 4 --gpu 80             # the batch shared by four GPUs
  python tools/budget.py spark3d_resenc_l --workflow inference --volume 400,400,600
  python tools/budget.py all --output docs/budget.md                      # the tables of all bundles (minutes)
  python tools/budget.py all --check 64                                   # the estimate against this CPU (minutes)

The step is the config's own: its views, network, loss and optimizer are run by its trainer on a device that holds
nothing but shapes. Memory is an estimate that leaves a stated margin; time is a range from the share of a GPU's peak
that such networks reach, since nothing was measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.budgeting.settings import Budget
from tools.commanding.running import main

__all__ = ["budget"]


def budget(settings: Budget) -> None:
    """Print what a run needs."""
    from tools.budgeting.budget import budget as run

    run(settings)


if __name__ == "__main__":
    main(budget, __doc__)
