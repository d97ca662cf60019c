# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Packages whose names are imported when they are first asked for, so that reading headers does not import PyTorch.

Such a package lists its names as any other, ``from .module import name``, below ``if TYPE_CHECKING``: type checkers and
readers see plain imports, Python reads them here (PEP 562).
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["on_demand"]


def on_demand(package: dict[str, Any]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: its ``globals()``.

    Example:
        >>> from common import data
        >>> data.StoreSettings.__module__
        'common.data.preparing.settings'
    """

    def find(name: str) -> Any:
        module = _listed(package["__file__"]).get(name)
        if module is None:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        value = package[name] = getattr(importlib.import_module(module, package["__name__"]), name)
        return value

    return find


@cache
def _listed(file: str) -> dict[str, str]:
    """Return the names that a file imports from its own project, each with its module."""
    tree = ast.parse(Path(file).read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}
