# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Test the ranges of versions that the metadata allow, in two environments: .venv-lowest and .venv-newest.

Each has the lowest, or the newest, version of every dependency and extra in pyproject.toml; of torch both have the
pinned one. The collection is installed there as a user does it, and tests run that reach what these packages do.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..commanding.environment import DEVELOPMENT, ROOT, RUNTIME, alone, install_torch, make, python_of
from ..commanding.locks import pins

__all__ = ["ranges_are_good"]

_RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}  # as uv calls them
_TESTERS = ("pytest", "pytest-xdist", "hypothesis", "jsonschema")
_TESTS = (
    *("tests/transforms", "tests/metrics", "tests/losses", "tests/optimizers"),
    "tests/tools/test_wheel.py",  # from pre-training to a prediction
)
_SHOW = """
import importlib.metadata as metadata, sys
print(", ".join(f"{name} {metadata.version(name)}" for name in sys.argv[1:]))
"""


def ranges_are_good(*, workers: int) -> bool:
    """Make both environments, print what they have, and run the tests in each; return whether all pass.

    Args:
        workers: processes that test at the same time.
    """
    passed = [_is_good(name, workers) for name in _RESOLUTIONS]  # the second also if the first fails
    return all(passed)


def _is_good(name: str, workers: int) -> bool:
    """Make an environment and test in it."""
    folder = ROOT / f".venv-{name}"
    python = python_of(folder)
    with alone(folder):
        _fill(folder, _RESOLUTIONS[name])
        for words in (
            [str(python), "-c", _SHOW, *pins(ROOT / RUNTIME)],
            [sys.executable, "-m", "uv", "pip", "check", "--quiet", "--python", str(python)],
            [str(python.with_name("openmind")), "doctor"],
            [str(python), "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadscope", *_TESTS],
        ):
            if subprocess.run(words, cwd=ROOT).returncode:
                print(f"failed with the {name} versions: {' '.join(words)}")
                return False
    return True


def _fill(folder: Path, resolution: str) -> None:
    """Make an environment anew, since newer versions appear, and install the collection into it.

    Raises:
        SystemExit: if the versions cannot be had.
    """
    make(folder, again=True)
    python = python_of(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    install_torch(pip, ROOT / "locks" / RUNTIME, "python tools/check.py")
    known = pins(ROOT / RUNTIME) | pins(ROOT / DEVELOPMENT)
    exact = [f"{each}=={known[each]}" for each in ("torch", *_TESTERS)]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python)]
    for words in (
        [*uv, "--resolution", resolution, "--all-extras", "-r", "pyproject.toml", *exact],
        [*uv, "--no-deps", "--reinstall-package", "openmind-bundles", "."],
    ):
        if subprocess.run(words, cwd=ROOT).returncode:
            raise SystemExit(f"Stopped: uv could not install into {folder}; see its message above")
