# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend, and how a workflow ends with one."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["DataError", "SettingsError", "WeightsError", "ends_in_a_sentence"]

P = ParamSpec("P")
R = TypeVar("R")


class DataError(ValueError):
    """A volume, label or folder that cannot be used; the message names the file and the remedy."""


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class SettingsError(ValueError):
    """A setting that does not fit; the message names it, its value and the remedy."""


def ends_in_a_sentence(function: Callable[P, R]) -> Callable[P, R]:
    """Let a workflow stop with the message of these errors as its last line, not with a traceback through MONAI.

    For functions that configs name with ``_target_``: MONAI wraps an exception raised there into two others and prints
    the message in the middle. ``SystemExit`` passes through unchanged and makes the exit status 1.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (DataError, WeightsError, SettingsError) as error:
            raise SystemExit(f"Stopped: {error}") from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = error.filename or "the output folder"
            raise SystemExit(
                f"Stopped: the disk is full while writing {where}; free some space and run again"
            ) from error

    return wrapped
