# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How many threads a run takes on a CPU that other programs keep busy.

The threads of a step wait for each other after each operation. Where a core is busy with something else, all wait for
the one that shares it, and a step can take many times as long as with fewer threads.
"""

from __future__ import annotations

import os

import psutil
import torch
from tqdm import tqdm

__all__ = ["choose_threads", "free_cores"]

_SAID = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user decides himself
_BUSY = 1.0  # load from which it is worth a look
_LOOK = 0.3  # seconds; the load is a mean of the last minute, and may be of what has just ended


def choose_threads(device: str | torch.device) -> None:
    """Take as many threads as there are free cores, and say so, unless the user has said how many.

    Args:
        device: of the run; nothing is done unless it is a CPU, nor where several processes share the machine.
    """
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1 or "RANK" in os.environ or any(map(os.environ.get, _SAID)):
        return
    if psutil.getloadavg()[0] < _BUSY:
        return
    free = free_cores()
    chosen = max(1, round(free))
    if chosen < threads:
        torch.set_num_threads(chosen)
        tqdm.write(
            f"other programs keep this machine busy ({free:.1f} cores are free): computing with {chosen} "
            f"thread{'s' if chosen > 1 else ''} instead of {threads}; OMP_NUM_THREADS={threads} before the command "
            "takes all the same"
        )


def free_cores() -> float:
    """Return how many of the cores that this process may use are idle now."""
    shares = psutil.cpu_percent(interval=_LOOK, percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    return sum(1 - shares[core] / 100 for core in mine if core < len(shares))
