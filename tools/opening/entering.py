# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The verbs on the command line: their help, with the settings of the configs, and their words."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commanding import running
from ..commanding.ending import by_verbs
from ..commanding.environment import RUNS, RUNTIME
from .options import BUNDLES, options_text

__all__ = ["WORKFLOWS", "enter"]

Verbs = Mapping[str, Callable[[Any], None]]
WORKFLOWS = {
    "pretrain": "pretrain",
    "finetune": "train",
    "predict": "inference",
    "embed": "features",
    "classify": "train_classification",
}
_EXAMPLE = "mae_resenc_l"
_INTO_RUNS = ("evaluate", "choose", "curve", "export")  # which else write where their tool does
_OUTPUT = re.compile(r"-o|--output(=.*)?")


def enter(verbs: Verbs, about: str, arguments: Sequence[str], *, groups: Mapping[str, Verbs]) -> None:
    """Print the help that is asked for, or do a verb; a reader who has seen enough (``| head``) ends it quietly.

    Args:
        verbs: functions by name, the first of them of the command itself.
        about: what the help begins with.
        arguments: of the command line.
        groups: verbs that have commands of their own, as their tools have.
    """
    try:
        with by_verbs():
            _enter(verbs, about, arguments, groups)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(1) from None


def _enter(verbs: Verbs, about: str, arguments: Sequence[str], groups: Mapping[str, Verbs]) -> None:
    verb = arguments[0] if arguments else ""
    if verb in groups:
        running.main(groups[verb], _page(next(iter(groups[verb].values()))), arguments=arguments[1:])
        return
    own = _page(next(iter(verbs.values())))
    if verb in verbs and (page := _page(verbs[verb])) != own:  # of a tool, which explains it whole
        more = (
            f"As a verb it writes to {RUNS / verb}_NAME unless --output names a folder." if verb in _INTO_RUNS else ""
        )
        running.main(verbs[verb], page, arguments=_into_runs(verb, arguments[1:]), more=more)
        return
    more = "".join(f"\n  {name}: {', '.join(each)}; openmind {name} tells of them" for name, each in groups.items())
    more = f"Verbs with commands of their own:{more}" if not verb or verb.startswith("-") else ""
    if running.asks_for_help(arguments) and verb in WORKFLOWS:
        named = next((word for word in arguments[1:] if (BUNDLES / word / "configs").is_dir()), None)
        more = options_text(named or _EXAMPLE, WORKFLOWS[verb])
        if named is None:
            more += "\n\nThose of another bundle differ a little: name it before --help."
    running.main(verbs, about, arguments=arguments, files=() if verb == "doctor" else (RUNTIME,), more=more)


def _page(function: Callable[..., Any]) -> str:
    """Return the text that the file of a command begins with."""
    return sys.modules[function.__module__].__doc__ or ""


def _into_runs(verb: str, arguments: Sequence[str]) -> list[str]:
    """Return the words of a tool, with a folder below openmind_runs as its output unless one is told."""
    told = running.asks_for_help(arguments) or any(_OUTPUT.fullmatch(word) for word in arguments)
    if verb not in _INTO_RUNS or told:
        return list(arguments)
    of = [Path(word).stem for word in arguments[:1] if not word.startswith("-")]
    return [*arguments, f"--output={RUNS / '_'.join([verb, *of])}"]
