# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The locks: of the pins as they are, complete, with digests, and pip takes nothing else."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
import zipfile
from pathlib import Path

import pytest

from tools.commanding import environment
from tools.commanding.environment import CUDA, DEVELOPMENT, RUNTIME
from tools.commanding.locks import LABEL, LOCKED, Package, lock_problems, normal, pins, read_lock

from ..conftest import ROOT


def test_the_locks_are_of_the_pins() -> None:
    assert lock_problems() == []
    for name, files in LOCKED.items():
        packages = read_lock(ROOT / "locks" / name)
        assert len(packages) > 80
        assert all(len(digest) == 64 for package in packages for digest in package.digests)
        versions: dict[str, set[str]] = {}
        for package in packages:
            versions.setdefault(package.name, set()).add(package.version)
            assert package.needed_by, package.name
            parents = {normal(one) for one in package.needed_by if not one.startswith("-r ")}
            assert parents <= {one.name for one in packages}, f"{package.name} is needed by what is not there"
        direct = {pin: {version} for file in files for pin, version in pins(ROOT / file).items()}
        assert direct.items() <= versions.items()
        assert not {one for one in versions if one.startswith(("nvidia-", "cuda-", "triton"))}, "those are CUDA's"


def test_any_build_of_torch_that_is_used_is_known() -> None:
    """All wheels of the index, of every system, and the build for CPUs that the tests run with."""
    for name in LOCKED:
        text = (ROOT / "locks" / name).read_text("utf-8")
        (torch,) = (package for package in read_lock(ROOT / "locks" / name) if package.name == "torch")
        builds = re.findall(rf"^# torch-{re.escape(torch.version)}\+cpu-\S+\.whl sha256:(\w+)$", text, re.M)
        assert builds
        assert {*builds} < {*torch.digests}
        assert len(torch.digests) > 20
    cuda = {package.name: package for package in read_lock(ROOT / "locks" / CUDA)}
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "triton"} <= cuda.keys()
    assert all("sys_platform == 'linux'" in package.marker for package in cuda.values())
    assert {parent for package in cuda.values() for parent in package.needed_by} <= {"torch", *cuda}


def copied(folder: Path) -> Path:
    shutil.copytree(ROOT / "locks", folder / "locks")
    for file in (RUNTIME, DEVELOPMENT, LABEL):
        shutil.copy(ROOT / file, folder)
    return folder


def changed(file: Path, pattern: str, text: str) -> None:
    before = file.read_text("utf-8")
    after = re.sub(pattern, text, before, count=1, flags=re.M)
    assert after != before
    file.write_text(after, "utf-8")


@pytest.mark.parametrize(
    ("file", "pattern", "text", "told"),
    [
        (RUNTIME, r"^tqdm==.*$", "tqdm==9.9.9", "does not have tqdm==9.9.9"),
        (RUNTIME, r"^tqdm==.*$", "", "is of other pins than requirements.txt"),
        (DEVELOPMENT, r"\Z", "six==1.17.0\n", "does not have six==1.17.0"),
        (LABEL, r"^itk==.*$", "itk==9.9", "does not have itk==9.9"),
        (f"locks/{RUNTIME}", r"^tqdm==\S+", "tqdm==4.0.0", "does not have tqdm==4.70.1"),
        (f"locks/{RUNTIME}", r"^idna==\S+", "idna==1.0", "idna 1.0 is in locks/requirements.txt and not in"),
        (f"locks/{LABEL}", r"^(absl-py==\S+).*\n( +--hash.*\n)+", r"\1\n", "absl-py 2.5.1 has no digest"),
        (f"locks/{CUDA}", r"^# pins .*\n", "", "locks/cuda.txt is of other pins"),
    ],
)
def test_a_stale_lock_is_told(file: str, pattern: str, text: str, told: str, tmp_path: Path) -> None:
    root = copied(tmp_path)
    assert lock_problems(root) == []
    changed(root / file, pattern, text)
    problems = lock_problems(root)
    assert any(told in problem and problem.endswith("run python tools/lock.py") for problem in problems), problems
    (root / "locks" / LABEL).unlink()
    assert f"locks/{LABEL} is missing; run python tools/lock.py" in lock_problems(root)


def test_a_comment_in_a_requirements_file_makes_no_lock_stale(tmp_path: Path) -> None:
    root = copied(tmp_path)
    changed(root / RUNTIME, r"^tqdm==(\S+)$", r"tqdm==\1  # of progress")
    assert lock_problems(root) == []


def test_an_entry_is_written_as_it_was_read(tmp_path: Path) -> None:
    entries = [
        Package("a-b", "1.0", "python_full_version < '3.12'", ["a" * 64, "b" * 64], ["c", "-r requirements.txt"]),
        Package("c", "2.0.post1+cpu", "", ["0" * 64], ["d"]),
    ]
    file = tmp_path / "lock.txt"
    file.write_text("# head\n" + "".join(entry.text() for entry in entries))
    assert read_lock(file) == entries
    file.write_text("a>=1.0\n")
    with pytest.raises(ValueError, match="is no entry of a lock"):
        read_lock(file)


def wheel(folder: Path, name: str, version: str, *needs: str) -> str:
    """Write a package without content; return the SHA-256 of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with locks of a few made-up wheels, an index that states their digests, and an environment."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (tmp_path / "tools" / "commanding").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "commanding" / "environment.py", tmp_path / "tools" / "commanding")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "tools" / "commanding" / "environment.py"))
    cuda = wheel(tmp_path / "simple" / "nvidia-cublas", "nvidia_cublas", "13.1")
    with_cuda = wheel(tmp_path / "simple" / "torch", "torch", "2.13.0", "nvidia-cublas==13.1; sys_platform == 'linux'")
    for_cpu = wheel(tmp_path / "spare", "torch", "2.13.0+cpu")
    tqdm = wheel(tmp_path / "simple" / "tqdm", "tqdm", "4.0")
    (tmp_path / "locks").mkdir()
    entries = [Package("torch", "2.13.0", "", [with_cuda, for_cpu], ["-r requirements.txt"])]
    entries += [Package("tqdm", "4.0", "", [tqdm], ["-r requirements.txt"])]
    (tmp_path / "locks" / RUNTIME).write_text("".join(entry.text() for entry in entries))
    entry = Package("nvidia-cublas", "13.1", "sys_platform == 'linux'", [cuda], ["torch"])
    (tmp_path / "locks" / CUDA).write_text(entry.text())
    listed(tmp_path / "simple")
    venv.create(tmp_path / "env", with_pip=True)
    return tmp_path


def listed(simple: Path) -> None:
    """Write the pages of an index, with digests."""
    for folder in simple.iterdir():
        links = [
            f'<a href="{path.name}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}">{path.name}</a>'
            for path in folder.glob("*.whl")
        ]
        (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{' '.join(links)}</body></html>")


def installed(root: Path) -> set[str]:
    found = {path.name.removesuffix(".dist-info") for path in root.glob("env/lib/*/site-packages/*.dist-info")}
    return {name for name in found if not name.startswith(("pip-", "setuptools-"))}


def removed(root: Path) -> None:
    names = [name.split("-")[0] for name in installed(root)]
    subprocess.run([root / "env" / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", *names], check=True)


def test_the_torch_that_pip_takes_decides_on_the_libraries_of_cuda(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the index: with CUDA. A build for CPUs, where there is one: without. One that is there already stays."""
    python = index / "env" / "bin" / "python"
    environment.install(python, RUNTIME)
    assert installed(index) == {"torch-2.13.0", "nvidia_cublas-13.1", "tqdm-4.0"}
    removed(index)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "spare"))
    environment.install(python, RUNTIME)
    assert installed(index) == {"torch-2.13.0+cpu", "tqdm-4.0"}
    assert "note" not in capsys.readouterr().out
    removed(index)
    unknown = wheel(index / "spare", "torch", "2.13.0+cpu", "tqdm")
    environment.install(python, RUNTIME)
    assert installed(index) == {"torch-2.13.0+cpu", "tqdm-4.0"}
    assert f"does not know the build torch-2.13.0+cpu-py3-none-any.whl, sha256 {unknown}" in capsys.readouterr().out
    removed(index)
    wheel(index / "own", "torch", "2.13.0+cu126", "nvidia-cublas-cu12==12.6")
    wheel(index / "own", "nvidia_cublas_cu12", "12.6")
    own = [str(path) for path in (index / "own").iterdir()]  # as a user does who wants another CUDA
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", *own], check=True)
    environment.install(python, RUNTIME)
    assert installed(index) == {"torch-2.13.0+cu126", "nvidia_cublas_cu12-12.6", "tqdm-4.0"}


def test_a_file_that_is_not_the_locked_one_is_not_installed(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = index / "env" / "bin" / "python"
    wheel(index / "simple" / "tqdm", "tqdm", "4.0", "something-else")
    listed(index / "simple")
    with pytest.raises(SystemExit, match=r"could not install requirements\.txt as locked.* -r requirements\.txt"):
        environment.install(python, RUNTIME)
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert installed(index) == {"torch-2.13.0"}
    removed(index)
    wheel(index / "simple" / "torch", "torch", "2.13.0", "something-else")
    listed(index / "simple")
    with pytest.raises(SystemExit, match=r"torch-2\.13\.0-py3-none-any\.whl is not the locked file, its sha256 is"):
        environment.install(python, RUNTIME)
    assert installed(index) == set()


def test_commands_that_start_at_once_wait_for_one_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, began, held = tmp_path / ".venv", threading.Event(), threading.Event()
    python, installed = folder / "bin" / "python", list[Path]()

    def fill(where: Path, *_: str) -> None:
        began.set()
        assert held.wait(60)
        where.parent.mkdir(parents=True)
        where.touch()
        installed.append(where)

    (tmp_path / RUNTIME).write_text("there-is-no-such-package==1.0\n")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "is_installed", lambda: False)
    monkeypatch.setattr(environment, "make", lambda _: None)
    monkeypatch.setattr(environment, "install", fill)
    monkeypatch.setattr(environment, "_check", lambda where, _: not where.exists())
    monkeypatch.setattr(sys, "prefix", str(folder))  # so that it returns and starts nothing
    several = [threading.Thread(target=environment.ensure, args=(RUNTIME,)) for _ in range(3)]
    several[0].start()
    assert began.wait(60)
    for each in several[1:]:
        each.start()
    told = ""
    while told.count("another command is installing into") < 2:
        told += capsys.readouterr().out
        time.sleep(0.01)
    held.set()
    for each in several:
        each.join(60)
    assert installed == [python]
    with environment.alone(folder):  # and is free again
        pass


def test_installing_shows_that_it_moves(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        *(f"Collecting p{n}==1.0 (from -r x)" for n in range(25)),
        "Using cached",
        "Installing collected packages:",
    ]
    talk = f"import sys; print({chr(10).join(lines)!r}); sys.exit(3)"
    assert environment._moving([sys.executable, "-c", talk]) == 3
    told = [line.split(", ")[0] + line.partition(":")[2] for line in capsys.readouterr().out.splitlines()]
    assert told == ["  10 packages p9", "  20 packages p19", "  25 packages unpacking all of them"]


@pytest.mark.slow
def test_an_empty_environment_is_filled_from_the_lock(tmp_path: Path) -> None:
    """With what pip is told of indexes here: the pins are met, nothing is missing, and the network imports."""
    python = tmp_path / "env" / "bin" / "python"
    venv.create(tmp_path / "env", with_pip=True)
    environment.install(python, RUNTIME, DEVELOPMENT)
    for command in (["-m", "pip", "check"], [environment.__file__, RUNTIME, DEVELOPMENT], ["-c", "import monai"]):
        done = subprocess.run([python, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version"), [(RUNTIME, "3.11"), (RUNTIME, "3.13"), (DEVELOPMENT, "3.12"), (LABEL, "3.11")]
)
def test_the_locks_with_cuda_are_complete(name: str, version: str, tmp_path: Path) -> None:
    """The index's metadata ask for nothing else on Linux with CUDA; no package is downloaded."""
    entries = [package for file in (name, CUDA) for package in read_lock(ROOT / "locks" / file)]
    lock = tmp_path / "lock.txt"
    lock.write_text("".join(entry.text() for entry in entries))
    options = ["--dry-run", "--require-hashes", "--no-config", "--target", str(tmp_path / "there")]
    options += [
        "--no-build-isolation-package",
        "sam2",
        "--python-platform",
        "x86_64-manylinux_2_28",
        "--python-version",
        version,
    ]
    options += ["-r", str(lock)]
    options += ["--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-m", "uv", "pip", "install", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert " + torch==2.13.0" in told
    assert " + nvidia-cublas==" in told
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 100e6, "torch alone has more"
