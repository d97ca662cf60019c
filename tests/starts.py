# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Start Python as a user does without waiting for its imports, which take far longer than a tiny run.

:func:`python` stands in for ``sys.executable``::

    subprocess.run([python(), "-W", "ignore", "-m", "monai.bundle", "run", ...], cwd=ROOT, capture_output=True)

A server imports torch and MONAI once, and nothing of this project, and forks a process for each command. That has the
arguments, folder, environment, open files, ``sys.path``, ``__main__``, output and exit status of a process of its own;
what is started gets signals, and dies if it is killed. Python that it starts, or that is spawned, is forked as well.

Where the environment says what only a start can obey (``HF_HOME``, ``PYTHONHASHSEED``), or an option does (``-X``),
Python is really started. Tests of a start itself, of what it imports and how long that takes, use ``sys.executable``.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from functools import cache
from typing import Any

__all__ = ["python"]

_IMPORTED = ("monai.bundle", "matplotlib.pyplot", "torch.utils.tensorboard", "torch.distributed.launcher.api")
_IMPORTED += ("skimage.measure", "sklearn.linear_model", "statsmodels.api", "pydicom", "nrrd", "nibabel", "psutil")
_IMPORTED += ("multiprocessing.spawn", "fire", "peft")
# what Python and these read once, by the beginnings of the names of variables; but not what a forked process obeys
_READ_ONCE = ("HF_", "HOME", "HUGGINGFACE", "LD_", "MKL_", "MPL", "PYTHON", "TRANSFORMERS_")
_OBEYED = ("PYTHONPATH", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in _OBEYED}
_MEANT_FOR_TESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # of a whole group: they end, and the server then
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@cache
def python() -> str:
    """Return the path of a command that does what ``sys.executable`` does, forked from the server of this process."""
    if sys.platform != "linux":
        return sys.executable
    import shlex
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="python-")
    with open(f"{folder}/environment.json", "w", encoding="utf-8") as stream:
        json.dump(_ENVIRONMENT, stream)
    with open(f"{folder}/python", "w", encoding="utf-8") as stream:
        stream.write(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-I", "-S", __file__, "launch", folder])} "$@"\n')
    os.chmod(f"{folder}/python", 0o700)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{folder}/socket")
    server.listen()
    alive, _ends_with_this_process = os.pipe()
    subprocess.Popen(
        [sys.executable, __file__, "serve", folder, str(server.fileno())],
        env=_ENVIRONMENT | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # a process that has used CUDA cannot be forked
        pass_fds=[server.fileno()],
        stdin=alive,
        stdout=subprocess.DEVNULL,
    )
    server.close()
    os.close(alive)
    return f"{folder}/python"


# the command


def _parsed(arguments: list[str]) -> tuple[list[str], set[str], list[str]] | None:
    """Return the filters of warnings, the options without a value, and what to run; None if Python has to start."""
    filters, options, rest = [], set(), list(arguments)
    while rest and rest[0][:1] == "-" and rest[0] not in ("-m", "-c", "-"):
        option = rest.pop(0)
        if option[:2] == "-W" and ":" not in option:
            filters.append(option[2:] or rest.pop(0))
        elif option in ("-B", "-u"):
            options.add(option)
        else:
            return None
    return (filters, options, rest) if rest and rest[0] != "-" else None


def _launch(folder: str, arguments: list[str]) -> None:
    """Let the server do what Python does with these arguments, and end as that ends."""
    with open(f"{folder}/environment.json", encoding="utf-8") as stream:
        known = json.load(stream)
    read = [name for name in known.keys() | os.environ.keys() if name.startswith(_READ_ONCE) and name not in _OBEYED]
    if _parsed(arguments) is None or any(known.get(name) != os.environ.get(name) for name in read):
        os.execv(sys.executable, [sys.executable, *arguments])
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    numbers = [number for number in numbers if os.path.exists(f"/proc/self/fd/{number}")]
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ), "files": numbers}
    content = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"{folder}/socket")
        socket.send_fds(server, [len(content).to_bytes(8, "big")], numbers)
        server.sendall(content)
        answers = server.makefile()
        pid = int(answers.readline() or sys.exit("the server of tests/starts.py has ended"))
        for number in _HANDED_ON:
            signal.signal(number, lambda which, _: os.kill(pid, which))
        status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


# the server


def _serve(folder: str, server: socket.socket) -> dict[str, Any]:
    """Fork a process for each request, until the tests end; return the request in each of these."""
    import gc
    import importlib
    import shutil

    for number in (*_MEANT_FOR_TESTS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    ready = False
    while True:
        if server not in select.select([server, sys.stdin], [], [])[0]:
            shutil.rmtree(folder)
            sys.exit()
        connection, _ = server.accept()
        if not ready:
            for name in _IMPORTED:
                importlib.import_module(name)
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
            gc.collect()
            gc.freeze()
            ready = True
        length, files, _, _ = socket.recv_fds(connection, 8, 253)
        if os.fork() == 0:
            server.close()
            return _forked(connection, int.from_bytes(length, "big"), files)
        connection.close()
        for file in files:
            os.close(file)


def _forked(connection: socket.socket, length: int, files: list[int]) -> dict[str, Any]:
    """Fork again: the one waits for the other and tells how it ends; return the request in that one."""
    import fcntl

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request: dict[str, Any] = json.loads(connection.makefile("rb").read(length))
    signal.pthread_sigmask(signal.SIG_BLOCK, _MEANT_FOR_TESTS)  # one that comes too early waits, and is not ignored
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        try:
            connection.send(f"{pid}\n".encode())
            asker_was_killed = connection in select.select([connection, os.pidfd_open(pid)], [], [])[0]
        except OSError:
            asker_was_killed = True
        if asker_was_killed:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):
            connection.send(f"{status}\n".encode())
        os._exit(0)
    connection.close()
    for number in _MEANT_FOR_TESTS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _MEANT_FOR_TESTS)
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    return request


def _stream(before: io.TextIOWrapper, *, unbuffered: bool) -> io.TextIOWrapper:
    """Return what Python makes of an open file when it starts, since that of the server was another one."""
    number, output = before.fileno(), before.writable()
    binary = open(number, "wb" if output else "rb", buffering=0 if unbuffered and output else -1, closefd=False)  # noqa: SIM115
    lines = not unbuffered and (os.isatty(number) or number == 2)
    how = {"encoding": before.encoding, "errors": before.errors, "line_buffering": lines}
    return io.TextIOWrapper(binary, **how, write_through=unbuffered)  # type: ignore[arg-type]


def _become(command: str, request: dict[str, Any]) -> None:
    """Do what the interpreter does with these arguments in this folder and environment."""
    import importlib
    import multiprocessing.spawn
    import runpy
    import tempfile
    import types
    import warnings

    import numpy as np
    import torch

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    parsed = _parsed(request["arguments"])
    assert parsed is not None
    filters, options, arguments = parsed
    unbuffered = "-u" in options or bool(os.environ.get("PYTHONUNBUFFERED"))
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, _stream(getattr(sys, name), unbuffered=unbuffered))
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.executable = command
    multiprocessing.spawn.set_executable(command)
    tempfile.tempdir = None
    np.random.seed()  # noqa: NPY002 (that of all who do not have their own)
    torch.default_generator.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.dont_write_bytecode = "-B" in options or bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.warnoptions[:] = [each for each in os.environ.get("PYTHONWARNINGS", "").split(",") if each] + filters
    for action in sys.warnoptions:
        warnings.simplefilter(action)  # type: ignore[arg-type]
    more = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    importlib.invalidate_caches()
    if arguments[0] == "-m":
        sys.path[:1], sys.argv = [os.getcwd(), *more], arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path[:1], sys.argv = ["", *more], ["-c", *arguments[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(arguments[1], vars(sys.modules["__main__"]))
    else:
        sys.path[:1], sys.argv = [os.path.dirname(os.path.realpath(arguments[0])), *more], arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _role, _folder, *_rest = sys.argv[1:]
    if _role == "launch":
        _launch(_folder, _rest)
    else:
        _become(f"{_folder}/python", _serve(_folder, socket.socket(fileno=int(_rest[0]))))
