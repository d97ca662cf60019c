# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of a config as they were written, where what was written is not what arrives.

A folder called ``20_24`` arrives as the number 2024, ``2024-01-01`` as a date, ``a,b`` as two texts, ``run#1`` as
``run`` from the command line and as ``run::1`` from everywhere else, and ``~`` as the letter that it is. What a setting
means that is a path is settled here, once for every config and for every way in which it is given.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..literals import as_data
from ..paths import as_path

__all__ = ["PATHS", "path_settings", "plain_numbers", "typed_settings", "written_settings"]

# the settings of all configs that are paths
PATHS = frozenset(
    (
        *("bundle_root", "dataset_dir", "datalist", "table", "splits", "groups", "labels", "predictions"),
        *("output_dir", "ckpt_dir", "store_dir", "pretrained", "model", "probe_data", "probe_labels", "probe_table"),
    )
)
_SEVERAL = "model"  # which may be a list instead
_NAMES = ("labels", "probe_labels")  # which are names of classes, unless they are a dataset.json
_LIKE_A_FLAG = re.compile(r"--|-[A-Za-z]")  # as the command line tells them from values
_NOTHING = ("None", "null")


def typed_settings(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Return the settings of a command line as they stand there.

    Args:
        arguments: of the command line; those of this process, if it is MONAI's command line, unless given.

    Example:
        >>> typed_settings(["run", "--output_dir=20_24", "--dataset-dir", "~/a b", "--resume"])
        {'output_dir': '20_24', 'dataset_dir': '~/a b'}
    """
    if arguments is None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        arguments = sys.argv[1:] if getattr(spec, "name", "") == "monai.bundle.__main__" else []
    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, equal, value = rest.pop(0).partition("=")
        if _LIKE_A_FLAG.match(flag):
            if not equal and rest and not _LIKE_A_FLAG.match(rest[0]):
                equal, value = "=", rest.pop(0)
            if equal:
                found[flag.lstrip("-").replace("-", "_")] = value
    return found


def plain_numbers(typed: Mapping[str, str]) -> dict[str, Any]:
    """Return what a config must hold for settings that are typed with a ``#``, of which MONAI would make ``::``."""
    plain = {name: text for name, text in typed.items() if "#" in text and text[0] not in "$@%"}
    return {name: as_data(_as_read(text)) for name, text in plain.items()}


def _as_read(text: str) -> Any:
    """Return what the command line makes of a text."""
    from fire.parser import DefaultParseValue

    return DefaultParseValue(text)


def written_settings(files: Iterable[str | Path]) -> dict[str, Any]:
    """Return the top-level settings of YAML or JSON files with all that is not a list or a section as text."""
    found: dict[str, Any] = {}
    for file in files:
        text = Path(file).read_text("utf-8")
        if str(file).lower().endswith(".json"):
            content = json.loads(text, parse_int=str, parse_float=str)
        else:
            import yaml  # an exported bundle has only JSON

            content = yaml.load(text, yaml.BaseLoader)
        found |= content if isinstance(content, dict) else {}
    return found


def path_settings(config: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config must hold for its settings that are paths, where that is not what it holds.

    Expressions are left as they are.

    Args:
        config: with the values that have arrived.
        written: settings as they were written, as far as that is known.

    Raises:
        SettingsError: if one can be no path.

    Example:
        >>> path_settings({"output_dir": 2024, "model": ["a.pt"], "datalist": None}, {"output_dir": "20_24"})
        {'output_dir': '20_24'}
    """
    found: dict[str, Any] = {}
    for name in PATHS & config.keys():
        value = config[name]
        several = name == _SEVERAL and isinstance(value, (list, tuple))
        if value is not None and written.get(name) not in (None, *_NOTHING):
            value = _as_read(written[name]) if several and isinstance(written[name], str) else written[name]
        if value is None or (name in _NAMES and not str(value).endswith(".json")):
            continue
        meant = [_meant(name, each) for each in value] if several else _meant(name, value)
        if meant != config[name]:
            found[name] = meant
    return found


def _meant(name: str, value: Any) -> Any:
    """Return what a config must hold for a path."""
    path = as_path(value, f"--{name}")
    text = value if isinstance(value, str) else str(path)
    return text if text[:1] in ("$", "@", "%") else as_data(str(path) if text.startswith("~") else text)
