# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The help of a command, from its texts and the class of its settings; needs nothing but Python."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from .settings import kinds, rest_of, words

__all__ = ["explanations", "help_text"]

_WIDTH = 100


def explanations(cls: type) -> dict[str, str]:
    """Return the text that stands below each field of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def help_text(about: str, commands: Mapping[str, tuple[Callable[[Any], None], type]], arguments: Sequence[str]) -> str:
    """Return the help of a tool, or of one of its commands if the words of the command line begin with one.

    Args:
        about: what the tool's file begins with.
        commands: functions and the classes of their settings by name; the name of a tool's only command is empty.
        arguments: of the command line.
    """
    if "" in commands:
        return f"{about.strip()}\n\n{_settings(commands[''][1])}"
    if arguments and arguments[0] in commands:
        command, cls = commands[arguments[0]]
        parts = [f"{arguments[0]}: {inspect.cleandoc(command.__doc__ or '')}", _examples(about, arguments[0])]
        return "\n\n".join([*filter(None, parts), _settings(cls)])
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {(each.__doc__ or '').splitlines()[0]}" for name, (each, _) in commands.items()]
    return "\n".join([about.strip(), "", "Commands; --help after one explains its settings:", *lines])


def _examples(about: str, name: str) -> str:
    """Return the lines of a tool's text that show how one of its commands is called."""
    found: list[str] = []
    for line in about.splitlines():
        goes_on = bool(found) and found[-1].endswith("\\")
        if goes_on or re.match(rf"  (?:python tools/\w+\.py|openmind) {name}\b", line):
            found.append(line)
    return "\n".join(found)


def _settings(cls: type) -> str:
    """Return a paragraph for each setting."""
    taken, told, rest = kinds(cls), explanations(cls), rest_of(cls)
    own = [each for each in fields(cls) if each.name != rest]  # type: ignore[arg-type]
    if not own:
        return "It has no settings."
    needed = [each.name for each in own if each.default is MISSING and each.default_factory is MISSING]
    lines = [f"Settings, as --name value{'; those needed may stand first, without their names' if needed else ''}:", ""]
    for each in own:
        default = each.default if each.default_factory is MISSING else each.default_factory()
        how = "needed" if each.name in needed else f"default {_shown(default)}" if default not in (None, "", ()) else ""
        lines += [f"  --{each.name}  {words(taken[each.name])}{'; ' if how else ''}{how}", *_wrapped(told[each.name])]
    if rest:
        lines += ["  --ANY_OTHER", *_wrapped(told[rest])]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
