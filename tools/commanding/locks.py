# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The locks: every package of a requirements file with all that it needs, and the SHA-256 of each of its files.

``locks/requirements.txt`` and its kin hold what any build of PyTorch needs; ``locks/cuda.txt`` the CUDA libraries that
the builds for Linux on the package index need besides. pip compares the digests (``--require-hashes``). Needs nothing
but Python, but for making locks, which takes uv.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .environment import CUDA, DEVELOPMENT, ROOT, RUNTIME

__all__ = ["LABEL", "LOCKED", "Package", "lock", "lock_problems", "normal", "pins", "read_lock"]

LABEL = "requirements-label.txt"
# each lock, and the requirements files that it is made of
LOCKED = {DEVELOPMENT: [RUNTIME, DEVELOPMENT], RUNTIME: [RUNTIME], LABEL: [LABEL]}
_OLDEST = "3.11"
_BUILDS = ("torch", "torchvision")  # of which there are builds that the index does not have
_BUILT_HERE = "sam2"  # has no wheel, and builds with the torch that is installed
_HEAD = "# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0\n"


@dataclass
class Package:
    """An entry of a lock.

    Attributes:
        name: in the normal form, lower case with hyphens.
        version: pinned.
        marker: for which machines, empty for all.
        digests: SHA-256 of each of its files.
        needed_by: names of packages that need it, and requirements files as ``-r FILE``.
    """

    name: str
    version: str
    marker: str = ""
    digests: list[str] = field(default_factory=list)
    needed_by: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the entry as it is written."""
        head = f"{self.name}=={self.version}" + (f" ; {self.marker}" if self.marker else "")
        lines = [head, *(f"    --hash=sha256:{digest}" for digest in sorted(self.digests))]
        return " \\\n".join(lines) + "\n" + f"    # via {', '.join(self.needed_by)}\n"


def normal(name: str) -> str:
    """Return a package's name in the form in which all spellings are equal.

    Example:
        >>> normal("Scikit_Image")
        'scikit-image'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: Path) -> dict[str, str]:
    """Return the packages of a requirements file and their versions."""
    lines = [line.split("#")[0].strip() for line in file.read_text("utf-8").splitlines()]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def read_lock(file: Path) -> list[Package]:
    """Return the entries of a lock; a package may have several, each for other machines.

    Raises:
        ValueError: if a line is neither an entry, nor a digest, nor a comment.
    """
    found: list[Package] = []
    for line in file.read_text("utf-8").splitlines():
        text = line.strip().removesuffix("\\").strip()
        if entry := re.fullmatch(r"([\w.-]+)==([^\s;]+)(?: *; *(.+))?", text):
            found.append(Package(normal(entry[1]), entry[2], entry[3] or ""))
        elif digest := re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", text):
            found[-1].digests.append(digest[1])
        elif text.startswith("# via "):
            found[-1].needed_by += text.removeprefix("# via ").split(", ")
        elif text and not text.startswith("#"):
            raise ValueError(f"{file}: {line!r} is no entry of a lock")
    return found


def _digest_of_pins(files: list[str], root: Path) -> str:
    told = [f"{name}=={version}" for file in files for name, version in pins(root / file).items()]
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()


def lock_problems(root: Path = ROOT) -> list[str]:
    """Return what is wrong with the locks, without asking anyone: all that CI needs to see that one is stale."""
    problems: list[str] = []
    known: dict[str, list[Package]] = {}
    for name, files in {**LOCKED, CUDA: [RUNTIME]}.items():
        path = root / "locks" / name
        if not path.is_file():
            problems.append(f"locks/{name} is missing; run python tools/lock.py")
            continue
        known[name] = read_lock(path)
        if f"# pins {_digest_of_pins(files, root)}\n" not in path.read_text("utf-8"):
            problems.append(f"locks/{name} is of other pins than {' and '.join(files)}; run python tools/lock.py")
        problems += [
            f"locks/{name}: {package.name} {package.version} has no digest; run python tools/lock.py"
            for package in known[name]
            if not package.digests
        ]
        versions = {(package.name, package.version) for package in known[name]}
        wanted = {} if name == CUDA else {pin: at for file in files for pin, at in pins(root / file).items()}
        problems += [
            f"locks/{name} does not have {pin}=={version}; run python tools/lock.py"
            for pin, version in wanted.items()
            if (pin, version) not in versions
        ]
    both = [{(one.name, one.version, one.marker) for one in known.get(name, [])} for name in (RUNTIME, DEVELOPMENT)]
    problems += [
        f"{name} {version} is in locks/{RUNTIME} and not in locks/{DEVELOPMENT}; run python tools/lock.py"
        for name, version, _ in sorted(both[0] - both[1])
    ]
    return problems


def _resolve(files: list[str], preferred: str, folder: Path) -> list[Package]:
    """Return all that requirements files need on any machine, by the index's metadata alone: nothing is downloaded.

    Args:
        files: of requirements.
        preferred: text of a lock whose versions are kept where they can be.
        folder: to work in.

    Raises:
        SystemExit: if uv cannot resolve them.
    """
    output = folder / "resolved.txt"
    output.write_text(preferred, "utf-8")
    options = ["--universal", "--python-version", _OLDEST, "--python", sys.executable, "--generate-hashes"]
    options += ["--no-header", "--no-config", "--quiet", "--annotation-style", "line"]
    options += ["--no-build-isolation-package", _BUILT_HERE]
    command = [sys.executable, "-m", "uv", "pip", "compile", *files, *options, "--output-file", str(output)]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"Stopped: uv could not resolve {' and '.join(files)}; see its message above")
    return read_lock(output)


def _of_cuda(packages: list[Package]) -> set[str]:
    """Return what only the torch for Linux on the package index needs: its CUDA libraries, and what they need."""
    found: set[str] = set()
    while True:
        more = {
            package.name
            for package in packages
            if "sys_platform == 'linux'" in package.marker and {*package.needed_by} <= {"torch", *found}
        }
        if more <= found:
            return found
        found |= more


def _builds(packages: list[Package], earlier: str, folder: Path) -> list[str]:
    """Add the digests of builds for CPUs to their packages; return a comment on each.

    Those that pip finds from here are taken, and those of an earlier lock for the same version.
    """
    comments: set[str] = set()
    for package in packages:
        if package.name not in _BUILDS:
            continue
        asked = f"{package.name}=={package.version}+cpu"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(folder), asked], capture_output=True)
        for wheel in folder.glob(f"{package.name}-{package.version}+*.whl"):
            with wheel.open("rb") as stream:
                comments.add(f"# {wheel.name} sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}")
        pattern = rf"^# {re.escape(package.name)}-{re.escape(package.version)}\+\S+\.whl sha256:\w+$"
        comments |= set(re.findall(pattern, earlier, re.M))
        own = [comment.split("sha256:")[1] for comment in comments if comment.startswith(f"# {package.name}-")]
        package.digests = sorted({*package.digests, *own})
    return sorted(comments)


def lock(*, upgrade: bool = False) -> list[str]:
    """Make all locks anew.

    Args:
        upgrade: take the newest versions of what the requirements do not pin, instead of those of the locks there.

    Returns:
        the files written.

    Raises:
        SystemExit: if the requirements cannot be resolved, or would want different CUDA libraries.
    """
    folder = ROOT / "locks"
    folder.mkdir(exist_ok=True)
    texts = {name: path.read_text("utf-8") if (path := folder / name).is_file() else "" for name in (*LOCKED, CUDA)}
    cuda: list[Package] = []
    newest = ""
    for name, files in LOCKED.items():
        with tempfile.TemporaryDirectory() as scratch:
            preferred = newest if name == RUNTIME else "" if upgrade else texts[name] + texts[CUDA]
            packages = _resolve(files, preferred, Path(scratch))
            builds = _builds(packages, texts[name], Path(scratch))
        names = _of_cuda(packages)
        theirs = [package for package in packages if package.name in names]
        own = [package for package in packages if package.name not in names]
        if cuda and [package.text() for package in theirs] != [package.text() for package in cuda]:
            raise SystemExit(f"Stopped: {' and '.join(files)} want other CUDA libraries than the other requirements")
        cuda = theirs
        comments = [f"# Made by python tools/lock.py of {' and '.join(files)}, for Python {_OLDEST} and newer."]
        comments += [f"# pins {_digest_of_pins(files, ROOT)}"]
        comments += ["# digests of builds that the package index does not have:", *builds] if builds else []
        text = "\n".join(comments) + "\n" + "".join(package.text() for package in own)
        (folder / name).write_text(_HEAD + text, "utf-8")
        newest = newest or text + "".join(package.text() for package in cuda)
    comments = ["# Made by python tools/lock.py: what the torch of the package index needs on Linux besides, for CUDA."]
    comments += [f"# pins {_digest_of_pins([RUNTIME], ROOT)}"]
    (folder / CUDA).write_text(_HEAD + "\n".join(comments) + "\n" + "".join(one.text() for one in cuda), "utf-8")
    return [f"locks/{name}" for name in (*LOCKED, CUDA)]
