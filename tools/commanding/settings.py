# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of a command: a dataclass whose types say what may be told, alike on a command line and in Python.

A text, which is all that a command line has, is read by the type of its field; any other value is checked by it. What
stands below a field as a text is its help. Needs nothing but Python, so that help is there before the environment is.

=====================  =================================================================================================
str, Path              as written; ``~`` begins a path of the user's
bool                   true or false
int, float             finite; ``Annotated[int, From(1)]`` bounds it
Literal["a", "b"]      one of these
tuple[str, ...]        ``a,b`` or ``['a','b']``; of numbers alike
dict[str, X]           ``{'a': X}``
X | None               nothing if it is empty, and if it is ``null`` or ``None`` where X is no text or path
Any                    a number, list, text, ... as ``monai.bundle run`` reads it
Annotated[X, Reads]    what a function makes of it
Annotated[dict, Rest]  all settings that are no fields: those of a bundle's configs
=====================  =================================================================================================

A ``RENAMED`` of the class has the new names of settings that were called otherwise, which are refused with a sentence.
"""

from __future__ import annotations

import ast
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from .environment import ROOT

__all__ = [
    "Bundle",
    "Existing",
    "From",
    "Labels",
    "Reads",
    "RefusalError",
    "Rest",
    "Rests",
    "Shard",
    "filled",
    "kinds",
    "plain",
    "read",
    "renamed",
    "rest_of",
    "settings",
    "words",
]

T = TypeVar("T")
_TEXTS = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True)
class From:
    """The least that a number may be; with ``above``, it must be more than that."""

    least: float
    above: bool = False


@dataclass(frozen=True)
class Reads:
    """A function that reads a value, or raises ValueError, and words for what it takes."""

    function: Callable[[Any], Any]
    words: str


class RefusalError(ValueError):
    """What is wrong with a value, in a sentence of its own."""


@dataclass(frozen=True)
class Rest:
    """Marks the field that takes what is no field."""


@dataclass_transform()
def settings(cls: type[T]) -> type[T]:
    """Make a class a dataclass that reads and checks its values when it is made.

    A ``__post_init__`` of the class comes afterwards, for what concerns several fields.

    Raises:
        SettingsError: later, if a value is none of its field's type: naming the field, the value and what it must be.

    Example:
        >>> @settings
        ... class Study:
        ...     file: Path
        ...     jobs: Annotated[int, From(1)] = 1
        >>> Study("a.yaml", jobs="2")
        Study(file=PosixPath('a.yaml'), jobs=2)
        >>> Study("a.yaml", jobs=0)
        Traceback (most recent call last):
        common.errors.SettingsError: --jobs is 0; it must be a whole number from 1
    """
    after: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")

    def read_all(self: Any) -> None:
        for name, kind in kinds(type(self)).items():
            value = getattr(self, name)
            try:
                setattr(self, name, read(kind, value))
            except ValueError as error:
                from common.errors import SettingsError

                if isinstance(error, SettingsError):
                    raise
                told = f"--{name} is {_as_told(value)}; it must be {words(kind)}"
                raise SettingsError(str(error) if isinstance(error, RefusalError) else told) from error
        if after is not None:
            after(self)

    cls.__post_init__ = read_all  # type: ignore[attr-defined]
    return dataclass(cls)


def kinds(cls: Any) -> dict[str, Any]:
    """Return the type of every field."""
    hints = get_type_hints(cls, include_extras=True)
    return {each.name: hints[each.name] for each in fields(cls)}  # type: ignore[arg-type]


def rest_of(cls: type) -> str | None:
    """Return the name of the field that takes what is no field, if there is one."""
    return next((name for name, kind in kinds(cls).items() if Rest() in getattr(kind, "__metadata__", ())), None)


def filled(cls: type[T], *values: Any, **named: Any) -> T:
    """Return settings; what is no field is taken as a setting of a bundle's config, if the class has a place for it.

    Example:
        >>> @settings
        ... class Export:
        ...     bundle: str
        ...     others: Rests
        >>> filled(Export, "mae_resenc_l", depth="2")
        Export(bundle='mae_resenc_l', others={'depth': 2})
    """
    if rest := rest_of(cls):
        others = {name: named.pop(name) for name in [*named] if name not in kinds(cls)}
        if told := next(filter(None, (renamed(cls, name) for name in others)), None):
            from common.errors import SettingsError

            raise SettingsError(told)
        named[rest] = {**named.get(rest, {}), **others}
    return cls(*values, **named)


def renamed(cls: type, name: str) -> str | None:
    """Return a sentence on a setting that is called otherwise now, by ``RENAMED`` of the class; None for any other.

    Example:
        >>> class Choose:
        ...     RENAMED = {"group": "patient"}
        >>> renamed(Choose, "group"), renamed(Choose, "epochs")
        ('--group is called --patient here; write --patient', None)
    """
    new = getattr(cls, "RENAMED", {}).get(name)
    return None if new is None else f"--{name} is called --{new} here; write --{new}"


def words(kind: Any) -> str:
    """Say what a type takes.

    Example:
        >>> words(Annotated[int, From(1)] | None), words(tuple[float, ...]), words(Literal["a", "b", "c"])
        ('a whole number from 1', 'numbers with commas between', 'a, b or c')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        for mark in kind.__metadata__:
            if isinstance(mark, Reads):
                return mark.words
            if isinstance(mark, From):
                return f"{words(inner[0])} {'above' if mark.above else 'from'} {mark.least:g}"
        return words(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(words(each) for each in inner if each is not NoneType))
    if origin is Literal:
        return " or ".join(", ".join(map(str, inner)).rsplit(", ", 1))
    if origin is tuple:
        several = {str: "names", Path: "paths", int: "whole numbers", float: "numbers"}
        return f"{several.get(_bare(inner[0])) or words(inner[0])} with commas between"
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return named.get(kind, "a mapping such as {'a': 1}" if origin is dict else "a value of a config")


def read(kind: Any, value: Any) -> Any:
    """Return a value as its type has it; texts are read.

    Raises:
        ValueError: if it is no such value.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        for mark in kind.__metadata__:
            if isinstance(mark, Reads):
                return mark.function(value)
        found = read(inner[0], value)
        for mark in kind.__metadata__:
            if isinstance(mark, From) and (found < mark.least or (mark.above and found == mark.least)):
                raise ValueError(found)
        return found
    if origin in (Union, UnionType):
        return _read_any(inner, value)
    if origin is Literal:
        text = str(value).lower() if isinstance(value, bool) else value
        if text not in inner:
            raise ValueError(value)
        return text
    if origin is tuple:
        parts = _parts(value)
        if "" in parts:
            raise ValueError(value)
        return tuple(read(inner[0], part) for part in parts)
    if origin is dict:
        found = plain(value)
        if not isinstance(found, Mapping):
            raise ValueError(value)
        return {read(inner[0], name): read(inner[1], each) for name, each in found.items()}
    return plain(value) if kind is Any else _read_one(kind, value)


def _read_any(inner: Sequence[Any], value: Any) -> Any:
    """Return a value as the first of several types that has it."""
    if NoneType in inner and (value is None or value == ""):
        return None
    problems = []
    for each in inner:
        if each is not NoneType:
            try:
                return read(each, value)
            except ValueError as error:
                problems.append(error)
    if NoneType in inner and value in ("null", "None"):
        return None
    raise problems[0]


def _read_one(kind: type, value: Any) -> Any:
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError(value)
        return str(value).lower() == "true"
    takes = {int: Integral, float: Real}.get(kind, (Real, os.PathLike))
    if isinstance(value, bool) or (value == "" and kind is Path) or not isinstance(value, (str, takes)):
        raise ValueError(value)
    number: Any = value
    found = kind(number) if kind in (int, float) else kind(str(value))
    if kind is float and not math.isfinite(found):
        raise ValueError(value)
    return found.expanduser() if isinstance(found, Path) else found


def _parts(value: Any) -> list[Any]:
    """Return the parts of a list, as it is or as a text: ``a,b``, ``[a,b]`` or ``['a','b']``."""
    if not isinstance(value, str):
        if isinstance(value, (Mapping, bool)) or not isinstance(value, (Sequence, int, float)):
            raise ValueError(value)
        return list(value) if isinstance(value, Sequence) else [value]
    text = value.strip()
    if text[:1] in ("[", "(", "'", '"'):
        try:
            found = ast.literal_eval(text)
            return list(found) if isinstance(found, (list, tuple)) else [found]
        except (ValueError, SyntaxError):
            text = text.removeprefix("[").removesuffix("]").removeprefix("(").removesuffix(")")
    return [part.strip() for part in text.removesuffix(",").split(",")] if text else []


def _as_told(value: Any) -> str:
    return repr(str(value) if isinstance(value, Path) else value)


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def plain(value: Any) -> Any:
    """Return what a text means as a value of a config: a number, list, mapping, ..., else the text itself.

    Example:
        >>> plain("[64, 64, 32]"), plain("1e-3"), plain("[a,b]"), plain("median"), plain("true")
        ([64, 64, 32], 0.001, ['a', 'b'], 'median', True)
    """
    if not isinstance(value, str):
        return value
    if value.lower() in _TEXTS:
        return _TEXTS[value.lower()]
    try:
        tree = ast.parse(value.strip(), mode="eval")
        return ast.literal_eval(_Names().visit(tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


class _Names(ast.NodeTransformer):
    """Takes names in a list for texts."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant(node.id)


def _shard(value: Any) -> tuple[int, int]:
    first, _, second = str(value if isinstance(value, str) else "/".join(map(str, value))).partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(value)
    return int(first), int(second)


def _bundle(value: Any) -> str:
    known = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/metadata.json"))
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "choose one of"
        raise RefusalError(f"there is no bundle {value!r}; {hint} {', '.join(known)}")
    return str(value)


def _there(value: Any) -> Path:
    path = read(Path, value)
    if not path.exists():
        raise ValueError(value)
    return path


def _labels(value: Any) -> tuple[str, ...] | dict[str, int] | str:
    if isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{")):
        return read(dict[str, int], value)
    if isinstance(value, (str, Path)) and str(value).endswith(".json"):
        return str(Path(value).expanduser().absolute())
    return read(tuple[str, ...], value)


Bundle = Annotated[str, Reads(_bundle, "the name of a bundle, such as mae_resenc_l")]
Shard = Annotated[tuple[int, int], Reads(_shard, "i/n with i from 0 to n - 1, such as 0/8 to 7/8")]
Existing = Annotated[Path, Reads(_there, "a file or folder that is there")]
Labels = Annotated[
    tuple[str, ...] | dict[str, int] | str,
    Reads(_labels, "names with commas between, background first, or the path of a dataset.json"),
]
Rests = Annotated[dict[str, Any], Rest()]
