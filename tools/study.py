# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Compare bundles on labelled data sets: methods x data sets x folds in one file, run and reported by a command each.

  python tools/study.py plan study.yaml        # what it will cost: hours, memory, disk; nothing is trained
  python tools/study.py run study.yaml         # all runs that are not done; killed, the same command goes on
  python tools/study.py report study.yaml      # tables, tests and pictures: one HTML, Markdown, CSV
  python tools/study.py slurm study.yaml       # a script for a cluster's job array
  python tools/study.py card FOLDER            # a data set card for your own labelled folder

docs/study.md says what study.yaml holds; docs/study/hippocampus_mni.yaml is one to start from.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import RUNTIME, ensure

if __name__ == "__main__":
    ensure(RUNTIME)
    from tools.commanding.commands import run
    from tools.reporting.commands import report
    from tools.studies import commands

    several = (commands.plan, commands.run, report, commands.slurm, commands.card, commands.one, commands.measure)
    run({each.__name__: each for each in several}, sys.argv[1:])
