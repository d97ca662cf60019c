# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure what each of several processes holds, and how long a training step takes, with weights copied and sharded.

  python tools/sharding.py mae_primus_m                                                  # two processes on the CPU
  python tools/sharding.py mae_primus_m --processes 4 --device cuda --patch_size 160 --batch_size 8

The bundle's own pretrain.yaml decides what is measured, at full size, with common/configs/multi_gpu.yaml and then with
common/configs/fsdp.yaml. Both must have the same loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    import fire

    from tools.benchmarking.sharding import sharding

    fire.Fire(sharding)
