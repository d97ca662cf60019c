# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Prepare many volumes at once: in processes within the memory that there is, or on the workers of a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import blosc2
import torch
from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...memory import comfortable_bytes
from ..cases import Case, images_of
from .estimates import are_few, memory_needed
from .settings import StoreSettings

__all__ = ["each", "one_thread"]

_GIB = 2**30
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

    A handful of small cases is done in this process, which takes less than starting others. A case whose process dies,
    as the system ends one that takes too much memory, is tried once more on its own.
    """
    if scheduler:
        yield from _on_dask(function, cases, scheduler)
        return
    budget = 2 * comfortable_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # all of a rank's that is free
    if num_workers <= 1 or len(cases) <= 2 or are_few(cases, settings):
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
                            f"PYTHONPATH={Path(__file__).resolve().parents[__name__.count('.')]}"
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
