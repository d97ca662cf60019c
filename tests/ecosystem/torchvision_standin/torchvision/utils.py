# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The two names that are imported; nothing that the tests do calls them."""

from typing import Any, NoReturn

__all__ = ["make_grid", "save_image"]


def make_grid(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("this is a stand-in for tests; install torchvision")


def save_image(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError("this is a stand-in for tests; install torchvision")
