# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Do all pieces of a study: several at a time, each in a process of its own, going on when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import SettingsError
from common.files import read_content
from common.terminal import progress_bar

from ..commanding.environment import ROOT
from .definition import Study
from .execution import FAILED, pieces, state

__all__ = ["ELSEWHERE", "Place", "places", "run_pieces"]

ELSEWHERE = 75  # exit status of a process that found its piece being worked on
_POLL = 0.5  # seconds
_POLL_ELSEWHERE = 20.0


@dataclass(frozen=True)
class Place:
    """Where one piece at a time runs: a GPU, or some of the CPU's cores."""

    gpu: str | None
    threads: int

    def environment(self) -> dict[str, str]:
        """Return the environment of its processes."""
        own = {"OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"}
        return {**os.environ, **own, **({} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu})}


def places(gpus: str = "", jobs: int = 0) -> list[Place]:
    """Return where pieces run: on the GPUs named, else on all there are, else in processes that share the CPU.

    Args:
        gpus: numbers with commas.
        jobs: processes on the CPU, or on each GPU; 0 is one.

    Raises:
        SettingsError: if a GPU does not exist.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there = torch.cuda.device_count()
    named = [part.strip() for part in str(gpus).strip("()[]").split(",") if part.strip()]
    if wrong := [name for name in named if not (name.isdigit() and int(name) < there)]:
        raise SettingsError(f"--gpus names {wrong[0]}, but this machine has {there} GPU(s), counted from 0")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = [visible[int(name)] if visible else name for name in named or map(str, range(there))]
    each = max(jobs, 1)
    count = each * (len(devices) or 1)
    threads = max(cores // count, 1)
    either: list[str | None] = [*devices] or [None]
    return [Place(device, threads) for device in either for _ in range(each)]


def run_pieces(
    study: Study,
    where: Sequence[Place],
    *,
    shard: tuple[int, int] = (0, 1),
    wanted: Collection[str] | None = None,
) -> dict[str, str]:
    """Do what is not done, with a progress bar; a failed piece is told, and tried again by the next call.

    Args:
        study: to run.
        where: one piece at a time runs at each.
        shard: which of how many parts; of every n-th run, with the pre-training that it needs.
        wanted: names of the pieces to do, of those that no other of them waits for; all unless given.

    Returns:
        why pieces failed, by name.
    """
    part, parts = shard
    runs = study.runs()[part::parts]
    order = {name: needs for name, needs in pieces(study, runs).items() if wanted is None or name in wanted}
    waiting = {name: needs for name, needs in order.items() if state(study.folder / name) != "finished"}
    failed: dict[str, str] = {}
    running: dict[subprocess.Popen[bytes], tuple[str, Place]] = {}
    elsewhere: dict[str, float] = {}
    free = list(where)
    done = len(order) - len(waiting)
    with progress_bar(total=len(order), initial=done, desc=study.name, unit="run", smoothing=0.1) as bar:
        try:
            while waiting or running:
                for name in _ready(study, waiting, failed) if free else ():
                    if not free:
                        break
                    if time.monotonic() < elsewhere.get(name, 0):
                        continue
                    place = free.pop()
                    del waiting[name]
                    running[_start(study, name, place)] = (name, place)
                for name in [each for each, needs in waiting.items() if any(need in failed for need in needs)]:
                    failed[name] = f"its pre-training failed: {waiting.pop(name)[0]}"
                    bar.update()
                bar.set_postfix_str(
                    f"{len(running)} running" + (f", {len(failed)} failed" if failed else ""), refresh=False
                )
                for process in [each for each in running if each.poll() is not None]:
                    name, place = running.pop(process)
                    free.append(place)
                    if process.returncode == ELSEWHERE:
                        waiting[name] = order[name]
                        elsewhere[name] = time.monotonic() + _POLL_ELSEWHERE
                        continue
                    if state(study.folder / name) != "finished":
                        failed[name] = _why(study.folder / name, process.returncode)
                        tqdm.write(f"failed: {name}: {failed[name]}")
                    bar.update()
                time.sleep(_POLL)
        except BaseException:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            raise
    return failed


def _ready(study: Study, waiting: dict[str, list[str]], failed: dict[str, str]) -> list[str]:
    """Return what can start now."""
    return [
        name
        for name, needs in waiting.items()
        if all(state(study.folder / need) == "finished" for need in needs) and name not in failed
    ]


def _start(study: Study, name: str, place: Place) -> subprocess.Popen[bytes]:
    folder = study.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "tools" / "study.py"), "one", study.source, name, str(study.folder)]
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, env=place.environment(), stdout=log, stderr=log, cwd=ROOT)


def _why(folder: Path, status: int) -> str:
    file = folder / FAILED
    if file.exists():
        return str(read_content(file)["why"])
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = ", perhaps for want of memory" if status == -9 else ""
    return f"its process {how}{hint}; see {folder / 'log.txt'}"
