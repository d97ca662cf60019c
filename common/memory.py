# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How much memory may be taken, and room for arrays that do not fit into it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from .errors import DataError

__all__ = ["comfortable_bytes", "peak_bytes", "room"]

_GIB = 2**30


def peak_bytes() -> int:
    """Return the most memory that this process has held, without that of the process which started it.

    ``ru_maxrss``, the answer of every system, is on Linux at least what a starting process held.
    """
    status = Path("/proc/self/status")
    if status.is_file() and len(told := status.read_text().split("VmHWM:")) == 2:  # some containers do not tell
        return 1024 * int(told[1].split()[0])
    if os.name == "posix":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))


def comfortable_bytes(device: torch.device | str = "cpu", *, limit_gb: float | None = None) -> int:
    """Return the bytes that one array may take: half of what is free on the device, at most ``limit_gb``.

    What a container is allowed counts as well as what the machine has.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
        with contextlib.suppress(OSError, ValueError):  # "max", or no container
            group = Path("/sys/fs/cgroup")
            used = int((group / "memory.current").read_text())
            free = min(free, int((group / "memory.max").read_text()) - used)
    comfortable = max(free, 0) // 2
    return comfortable if limit_gb is None else min(comfortable, int(limit_gb * _GIB))


def room(shape: Sequence[int], *, folder: str | Path | None = None, limit_gb: float | None = None) -> Tensor:
    """Return an uninitialised float32 tensor on the CPU, kept in a file where it would not fit into memory.

    The file has no name any more when this returns, so nothing is left of it when the tensor is gone, even by a kill.

    Args:
        shape: of the tensor.
        folder: for the file, which should not lie in memory itself; the system's temporary folder by default.
        limit_gb: most memory to take; by default half of what is free.

    Raises:
        DataError: if there is room neither in memory nor on the disk.
    """
    count = math.prod(shape)
    needed = 4 * count
    if needed <= comfortable_bytes(limit_gb=limit_gb):
        return torch.empty(tuple(shape), dtype=torch.float32)
    where = Path(folder or tempfile.gettempdir())
    where.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(where).free
    if needed > 0.9 * free:  # a full disk would kill the process at the first write into the tensor
        raise DataError(
            f"the logits need {needed / _GIB:.1f} GiB, more than half of the free memory and than the "
            f"{free / _GIB:.1f} GiB free in {where}; free some space, or use a model of coarser voxels or fewer classes"
        )
    handle, name = tempfile.mkstemp(prefix=".logits.", suffix=".part", dir=where)
    try:
        os.truncate(handle, needed)
        return torch.from_file(name, shared=True, size=count, dtype=torch.float32).view(tuple(shape))
    finally:
        os.close(handle)
        Path(name).unlink()
