# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make the project's environment, or use the running one if it has the exact pins. Needs nothing but Python."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "ROOT",
    "RUNS",
    "alone",
    "ensure",
    "install",
    "install_torch",
    "is_clone",
    "is_installed",
    "kept",
    "lacks_cuda",
    "make",
    "python_of",
    "unmet",
]

ROOT = Path(__file__).resolve().parents[2]
RUNTIME, DEVELOPMENT = "requirements.txt", "requirements-dev.txt"
CUDA = "cuda.txt"
_SHOW_EVERY = 10  # packages, where no terminal shows a line that changes
_OF_PIP = re.compile(r"(?:Collecting|Requirement already satisfied:) ([^\s=<>]+)|Installing (collected packages)")
PACKAGE = "openmind-bundles"  # as pyproject.toml has it
RUNS = Path("openmind_runs")  # where the verbs of openmind write, from where the user stands


def is_clone() -> bool:
    """Return whether this runs from a clone of the repository, not from what a wheel installed."""
    return (ROOT / "pyproject.toml").is_file()


def is_installed() -> bool:
    """Return whether the running interpreter has the collection as a package, whose metadata say what it needs."""
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def kept(bundle: str) -> Path:
    """Return the folder whose models/ keeps the weights of a bundle of the collection.

    In a clone it is the bundle's own. What is installed is not written to: there it is ``~/.openmind/BUNDLE``, or a
    folder below that of the environment variable OPENMIND_HOME.
    """
    if is_clone():
        return ROOT / "bundles" / bundle
    return Path(os.environ.get("OPENMIND_HOME", "~/.openmind")).expanduser() / bundle


def unmet(*files: str) -> list[str]:
    """Return the pins of these files that the running interpreter does not satisfy."""
    lines = [line.split("#")[0].strip() for file in files for line in (ROOT / file).read_text("utf-8").splitlines()]
    wrong = []
    for pin in filter(None, lines):
        name, _, version = pin.partition("==")
        try:
            installed = importlib.metadata.version(name).split("+")[0]  # "+cpu" and the like name a build
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            wrong.append(f"{pin} (here: {installed})")
    return wrong


def python_of(folder: Path) -> Path:
    """Return the interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure(*files: str) -> None:
    """Return if this interpreter has all pins; else go on in ``.venv``, making and filling it first if needed.

    Of several commands that are started at once one makes it, and the others wait. Where the collection is installed,
    its metadata have seen to what the commands need.

    Raises:
        SystemExit: if the installation fails.
    """
    if files == (RUNTIME,) and is_installed():
        return
    if not unmet(*files):
        return
    folder = ROOT / ".venv"
    python, inside = python_of(folder), Path(sys.prefix).resolve() == folder.resolve()
    if inside or not python.exists() or _check(python, files):
        with alone(folder):
            if not python.exists() or _check(python, files):  # nobody else has done it meanwhile
                make(folder)
                print(f"installing {', '.join(files)} into it (once; a few minutes)", flush=True)
                install(python, *files)
    if inside:
        return
    raise SystemExit(_run([str(python), *sys.argv]))


def _run(command: list[str]) -> int:
    """Run a command that says itself how it was interrupted, and return its exit status."""
    with subprocess.Popen(command) as job:
        while True:
            try:
                return job.wait()
            except KeyboardInterrupt:  # which the command has got as well
                continue


def make(folder: Path, *, again: bool = False) -> None:
    """Make an environment, unless there is one that has pip.

    Args:
        folder: of it.
        again: what is there goes first.
    """
    python = python_of(folder)
    if (
        again
        or not python.exists()
        or subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode
    ):
        print(f"making the environment {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=again)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works on an environment, saying so, and keep others waiting.

    The system lets go of the lock when a process ends, however it ends. Where it cannot lock, nobody waits.

    Args:
        folder: of the environment; the lock lies beside it.
    """
    with open(folder.with_name(f"{folder.name}.lock"), "a+b") as stream:
        told = False
        while not _locked(stream.fileno()):
            if not told:
                print(f"another command is installing into {folder}; waiting until it is done", flush=True)
            told = True
            time.sleep(0.5)
        yield


def _locked(descriptor: int) -> bool:
    """Take the lock of a file and return whether that went well; where there are no locks it counts as taken."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def lacks_cuda() -> bool:
    """Return whether the torch that is installed here was built for CUDA, and has not got all libraries of it.

    Only those that the lock has are looked at; the builds for other versions of CUDA bring others.
    """
    try:
        needed = [line for line in importlib.metadata.requires("torch") or [] if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:
        return False
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "locks" / CUDA).read_text("utf-8"), re.M))
    for name in (re.split(r"[^\w.-]", line)[0] for line in needed):
        if sys.platform == "linux" and name in locked:
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                return True
    return False


def install(python: Path, *files: str, options: tuple[str, ...] = ()) -> None:
    """Install what the locks of requirements files hold, each file compared with its SHA-256.

    The torch is the one that pip takes here; if it is built for CUDA, its libraries are installed too.

    Args:
        python: of the environment.
        files: requirements files.
        options: of pip besides.

    Raises:
        SystemExit: if pip fails, or a file is not the locked one.
    """
    by_hand = f"to install without comparing: {python} -m pip install -r {' -r '.join(files)}"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *options]
    install_torch(pip, ROOT / "locks" / files[0], by_hand)
    for names in (files, (CUDA,)):
        if names == (CUDA,) and subprocess.run([str(python), __file__, CUDA]).returncode == 0:
            break
        locks = [option for name in names for option in ("-r", str(ROOT / "locks" / name))]
        if _moving([*pip, "--require-hashes", *locks]):
            raise SystemExit(f"Stopped: pip could not install {', '.join(names)} as locked, see above; {by_hand}")


def install_torch(pip: list[str], lock: Path, by_hand: str) -> None:
    """Install the torch that pip prefers here, whose version may name a build, if it is not there.

    Among several builds with known digests pip would else take the one whose digest an index states, which is CUDA's.

    Raises:
        SystemExit: if it cannot be had, or is not the locked one.
    """
    entry = re.search(r"^torch==(\S+)((?:.*\\\n)+.*)", lock.read_text("utf-8"), re.M)
    look = "import importlib.metadata as m; print(m.version('torch'))"
    there = subprocess.run([pip[0], "-c", look], capture_output=True, text=True).stdout.split("+")[0].strip()
    if entry is None or there == entry[1]:
        return
    with tempfile.TemporaryDirectory() as scratch:
        fetch = ["download", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*pip[:3], *fetch, "--dest", scratch, f"torch=={entry[1]}"]).returncode:  # its bar is shown
            raise SystemExit("Stopped: pip could not fetch torch; see its message above")
        (wheel,) = Path(scratch).glob("*.whl")
        with wheel.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if f"--hash=sha256:{digest}" not in entry[2]:
            if "+" not in wheel.name:
                raise SystemExit(f"Stopped: {wheel.name} is not the locked file, its sha256 is {digest}; {by_hand}")
            print(
                f"note: {lock.name} does not know the build {wheel.name}, sha256 {digest}: taken as it is", flush=True
            )
        if _moving([*pip, str(wheel)]):
            raise SystemExit("Stopped: pip could not install torch; see its message above")


def _moving(command: list[str]) -> int:
    """Run pip, show in one line how far it is, and return its exit status; what it has to say else it says."""
    began, count, terminal = time.monotonic(), 0, sys.stdout.isatty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as job:
        assert job.stdout is not None
        for line in job.stdout:
            if (found := _OF_PIP.match(line.strip())) is None:
                continue
            count += found[1] is not None
            told = f"  {count} packages, {time.monotonic() - began:.0f} s: {found[1] or 'unpacking all of them'}"
            if terminal:
                print(f"\r{told:<78.78}", end="", flush=True)
            elif found[2] or count % _SHOW_EVERY == 0:
                print(told, flush=True)
    if terminal and count:
        print(flush=True)
    return job.returncode


def _check(python: Path, files: tuple[str, ...]) -> bool:
    """Return whether that interpreter lacks pins."""
    return subprocess.run([str(python), __file__, *files]).returncode != 0


if __name__ == "__main__":
    if sys.argv[1] == "install":  # into the environment that runs this
        install(Path(sys.executable), *sys.argv[2:])
    else:
        sys.exit(lacks_cuda() if sys.argv[1:] == [CUDA] else bool(unmet(*sys.argv[1:])))
