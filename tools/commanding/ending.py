# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The three lines with which a command ends, as the workflows of the bundles do; paths are as the user sees them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from .environment import ROOT

__all__ = ["config_command", "end", "tool_command"]

_WIDTH = 9


def end(result: str | Path, *, look: str | Path | None = None, following: str) -> None:
    """Print where the result is, where to look, and what to run next.

    Args:
        result: file or folder, or words where nothing is written.
        look: picture or page; the result unless given.
        following: command, ready to paste; words in capitals in it stand for what is the user's.
    """
    told = {"result": result, "look at": look or result, "next": following}
    lines = (f"{name + ':':<{_WIDTH}}{_shown(each) if isinstance(each, Path) else each}" for name, each in told.items())
    print("\n".join(lines), flush=True)


def tool_command(name: str, *words: str | Path) -> str:
    """Return a command line of a tool.

    Args:
        name: of its file, without ending.
        words: that follow.
    """
    return _line(["python", ROOT / "tools" / f"{name}.py", *words])


def config_command(bundle: str, config: str, *words: str | Path) -> str:
    """Return a command line that runs a config of a bundle of the collection."""
    file = ROOT / "bundles" / bundle / "configs" / f"{config}.yaml"
    return _line(["python", "-m", "monai.bundle", "run", "--config_file", file, *words])


def _line(words: list[str | Path]) -> str:
    return " ".join(shlex.quote(_shown(each) if isinstance(each, Path) else each) for each in words)


def _shown(path: Path) -> str:
    """Return a path as it is shortest from where the user stands."""
    whole = path.absolute()
    return os.path.normpath(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)
