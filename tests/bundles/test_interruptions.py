# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A training that is interrupted says what is saved and how to go on, ends soon, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from ..conftest import ROOT, command, pretraining
from ..starts import python


@pytest.mark.parametrize(
    ("number", "of", "status", "told"),
    [
        (signal.SIGINT, "group", 130, "Stopped: interrupted by Ctrl-C. "),
        (signal.SIGTERM, "run", 143, "Stopped: interrupted by SIGTERM. "),
        (
            signal.SIGKILL,
            "reader",
            1,
            "Stopped: the system ended a process that reads data, as it does for want of memory",
        ),
    ],
)
def test_an_interrupted_run_ends_in_a_sentence(
    number: signal.Signals, of: str, status: int, told: str, images: Path, tmp_path: Path
) -> None:
    arguments = [*pretraining(tmp_path, images, epochs=1000), "--num_workers", "1"]
    temporary = tmp_path.parent / of  # short enough for sockets
    if of == "run":  # too long, as deep folders of a cluster are
        temporary = tmp_path / ("temporary" * 10)
    temporary.mkdir()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command("mae_resenc_l", "pretrain", *arguments)[1:]],  # really started: signals meet it
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored where tests run behind a shell
        )
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "models" / "pretrained_encoder.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert (tmp_path / "models" / "pretrained_encoder.json").exists(), (tmp_path / "log").read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        if of == "group":  # as a terminal does
            os.killpg(process.pid, number)
        elif of == "run":
            process.send_signal(number)
        else:
            readers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
            readers[0].send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        assert process.returncode == status, (tmp_path / "log").read_text()[-3000:]
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    last = text.strip().splitlines()[-1]
    assert last.startswith(told), text[-3000:]
    assert "Traceback" not in text
    if number != signal.SIGKILL:
        assert str(tmp_path / "models" / "pretraining_state.pt") in last
        assert "the same command goes on from there" in last
    else:
        assert "--num_workers" in last
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]  # PyTorch's cache
    assert {path.name for path in (tmp_path / "models").iterdir()} <= {
        *(".training.lock", "pretraining_state.pt", "pretrained_encoder.pt", "pretrained_encoder.json"),
        *("pretrained_encoder_best.pt", "pretrained_encoder_best.json"),
    }


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ("raise KeyboardInterrupt", 130, "Stopped: interrupted by Ctrl-C. "),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, "Stopped: interrupted by SIGTERM. "),
        ("raise DataError('scan.nii is empty; leave it out')", 1, "Stopped: scan.nii is empty; leave it out"),
        ("raise OSError(28, 'No space left on device', '/out')", 1, "Stopped: the disk is full while writing /out; "),
    ],
)
def test_the_exit_status_is_what_shells_expect(how: str, status: int, told: str, tmp_path: Path) -> None:
    program = "import atexit, os, signal; from common.errors import DataError, end_in_a_sentence; end_in_a_sentence()\n"
    program += f"atexit.register(open(r'{tmp_path}/cleaned', 'w').close)\n{how}"
    done = subprocess.run([python(), "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "cleaned").exists(), "what is to be done at the end is done"
    shell = subprocess.run(
        ["sh", "-c", f'"{python()}" -c "$0"; echo $?', program], cwd=ROOT, capture_output=True, text=True
    )
    assert shell.stdout.strip() == str(status)


def test_what_a_run_forks_ends_by_sigterm_at_once() -> None:
    program = "import os, signal; from common.errors import end_in_a_sentence; end_in_a_sentence()\n"
    program += "own = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL\n"
    program += "ready, tell = os.pipe()\n"
    program += "if (child := os.fork()) == 0: os.write(tell, b'.') and signal.pause()\n"
    program += "os.read(ready, 1); os.kill(child, signal.SIGTERM); print(own, os.waitpid(child, 0)[1])"
    done = subprocess.run([python(), "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"True {signal.SIGTERM.value}\n", "")


@pytest.mark.parametrize(("error", "told"), [("EOFError()", False), ("OSError(5, 'Input/output error')", True)])
def test_a_reader_that_lost_its_run_says_nothing(error: str, told: bool) -> None:
    program = "import os; from common.errors import end_in_a_sentence; end_in_a_sentence()\n"
    program += f"if os.fork() == 0: raise {error}\n"
    done = subprocess.run([python(), "-c", program + "os.wait()"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ("Traceback" in done.stderr) is told
