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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    from tools.checkpoints.inspecting import inspect_weights
    from tools.commanding.commands import run

    run(inspect_weights, sys.argv[1:])
