# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the command ``study`` does with one file: plan, run, hand to a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..commanding.commands import number, shard_parts, whole
from ..commanding.environment import ROOT

if TYPE_CHECKING:
    from collections.abc import Collection

    from .definition import Study

__all__ = ["card", "measure", "one", "opened", "plan", "run", "slurm", "written"]

_SBATCH = """#!/bin/bash
# {name}: every task of the array does its share of the runs; a run that another task works on is left to it.
# Submit it again after a failure or a time limit: what is done is skipped, what was cut goes on.
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
#SBATCH --output={log}
{options}
set -euo pipefail
cd {root}
exec {python} tools/study.py run {source} --output {folder} --shard "$SLURM_ARRAY_TASK_ID/{count}"
"""


def opened(file: str, output: str = "") -> Study:
    """Read a study, and go to the root, relative to which bundles are run."""
    from .reading import read_study

    study = read_study(file, output=Path(output).expanduser().absolute() if output else None)
    os.chdir(ROOT)
    return study


def written(study: Study) -> None:
    """Write study.json, unless there are results of another study."""
    from common.files import write_json

    from .execution import check_results

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
    again: bool = False,
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
        again: measure once more what was measured before.
    """
    hours, memory_gib = number("hours", hours), number("memory_gib", memory_gib)
    jobs, shards, steps = whole("jobs", jobs), whole("shards", shards, least=1), whole("steps", steps, least=1)
    from ..commanding.commands import truth

    again = truth(again)
    told = opened(study, output)
    from .cost import write_plan
    from .scheduling import places

    where = places(gpus, jobs)
    written(told)
    write_plan(told, where, hours=hours, memory_gib=memory_gib, shards=shards, steps=steps, again=again)


def run(study: str, output: str = "", gpus: str = "", jobs: int = 0, shard: str = "") -> None:
    """Do all runs that are not done, and list those that failed.

    Args:
        study: YAML file.
        output: folder of the study, instead of the one that the file says.
        gpus: numbers with commas; all by default.
        jobs: runs at a time on each GPU, or on the CPU; narrow networks are fastest with one for each core.
        shard: i/n with i from 0 to n - 1: only every n-th run, for a cluster's job array.
    """
    jobs = whole("jobs", jobs)
    if shard:
        shard_parts(shard)
    told = opened(study, output)
    from .execution import pieces, state
    from .scheduling import places, run_pieces

    where = places(gpus, jobs)
    written(told)
    failed = run_pieces(told, where, shard=shard)
    names = [name for name in pieces(told) if name.startswith("runs/")]
    done = sum(state(told.folder / name) == "finished" for name in names)
    print(f"{done} of {len(names)} runs finished; they are in {told.folder}/runs")
    if failed:
        listed = "\n".join(f"  - {name}: {why}" for name, why in failed.items())
        raise SystemExit(f"Failed:\n{listed}\nStopped: {len(failed)} failed; the same command tries them again")
    if done == len(names):
        print(f"report: python tools/study.py report {study}" + (f" --output {output}" if output else ""))


def slurm(study: str, output: str = "", tasks: int = 16, options: str = "--gres=gpu:1 --cpus-per-task=8") -> None:
    """Write a script for sbatch whose array shares the runs.

    Args:
        study: YAML file.
        output: folder of the study, on a file system that all machines see.
        tasks: of the array.
        options: of sbatch.
    """
    from shlex import quote

    tasks, lines = whole("tasks", tasks, least=1), _sbatch_lines(options)
    told = opened(study, output)
    written(told)
    from .definition import plain_name

    count = min(tasks, len(told.runs()))
    script = told.folder / "study.sbatch"
    script.write_text(
        _SBATCH.format(
            name=" ".join(told.name.split()),
            job=plain_name(told.folder.name) or "study",
            log=quote(f"{str(told.folder).replace('%', '%%')}/slurm-%A_%a.txt"),
            last=count - 1,
            count=count,
            folder=quote(str(told.folder)),
            options="\n".join(lines),
            root=quote(str(ROOT)),
            python=quote(sys.executable),
            source=quote(told.source),
        ),
        "utf-8",
    )
    print(f"written: {script}; submit it with: sbatch {quote(str(script))}")


def _sbatch_lines(options: str) -> list[str]:
    """Return a line of the script for each option of sbatch, with its value.

    Raises:
        SettingsError: if they cannot be read.

    Example:
        >>> _sbatch_lines("-p gpu --comment='two words' --exclusive")
        ['#SBATCH -p gpu', "#SBATCH --comment='two words'", '#SBATCH --exclusive']
    """
    import shlex

    from common.errors import SettingsError

    remedy = "write for example --options='--gres=gpu:1 --time=24:00:00'"
    try:
        parts = shlex.split(options)
    except ValueError as error:
        raise SettingsError(f"--options is {options!r}, in which a quotation is not closed; {remedy}") from error
    lines: list[str] = []
    for part in parts:
        flag, equal, value = part.partition("=")
        if "\n" in part or (not lines and not part.startswith("-")):
            raise SettingsError(f"--options is {options!r}; it must hold options of sbatch in one line; {remedy}")
        if not part.startswith("-"):
            lines[-1] += f" {shlex.quote(part)}"
        else:
            lines.append(f"#SBATCH {flag}{equal}{shlex.quote(value) if value else ''}")
    return lines


def card(folder: str, output: str = "") -> None:
    """Write a data set card for a labelled folder, to be completed by hand.

    Args:
        folder: images and labels.
        output: YAML to write; default <folder's name>.yaml here.
    """
    import yaml

    from .cards import card_for_folder

    place = Path(folder).expanduser().absolute()
    file = Path(output or f"{place.name}.yaml").expanduser()
    if file.exists():
        raise SystemExit(f"Stopped: {file} exists; give another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(card_for_folder(place), sort_keys=False, allow_unicode=True), "utf-8")
    print(f"written: {file}; look at it, complete it, and name it in a study as card: {file}")


def one(study: str, piece: str, output: str) -> None:
    """Do one piece; what ``run`` starts in a process of its own."""
    told = opened(study, output)
    from .execution import do, pieces
    from .scheduling import ELSEWHERE

    _one_of(piece, pieces(told), "piece")
    if do(told, piece) == "elsewhere":
        raise SystemExit(ELSEWHERE)


def measure(study: str, name: str, config: str, output: str, file: str, steps: int = 6, changes: str = "{}") -> None:
    """Try one kind of run for some steps; what ``plan`` starts in a process of its own."""
    import json

    steps = whole("steps", steps, least=1)
    from common.files import write_json

    told = opened(study, output)

    from .cost import measure as tried

    runs = {each.name: each for each in told.runs()}
    _one_of(name, runs, "run")
    wanted = runs[name]
    write_json(tried(told, wanted, config, steps=steps, changes=json.loads(changes)), Path(file))


def _one_of(name: str, known: Collection[str], what: str) -> None:
    """Refuse a name that a study does not have.

    Raises:
        SettingsError: saying what is meant perhaps.
    """
    from difflib import get_close_matches

    from common.errors import SettingsError

    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise SettingsError(f"the study has no {what} {name!r}; the nearest of its {len(known)} is {near}")
