# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Say what a weights file is: its receipt if it has one, else what can be worked out from it.

  python tools/inspect_weights.py bundles/mae_resenc_l/models/pretrained_encoder.pt
  python tools/inspect_weights.py checkpoint_final.pth          # of the reference, or anything else torch.save wrote
  python tools/inspect_weights.py pretrained_encoder.safetensors

Nothing in the file is executed: tensors and plain values only.
"""

from __future__ import annotations

import sys

from environment import ROOT, RUNTIME, ensure

__all__ = ["inspect_weights"]


def inspect_weights(file: str, plan: str | None = None) -> None:
    """Print what a weights file is.

    Args:
        file: to look into.
        plan: adaptation plan of a checkpoint of the reference, if neither in the file nor beside it.
    """
    sys.path.insert(0, str(ROOT))
    from common.weights import inspect

    print("\n".join(inspect(file, plan_file=plan)))


if __name__ == "__main__":
    ensure(RUNTIME)
    from commands import run

    run(inspect_weights, sys.argv[1:])
