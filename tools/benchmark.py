# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measure every bundle: training step, peak memory, views and store reads, each against a yardstick in the same run.

  python tools/benchmark.py                                            # all bundles, sizes for any machine
  python tools/benchmark.py --cells mae_resenc_l,spark3d_resenc_l --parts steps
  python tools/benchmark.py --peers true --output docs/benchmark.md    # also against other packages
  python tools/benchmark.py --device cuda --patch_size 160 --batch_size 2 --checkpointing full
  python tools/benchmark.py --parts data                               # the data path alone
  python tools/benchmark.py --help                                     # all options

A bundle's own pretrain.yaml decides what is measured: method, loss, views, optimizer, full-size networks. The
yardstick of a step is the same mathematics written plainly (tools/benchmarking/plain.py); both must give the same loss
and gradient before they are timed. Seconds differ between machines and days; ratios within one run do not.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.benchmarking.settings import Benchmark
from tools.commanding.running import main

__all__ = ["benchmark"]


def benchmark(settings: Benchmark) -> None:
    """Measure and print Markdown; progress goes to the error stream."""
    from tools.benchmarking.benchmark import benchmark as run

    run(settings)


if __name__ == "__main__":
    main(benchmark, __doc__)
