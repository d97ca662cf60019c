# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One training writes to a folder at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import SettingsError
from common.ownership import hold, release, set_apart

from .conftest import ROOT

HOLDER = "import sys, time; from common.ownership import hold; hold(*sys.argv[1:], what='x'); print(1, flush=True)"


@contextmanager
def holder(*folders: Path, after: str = "time.sleep(60)") -> Iterator[subprocess.Popen[str]]:
    """Have a process that takes folders, and kill it in the end."""
    command = [sys.executable, "-c", f"{HOLDER}; {after}", *map(str, folders)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_second_is_told_who_holds_the_folder_and_a_kill_frees_it(tmp_path: Path) -> None:
    one, two = tmp_path / "models", tmp_path / "out"
    with holder(one, two) as process:
        for folders in ((one,), (tmp_path / "else", two)):
            with pytest.raises(SettingsError, match=f"in use by another run .x, process {process.pid} of ") as told:
                hold(*folders, what="y")
            assert re.search(r"since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", str(told.value))
            assert "--ckpt_dir and --output_dir" in str(told.value)
        with holder(tmp_path / "else"):  # the refused run took nothing
            pass
    hold(one, two, what="y")
    hold(one, what="y again, as MONAI Label trains repeatedly in one process")
    release()
    assert {path.name for path in one.iterdir()} == {".training.lock"}
    with holder(one):  # given back, so another process can take it
        pass


def test_processes_that_a_killed_run_leaves_for_a_moment_do_not_block_it(tmp_path: Path) -> None:
    """A reading process inherits the lock, and ends a little later than its killed parent."""
    fork = "import os; pid = os.fork(); time.sleep(3 if pid == 0 else 60)"
    with holder(tmp_path, after=fork):
        pass
    began = time.monotonic()
    hold(tmp_path, what="y")
    release(tmp_path)
    assert time.monotonic() - began < 15


def test_what_an_earlier_run_left_is_kept_apart(tmp_path: Path) -> None:
    for name in ("history.json", "events.out.tfevents.1.host", "pictures/epoch_1.png", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for path in (*tmp_path.iterdir(), tmp_path / "pictures"):
        os.utime(path, (1, 1))
    hold(tmp_path, what="y")
    (tmp_path / "curves.png").write_text("of this run")
    assert set_apart(tmp_path) == tmp_path / "earlier"
    assert {path.name for path in (tmp_path / "earlier").iterdir()} == {
        *("history.json", "events.out.tfevents.1.host", "pictures")
    }
    assert (tmp_path / "earlier" / "pictures" / "epoch_1.png").read_text() == "pictures/epoch_1.png"
    assert (tmp_path / "mine.txt").exists()
    assert (tmp_path / "curves.png").exists()
    assert set_apart(tmp_path) is None
    os.utime(tmp_path / "curves.png", (1, 1))
    assert set_apart(tmp_path) == tmp_path / "earlier_2"
    release()
