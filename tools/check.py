# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Run every check of the project: configs, locks, format, lint, types, tests. One line per step; the exit status says
if any failed.

  python tools/check.py           # what CI runs
  python tools/check.py --fast    # without the tests that run whole bundles
  python tools/check.py --all     # with the slow tests too, and those of a MONAI Label server
  python tools/check.py --fix     # let ruff mend what it can first

It makes its own environment (.venv) unless the running one has the exact pins; --all makes .venv-label as well.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.commanding.environment import DEVELOPMENT, ROOT, RUNTIME, ensure

__all__ = ["check"]

_MOST_WORKERS = 8  # each holds a gigabyte or more
_APART = ("--dist", "loadscope", "--no-loadscope-reorder")  # a file's fixtures are made in one process


def _config_problems(path: Path) -> list[str]:
    """Return what is wrong with a config: repeated keys, references to nothing, missing targets."""
    import re

    import yaml
    from monai.bundle import ConfigParser

    from common.bundles import read_config

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            problems.append(f"repeated key {sorted(map(str, twice))}")
        return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))

    problems: list[str] = []
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    yaml.load(path.read_text("utf-8"), Strict)
    if path.parts[-2] != "configs" or path.parts[-4] != "bundles":
        return problems
    parser = ConfigParser(read_config(path))
    parser.resolve_macro_and_relative_ids()
    resolved = parser.get()

    def walk(value: object, where: str) -> None:
        if isinstance(value, dict):
            target = value.get("_target_")
            if isinstance(target, str) and "." in target:
                from pydoc import locate

                if locate(target) is None:
                    problems.append(f"{where}: there is no {target}")
            for key, inner in value.items():
                walk(inner, f"{where}#{key}")
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, f"{where}#{index}")
        elif isinstance(value, str) and value[:1] in "@$":
            for reference in re.findall(r"@([\w:#]+)", value):
                if reference.replace("#", "::") not in parser:
                    problems.append(f"{where}: @{reference} refers to nothing")

    walk(resolved, "")
    return problems


def _configs() -> bool:
    """Check all YAML of the project and print each problem; of the links to one source, the first."""
    from tools.linking.links import problems

    good = True
    linked = {path.resolve(): path for path in sorted(ROOT.glob("bundles/*/configs/*.yaml"), reverse=True)}
    paths = [*ROOT.glob("common/configs/*.yaml"), *linked.values()]
    for path in sorted(paths):
        for problem in _config_problems(path):
            print(f"{path.relative_to(ROOT)}: {problem}")
            good = False
    for problem in problems():
        print(problem)
        good = False
    return good and bool(paths)


def _locks() -> bool:
    """Check that the locks are of the pins, without a network, and print each problem."""
    from tools.commanding.locks import lock_problems

    for problem in (found := lock_problems()):
        print(problem)
    return not found


def _workers() -> int:
    """Return how many processes test at the same time: one for each core, since each uses one thread."""
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def check(fast: bool = False, all: bool = False, fix: bool = False) -> None:
    """Run the checks.

    Args:
        fast: leave out the tests that run whole bundles.
        all: run the slow tests and those of a MONAI Label server too.
        fix: let ruff mend format and lint first.
    """
    import os

    os.chdir(ROOT)
    python = [sys.executable, "-m"]
    if fix:
        subprocess.run([*python, "ruff", "format", "--quiet", "."])
        subprocess.run([*python, "ruff", "check", "--quiet", "--fix", "."])
    tests = ["-m", "not label" if all else "not slow and not label"]
    tests += ["--ignore", "tests/bundles/test_runs.py", "--ignore", "tests/ecosystem"] if fast else []
    steps: dict[str, list[str]] = {
        "format": [*python, "ruff", "format", "--check", "."],
        "lint": [*python, "ruff", "check", "."],
        "types": [*python, "mypy"],
        "tests": [*python, "pytest", "-q", "-n", str(_workers()), *_APART, *tests],
    }
    if all:
        steps["label"] = [*python, "pytest", "-q", "-m", "label", "tests/ecosystem"]
    results: list[tuple[str, bool, float]] = []
    quick = {"configs": _configs, "locks": _locks}
    for name in (*quick, *steps):
        print(f"== {name}", flush=True)
        began = time.monotonic()
        passed = quick[name]() if name in quick else subprocess.run(steps[name]).returncode == 0
        results.append((name, passed, time.monotonic() - began))
    print()
    for name, passed, seconds in results:
        print(f"{'ok    ' if passed else 'FAILED'} {name:8} {seconds:6.0f} s")
    if not min(passed for _, passed, _ in results):
        raise SystemExit(1)


if __name__ == "__main__":
    ensure(RUNTIME, DEVELOPMENT)
    from tools.commanding.commands import run

    run(check, sys.argv[1:])
