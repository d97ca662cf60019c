# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How a run becomes one of several connected processes, as torchrun starts them, and how it stops being one."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its functions would keep the group as a default for ever

__all__ = ["join_processes", "leave_processes"]

_left: list[Any] = []  # groups of processes whose threads may still hold tensors


def join_processes(timeout_minutes: float) -> None:
    """Connect this process with the others that torchrun started: by NCCL, or without a GPU by gloo on the CPU.

    Args:
        timeout_minutes: how long a process waits for the others.

    Raises:
        SystemExit: if torchrun may start processes again that would then hang.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise SystemExit(
            "Stopped: torchrun --max_restarts hangs after a restart unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set "
            "in its environment; set it on every machine, or leave --max_restarts out"
        )
    os.environ.pop("SLURM_JOB_ID", None)  # torchrun says which process this is; ignite would ask SLURM instead
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def leave_processes() -> None:
    """Disconnect this process from the others at the end of its run.

    PyTorch does not end the threads of gloo before the group itself is gone, which a network in
    DistributedDataParallel holds on to. One that lets go of a tensor while Python shuts down aborts the process
    (pytorch/pytorch#190489), and a complete run would count as lost. So the threads are waited for before that.
    """
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        if not _left:
            atexit.register(_wait_for_threads)
        _left.append(dist.group.WORLD)
    dist.destroy_process_group()


def _wait_for_threads() -> None:
    gc.collect()  # networks that hold a group, too
    _left.clear()  # the last holders; unlike the networks they leave Python to the threads while they wait
    time.sleep(0.1)  # full sharding holds on to its group for ever: time for its threads, which have nothing to do
