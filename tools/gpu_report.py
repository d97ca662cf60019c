# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure what only a GPU can show, in at most twelve minutes, and write a page to send back.

  python tools/gpu_report.py                            # gpu_report/report.json and report.md
  python tools/gpu_report.py --minutes 30 --output a100
  python tools/gpu_report.py --device cpu --patch_size 32 --small_size 32 --volume 40,40,40   # no GPU: does it run?

The most important comes first, and each part is saved as it ends: a convolution in bfloat16 against float32; loss and
gradient of every bundle on the GPU against the CPU, in float32, float16 and bfloat16; step time and peak memory at
published size beside the estimate of tools/budget.py; the prediction of a volume; channels_last_3d; torch.compile.
What there was no time for is named. The networks are random, and no data are needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.budgeting.settings import GpuReport
from tools.commanding.running import main

__all__ = ["gpu_report"]


def gpu_report(settings: GpuReport) -> None:
    """Measure and write the report."""
    from tools.budgeting.gpu_report import gpu_report as run

    run(settings)


if __name__ == "__main__":
    main(gpu_report, __doc__)
