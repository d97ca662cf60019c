# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a weights file is: its receipt if it has one, else what can be worked out from it.

  python tools/inspect_weights.py bundles/mae_resenc_l/models/pretrained_encoder.pt
  python tools/inspect_weights.py checkpoint_final.pth          # of the reference, or anything else torch.save wrote
  python tools/inspect_weights.py pretrained_encoder.safetensors

Nothing in the file is executed: tensors and plain values only.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.checkpoints.settings import InspectWeights
from tools.commanding.running import main

__all__ = ["inspect_weights"]


def inspect_weights(settings: InspectWeights) -> None:
    """Print what a weights file is."""
    from tools.checkpoints.inspecting import inspect_weights as run

    run(settings)


if __name__ == "__main__":
    main(inspect_weights, __doc__)
