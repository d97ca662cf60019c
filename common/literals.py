# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Values in a config that its parser gives back as they are.

MONAI's parser takes texts for commands: what starts with ``$`` is evaluated as Python, what starts with ``@`` or ``%``
is replaced by what it names, a dictionary with ``_target_`` is called, and every ``#`` becomes ``::``. A class called
``$5``, a folder called ``run#2`` and a label in somebody's ``dataset.json`` are no commands: whatever the author of a
config has not written goes into it by :func:`as_data`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["as_data", "literal"]

_READ_OTHERWISE = re.compile(r"^[$@%]|#|[@%]::")
# in an expression; the parser takes one that holds "import" for a statement, before it knows what "@" stands for
_ESCAPED = {"@": r"\x40", "#": r"\x23", "%": r"\x25", "import": r"\x69mport"}


def as_data(value: Any) -> Any:
    r"""Return what a config must hold so that its parser gives ``value``; that is the value itself where it can be.

    Args:
        value: texts, numbers, None, and lists and dictionaries of these.

    Raises:
        TypeError: if it holds anything else.

    Example:
        >>> as_data("lesion"), as_data(["background", "@home"]), as_data(None)
        ('lesion', "$['background', '\\x40home']", '$None')
    """
    written = literal(value)
    return value if value is not None and _is_plain(value) else f"${written}"


def literal(value: Any) -> str:
    """Return a Python literal of a plain value, to stand in an expression of a config, in which it names nothing.

    Raises:
        TypeError: if it holds anything but texts, numbers, None, lists and dictionaries.
    """
    if isinstance(value, str):
        return re.sub("[@#%]|import", lambda found: _ESCAPED[found[0]], ascii(value))
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else f"float('{value}')"
    if value is None or isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(name)}: {literal(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(literal, value)) + "]"
    raise TypeError(f"a config cannot hold {value!r} as data")


def _is_plain(value: Any) -> bool:
    """Return whether the parser leaves a value as it is."""
    if isinstance(value, Mapping):
        names = all(isinstance(name, str) and not name.startswith("_") for name in value)
        return names and all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return not (isinstance(value, str) and _READ_OTHERWISE.search(value))
