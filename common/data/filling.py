# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Prepare many volumes at once: in processes within the memory that there is, or on the workers of a Dask cluster."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blosc2
import numpy as np
import torch
from tqdm import tqdm

from ..errors import DataError, SettingsError
from ..memory import comfortable_bytes
from ..transforms import read_header
from .files import LABEL, MASKS, Case, images_of

if TYPE_CHECKING:
    from .store import StoreSettings

__all__ = ["DiskEstimate", "each", "memory_needed", "one_thread"]

_GIB = 2**30
_PROCESS = 300 * 2**20  # bytes of a preparing process without a volume
# bytes for each voxel of a file and of what it becomes; measured: 15 to 29 and 9, docs/data.md
_PER_VOXEL_READ, _PER_VOXEL_MADE, _PER_VOXEL_OF_A_MASK = 26, 10, 8
_MEASURED, _SAMPLED = 8, 200  # volumes that tell how well they compress, headers that tell how large they are
# bytes for each voxel: the least compressible and the most compressible volumes of docs/benchmark.md
_WORST, _BEST = {"float16": 0.43 * 4, "float32": 0.83 * 4}, {"float16": 0.22 * 4, "float32": 0.45 * 4}
_WAIT_SECONDS = 120  # for a Dask worker
_Result = tuple[Case, BaseException | None]


def one_thread(_worker: int = 0) -> None:
    """Keep a preparing or reading process to one thread; the processes are the parallelism."""
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)


def each(
    function: Callable[[Case], object],
    cases: Sequence[Case],
    settings: StoreSettings,
    *,
    num_workers: int = 0,
    scheduler: str | None = None,
) -> Generator[_Result, None, None]:
    """Call ``function`` on every case and yield the case and what was raised, as they end.

    A case whose process dies, as the system ends one that takes too much memory, is tried once more on its own.
    """
    if scheduler:
        yield from _on_dask(function, cases, scheduler)
        return
    budget = 2 * comfortable_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # all of a rank's that is free
    if num_workers <= 1 or len(cases) <= 2:
        for case in cases:
            yield case, _too_large(case, settings, budget) or _raised(function, case)
        return
    queue = deque(cases)
    while queue:
        suspects: list[Case] = []
        yield from _in_processes(function, queue, suspects, settings, min(num_workers, len(cases)), budget)
        alone = deque(suspects)
        while alone:
            broken: list[Case] = []
            yield from _in_processes(function, alone, broken, settings, 1, budget)
            for case in broken:
                needed = memory_needed(case, settings) / _GIB
                yield (
                    case,
                    DataError(
                        f"the process that prepared {images_of(case)[0]} died twice; if it was for lack of memory "
                        f"(about {needed:.1f} GiB are needed), use a machine with more, else leave out the file"
                    ),
                )


def _raised(function: Callable[[Case], object], case: Case) -> BaseException | None:
    try:
        function(case)
    except MemoryError:
        return DataError(f"the memory does not suffice to prepare {images_of(case)[0]}; use a machine with more")
    except (DataError, OSError) as error:
        return error
    return None


def _too_large(case: Case, settings: StoreSettings, budget: int) -> DataError | None:
    """Return what to say of a volume for which there is not the memory, by its header."""
    needed = memory_needed(case, settings)
    if needed <= budget:
        return None
    return DataError(
        f"{images_of(case)[0]} needs about {needed / _GIB:.1f} GiB of memory, but {budget / _GIB:.1f} GiB are free; "
        "use a machine with more, a coarser --spacing_mm, or leave out the file"
    )


def _in_processes(
    function: Callable[[Case], object],
    queue: deque[Case],
    suspects: list[Case],
    settings: StoreSettings,
    workers: int,
    budget: int,
) -> Iterator[_Result]:
    """Work on the queue in processes until it is empty or one of them dies; then ``suspects`` gets what was running.

    No more than twice as many cases as processes are handed over, and no more than fit into half of the free memory,
    but always one.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process)
    running: dict[Future[object], tuple[Case, int]] = {}
    most = 2 * workers if workers > 1 else 1
    try:
        while (queue and not suspects) or running:
            while queue and not suspects and len(running) < most:
                needed = memory_needed(queue[0], settings)
                if running and needed + sum(bytes_ for _, bytes_ in running.values()) > budget // 2:
                    break
                case = queue.popleft()
                problem = _too_large(case, settings, budget)
                if problem is not None:
                    yield case, problem
                    continue
                try:
                    running[pool.submit(_call, function, case)] = case, needed
                except BrokenProcessPool:
                    suspects.append(case)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                case, _ = running.pop(future)
                if isinstance(error := future.exception(), BrokenProcessPool):
                    suspects.append(case)
                else:
                    yield case, error
    finally:
        pool.shutdown(cancel_futures=True)


def _on_dask(function: Callable[[Case], object], cases: Sequence[Case], scheduler: str) -> Iterator[_Result]:
    """Hand the cases to the workers of a Dask cluster, twice as many at a time as they have threads."""
    try:
        from dask.distributed import Client, KilledWorker
    except ImportError as error:
        raise SettingsError("--scheduler needs Dask; pip install the distributed of requirements-dev.txt") from error
    try:
        client = Client(scheduler, timeout=20)
    except OSError as error:
        raise SettingsError(f"no Dask scheduler answers at {scheduler}; start one or correct --scheduler") from error
    queue = deque(cases)
    running: dict[Future[object], Case] = {}
    with client:
        executor = client.get_executor(pure=False)
        try:
            while queue or running:
                if not (threads := client.nthreads()):
                    _wait_for_workers(client, scheduler)
                most = 2 * max(1, sum(threads.values()))
                while queue and len(running) < most:
                    case = queue.popleft()
                    running[executor.submit(_call, function, case)] = case
                for future in wait(running, timeout=10, return_when=FIRST_COMPLETED).done:
                    case, problem = running.pop(future), future.exception()
                    if isinstance(problem, KilledWorker):
                        problem = DataError(f"{images_of(case)[0]} killed every Dask worker that prepared it")
                    elif isinstance(problem, ModuleNotFoundError):
                        raise SettingsError(
                            f"the Dask workers lack {problem.name}; start them with this environment and "
                            f"PYTHONPATH={Path(__file__).resolve().parents[2]}"
                        ) from problem
                    yield case, problem
        finally:
            for future in running:
                future.cancel()
            executor.shutdown(wait=False)


def _wait_for_workers(client: Any, scheduler: str) -> None:
    """Wait some time for a worker, which a cluster may be about to start.

    Raises:
        SettingsError: if none comes.
    """
    tqdm.write(f"the Dask scheduler {scheduler} has no workers; waiting up to {_WAIT_SECONDS} s for one")
    try:
        client.wait_for_workers(1, timeout=_WAIT_SECONDS)
    except TimeoutError as error:
        raise SettingsError(
            f"the Dask scheduler {scheduler} has no workers after {_WAIT_SECONDS} s; start some and run again, what is "
            "prepared stays"
        ) from error


def _call(function: Callable[[Case], object], case: Case) -> None:
    """Run in a worker, which sends nothing back but what is raised."""
    one_thread()
    if (error := _raised(function, case)) is not None:
        raise error


def _start_process() -> None:
    """Let a preparing process end when the one that started it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def memory_needed(case: Case, settings: StoreSettings) -> int:
    """Return about how many bytes the preparation of a case takes, by its header; a process of its own included."""
    read, made = _voxels(case, settings)
    masks = sum(name in case for name in (*MASKS, LABEL))
    of_masks = masks * _PER_VOXEL_OF_A_MASK * (read + made)
    return int(_PROCESS + _PER_VOXEL_READ * read + _PER_VOXEL_MADE * made + of_masks)


def _voxels(case: Case, settings: StoreSettings) -> tuple[float, float]:
    """Return how many voxels an image has and will have, before it is cropped."""
    files = images_of(case)
    try:
        header = read_header(files[0])
    except Exception:  # what is wrong with it is said where it is prepared
        return 0.0, 0.0
    read = float(math.prod(header.shape) * len(files))
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    if settings.size is not None:
        return read, float(math.prod(settings.size) * settings.channels)
    if settings.spacing_mm is None:
        return read, read
    return read, read * float(np.prod(spacing)) / math.prod(settings.spacing_mm)  # type: ignore[arg-type]


class DiskEstimate:
    """Say what a preparation will take on the disk: by the headers at once, better when the first volumes are done.

    Before anything is prepared it is refused if the disk is too small even for volumes that compress as well as any
    that were measured; in between, the first eight decide.

    Args:
        cases: to prepare.
        settings: of the store.
        root: of the store.
        shares: into how many parts the work is split, of which these cases are one.
        refuse: raise if the disk is too small, not only say so.

    Raises:
        DataError: if the disk is too small.
    """

    def __init__(
        self, cases: Sequence[Case], settings: StoreSettings, root: Path, *, shares: int = 1, refuse: bool = True
    ) -> None:
        self.cases, self.settings, self.root, self.shares, self.refuse = cases, settings, root, shares, refuse
        self.free = shutil.disk_usage(root).free
        self.voxels = self.bytes = 0.0
        self.count = 0
        few = random.Random(0).sample(list(cases), min(_SAMPLED, len(cases)))
        self.mean = sum(map(self._made, few)) / max(len(few), 1)
        most, least = (each[settings.dtype] * self.mean * len(cases) * shares for each in (_WORST, _BEST))
        if most:
            told = f"{self._of()} volumes will take up to about {_readable(most)} in {root} by their headers"
            self._tell(f"{told}, where {_readable(self.free)} are free", least)

    def add(self, case: Case, written: Callable[[Case], int]) -> None:
        """Take note of a case that is done; at the eighth, print a better estimate if there are many more.

        Raises:
            DataError: if the disk is too small.
        """
        if self.count == _MEASURED:
            return
        self.count += 1
        self.voxels += self._made(case)
        self.bytes += written(case)
        if self.count < _MEASURED or len(self.cases) == _MEASURED:
            return
        needed = self.bytes / max(self.voxels, 1) * self.mean * len(self.cases) * self.shares
        each = f"{_readable(self.bytes / self.count)} each for the first {self.count}"
        told = f"{self._of()} volumes will take about {_readable(needed)} in {self.root} ({each})"
        self._tell(f"{told}, where {_readable(self.free)} are free", needed)

    def _of(self) -> str:
        count = f"{len(self.cases):,}"
        return f"the {self.shares} shares of about {count}" if self.shares > 1 else f"the {count}"

    def _tell(self, told: str, needed: float) -> None:
        if needed > self.free and self.refuse:
            raise DataError(
                f"{told}; give another --store_dir or a coarser --spacing_mm, or prepare with --check_disk false"
            )
        tqdm.write(told)

    def _made(self, case: Case) -> float:
        return _voxels(case, self.settings)[1]


def _readable(count: Any) -> str:
    """Return a number of bytes in words.

    Example:
        >>> _readable(3 * 2**30)
        '3.0 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
