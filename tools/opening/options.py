# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The settings of a bundle's config as options: name, default, type and help, read from the text of the config itself.

A setting is a name at the top of a config whose value stands on its line, outside the section "workflow"; the comment
behind it is its help. Needs nothing but Python, so that help is there before the environment is.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.settings import unknown_settings

from ..commanding.environment import ROOT
from ..commanding.settings import Labels, plain, read

__all__ = ["BUNDLES", "Option", "config_file", "judged", "names_of", "options", "options_text", "word"]

BUNDLES = ROOT / "bundles"
_LINE = re.compile(r"([A-Za-z_]\w*):(?:\s+(.*))?")
_SHARED = re.compile(r"\[(.*)\]")
_NOT_TOLD = {"imports", "shared", "bundle_root", "initialize", "run"}
_ANY = {"spacing_mm", "mirror_axes"}  # numbers by default, and much else
_SIDES = {"patch_size", "input_size"}  # of which one number stands for three
_WIDTH = 100


@dataclass(frozen=True)
class Option:
    """A setting of a config.

    Attributes:
        name: at the top of the config.
        text: its default as the config has it.
        about: the comment behind it.
        section: of the config.
    """

    name: str
    text: str
    about: str
    section: str

    @property
    def default(self) -> Any:
        """The default as a value; an expression stays a text."""
        return ast.literal_eval(self.text) if self.text[:1] in ("'", '"') else plain(self.text)

    @property
    def is_expression(self) -> bool:
        """Whether the default is worked out when the config runs."""
        return str(self.default)[:1] in ("$", "@")

    @property
    def takes(self) -> str:
        """What may be told, in words; empty if the default does not say."""
        value = self.default
        if self.name in _ANY or value is None or self.is_expression:
            return ""
        if isinstance(value, bool):
            return "true or false"
        if _is_numbers(value):
            whole = all(isinstance(each, int) for each in value)
            return "whole numbers" if whole else "numbers"
        kinds: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", list: "a list"}
        return kinds.get(type(value), "")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) in (int, float) for each in value)


def config_file(bundle: str, workflow: str) -> Path:
    """Return the config of one workflow of a bundle of the collection."""
    return BUNDLES / bundle / "configs" / f"{workflow}.yaml"


def _files(file: Path) -> list[Path]:
    """Return the files that say what a config is, the lowest first, itself last."""
    found = re.search(r"^shared: *\[(.*?)\]", file.read_text("utf-8"), re.M)
    below = [name.strip() for name in found[1].split(",")] if found else []
    return [*(ROOT / "common" / "configs" / name for name in below), file]


def _cut(text: str) -> tuple[str, str]:
    """Return a value and the comment behind it.

    Example:
        >>> _cut("'#1'   # the first")
        ("'#1'", 'the first')
    """
    quote = ""
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (index == 0 or text[index - 1].isspace()):
            return text[:index].strip(), text[index + 1 :].strip()
    return text.strip(), ""


@cache
def _names(file: Path) -> dict[str, Option]:
    """Return every name at the top of a config."""
    found: dict[str, Option] = {}
    for each in _files(file):
        section, began = "", False
        for line in each.read_text("utf-8").splitlines():
            if line.startswith("# ") and began:
                section = line[2:]
            if (match := _LINE.fullmatch(line)) is None:
                continue
            began = True
            value, about = _cut(match[2] or "")
            below = found.get(match[1])
            about = about or (below.about if below else "")
            found[match[1]] = Option(match[1], value, about, below.section if below else section)
    return found


def names_of(bundle: str, workflow: str) -> list[str]:
    """Return every name at the top of a config, settings or not."""
    return list(_names(config_file(bundle, workflow)))


def options(bundle: str, workflow: str) -> dict[str, Option]:
    """Return the settings of a config by name."""
    return {
        name: each
        for name, each in _names(config_file(bundle, workflow)).items()
        if name not in _NOT_TOLD
        and each.text
        and not each.section.startswith("workflow")
        and not re.match(r"@|[{\[]shared\b", each.text.strip('"'))
        and ".to(@device)" not in each.text
    }


def options_text(bundle: str, workflow: str) -> str:
    """Return a paragraph for each setting of a config, in its sections."""
    lines = [f"Settings of {config_file(bundle, workflow).name} of {bundle}, as --name value:"]
    section = None
    for each in options(bundle, workflow).values():
        if each.section != section:
            section = each.section
            lines += ["", f"  {section}"] if section else [""]
        shown = _in_words(each.default) if each.is_expression else _plainly(each.default)
        default = f"default {shown}" if shown else ""
        lines.append(f"  --{each.name}  {'; '.join(filter(None, (each.takes, default)))}")
        lines += textwrap.wrap(each.about, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _plainly(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return " ".join(map(str, value)) if _is_numbers(value) else ",".join(map(str, value))
    return str(value)


def _in_words(expression: str) -> str:
    """Return an expression of a config as a reader takes it, with RUN for the folder of the run.

    Example:
        >>> _in_words("$@bundle_root + '/models'"), _in_words("$@trained.get('channels', 1)"), _in_words("$min(8, @a)")
        ('RUN/models', 'as the model says, else 1', 'min(8, a)')
    """
    if found := re.fullmatch(r"\$@(\w+) \+ '(.*)'", expression):
        return ("RUN" if found[1] == "bundle_root" else found[1].upper()) + found[2]
    if found := re.fullmatch(r"\$@trained\.get\('\w+'(?:, (.*))?\)", expression):
        return f"as the model says, else {found[1] or 'none'}"
    return re.sub(r"[$@]", "", expression)


def judged(bundle: str, workflow: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return settings of a config as the words that its command line has them in.

    Args:
        bundle: of the collection.
        workflow: of it.
        given: texts as written, or values.

    Raises:
        SettingsError: if the config has no such setting, naming the nearest, or a value is none of the default's type.
    """
    if told := unknown_settings(given, names_of(bundle, workflow)):
        raise SettingsError(told)
    known = _names(config_file(bundle, workflow))
    return {name: word(_judged_one(known.get(name), name, value)) for name, value in given.items()}


def _judged_one(option: Option | None, name: str, value: Any) -> Any:
    if name in ("labels", "probe_labels") and not (isinstance(value, str) and value[:1] in ("$", "@")):
        try:
            found = read(Labels, value)
        except ValueError as error:
            raise SettingsError(
                f"--{name} is {value!r}; it must be names with commas between, or a dataset.json"
            ) from error
        return list(found) if isinstance(found, tuple) else found
    if option is None or option.is_expression or str(value)[:1] in ("$", "@"):
        return value
    meant, default = plain(value) if isinstance(value, str) else value, option.default
    several = isinstance(default, list)
    if several and isinstance(meant, str) and "," in meant:
        meant = [part.strip() for part in meant.split(",")]
    listed = isinstance(meant, (list, tuple))
    if meant is None or name in _ANY or not (_is_numbers(default) or type(default) in (int, float)):
        return list(meant) if several and listed else value
    numbers = list(meant) if listed else [meant]
    whole = all(type(each) is int for each in (default if several else [default]))
    for each in numbers:
        number = isinstance(each, (int, float)) and not isinstance(each, bool)
        if not number or (whole and not float(each).is_integer()):
            raise SettingsError(
                f"--{name} is {value!r}; it must be {option.takes}, such as {_plainly(default)}, the default"
            )
    return numbers * 3 if name in _SIDES and not listed else numbers if listed else value


def word(value: Any) -> str:
    """Return a value as it stands on the command line of MONAI.

    Example:
        >>> word([96, 96, 96]), word(["background", "lesion"]), word(True), word(None), word("sawtooth")
        ('[96,96,96]', "['background','lesion']", 'true', 'None', 'sawtooth')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return _literal(value) if isinstance(value, (list, tuple, Mapping)) else str(value)


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_literal(name)}:{_literal(each)}' for name, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_literal, value))}]"
    return repr(str(value) if isinstance(value, os.PathLike) else value)
