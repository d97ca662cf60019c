# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands of study."""

from __future__ import annotations

import json
import shlex
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from ..commanding.settings import Existing, From, Reads, RefusalError, Shard, settings

__all__ = ["Measure", "Piece", "Plan", "Report", "Run", "Slurm", "WriteCard"]

Whole = Annotated[int, From(0)]
Positive = Annotated[int, From(1)]
Number = Annotated[float, From(0)]


def _sbatch(value: Any) -> str:
    """Return options of sbatch, one a line, each with its value.

    Example:
        >>> _sbatch("-p gpu --comment='two words' --exclusive").splitlines()
        ['#SBATCH -p gpu', "#SBATCH --comment='two words'", '#SBATCH --exclusive']
    """
    options, remedy = str(value), "write for example --options='--gres=gpu:1 --time=24:00:00'"
    try:
        parts = shlex.split(options)
    except ValueError as error:
        raise RefusalError(f"--options is {options!r}, in which a quotation is not closed; {remedy}") from error
    if parts and all(line.startswith("#SBATCH ") for line in options.splitlines()):
        return options  # is read already
    lines: list[str] = []
    for part in parts:
        flag, equal, given = part.partition("=")
        if "\n" in part or (not lines and not part.startswith("-")):
            raise RefusalError(f"--options is {options!r}; it must hold options of sbatch in one line; {remedy}")
        if not part.startswith("-"):
            lines[-1] += f" {shlex.quote(part)}"
        else:
            lines.append(f"#SBATCH {flag}{equal}{shlex.quote(given) if given else ''}")
    return "\n".join(lines)


def _json(value: Any) -> dict[str, Any]:
    return dict(json.loads(value)) if isinstance(value, str) else dict(value)


@settings
class Plan:
    """What ``study plan`` is told."""

    study: Existing
    """YAML file."""
    output: Path | None = None
    """Folder of the study, instead of the one that the file says."""
    hours: Number = 0.0
    """There are so many; told are settings that keep within them."""
    memory_gib: Number = 0.0
    """There is so much on a GPU, or for each process; settings that fit are measured and told."""
    gpu_gib: Number = 0.0
    """The runs will be on GPUs of so much, which this machine need not have: what fits there is estimated and told."""
    gpus: str = ""
    """Numbers with commas; all by default."""
    jobs: Whole = 0
    """Runs at a time on each GPU, or on the CPU."""
    shards: Positive = 1
    """Machines that share the runs, each with as many GPUs as here."""
    steps: Positive = 6
    """Of training that are measured."""
    again: bool = False
    """Measure once more what was measured before."""


@settings
class Run:
    """What ``study run`` is told."""

    study: Existing
    """YAML file."""
    output: Path | None = None
    """Folder of the study, instead of the one that the file says."""
    gpus: str = ""
    """Numbers with commas; all by default."""
    jobs: Whole = 0
    """Runs at a time on each GPU, or on the CPU; narrow networks are fastest with one for each core."""
    shard: Shard | None = None
    """Only every n-th run, for a cluster's job array."""


@settings
class Report:
    """What ``study report`` is told."""

    study: Existing
    """YAML file."""
    output: Path | None = None
    """Folder of the study, instead of the one that the file says."""


@settings
class Slurm:
    """What ``study slurm`` is told."""

    study: Existing
    """YAML file."""
    output: Path | None = None
    """Folder of the study, on a file system that all machines see."""
    tasks: Positive = 16
    """Of the array."""
    options: Annotated[str, Reads(_sbatch, "options of sbatch in one line")] = "--gres=gpu:1 --cpus-per-task=8"
    """Of sbatch."""


@settings
class WriteCard:
    """What ``study card`` is told."""

    folder: Existing
    """Images and labels."""
    output: Path | None = None
    """YAML to write; default <folder's name>.yaml here."""


@settings
class Piece:
    """What ``study one`` is told."""

    study: Existing
    """YAML file."""
    piece: str
    """Name."""
    output: Path
    """Folder of the study."""


@settings
class Measure:
    """What ``study measure`` is told."""

    study: Existing
    """YAML file."""
    name: str
    """Of the run."""
    config: str
    """Of the bundle: pretrain, train or train_classification."""
    output: Path
    """Folder of the study."""
    file: Path
    """JSON to write."""
    steps: Positive = 6
    """Of training."""
    changes: Annotated[dict[str, Any], Reads(_json, "JSON")] = field(default_factory=dict)
    """Other settings, as JSON."""
