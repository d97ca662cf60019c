# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The environment in which nnU-Net itself runs: .venv-nnunet, apart from the project's own.

python -m tests.weights.nnunet.environment [FOLDER]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from tools.commanding.environment import ROOT, RUNTIME, install

__all__ = ["nnunet_python"]

_HERE = Path(__file__).parent
_PACKAGES, _STANDIN = _HERE / "packages.txt", _HERE / "torchvision.py"


def nnunet_python(folder: Path | None = None) -> Path:
    """Return the interpreter of the environment, making and filling it first if needed.

    Args:
        folder: of the environment; ``.venv-nnunet`` unless given.

    Raises:
        SystemExit: if the installation fails.
    """
    folder = (folder or ROOT / ".venv-nnunet").absolute()
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    made = folder / "made_of.txt"
    wanted = "".join(file.read_text("utf-8") for file in (ROOT / RUNTIME, _PACKAGES, _STANDIN))
    if python.exists() and made.is_file() and made.read_text("utf-8") == wanted:
        return python
    print(f"making the environment {folder} (once; a few minutes)", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    install(python, RUNTIME)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, "-r", str(_PACKAGES)]).returncode:
        raise SystemExit(f"Stopped: pip could not install {_PACKAGES}; see its message above")
    (packages,) = folder.rglob("site-packages")
    shutil.copy(_STANDIN, packages / _STANDIN.name)
    made.write_text(wanted, "utf-8")
    return python


if __name__ == "__main__":
    print(nnunet_python(Path(sys.argv[1]) if sys.argv[1:] else None))
