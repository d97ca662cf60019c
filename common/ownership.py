# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Folders that one training writes to at a time, and what an earlier one left in them.

Two trainings that write ``model.pt`` into one folder would lose one of the two without a word. A training holds a lock
of the operating system on its folders, which is free again as soon as its process ends, however it ends.
"""

from __future__ import annotations

import atexit
import errno
import getpass
import json
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import SettingsError
from .files import write_json
from .paths import as_path

__all__ = ["hold", "release", "set_apart"]

_LOCK, _OWNER = ".training.lock", ".training.json"
_DYING_SECONDS = 20  # that reading processes of a killed training may live on, and hold its lock with it
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# what a training writes into its output folder for people to look at, and the next one would mix with its own
_OUTPUTS = (
    "history.json",
    "curves.png",
    "progress.html",
    "pictures",
    "unreadable.json",
    "probes.json",
    "validation_predictions.csv",
    "events.out.*",
)

_held: dict[Path, tuple[Any, float]] = {}


def hold(*folders: str | Path, what: str) -> None:
    """Take folders for this process until it ends or calls :func:`release`; it may take them several times.

    On a file system that cannot lock, a sentence says so.

    Args:
        folders: made if they are not there.
        what: is done in them, for the sentence that another run gets.

    Raises:
        SettingsError: if another process holds one, saying which, since when, and what to do.
    """
    from filelock import FileLock, Timeout

    free = dict.fromkeys(folder for each in folders if (folder := as_path(each).resolve()) not in _held)
    for folder in free:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=_DYING_SECONDS if _is_dead(folder) else 0)
        except Timeout as error:
            release(*free)
            raise SettingsError(
                f"{folder} is in use by {_told(folder)}; wait until that ends, or give this run folders of its own "
                "with --ckpt_dir and --output_dir"
            ) from error
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            print(  # noqa: T201
                f"note: {folder} is on a file system without locks ({error}); see that no other run writes to it",
                file=sys.stderr,
            )
            continue
        if not _held:
            atexit.register(release)
        _held[folder] = lock, time.time()
        owner = {"what": what, "process": os.getpid(), "machine": socket.gethostname(), "user": _user()}
        write_json(owner | {"since": datetime.now().astimezone().isoformat(timespec="seconds")}, folder / _OWNER)


def release(*folders: str | Path) -> None:
    """Give folders back that this process holds; all without arguments."""
    for folder in [as_path(each).resolve() for each in folders] or list(_held):
        if folder in _held:
            lock, _ = _held.pop(folder)
            (folder / _OWNER).unlink(missing_ok=True)
            lock.release()


def set_apart(output_dir: str | Path) -> Path | None:
    """Move what an earlier training left in its output folder into ``earlier``, ``earlier_2``, ... inside it.

    So its history and curves stay, and the next ones do not go on from them.

    Returns:
        The folder that was made, None if nothing was there.
    """
    folder = as_path(output_dir).resolve()
    began = _held[folder][1] if folder in _held else _process_began()
    left = [path for name in _OUTPUTS for path in sorted(folder.glob(name)) if path.stat().st_mtime < began]
    if not left:
        return None
    number = 1
    while (apart := folder / f"earlier{f'_{number}' if number > 1 else ''}").exists():
        number += 1
    apart.mkdir()
    for path in left:
        path.rename(apart / path.name)
    return apart


def _owner(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / _OWNER).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _told(folder: Path) -> str:
    owner = _owner(folder)
    if not {"what", "process", "machine", "user", "since"} <= owner.keys():
        return "another run"
    return (
        f"another run ({owner['what']}, process {owner['process']} of {owner['user']} on {owner['machine']}, since "
        f"{owner['since']})"
    )


def _is_dead(folder: Path) -> bool:
    """Return whether the process that took a folder was of this machine and has ended."""
    import psutil

    owner = _owner(folder)
    return owner.get("machine") == socket.gethostname() and not psutil.pid_exists(int(owner.get("process", 0)))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without names of users
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _process_began() -> float:
    import psutil

    return float(psutil.Process().create_time())
