# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Commands of a tool whose settings are judged before any work is done; fire alone finds a misspelt one afterwards."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_arguments", "number", "path_of", "run", "shard_parts", "truth", "whole"]

_FLAG = re.compile(r"--?([A-Za-z][\w-]*)(=.*)?", re.DOTALL)
_LIKE_A_FLAG = re.compile(r"--|-[A-Za-z]")  # which fire takes for no value


def run(commands: Mapping[str, Callable[..., None]] | Callable[..., None], arguments: Sequence[str]) -> None:
    """Call the command that the arguments name, or the only one; what a user can mend ends in a sentence.

    Texts stay as they are written: a folder may be called 2024.

    Raises:
        SettingsError: if it does not have one of the settings.
    """
    import fire
    from fire.decorators import SetParseFn

    if isinstance(commands, Mapping):
        several, named = dict(commands), list(arguments)
    else:
        several, named = {commands.__name__: commands}, [commands.__name__, *arguments]
    helps = bool({"-h", "--help"} & {*arguments})
    if not helps:
        from common.errors import end_in_a_sentence

        end_in_a_sentence()
    check_arguments(several, named)
    for command in () if helps else several.values():  # help would list what this adds
        parameters = inspect.signature(command).parameters.values()
        texts = [each.name for each in parameters if each.annotation in ("str", "str | None")]
        SetParseFn(str, *texts)(command)
    fire.Fire(several if isinstance(commands, Mapping) else commands, command=list(arguments))


def check_arguments(commands: Mapping[str, Callable[..., None]], arguments: Sequence[str]) -> None:
    """Refuse settings that a command does not have, settings without a value, and too many arguments.

    Raises:
        SettingsError: naming the command, the setting and what is meant perhaps.
    """
    from common.errors import SettingsError

    if not arguments or arguments[0] not in commands:
        return  # fire lists the commands
    name, known = arguments[0], inspect.signature(commands[arguments[0]]).parameters
    named: set[str] = set()
    placed: list[str] = []
    rest = list(arguments[1:])
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        if (match := _FLAG.fullmatch(argument)) is None:
            placed.append(argument)
            continue
        flag = match[1].replace("-", "_")
        if flag in ("help", "h"):
            return
        if flag not in known and flag.startswith("no") and _is_switch(known.get(flag[2:])):
            named.add(flag[2:])
            continue
        short = [each for each in known if len(flag) == 1 and each.startswith(flag)]
        flag = short[0] if len(short) == 1 else flag
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=2, cutoff=0.5)
            hint = (
                f"; did you mean {' or '.join(f'--{each}' for each in near)}?"
                if near
                else f"; it has: {', '.join(known)}"
            )
            raise SettingsError(f"{name} has no setting {argument.partition('=')[0]}{hint}")
        named.add(flag)
        if match[2] is None:
            if rest and _LIKE_A_FLAG.match(rest[0]) is None:
                rest.pop(0)
            elif not _is_switch(known[flag]):
                remedy = f"write --{flag} VALUE"
                if rest and rest[0] != "--":
                    remedy += f", and a value that begins with a hyphen as --{flag}={shlex.quote(rest[0])}"
                raise SettingsError(f"--{flag} of {name} has no value; {remedy}")
    if len(placed) > len(known) - len(named):
        raise SettingsError(f"{name} does not know what to do with {placed[-1]!r}; it has: {', '.join(known)}")


def whole(name: str, value: Any, *, least: int = 0) -> int:
    """Return a whole number of the command line.

    Raises:
        SettingsError: if it is none, or too small.
    """
    from common.errors import SettingsError

    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"--{name} is {value!r}; it must be a whole number from {least}")
    return value


def number(name: str, value: Any, *, least: float = 0.0) -> float:
    """Return a number of the command line.

    Raises:
        SettingsError: if it is none, or too small.
    """
    from common.errors import SettingsError

    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise SettingsError(f"--{name} is {value!r}; it must be a number from {least:g}")
    return float(value)


def shard_parts(shard: str) -> tuple[int, int]:
    """Return i and n of i/n: which of how many parts.

    Raises:
        SettingsError: if it is not of that form.
    """
    from common.errors import SettingsError

    first, _, second = str(shard).partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise SettingsError(f"--shard is {shard!r}; write i/n with i from 0 to n - 1, such as 0/8 to 7/8")
    return int(first), int(second)


def truth(value: object) -> bool:
    """Return what a switch of the command line means; fire hands on ``false`` as a text, which is true.

    Raises:
        SystemExit: if it is neither.
    """
    text = str(value).lower()
    if text not in ("true", "false"):
        raise SystemExit(f"Stopped: {value!r} is neither true nor false")
    return text == "true"


def path_of(option: str, value: object) -> Path:
    """Return a path of the command line, ``~`` being the user's folder; an option without a value arrives as true.

    Raises:
        SystemExit: if it is no path.
    """
    if not isinstance(value, (str, int, float, Path)) or isinstance(value, bool):
        raise SystemExit(f"Stopped: --{option} is {value!r}; it must be a path")
    return Path(str(value)).expanduser()


def _is_switch(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and isinstance(parameter.default, bool)
