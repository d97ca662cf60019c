# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make the project's environment, or use the running one if it has the exact pins. Needs nothing but Python."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
from pathlib import Path

__all__ = ["ROOT", "ensure", "unmet"]

ROOT = Path(__file__).resolve().parents[2]
RUNTIME, DEVELOPMENT = "requirements.txt", "requirements-dev.txt"


def unmet(*files: str) -> list[str]:
    """Return the pins of these files that the running interpreter does not satisfy."""
    lines = [line.split("#")[0].strip() for file in files for line in (ROOT / file).read_text("utf-8").splitlines()]
    wrong = []
    for pin in filter(None, lines):
        name, _, version = pin.partition("==")
        try:
            installed = importlib.metadata.version(name).split("+")[0]  # "+cpu" and the like name a build
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            wrong.append(f"{pin} (here: {installed})")
    return wrong


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure(*files: str) -> None:
    """Return if this interpreter has all pins; else go on in ``.venv``, making and filling it first if needed.

    Raises:
        SystemExit: if Python is too old or the installation fails.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs first, on any Python)
        raise SystemExit(f"Stopped: this needs Python 3.11 or newer, not {sys.version.split()[0]}")
    if not unmet(*files):
        return
    folder = ROOT / ".venv"
    python = _python(folder)
    if Path(sys.prefix).resolve() == folder.resolve() or not python.exists() or _check(python, files):
        if not python.exists():
            print(f"making the environment {folder}", flush=True)
            venv.create(folder, with_pip=True)
        print(f"installing {', '.join(files)} (once; a few minutes)", flush=True)
        requirements = [option for file in files for option in ("-r", str(ROOT / file))]
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        if subprocess.run(command).returncode:
            raise SystemExit(f"Stopped: pip could not install {', '.join(files)}; see its message above")
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    status = subprocess.run([str(python), *sys.argv]).returncode
    raise SystemExit(status)


def _check(python: Path, files: tuple[str, ...]) -> bool:
    """Return whether that interpreter lacks pins."""
    return subprocess.run([str(python), __file__, *files]).returncode != 0


if __name__ == "__main__":
    sys.exit(1 if unmet(*sys.argv[1:]) else 0)
