# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Run a program and note what it took; by the Python of either side, so with nothing of this project.

python measured.py REPORT PROGRAM [ARGUMENTS]     # a file, or -m and a module

The report is JSON: processor seconds of the whole process, those of them spent in imports, and its peak memory in
bytes, as the system counts it (Linux).
"""

import atexit
import builtins
import importlib
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_inside = 0
_imports = 0.0


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a way to import that counts the time of the outermost calls."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        global _inside, _imports
        _inside += 1
        began = time.process_time() if _inside == 1 else 0.0
        try:
            return function(*arguments, **keywords)
        finally:
            _inside -= 1
            if not _inside:
                _imports += time.process_time() - began

    return call


def _report(path: str) -> None:
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    found = {"seconds": time.process_time(), "imports": _imports, "peak": 1024 * int(peak)}
    Path(path).write_text(json.dumps(found))


def main(report: str, arguments: list[str]) -> None:
    """Run a program with its arguments; the report is written when the process ends."""
    atexit.register(_report, report)
    builtins.__import__ = _counted(builtins.__import__)
    importlib.import_module = _counted(importlib.import_module)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = ""
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
