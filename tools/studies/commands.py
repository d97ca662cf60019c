# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the command ``study`` does with one file: plan, run, hand to a cluster."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sized
from contextlib import chdir, contextmanager
from difflib import get_close_matches
from pathlib import Path
from shlex import quote

import yaml

from common.errors import SettingsError
from common.files import write_json, write_record
from common.terminal import near

from ..commanding.ending import end, tool_command
from ..commanding.environment import ROOT
from .cards import card_for_folder
from .cost import measure as tried
from .cost import on_gpu, write_plan
from .definition import PLAIN_ROWS, Study, plain_name
from .execution import check_results, do, pieces, state
from .reading import read_study
from .scheduling import ELSEWHERE, places, run_pieces
from .settings import Measure, Piece, Plan, Run, Slurm, WriteCard

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


@contextmanager
def opened(file: Path, output: Path | None = None) -> Iterator[Study]:
    """Read a study, and stand at the root, relative to which bundles are run, while it is worked on."""
    study = read_study(file, output=None if output is None else output.absolute())
    with chdir(ROOT):
        yield study


def written(study: Study) -> None:
    """Write study.json, unless there are results of another study."""
    check_results(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    write_record(study.as_plain(), study.folder / "study.json")


def plan(settings: Plan) -> None:
    """Measure some steps of each distinct run here, and say what the study will cost."""
    with opened(settings.study, settings.output) as study:
        where = places(settings.gpus, settings.jobs)
        written(study)
        _begin(study)
        write_plan(
            study,
            where,
            hours=settings.hours,
            memory_gib=settings.memory_gib,
            shards=settings.shards,
            steps=settings.steps,
            again=settings.again,
        )
        for line in on_gpu(study, settings.gpu_gib) if settings.gpu_gib else []:
            print(line)
    end(study.folder, following=_again("run", settings))


def run(settings: Run) -> None:
    """Do all runs that are not done, and list those that failed."""
    with opened(settings.study, settings.output) as study:
        where = places(settings.gpus, settings.jobs)
        written(study)
        _begin(study)
        failed = run_pieces(study, where, shard=settings.shard or (0, 1))
    names = [name for name in pieces(study) if name.startswith("runs/")]
    done = sum(state(study.folder / name) == "finished" for name in names)
    print(f"{done} of {len(names)} runs finished; they are in {near(study.folder)}/runs")
    if failed:
        listed = "\n".join(f"  - {name}: {why}" for name, why in failed.items())
        raise SystemExit(f"Failed:\n{listed}\nStopped: {len(failed)} failed; the same command tries them again")
    end(study.folder / "runs", following=_again("report" if done == len(names) else "run", settings))


def _begin(study: Study) -> None:
    """Print what a study is."""
    runs = study.runs()
    done = sum(state(study.folder / f"runs/{run.name}") == "finished" for run in runs)
    named: dict[str, Sized] = {"arms": study.arms, "data sets": study.data_sets, "budgets": study.budgets}
    named |= {"folds": study.folds, "seeds": study.seeds}
    counts = " x ".join(f"{len(each)} {name}" for name, each in named.items())
    plain = sum(arm.weights in PLAIN_ROWS for arm in study.arms.values())
    counts = counts.replace(" arms", f" arms ({plain} of them plain rows)", 1) if plain else counts
    print(f"{study.name}: {counts}, {len(runs)} runs, {done} of them done before", flush=True)


def _again(command: str, settings: Plan | Run) -> str:
    """Return the next command on the same study."""
    output = () if settings.output is None else ("--output", settings.output)
    return tool_command("study", command, settings.study, *output)


def slurm(settings: Slurm) -> None:
    """Write a script for sbatch whose array shares the runs."""
    with opened(settings.study, settings.output) as study:
        written(study)
    count = min(settings.tasks, len(study.runs()))
    script = study.folder / "study.sbatch"
    script.write_text(
        _SBATCH.format(
            name=" ".join(study.name.split()),
            job=plain_name(study.folder.name) or "study",
            log=quote(f"{str(study.folder).replace('%', '%%')}/slurm-%A_%a.txt"),
            last=count - 1,
            count=count,
            folder=quote(str(study.folder)),
            options=settings.options,
            root=quote(str(ROOT)),
            python=quote(sys.executable),
            source=quote(study.source),
        ),
        "utf-8",
    )
    end(script, following=f"sbatch {quote(near(script))}")


def card(settings: WriteCard) -> None:
    """Write a data set card for a labelled folder, to be completed by hand."""
    place = settings.folder.absolute()
    file = settings.output or Path(f"{place.name}.yaml")
    if file.exists():
        raise SettingsError(f"{file} exists; give another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(card_for_folder(place), sort_keys=False, allow_unicode=True), "utf-8")
    print(f"a card of {near(settings.folder)}, to be completed, and named in a study as card: {near(file)}")
    end(file, following=tool_command("study", "plan", "STUDY.yaml"))


def one(settings: Piece) -> None:
    """Do one piece; what ``run`` starts in a process of its own."""
    with opened(settings.study, settings.output) as study:
        _one_of(settings.piece, pieces(study), "piece")
        if do(study, settings.piece) == "elsewhere":
            raise SystemExit(ELSEWHERE)


def measure(settings: Measure) -> None:
    """Try one kind of run for some steps; what ``plan`` starts in a process of its own."""
    with opened(settings.study, settings.output) as study:
        runs = {each.name: each for each in study.runs()}
        _one_of(settings.name, runs, "run")
        found = tried(study, runs[settings.name], settings.config, steps=settings.steps, changes=settings.changes)
        write_json(found, settings.file)


def _one_of(name: str, known: Collection[str], what: str) -> None:
    """Refuse a name that a study does not have.

    Raises:
        SettingsError: saying what is meant perhaps.
    """
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise SettingsError(f"the study has no {what} {name!r}; the nearest of its {len(known)} is {near}")
