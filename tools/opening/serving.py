# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Serve a bundle with MONAI Label, whose own environment starts the server."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from common.errors import SettingsError
from common.terminal import near

from ..commanding.environment import ROOT
from .settings import Serve

__all__ = ["serve"]


def serve(settings: Serve) -> None:
    """Put the app and the bundle together, unless they are, and start the server.

    Raises:
        SettingsError: if the bundle is none that MONAI Label takes, or MONAI Label is not installed.
        SystemExit: with the server's exit status.
    """
    name = settings.bundle.resolve().name
    if not (settings.bundle / "configs" / "inference.json").is_file():
        raise SettingsError(
            f"{settings.bundle} is no bundle that MONAI Label takes; make one for your classes with: openmind new-task "
            "BUNDLE --labels edema,core --output FOLDER"
        )
    app = settings.app
    command = ["start_server", "--app", str(app), "--studies", str(settings.studies)]
    named = {"models": name, "zoo_source": "local", "sam2": "false", "epistemic_model": name}
    command += [word for conf in named.items() for word in ("--conf", *conf)]
    command += ["--host", settings.host, "--port", str(settings.port)]
    program = shutil.which(settings.monailabel)
    command = [*_started_by(program or settings.monailabel), *command]
    if settings.show_command:
        print(shlex.join(command))
        return
    if program is None:
        raise SettingsError(
            f"there is no program {settings.monailabel}; MONAI Label needs an environment of its own, which "
            "docs/monai_label.md tells how to make: name its program with --monailabel ENVIRONMENT/bin/monailabel"
        )
    _put_together(app, settings.bundle, name)
    print(
        f"labels go to {near(settings.studies / 'labels' / 'final')}; in 3D Slicer, MONAI Label server: "
        f"http://{settings.host}:{settings.port}; Ctrl-C ends it",
        flush=True,
    )
    raise SystemExit(subprocess.run(command).returncode)


def _started_by(program: str) -> list[str]:
    """Return the words that start MONAI Label by the Python beside its program.

    The program itself is a script that takes the first Python of the search path, and cuts words at spaces.
    """
    python = Path(program).with_name("python.exe" if os.name == "nt" else "python")
    return [str(python), "-m", "monailabel.main"] if python.is_file() else [program]


def _put_together(app: Path, bundle: Path, name: str) -> None:
    """Copy the app, and the bundle into it; what was trained in there stays."""
    shutil.copytree(
        ROOT / "tools" / "monai_label_app",
        app,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("model", "embeddings", "logs", "__pycache__"),
    )
    model = app / "model" / name
    if model.exists():
        print(f"going on with {model}, as it is there")
    else:
        shutil.copytree(bundle, model)
        print(f"copied {bundle} to {model}, where training writes")
