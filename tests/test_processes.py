# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The end of one of several connected processes."""

from __future__ import annotations

import sys
from pathlib import Path

from .bundles.processes import Job, free_port

# Rank 0 is done while a sum of its still waits for rank 1. Then a thread of gloo asks for the interpreter, to let go of
# the tensor, and is not answered before Python shuts down, since the last callback has no gap.
PROGRAM = """
import atexit
atexit.register(sum, range(10**8))
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from common.processes import join_processes, leave_processes

done = Path(sys.argv[1])
join_processes(1)
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
network(torch.ones(1, 2)).sum().backward()
network.itself = network
tensor = torch.ones(3)
if dist.get_rank() == 0:
    dist.all_reduce(tensor, async_op=True)
    done.touch()
else:
    while not done.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    dist.all_reduce(tensor)
leave_processes()
del tensor, network
"""


def test_a_process_that_is_done_does_not_abort(tmp_path: Path) -> None:
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "done")]
    jobs = [Job([command], where | {"RANK": str(rank)}) for rank in range(2)]
    assert [job.end() for job in jobs] == [([0], ""), ([0], "")]
