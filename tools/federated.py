# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
r"""Pre-train or fine-tune over several sites with NVFLARE, whose scans stay where they are; only weights travel.

  python tools/export_bundle.py mae_resenc_l --output dist
  python tools/federated.py dist/mae_resenc_l pretrain --sites "A=/data/a,B=/data/b" --rounds 100 --local_epochs 10
  python tools/federated.py dist/mae_resenc_l train --sites "A=/data/a,B=/data/b" --rounds 15 --local_epochs 10 \
    --labels "['background','lesion']"
  python tools/federated.py dist/mae_resenc_l pretrain --sites 'A=$DATA,B=$DATA' --output '$RESULTS' \
    --site_bundle '$BUNDLE' --job job

The first two runs simulate the sites on this machine. The last writes a job for a server of NVFLARE: folders are then
those at the sites, where $DATA and the like are looked up. It needs nvflare (pip install nvflare==2.9.0). Read
docs/federated.md first: what travels, and what is not protected.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.federating.settings import Federated

__all__ = ["federated"]


def federated(settings: Federated) -> None:
    """Run or write a federation."""
    from tools.federating.federation import federated as run

    run(settings)


if __name__ == "__main__":
    main(federated, __doc__)
