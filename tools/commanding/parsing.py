# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""From the words of a command line to the settings of a command; cyclopts finds which word belongs to which setting."""

from __future__ import annotations

import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnknownOptionError, UnusedCliTokensError

from common.errors import SettingsError

from .settings import filled, kinds, renamed, rest_of, words

__all__ = ["parse"]

T = TypeVar("T")
_OPTION = re.compile(r"-?-([A-Za-z][^=\s]*)(=.*)?", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d.]*(?:e-?\d+)?")
_NUMBERS = re.compile(rf"{_NUMBER.pattern}(?:,{_NUMBER.pattern})*")
_BARE = {"help_flags": [], "version_flags": [], "name": "command"}


def parse(name: str, cls: type[T], arguments: Sequence[str]) -> T:
    """Return the settings that the words of a command line mean.

    ``--name value`` or ``--name=value``, with underscores or hyphens, in any order; a switch needs no value, and
    ``--no-switch`` turns it off; the first letter is enough if it is of one setting only; values without a name are
    those of the settings in their order. Of a setting that is named twice the last value holds.

    Raises:
        SettingsError: if there is no such setting, or one is missing or has no value or a wrong one.
    """
    app = App(**_BARE)  # type: ignore[arg-type]
    app.default(_function(cls))
    try:
        bound = app.parse_args(_words(cls, arguments), exit_on_error=False, print_error=False)[1]
    except CycloptsError as error:
        raise SettingsError(_sentence(error, name, cls, arguments)) from error
    rest = bound.arguments.pop(rest_of(cls) or "", {})
    return filled(cls, **bound.arguments, **{each.replace("-", "_"): value for each, value in rest.items()})


def _own(cls: type) -> list[str]:
    """Return the settings that are not those of a bundle's configs."""
    rest = rest_of(cls)
    return [name for name in kinds(cls) if name != rest]


def _needed(cls: type) -> list[str]:
    """Return the settings without a default."""
    return [name for name, each in inspect.signature(cls).parameters.items() if each.default is each.empty]


def _names(cls: type) -> dict[str, str]:
    """Return the setting of every name that it may be called by."""
    own = _own(cls)
    first = [name[0] for name in own]
    names = {f"--{each}": name for name in own for each in (name, name.replace("_", "-"))}
    return names | {f"-{name[0]}": name for name in own if first.count(name[0]) == 1}


def _function(cls: type) -> Callable[..., None]:
    """Return a function that has the settings as arguments: texts, and switches."""
    names, needed, taken, parameters = _names(cls), _needed(cls), kinds(cls), []
    for name in _own(cls):
        switch = taken[name] is bool
        off = [f"--no-{name.replace('_', '-')}", f"--no{name}", f"--no_{name}"] if switch else []
        own = [each for each, whose in names.items() if whose == name]
        about = Parameter(name=own, negative=off, allow_repeating=True)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if name in needed else None,
                annotation=Annotated[bool if switch else str, about],
            )
        )
    if rest := rest_of(cls):
        parameters.append(inspect.Parameter(rest, inspect.Parameter.VAR_KEYWORD, annotation=str))

    def function(**_: Any) -> None: ...

    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    return function


def _words(cls: type, arguments: Sequence[str]) -> list[str]:
    """Write a command line so that no word can be taken for another: ``-name`` as ``--name``, a switch with its value,
    a negative number with its setting, numbers that follow each other as one list, and a setting of a config without a
    value with ``=true``.
    """
    names, taken, found = _names(cls), kinds(cls), list[str]()
    for word in _numbers_joined(cls, arguments):
        option = _OPTION.fullmatch(word)
        whole = f"-{word}" if option is not None and not word.startswith("--") and len(option[1]) > 1 else word
        if found and (before := _OPTION.fullmatch(found[-1])) is not None and before[2] is None:
            switch = taken.get(names.get(found[-1], "")) is bool
            if whole.lower() in ("true", "false") if switch else re.match(r"-[\d.]", whole):
                found[-1] += f"={whole}"
                continue
        found.append(whole)
    if rest_of(cls) is not None:
        for index, (word, following) in enumerate(zip(found, _following(found), strict=True)):
            alone = following is None or _OPTION.fullmatch(following) is not None
            option = _OPTION.fullmatch(word)
            if option is not None and option[2] is None and alone and word not in names and not _turned_off(cls, word):
                found[index] = f"{word}=true"
    return found


def _numbers_joined(cls: type, arguments: Sequence[str]) -> list[str]:
    """Return the words with ``96 96 96`` behind a setting that takes a list, or one of a config, as ``96,96,96``."""
    names, taken, rest = _names(cls), kinds(cls), rest_of(cls)
    found: list[str] = []
    last = ""
    for word in arguments:
        option = _OPTION.fullmatch(word)
        if option is not None:
            last = word if word.startswith("--") or len(option[1]) == 1 else f"-{word}"
            last = "" if option[2] else last
        elif last and _NUMBER.fullmatch(word):
            several = rest is not None if last not in names else "numbers" in words(taken[names[last]])
            if several and _NUMBERS.fullmatch(found[-1]):
                found[-1] += f",{word}"
                continue
        else:
            last = ""
        found.append(word)
    return found


def _following(arguments: Sequence[str]) -> list[str | None]:
    """Return what follows each word."""
    return [*arguments[1:], None][: len(arguments)]


def _turned_off(cls: type, word: str) -> bool:
    """Return whether a word is ``--no-switch``."""
    name = word.lstrip("-").replace("-", "_")
    return kinds(cls).get(name.removeprefix("no").removeprefix("_")) is bool and name.startswith("no")


def _sentence(error: CycloptsError, name: str, cls: type, arguments: Sequence[str]) -> str:
    """Say what is wrong with a command line, and what to do."""
    own = _own(cls)
    every = f"it has: {', '.join(own)}"
    if isinstance(error, UnknownOptionError):
        word = str(error.token.keyword or error.token.value).partition("=")[0]
        if told := renamed(cls, word.lstrip("-").replace("-", "_")):
            return told
        near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), own, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(f'--{each}' for each in near)}?" if near else every
        return f"{name} has no setting {word}; {hint}"
    if isinstance(error, UnusedCliTokensError):
        return f"{name} does not know what to do with {(error.unused_tokens or [''])[-1]!r}; {every}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        of = error.argument.name.lstrip("-").replace("-", "_")
        for word, following in zip(arguments, _following(arguments), strict=True):
            if _names(cls).get(word) == of:
                remedy = f"write --{of} VALUE"
                if following not in (None, "--"):
                    remedy += f", and a value that begins with a hyphen as --{of}={shlex.quote(str(following))}"
                return f"--{of} of {name} has no value; {remedy}"
        lacking = [f"--{each} ({words(kinds(cls)[each])})" for each in _needed(cls)]
        return f"{name} needs {' and '.join(lacking)}, and --{of} is not given; --help tells of each"
    return f"{name}: {error}"
