# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Run every check of the project."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..commanding.environment import ROOT
from ..commanding.locks import lock_problems
from .configs import configs_are_good
from .ranges import ranges_are_good
from .settings import Check

__all__ = ["check"]

_MOST_WORKERS = 8  # each holds a gigabyte or more
_LONG = (  # train, have networks of full size, or start processes, servers and environments
    *("tests/bundles", "tests/ecosystem", "tests/parity", "tests/studies", "tests/test_figures.py"),
    *("tests/data/test_scale.py", "tests/data/test_sources.py", "tests/engines/test_budget.py"),
    *("tests/engines/test_features.py", "tests/engines/test_precision.py", "tests/engines/test_written.py"),
    *("tests/test_processes.py", "tests/test_starts.py"),
    *("tests/tools/test_beside_nnunet.py", "tests/tools/test_budget.py", "tests/tools/test_first_steps.py"),
    *("tests/tools/test_gpu_report.py", "tests/tools/test_label_curve.py", "tests/tools/test_locks.py"),
    *("tests/tools/test_memory.py", "tests/tools/test_openmind.py", "tests/tools/test_prepare_data.py"),
    *("tests/tools/test_probe.py", "tests/tools/test_tools.py", "tests/tools/test_wheel.py"),
    *("tests/weights/test_exchange.py", "tests/weights/test_nnunet.py", "tests/weights/test_sources.py"),
)
_APART = ("--dist", "loadscope", "--no-loadscope-reorder")  # a file's fixtures are made in one process


def check(settings: Check) -> None:
    """Run the checks; one line per step.

    Raises:
        SystemExit: with status 1, if any fails.
    """
    os.chdir(ROOT)
    python = [sys.executable, "-m"]
    if settings.fix:
        subprocess.run([*python, "ruff", "format", "--quiet", "."])
        subprocess.run([*python, "ruff", "check", "--quiet", "--fix", "."])
    tests = ["-m", f"{'' if settings.all else 'not slow and '}not label and not browser"]
    tests += [f"--ignore={place}" for place in _LONG] if settings.fast else []
    steps: dict[str, list[str]] = {
        "format": [*python, "ruff", "format", "--check", "."],
        "lint": [*python, "ruff", "check", "."],
        "tests": [*python, "pytest", "-q", "-n", str(_workers()), *_APART, *tests],
    }
    if settings.all:
        steps["label"] = [*python, "pytest", "-q", "-m", "label", "tests/ecosystem"]
        steps["browser"] = [*python, "pytest", "-q", "-m", "browser", "tests/viewing"]
        steps["nnunet"] = [*python, "tests.weights.nnunet.record"]
    results: list[tuple[str, bool, float]] = []
    own: dict[str, Callable[[], bool]] = {"configs": configs_are_good, "locks": _locks_are_fresh}
    order = [*own, *steps]
    if settings.all:
        own["ranges"] = partial(ranges_are_good, workers=_workers())
        order.append("ranges")
    with ThreadPoolExecutor(1) as beside:  # mypy uses one core, and the last tests leave one idle
        types = beside.submit(_types_are_right)
        for name in order:
            print(f"== {name}", flush=True)
            began = time.monotonic()
            passed = own[name]() if name in own else subprocess.run(steps[name]).returncode == 0
            results.append((name, passed, time.monotonic() - began))
        print("== types", flush=True)
        passed, said, took = types.result()
        print(said)
        results.append(("types", passed, took))
    print()
    for name, passed, seconds in results:
        print(f"{'ok    ' if passed else 'FAILED'} {name:8} {seconds:6.0f} s")
    if not min(passed for _, passed, _ in results):
        raise SystemExit(1)


def _locks_are_fresh() -> bool:
    """Check that the locks are of the pins, without a network, and print each problem."""
    for problem in (found := lock_problems()):
        print(problem)
    return not found


def _types_are_right() -> tuple[bool, str, float]:
    """Check the types; return whether they are right, what mypy says, and seconds."""
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True)
    return ended.returncode == 0, (ended.stdout + ended.stderr).rstrip(), time.monotonic() - began


def _workers() -> int:
    """Return how many processes test at the same time: one for each core, since each uses one thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)
