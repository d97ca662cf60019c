# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Compare bundles on labelled data sets: methods x data sets x folds in one file, run and reported by a command each.

  python tools/study.py plan study.yaml        # what it will cost: hours, memory, disk; nothing is trained
  python tools/study.py run study.yaml         # all runs that are not done; killed, the same command goes on
  python tools/study.py report study.yaml      # tables, tests and pictures: one HTML, Markdown, CSV
  python tools/study.py slurm study.yaml       # a script for a cluster's job array
  python tools/study.py card FOLDER            # a data set card for your own labelled folder

docs/study.md says what study.yaml holds; studies/example.yaml is one to start from.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from environment import ROOT, RUNTIME, ensure

if TYPE_CHECKING:
    from studies.definition import Study

__all__ = ["card", "measure", "one", "plan", "report", "run", "slurm"]

_SBATCH = """#!/bin/bash
# {name}: every task of the array does its share of the runs; a run that another task works on is left to it.
# Submit it again after a failure or a time limit: what is done is skipped, what was cut goes on.
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
#SBATCH --output={folder}/slurm-%A_%a.txt
{options}
set -euo pipefail
cd {root}
exec {python} tools/study.py run {source} --output {folder} --shard "$SLURM_ARRAY_TASK_ID/{count}"
"""


def _study(file: str, output: str = "") -> Study:
    sys.path.insert(0, str(ROOT))
    from studies.reading import read_study

    from common.errors import end_in_a_sentence

    end_in_a_sentence()
    study = read_study(file, output=Path(output).expanduser().absolute() if output else None)
    os.chdir(ROOT)
    return study


def _write(study: Study) -> None:
    """Write study.json, unless there are results of another study."""
    from studies.execution import check_results

    from common.weights.files import write_json

    check_results(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    write_json(study.as_plain(), study.folder / "study.json")


def plan(
    study: str,
    output: str = "",
    hours: float = 0.0,
    memory_gib: float = 0.0,
    gpus: str = "",
    jobs: int = 0,
    shards: int = 1,
    steps: int = 6,
) -> None:
    """Measure some steps of each distinct run here, and say what the study will cost.

    Args:
        study: YAML file.
        output: folder of the study, instead of the one that the file says.
        hours: there are so many; told are settings that keep within them.
        memory_gib: there is so much on a GPU, or for each process; settings that fit are measured and told.
        gpus: numbers with commas; all by default.
        jobs: runs at a time on each GPU, or on the CPU.
        shards: machines that share the runs, each with as many GPUs as here.
        steps: of training that are measured.
    """
    told = _study(study, output)
    _write(told)
    from studies.cost import write_plan
    from studies.scheduling import places

    write_plan(told, places(gpus, jobs), hours=hours, memory_gib=memory_gib, shards=shards, steps=steps)


def run(study: str, output: str = "", gpus: str = "", jobs: int = 0, shard: str = "") -> None:
    """Do all runs that are not done, and list those that failed.

    Args:
        study: YAML file.
        output: folder of the study, instead of the one that the file says.
        gpus: numbers with commas; all by default.
        jobs: runs at a time on each GPU, or on the CPU; narrow networks are fastest with one for each core.
        shard: i/n with i from 0 to n - 1: only every n-th run, for a cluster's job array.
    """
    told = _study(study, output)
    _write(told)
    from studies.execution import pieces, state
    from studies.scheduling import places, run_pieces

    failed = run_pieces(told, places(gpus, jobs), shard=shard)
    names = [name for name in pieces(told) if name.startswith("runs/")]
    done = sum(state(told.folder / name) == "finished" for name in names)
    print(f"{done} of {len(names)} runs finished; they are in {told.folder}/runs")
    if failed:
        listed = "\n".join(f"  - {name}: {why}" for name, why in failed.items())
        raise SystemExit(f"Failed:\n{listed}\nStopped: {len(failed)} failed; the same command tries them again")
    if done == len(names):
        print(f"report: python tools/study.py report {study}" + (f" --output {output}" if output else ""))


def report(study: str, output: str = "") -> None:
    """Write the report of what is finished.

    Args:
        study: YAML file.
        output: folder of the study, instead of the one that the file says.
    """
    told = _study(study, output)
    _write(told)
    from studies.report import write_report

    print(f"written: {write_report(told.folder)}")


def slurm(study: str, output: str = "", tasks: int = 16, options: str = "--gres=gpu:1 --cpus-per-task=8") -> None:
    """Write a script for sbatch whose array shares the runs.

    Args:
        study: YAML file.
        output: folder of the study, on a file system that all machines see.
        tasks: of the array.
        options: of sbatch.
    """
    from shlex import quote

    told = _study(study, output)
    _write(told)
    count = max(1, min(tasks, len(told.runs())))
    script = told.folder / "study.sbatch"
    script.write_text(
        _SBATCH.format(
            name=told.name,
            job=told.folder.name,
            last=count - 1,
            count=count,
            folder=quote(str(told.folder)),
            options="\n".join(f"#SBATCH {option}" for option in options.split()),
            root=quote(str(ROOT)),
            python=quote(sys.executable),
            source=quote(told.source),
        ),
        "utf-8",
    )
    print(f"written: {script}; submit it with: sbatch {script}")


def card(folder: str, output: str = "") -> None:
    """Write a data set card for a labelled folder, to be completed by hand.

    Args:
        folder: images and labels.
        output: YAML to write; default <folder's name>.yaml here.
    """
    sys.path.insert(0, str(ROOT))
    import yaml
    from studies.cards import card_for_folder

    from common.errors import end_in_a_sentence

    end_in_a_sentence()
    place = Path(folder).expanduser().absolute()
    file = Path(output or f"{place.name}.yaml")
    if file.exists():
        raise SystemExit(f"Stopped: {file} exists; give another --output")
    file.write_text(yaml.safe_dump(card_for_folder(place), sort_keys=False, allow_unicode=True), "utf-8")
    print(f"written: {file}; look at it, complete it, and name it in a study as card: {file}")


def one(study: str, piece: str, output: str) -> None:
    """Do one piece; what ``run`` starts in a process of its own."""
    told = _study(study, output)
    from studies.execution import do
    from studies.scheduling import ELSEWHERE

    if do(told, piece) == "elsewhere":
        raise SystemExit(ELSEWHERE)


def measure(study: str, name: str, config: str, output: str, file: str, steps: int = 6, changes: str = "{}") -> None:
    """Try one kind of run for some steps; what ``plan`` starts in a process of its own."""
    import json

    told = _study(study, output)
    from studies.cost import measure as tried

    from common.weights.files import write_json

    wanted = next(each for each in told.runs() if each.name == name)
    write_json(tried(told, wanted, config, steps=steps, changes=json.loads(changes)), Path(file))


if __name__ == "__main__":
    ensure(RUNTIME)
    import commands

    several = (plan, run, report, slurm, card, one, measure)
    commands.run({each.__name__: each for each in several}, sys.argv[1:])
