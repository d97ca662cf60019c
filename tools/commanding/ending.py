# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The three lines with which a command ends, as the workflows of the bundles do; paths are as the user sees them."""

from __future__ import annotations

import shlex
from pathlib import Path

from common.terminal import ending, near

from .environment import ROOT

__all__ = ["config_command", "end", "tool_command"]


def end(result: str | Path, *, look: str | Path | None = None, following: str) -> None:
    """Print where the result is, where to look, and what to run next.

    Args:
        result: file or folder, or words where nothing is written.
        look: picture or page; the result unless given.
        following: command, ready to paste; words in capitals in it stand for what is the user's.
    """
    last = ending(_told(result), look=_told(look or result), following=following)
    print(last, flush=True)


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
    return " ".join(shlex.quote(_told(each)) for each in words)


def _told(each: str | Path) -> str:
    return near(each) if isinstance(each, Path) else each
