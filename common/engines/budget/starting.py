# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Before the first step: does this training fit the GPU that it starts on, and if not, what would?

The answer takes some seconds, in a process of its own, since the device that stands in for a GPU is known to a whole
process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...bundles import running_parser
from ...errors import SettingsError
from ...terminal import speaks

__all__ = ["check_memory", "memory_problem"]

_TIMEOUT = 600  # seconds
_NEEDED = ("validate", "run", "initialize")  # what the step does not need
_ROOT = Path(__file__).resolve().parents[__name__.count(".")]  # the folder of the package, whatever its name is


def check_memory(device: torch.device | str, *, memory_gib: float | None = None) -> None:
    """Refuse a training that cannot fit the GPU that it starts on; call it in the ``run`` of a config.

    What PyTorch's allocator or cuDNN need besides is not held against a run: only what is sure to be too much is
    refused, and what may be is told.

    Args:
        device: of the run; on a CPU nothing is looked at, unless ``memory_gib`` says how much there is.
        memory_gib: memory to judge by instead of the GPU's own.

    Raises:
        SettingsError: with the settings that would fit.
    """
    device, parser = torch.device(device), running_parser()
    if parser is None or (device.type != "cuda" and memory_gib is None):
        return
    gib = memory_gib
    if gib is None:
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    content = {name: value for name, value in parser.get().items() if name not in _NEEDED}
    content |= {name: parser.get_parsed_content(name) for name in ("amp", "amp_dtype")}
    told = memory_problem(content, gib, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if told is None:
        return
    if told["sure"]:
        raise SettingsError(told["text"])
    if speaks():
        tqdm.write(f"note: {told['text']}")


def memory_problem(content: Mapping[str, Any], gib: float, *, processes: int = 1) -> dict[str, Any] | None:
    """Return what is wrong with a training on a GPU of so much memory, None if it fits.

    Args:
        content: of the config, complete and not resolved, overrides included.
        gib: of the GPU.
        processes: that share the batch.

    Returns:
        ``text``, a sentence; whether it is ``sure`` that the training cannot fit; ``changes`` of settings that fit.
    """
    try:
        told = json.dumps({"content": content, "gib": gib, "processes": processes})
    except TypeError as error:  # a config that was given objects
        return _unknown(str(error))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", f"from {__package__}.starting import _answer; _answer()"]
    try:
        answer = subprocess.run(
            command, input=told, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        last = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
        return _unknown(" ".join(last))
    found: dict[str, Any] | None = json.loads(answer.stdout.splitlines()[-1])
    return found


def _unknown(why: str) -> dict[str, Any]:
    return {"sure": False, "text": f"whether this fits the GPU could not be found out: {why}", "changes": {}}


def _answer() -> None:
    """Read a question and print the answer; in the process that :func:`memory_problem` starts."""
    from .fitting import GIB, Fits, needed_gib, override

    asked = json.loads(sys.stdin.read())
    fits, gib = Fits(asked["content"], asked["processes"]), float(asked["gib"])
    step, found = fits.step(), None
    needed = needed_gib(step)
    if needed > gib:
        sure = step.peak / GIB > gib
        text = f"this training needs some {needed:.1f} GiB, and the GPU has {gib:.1f}"
        fit = fits.within(gib)
        remedy = f"add {override(fit.changes)}" if fit is not None else "nothing that was tried fits it"
        text = f"{text}; {remedy}" if sure else f"{text}, which may be too little; {remedy}"
        found = {"sure": sure, "text": text, "changes": fit.changes if fit is not None else {}}
    sys.stdout.write(json.dumps(found) + "\n")
