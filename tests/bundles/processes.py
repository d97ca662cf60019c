# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Bundles run by two connected processes, as two GPUs would, on the CPU.

By ``torchrun``, as a user starts them; or, where what is started is not the point, several runs in one pair of
processes, since starting Python takes longer than such a run.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.multiprocessing as multiprocessing
from monai.bundle import run as run_bundle

from common.errors import sentence
from common.handlers import PretrainingCheckpoint
from common.processes import leave_processes
from common.weights import read_checkpoint

from ..conftest import ROOT
from ..starts import python

__all__ = ["Job", "distance", "free_port", "run_here", "run_in_processes", "torchrun"]

PATIENCE = 600  # seconds that anything here may take, on a machine that has other work too
CPU = {"CUDA_VISIBLE_DEVICES": ""}
_TORCHRUN = re.compile(
    r'Traceback [^\n]+\n(  File "<frozen runpy>"[^\n]+\n)+  File [^\n]+/distributed/run\.py".+?(?=\n={5})', re.S
)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def distance(one: Path, other: Path, part: str | None = None) -> float:
    """Return the largest difference between the tensors of two files."""
    mine, theirs = (read_checkpoint(path) for path in (one, other))
    mine, theirs = (content[part] if part else content for content in (mine, theirs))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


class Job:
    """What was started with some commands, one for each machine; what they start belongs to it."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None) -> None:
        self.logs = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115
        self.parts = [
            psutil.Popen(
                one, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | CPU | (environment or {})
            )
            for one, log in zip(commands, self.logs, strict=True)
        ]

    def said(self) -> str:
        """Return what was printed so far, but where torchrun was when a process failed."""
        for log in self.logs:
            log.seek(0)
        return "\n".join(_TORCHRUN.sub("", log.read()) for log in self.logs)

    def wait_until(self, when: Callable[[], bool]) -> None:
        """Wait until something is true while the job runs."""
        until = time.monotonic() + PATIENCE
        while not when():
            assert all(part.poll() is None for part in self.parts), f"it ended too early: {self.said()[-3000:]}"
            assert time.monotonic() < until, f"it takes too long: {self.said()[-3000:]}"
            time.sleep(0.01)

    def process(self, rank: int) -> psutil.Process:
        """Return the process of the run that has this rank, when it has started."""

        def found() -> list[psutil.Process]:
            started = [one for part in self.parts for one in part.children(recursive=True)]
            python = [one for one in started if one.cmdline()[1:2] == ["-u"]]  # as torchrun starts it
            return [one for one in python if one.environ().get("RANK") == str(rank)]

        self.wait_until(lambda: bool(found()))
        return found()[0]

    def end(self) -> tuple[list[int], str]:
        """Wait for the end; return the exit statuses and what was printed."""
        _, alive = psutil.wait_procs(self.parts, timeout=PATIENCE)
        for part in alive:
            for one in (*part.children(recursive=True), part):
                one.kill()
        assert not alive, f"it hangs: {self.said()[-3000:]}"
        return [part.returncode for part in self.parts], self.said()


def torchrun(
    line: list[str],
    overlay: str,
    *,
    machines: int = 1,
    options: Sequence[str] = (),
    started: bool = False,
    **more: str,
) -> Job:
    """Start a command line of one process with torchrun: two processes on one machine, or one on each of two.

    The agents of two machines meet over the network as they would between machines. Processes that a test reaches for,
    with :meth:`Job.process`, have to be really started.
    """
    line = line[line.index("-m") :]
    at = line.index("--config_file") + 1
    line[at] = f"['{line[at]}','common/configs/{overlay}.yaml']"
    place = ["--standalone", "--nproc_per_node", "2"]
    if machines == 2:
        place = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
        place += ["--rdzv_id", "test", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    interpreter = sys.executable if started else python()
    start = [interpreter, "-W", "ignore", "-m", "torch.distributed.run", *place, *options, *line]
    return Job([start] * machines, more)


def run_here(
    bundle: str, config: str, *, overlay: str | None = None, stop_after: int | None = None, **own: Any
) -> None:
    """Run a config in this process; a pre-training can be cut off after an epoch."""
    root = f"bundles/{bundle}"
    files = [f"{root}/configs/{config}.yaml", *([f"common/configs/{overlay}.yaml"] if overlay else [])]
    save = PretrainingCheckpoint._save

    def save_and_stop(self: PretrainingCheckpoint, engine: Any) -> None:
        save(self, engine)
        if engine.state.epoch == stop_after:
            engine.terminate()

    PretrainingCheckpoint._save = save_and_stop  # type: ignore[method-assign]
    try:
        run_bundle(config_file=files, bundle_root=root, logging_file=None, **own)
    finally:
        PretrainingCheckpoint._save = save  # type: ignore[method-assign]


def _rank(rank: int, ports: list[int], runs: list[dict[str, Any]], folder: str, gpus: bool) -> None:
    os.chdir(ROOT)
    if not gpus:
        os.environ |= CPU
    torch.set_num_threads(1)
    told: list[str | None] = []
    for port, run in zip(ports, runs, strict=True):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in where.items()}
        try:
            run_here(**{name: value[rank] if isinstance(value, tuple) else value for name, value in run.items()})
            told.append(None)
        except Exception as error:
            told.append(sentence(error) or repr(error))
        finally:
            leave_processes()  # again, where the run did not get that far
    torch.save(told, f"{folder}/told_{rank}.pt")


def run_in_processes(runs: Sequence[dict[str, Any]], folder: Path, *, gpus: bool = False) -> list[list[str | None]]:
    """Do these calls of :func:`run_here` one after the other, each in two connected processes.

    A tuple among the arguments has a value for each process.

    Returns:
        for each run, how it ended in each process: None, or the sentence that it stopped with.
    """
    ports = [free_port() for _ in runs]
    multiprocessing.spawn(_rank, args=(ports, list(runs), str(folder), gpus), nprocs=2)
    told = [torch.load(folder / f"told_{rank}.pt") for rank in range(2)]
    return [list(one) for one in zip(*told, strict=True)]
