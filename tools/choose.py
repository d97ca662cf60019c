# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which checkpoint for my task? Ask a few labelled cases: probe every encoder at hand, then fine-tune the best shortly.

  python tools/choose.py --data FOLDER --labels "['background','lesion']"
  python tools/choose.py --data FOLDER --labels dataset.json --bundles mae_resenc_l,mae_primus_m --best 1
  python tools/choose.py --data FOLDER --labels dataset.json --weights mae_resenc_l/mine=encoder.pt
  python tools/choose.py --data FOLDER --table labels.csv --target diagnosis      # classification
  python tools/choose.py --data FOLDER --table ages.csv --target age --task regression

Asked are all bundles whose models/pretrained_encoder.pt is there, or those of --bundles (none for none), and the files
of --weights: NAME=PATH with commas, where NAME is a bundle, or a bundle, a slash and a name of yours.

First a linear probe of each frozen encoder, and of a random one of each backbone: what maps or embeddings tell of
cases that the probe has not seen. Then the --best of them are fine-tuned, and each of their backbones from scratch,
with the same cases, steps and seeds (--best 0: no fine-tuning). An arm is recommended over another only if the 95 %
interval of their difference, case by case, leaves out 0; else it is too close to call. One run of each (--seeds 1)
gives an order, but no recommendation.

A name that is none of the arguments below is a setting of the bundles' configs (--epochs, --patch_size, --lr, ...).
Fine-tuning is short by default, and shorter still without a GPU; what was used is written down. A run that was cut
goes on with the same command. It writes choose.json, choose.md and choose.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.choosing.settings import Choose
from tools.commanding.running import main

__all__ = ["choose"]


def choose(settings: Choose) -> None:
    """Rank the encoders at hand for one's own task, and recommend one, or say that it is too close to call."""
    from tools.choosing.choose import choose as run

    run(settings)


if __name__ == "__main__":
    main(choose, __doc__)
