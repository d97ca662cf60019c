# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend, and how a workflow on the command line or a labelling server ends with one.

MONAI Label answers any error with "Internal Server Error", but one of its web framework's own class with what it says.
Loaded into such a server, the errors here are of that class too, so that a viewer shows their sentence.
"""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

__all__ = [
    "DataError",
    "SettingsError",
    "WeightsError",
    "causes",
    "disk_is_full",
    "end_in_a_sentence",
    "line_of",
    "on_interruption",
    "plainly",
    "sentence",
]


_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_IN_A_WORKER = "in DataLoader worker process"
_WORKER_ENDED = re.compile(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", re.DOTALL)
_PROMISES: list[Callable[[], str]] = []  # what is said of a run that is interrupted; the last one counts


if "monailabel" in sys.modules:  # a server has loaded itself before it loads a bundle
    from starlette.exceptions import HTTPException

    class _MendableError(HTTPException, ValueError):
        """What a user can mend."""

        def __init__(self, message: str = "") -> None:
            super().__init__(422, message)

        def __str__(self) -> str:
            return str(self.detail)

else:

    class _MendableError(ValueError):  # type: ignore[no-redef]
        """What a user can mend."""


class DataError(_MendableError):
    """A volume, label or folder that cannot be used; the message names the file and the remedy."""


class WeightsError(_MendableError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class SettingsError(_MendableError):
    """A setting that does not fit; the message names it, its value and the remedy."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it was raised from, back to the first, each once."""
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:  # "raise error from error" makes a circle
        seen.add(id(chain))
        yield chain
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


def disk_is_full(error: BaseException) -> bool:
    """Return whether a full disk, or a used up quota, is behind an error: all further cases would fail by it, too."""
    if any(isinstance(cause, OSError) and cause.errno in _FULL for cause in causes(error)):
        return True
    return "No space left on device" in str(error)


def sentence(error: BaseException) -> str | None:
    """Return what to tell the user, if anywhere in the chain of exceptions there is something that a user can mend.

    That is one of the errors above, a value that this package's own code refused, a full disk, a place that may not be
    read or written, or the end of another process of the same run.

    Example:
        >>> try:
        ...     try:
        ...         raise DataError("a.nii is empty; leave it out")
        ...     except DataError as error:
        ...         raise RuntimeError("failed to instantiate component") from error
        ... except RuntimeError as error:
        ...     sentence(error)
        'a.nii is empty; leave it out'
    """
    package = __name__.split(".")[0]
    for chain in causes(error):
        if isinstance(chain, (DataError, WeightsError, SettingsError)):
            told = str(chain)
            if _IN_A_WORKER in told:  # PyTorch puts the traceback of a loader's process in front of the message
                told = told.rstrip().splitlines()[-1].partition(": ")[2]
            return told
        if isinstance(chain, OSError) and chain.errno in _FULL:
            where = chain.filename or "the output folder"
            return f"the disk is full while writing {where}; free some space and run again, it goes on from there"
        if isinstance(chain, OSError) and chain.errno in _NOT_ALLOWED:
            reason = chain.strerror or type(chain).__name__
            return f"{chain.filename or 'a file'} cannot be read or written ({reason}); correct the path or its rights"
        if isinstance(chain, RuntimeError) and (_of_torch_distributed(chain) or "/gloo/" in str(chain)):
            return (
                f"another process of this run ended or cannot be reached ({str(chain).splitlines()[0]}); see what that "
                "one said. What was saved is kept, and the same command goes on from there"
            )
        if _of_an_ended_reader(chain):
            shared = " of shared memory (a container wants --shm-size)" if "Bus error" in str(chain) else ""
            return (
                f"the system ended a process that reads data, as it does for want of memory{shared}; run again with a "
                "lower --num_workers or fewer other programs. What was saved is kept, and the run goes on from there"
            )
        if isinstance(chain, ValueError):
            frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(chain.__traceback__)]
            if frames and frames[-1].split(".")[0] == package:
                return str(chain)
    return None


def plainly(error: Exception) -> Exception | None:
    """Return the error that says itself what :func:`sentence` finds anywhere in a chain, None if that is nothing.

    Example:
        >>> try:
        ...     raise RuntimeError("failed to instantiate component") from DataError("a.nii is empty; leave it out")
        ... except RuntimeError as error:
        ...     plainly(error)
        DataError('a.nii is empty; leave it out')
    """
    if (told := sentence(error)) is None:
        return None
    for chain in causes(error):
        if isinstance(chain, (DataError, WeightsError, SettingsError)):
            return chain if str(chain) == told else type(chain)(told)
    plain = SettingsError(told)
    plain.__cause__ = error
    return plain


def _of_torch_distributed(error: RuntimeError) -> bool:
    """Return whether it is PyTorch's own error about processes, which exists only where PyTorch is imported."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and isinstance(error, distributed.DistError)


def _of_an_ended_reader(error: BaseException) -> bool:
    """Return whether a process of PyTorch's loader has ended by itself: its own words, or a connection that broke."""
    if isinstance(error, RuntimeError):
        return _WORKER_ENDED.search(str(error)) is not None
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, (ConnectionError, EOFError)) and "torch.utils.data.dataloader" in modules


def line_of(error: Exception, text: str = "") -> str:
    r"""Say in one line what a parser of YAML or JSON has found in a text, and where.

    Example:
        >>> import yaml
        >>> text = "a:\n\tb: 1"
        >>> try:
        ...     yaml.safe_load(text)
        ... except yaml.YAMLError as error:
        ...     line_of(error, text)
        'line 2 begins with a tab, which YAML does not take; indent with spaces'
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join((getattr(error, "strerror", None) or str(error)).split())
    lines = text.splitlines()
    if mark.line < len(lines) and lines[mark.line].lstrip(" ").startswith("\t"):
        return f"line {mark.line + 1} begins with a tab, which YAML does not take; indent with spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}; mend that line"


def on_interruption(tell: Callable[[], str]) -> None:
    """Name what is said if the run is interrupted from now on: what is saved, and how to go on."""
    _PROMISES.append(tell)


class _Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM, and unwinds as after Ctrl-C."""


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise _Terminated


def _end_as_usual() -> None:
    """Let SIGTERM end a forked process at once: a reader that went on to unwind could be waited for without end."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupted(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return what is said of an interrupted run, and its exit status, by which shells and schedulers know of it."""
    by, number = ("SIGTERM", signal.SIGTERM) if isinstance(error, _Terminated) else ("Ctrl-C", signal.SIGINT)
    told = (
        _PROMISES[-1]() if _PROMISES else "What was written before is whole; the same command starts again from there"
    )
    return f"interrupted by {by}. {told}", 128 + number


def end_in_a_sentence() -> None:
    """Let this process end with that sentence instead of a traceback, into which MONAI would wrap the message.

    Names of files that cannot be printed are printed with escapes. Ctrl-C and SIGTERM end in a sentence, too, with the
    exit status 130 and 143.
    """
    in_main = threading.current_thread() is threading.main_thread()
    alone = "RANK" not in os.environ  # a process that waits for others in a collective call would never come to it
    if in_main and alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_end_as_usual)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before, run = sys.excepthook, os.getpid()

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if os.getpid() != run and isinstance(error, (ConnectionError, EOFError)):
            return  # a reading process lost the run, which says why it ends
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGCHLD, signal.SIG_DFL
            )  # PyTorch's handler would raise in here, for a loader's process
        told, status = _interrupted(error) if isinstance(error, KeyboardInterrupt) else (sentence(error), 1)
        if told is None:
            before(kind, error, where)
            return
        print(f"Stopped: {told}", file=sys.stderr)  # noqa: T201
        raise SystemExit(status)  # Python ends with it as if nothing had been raised before

    sys.excepthook = hook
