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

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.benchmarking.settings import Sharding
from tools.commanding.running import main

__all__ = ["sharding"]


def sharding(settings: Sharding) -> None:
    """Measure and print a table, the largest of all processes in each place."""
    from tools.benchmarking.sharding import sharding as run

    run(settings)


if __name__ == "__main__":
    main(sharding, __doc__)
