# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""nnU-Net itself, which runs by the Python of an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..commanding.environment import ROOT

__all__ = ["PEER", "nnunet_python", "nnunet_version", "on_one_thread"]

_WITNESS = "tests.weights.nnunet"  # its environment, and what runs there
PEER = ROOT.joinpath(*_WITNESS.split("."), "peer.py")


def nnunet_python() -> Path:
    """Return the interpreter of nnU-Net's environment, which is made first if needed."""
    command = [sys.executable, "-m", f"{_WITNESS}.environment"]
    told = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Path(told.splitlines()[-1])


def nnunet_version(python: Path) -> str:
    """Return the versions of nnU-Net and of the PyTorch beside it."""
    ask = "import importlib.metadata as m; print(m.version('nnunetv2'), 'with torch', m.version('torch'))"
    return subprocess.run([str(python), "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def on_one_thread() -> dict[str, str]:
    """Return the variables of a process that computes on one thread, and of nnU-Net's folders those of nobody."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet_", "PYTHON"))}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "nnUNet_def_n_proc": "1"}
