# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Forked processes are those that a start of Python makes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .starts import python

PROGRAM = """
import atexit, json, os, sys, warnings
atexit.register(print, "at exit")
sys.stdout.reconfigure(errors="backslashreplace")
warnings.warn("a warning")
spec = getattr(sys.modules["__main__"], "__spec__", None)
print(json.dumps({
    "arguments": sys.argv, "first": sys.path[0], "cwd": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "spec": spec and spec.name, "main": sys.modules["__main__"].__dict__ is globals(), "input": sys.stdin.read(),
    "ours": [name for name in sys.modules if name.split(".")[0] in ("common", "tests", "tools", "starts")],
    "found": __import__("beside").__file__, "bytecode": sys.dont_write_bytecode, "terminal": sys.stdout.isatty(),
    "options": sys.warnoptions, "streams": [(each.encoding, each.errors, each.line_buffering, each.write_through,
    each.seekable()) for each in (sys.stdin, sys.stdout, sys.stderr)],
    "files": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "more": os.read(int(sys.argv[-1]), 100).decode()}))
if sys.argv[1] == "raise":
    raise ValueError("a reason")
if sys.argv[1] == "abort":
    os.abort()
sys.exit({"zero": None, "three": 3, "words": "some words"}[sys.argv[1]])
"""


NUMBER = 200  # of a file that is handed on


@pytest.mark.parametrize("how", ["module", "script", "command"])
def test_a_forked_process_is_what_python_starts(how: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "here" / "program.py").write_text(PROGRAM)
    (tmp_path / "more" / "beside.py").touch()
    (tmp_path / "input").write_text("typed")
    line = {"module": ["-m", "program"], "script": ["here/program.py"], "command": ["-c", PROGRAM]}[how]
    own = {"OWN": "a b", "PYTHONPATH": str(tmp_path / "more"), "PYTHONDONTWRITEBYTECODE": "1"}

    def done(command: str, ending: str, *options: str) -> subprocess.CompletedProcess[str]:
        with open(tmp_path / "input") as stdin, open(tmp_path / "here" / "program.py") as file:
            os.dup2(file.fileno(), NUMBER)  # the same for both, whatever else is open meanwhile
            return subprocess.run(
                [command, *options, *line, ending, "--flag", "a b", str(NUMBER)],
                cwd=tmp_path / ("here" if how == "module" else ""),
                env=os.environ | own,
                stdin=stdin,
                pass_fds=[NUMBER],
                capture_output=True,
                text=True,
            )

    for ending in ("zero", "raise"):
        forked, real = done(python(), ending), done(sys.executable, ending)
        assert forked.returncode == real.returncode == (ending == "raise")
        assert "a warning" in forked.stderr
        assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]
        told = [json.loads(one.stdout.splitlines()[0]) for one in (forked, real)]
        assert told[0]["more"].startswith("\nimport atexit")
        assert told[0]["ours"] == []
        for one in told:
            one["environment"].pop("PWD", None)  # which the shell in between sets
        assert told[0] == told[1]
        assert [one.stdout.splitlines()[1:] for one in (forked, real)] == [["at exit"]] * 2
    for ending, status in (("three", 3), ("words", 1), ("abort", -signal.SIGABRT)):
        ended = done(python(), ending)
        assert ended.returncode == status
        assert ("some words" in ended.stderr) == (ending == "words")
    quiet = done(python(), "zero", "-W", "ignore")
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout.splitlines()[0])["options"] == ["ignore"]


def run(program: str, *options: str, **more: str) -> str:
    command = [python(), *options, "-c", program]
    done = subprocess.run(command, env=os.environ | more, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.strip()


def test_python_is_really_started_where_only_a_start_obeys() -> None:
    imported = "import sys; print('torch' in sys.modules)"
    assert run(imported) == "True"
    assert run(imported, HF_HOME="elsewhere") == "False"
    assert run(imported, "-X", "dev") == "False"
    assert run("import torch; print(torch.get_num_threads())", OMP_NUM_THREADS="2") == "2"


def test_what_it_starts_or_spawns_is_forked_too() -> None:
    inner = "import sys; print('torch' in sys.modules, sys.executable == sys.argv[1])"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, sys.executable], check=True)"
    assert run(outer) == "True True"
    start = "import multiprocessing as m; print(m.get_context('spawn').Pool(2).map(abs, [-1, -2]))"
    assert run(start) == "[1, 2]"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(eval, ("'torch' in __import__('sys').modules",)), "and what a test spawns"


def test_it_gets_signals_and_ends_with_what_was_started() -> None:
    program = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print(os.getpid(), flush=True)"
    for number, status in ((signal.SIGTERM, 7), (signal.SIGKILL, -9), (signal.SIGUSR1, -signal.SIGUSR1)):
        job = subprocess.Popen([python(), "-c", f"{program}; time.sleep(60)"], stdout=subprocess.PIPE)
        assert job.stdout is not None
        process = psutil.Process(int(job.stdout.readline()))
        assert process.pid != job.pid
        assert job.poll() is None
        job.send_signal(number)
        assert job.wait() == status
        process.wait(timeout=10)
        job.stdout.close()


def test_the_server_ends_with_the_tests() -> None:
    program = (
        "from tests.starts import python; import subprocess; subprocess.run([python(), '-c', '']); print(python())"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    folder = Path(done.stdout.strip()).parent
    until = time.monotonic() + 30
    while folder.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_folder_is_left_where_a_whole_group_is_told_to_end(ending: signal.Signals) -> None:
    program = f"import signal, time; signal.signal({ending}, signal.SIG_DFL)"  # which may be ignored where tests run
    program += "; from tests.starts import python; print(python(), flush=True); time.sleep(600)"
    command, quiet = [sys.executable, "-c", program], subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, start_new_session=True) as job:
        assert job.stdout is not None
        folder = Path(job.stdout.readline().strip()).parent
        (server,) = psutil.Process(job.pid).children()
        status = Path(f"/proc/{server.pid}/status")
        while not int(status.read_text().split("SigIgn:")[1].split()[0], 16) >> (ending - 1) & 1:
            time.sleep(0.01)  # it has only just begun
        assert folder.is_dir()
        os.killpg(job.pid, ending)
    until = time.monotonic() + 30
    while folder.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_runs_draw_numbers_of_their_own() -> None:
    program = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    assert len({*run(program).split(), *run(program).split()}) == 6


def test_nothing_is_left_of_what_is_killed_while_it_starts() -> None:
    """The output ends when nobody is left who could write to it."""
    line = [python(), "-c", "import time; time.sleep(600)"]
    jobs = [subprocess.Popen(line, stdout=subprocess.PIPE) for _ in range(12)]
    for job in jobs:
        time.sleep(0.03)
        job.kill()
    for job in jobs:
        assert job.communicate(timeout=60) == (b"", None)
        assert job.returncode == -signal.SIGKILL
