# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a run depends on of this machine, one finding a line; needs nothing but Python, for it tells what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.terminal import openmind

from ..commanding.ending import end, tool_command
from ..commanding.environment import ROOT, RUNS, RUNTIME, is_clone, is_installed, kept, lacks_cuda
from ..commanding.locks import pins
from ..linking.links import problems
from .settings import Doctor

__all__ = ["doctor", "findings"]

_TESTED_PYTHON = (3, 11)
_EXTRAS = {
    "peft": "--tuning lora",
    "onnx": "export of networks to ONNX",
    "distributed": "preparing data on a Dask cluster",
    "nvflare": "training over several sites",
    "mlflow": "--tracking mlflow",
    "monailabel": "labelling; it has an environment of its own, see docs/monai_label.md",
}
_GIB = 2**30
_LITTLE_DISK, _LITTLE_MEMORY, _LITTLE_SHARED = 20, 8, 2  # GiB below which a line warns


def doctor(_: Doctor) -> None:
    """Print the findings, and what to do next; the exit status is 1 if a run cannot work here.

    Raises:
        SystemExit: if something is missing.
    """
    found = list(findings())
    width = max(len(mark) for mark, _ in found)
    for mark, told in found:
        print(f"{mark:<{width}}  {told}")
    missing = [told for mark, told in found if mark == "missing"]
    end(following=_following(missing))
    if missing:
        raise SystemExit(1)


def _following(missing: Sequence[str]) -> str | None:
    """Return the command that mends what is missing, or the first one to try; None if a person has to see to it.

    Args:
        missing: sentences.
    """
    absent = [name for name in pins(ROOT / RUNTIME) if any(told.startswith(f"{name} is not") for told in missing)]
    if absent and (is_installed() or not is_clone()):
        return shlex.join(["python", "-m", "pip", "install", *absent])
    if absent or not missing:  # in a clone a verb makes the environment
        return f"{openmind() or 'openmind'} list"
    return tool_command("links") if is_clone() and problems() else None


def findings() -> Iterator[tuple[str, str]]:
    """Yield a mark (good, note or missing) and a sentence for each thing that was looked at."""
    version = ".".join(map(str, sys.version_info[:3]))
    mark = "good" if sys.version_info[:2] == _TESTED_PYTHON else "note"
    told = "as tested" if mark == "good" else "3.11 is what was tested, newer ones should do"
    yield mark, f"Python {version} on {platform.system()} {platform.machine()}, {told}"
    yield from _packages()
    yield from _device()
    yield from _memory()
    yield from _disk()
    yield from _links()
    for name, use in _EXTRAS.items():
        there = importlib.util.find_spec(name) is not None
        yield "good" if there else "note", f"extra {name} is {'there' if there else 'not there'}: {use}"


def _packages() -> Iterator[tuple[str, str]]:
    """Yield what is missing and what has another version than the tested one."""
    tested, equal = pins(ROOT / RUNTIME), 0
    for name, version in tested.items():
        try:
            here = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            yield "missing", f"{name} is not installed; {version} is what was tested"
            continue
        equal += here == version
        if here != version:
            untried = "; no other version of torch was tried" if name == "torch" else ""
            yield "note", f"{name} {here} is installed, {version} is what was tested{untried}"
    yield "good" if equal else "note", f"{equal} of {len(tested)} packages have the version that was tested"


def _device() -> Iterator[tuple[str, str]]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            yield "good", f"GPU {index}: {about.name}, {about.total_memory / _GIB:.0f} GiB"
        return
    why = "this torch is built for CPUs" if torch.version.cuda is None else "the driver shows none"
    if torch.version.cuda is not None and lacks_cuda():
        why = "libraries of CUDA that this torch needs are not installed"
    yield "note", f"no GPU ({why}): runs take the CPU, {os.cpu_count()} processors; take small networks and patches"


def _memory() -> Iterator[tuple[str, str]]:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
        yield "good" if size >= _LITTLE_MEMORY else "note", f"memory: {size:.0f} GiB"
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / _GIB
        remedy = "" if size >= _LITTLE_SHARED else "; a container wants --shm-size 8g, or use --num_workers 0"
        yield "good" if not remedy else "note", f"shared memory: {size:.1f} GiB{remedy}"


def _disk() -> Iterator[tuple[str, str]]:
    places = {"runs": RUNS.absolute().parent, "kept weights": kept("")}
    for what, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free / _GIB
        writable = os.access(there, os.W_OK)
        mark = "good" if writable and free >= _LITTLE_DISK else "note" if writable else "missing"
        yield (
            mark,
            f"disk for {what}: {free:.0f} GiB free at {place}{'' if writable else ', which cannot be written to'}",
        )


def _links() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            (Path(scratch) / "link").symlink_to("target")
            yield "good", "links can be made here"
        except (OSError, NotImplementedError):
            yield "note", "links cannot be made here: copies stand in their place (python tools/links.py)"
    if is_clone():
        wrong = problems()
        told = (
            f"{len(wrong)} links of the clone are not right: {wrong[0]}"
            if wrong
            else "the links of the clone are right"
        )
        yield "missing" if wrong else "good", told
