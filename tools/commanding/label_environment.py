# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The environment in which the tests start a MONAI Label server: .venv-label, apart from the project's own."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

from .environment import ROOT, _check, _python

__all__ = ["label_python"]

LABEL = "requirements-label.txt"
_STANDIN = ROOT / "tests" / "ecosystem" / "torchvision_standin"
_FIRST = ("torch", "numpy", "setuptools", "wheel")  # what building the others needs


def label_python() -> Path:
    """Return the interpreter of ``.venv-label``, making and filling it first if needed.

    Raises:
        SystemExit: if the installation fails.
    """
    folder = ROOT / ".venv-label"
    python = _python(folder)
    if python.exists() and not _check(python, (LABEL,)):
        return python
    print(f"making the environment {folder} (once; a few minutes)", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    lines = (ROOT / LABEL).read_text("utf-8").splitlines()
    first = [line for line in lines if line.partition("==")[0] in _FIRST]
    for what in (first, ["--no-build-isolation", str(_STANDIN)], ["--no-build-isolation", "-r", str(ROOT / LABEL)]):
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
        if subprocess.run(command, env=os.environ | {"SAM2_BUILD_CUDA": "0"}).returncode:
            raise SystemExit(f"Stopped: pip could not install {' '.join(what)}; see its message above")
    return python
