# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Stand-in for torchvision in the environment of nnU-Net: timm takes names from it, and nothing here calls what they
are.
"""

import enum
import sys
import types
from typing import Any

__path__: list[str] = []  # a package, as far as imports go
_MODULES = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets", "models", "models.feature_extraction")


def _refuse(*_: Any, **__: Any) -> None:
    raise NotImplementedError("this is a stand-in; install torchvision")


class InterpolationMode(enum.Enum):
    """The names that timm has words for."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": _refuse})


for _name in _MODULES:
    _module = _Module(f"{__name__}.{_name}")
    sys.modules[_module.__name__] = _module
    _parent, _, _leaf = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _leaf, _module)
sys.modules[f"{__name__}.transforms.functional"].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
