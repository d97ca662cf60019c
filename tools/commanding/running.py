# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What every command does first: help, the environment, and settings that are judged before any work is done."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from .environment import RUNTIME, ensure
from .helping import help_text

__all__ = ["asks_for_help", "main", "run"]

Commands = Callable[[Any], None] | Mapping[str, Callable[[Any], None]]


def main(
    commands: Commands,
    about: str | None,
    *,
    files: Sequence[str] = (RUNTIME,),
    arguments: Sequence[str] | None = None,
    more: str = "",
) -> None:
    """Print the help that the command line asks for, with the standard library alone, or run a command.

    Args:
        commands: the only one, or several by name, each with one argument, the class of its settings.
        about: what the tool's file begins with.
        files: whose pins the command needs.
        arguments: those of this process unless given.
        more: what the help says besides.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if asks_for_help(arguments) or (isinstance(commands, Mapping) and not arguments):
        print("\n\n".join(filter(None, [help_text(about or "", _with_settings(commands), arguments), more])))
        return
    try:
        ensure(*files)
    except KeyboardInterrupt:
        print("Stopped: interrupted by Ctrl-C. The same command goes on with what is installed", file=sys.stderr)
        raise SystemExit(130) from None
    run(commands, arguments)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return bool({"-h", "--help"} & {*arguments})


def run(commands: Commands, arguments: Sequence[str]) -> None:
    """Call the command that the arguments name, or the only one; what a user can mend ends in a sentence.

    Raises:
        SettingsError: if there is no such command or setting, or one is missing or has a wrong value.
    """
    from common.errors import SettingsError, end_in_a_sentence

    end_in_a_sentence()
    known = _with_settings(commands)
    if isinstance(commands, Mapping):
        name = arguments[0]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise SettingsError(f"there is no command {name!r}; {hint}")
        (command, cls), rest = known[name], arguments[1:]
    else:
        (command, cls), rest = known[""], arguments
        name = command.__name__
    if rest or inspect.signature(cls).parameters:
        from .parsing import parse

        command(parse(name, cls, rest))
    else:
        command(cls())


def _with_settings(commands: Commands) -> dict[str, tuple[Callable[[Any], None], type]]:
    """Return functions with the classes of their settings."""
    several = dict(commands) if isinstance(commands, Mapping) else {"": commands}
    return {name: (each, _class(each)) for name, each in several.items()}


def _class(command: Callable[[Any], None]) -> type:
    found: type = get_type_hints(command)[next(iter(inspect.signature(command).parameters))]
    return found
