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
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.studies.settings import Measure, Piece, Plan, Report, Run, Slurm, WriteCard

__all__ = ["COMMANDS", "card", "measure", "one", "plan", "report", "run", "slurm"]


def plan(settings: Plan) -> None:
    """Measure some steps of each distinct run here, and say what the study will cost."""
    from tools.studies.commands import plan as run_it

    run_it(settings)


def run(settings: Run) -> None:
    """Do all runs that are not done, and list those that failed."""
    from tools.studies.commands import run as run_it

    run_it(settings)


def report(settings: Report) -> None:
    """Write the report of what is finished."""
    from tools.reporting.commands import report as run_it

    run_it(settings)


def slurm(settings: Slurm) -> None:
    """Write a script for sbatch whose array shares the runs."""
    from tools.studies.commands import slurm as run_it

    run_it(settings)


def card(settings: WriteCard) -> None:
    """Write a data set card for a labelled folder, to be completed by hand."""
    from tools.studies.commands import card as run_it

    run_it(settings)


def one(settings: Piece) -> None:
    """Do one piece; what run starts in a process of its own."""
    from tools.studies.commands import one as run_it

    run_it(settings)


def measure(settings: Measure) -> None:
    """Try one kind of run for some steps; what plan starts in a process of its own."""
    from tools.studies.commands import measure as run_it

    run_it(settings)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "plan": plan,
    "run": run,
    "report": report,
    "slurm": slurm,
    "card": card,
    "one": one,
    "measure": measure,
}

if __name__ == "__main__":
    main(COMMANDS, __doc__)
