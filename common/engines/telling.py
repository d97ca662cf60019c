# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a run says first, which is what it has understood, and last: the result, where to look, what is next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..paths import as_path
from ..tasks import ClassificationTask, RegressionTask, SegmentationTask
from ..terminal import duration, ending, near, speaks
from .following import next_command

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["tell_beginning", "tell_end"]

_RECENT = 5  # epochs whose time tells that of the next
_WIDTH = 9


def tell_beginning(
    what: str,
    *,
    cases: Mapping[str, Sized | int],
    task: SegmentationTask | ClassificationTask | RegressionTask | None = None,
    network: nn.Module | None = None,
    device: str | torch.device | None = None,
    crop: int | Sequence[int] | None = None,
    spacing_mm: Any = "",
    epochs: int | None = None,
    length: str = "",
    history: str | None = None,
) -> None:
    """Print what a run has understood, before its work begins.

    Args:
        what: it does.
        cases: by what they are for.
        task: whose classes are named with their values, or whose number is.
        network: whose size is said.
        device: that it runs on.
        crop: sides of the input in voxels.
        spacing_mm: of these voxels.
        epochs: of a training.
        length: of an epoch, in words.
        history: JSON of the epochs that were done before, by which the time is estimated.
    """
    if not speaks():
        return
    counts = {name: each if isinstance(each, int) else len(each) for name, each in cases.items()}
    lines = {"cases": ", ".join(f"{count:,} {name}" for name, count in counts.items())}
    if isinstance(task, SegmentationTask):
        lines["labels"] = ", ".join(f"{value} {name}" for value, name in task.by_value.items())
        if task.regions is not None:
            regions = (f"{name} ({', '.join(map(str, values))})" for name, values in task.regions.items())
            lines["regions"] = ", ".join(regions)
    elif isinstance(task, RegressionTask):
        units = f" {task.units}" if task.units else ""
        lines["number"] = f"{task.name}, in training {task.mean:.4g} ± {task.std:.3g}{units}"
    elif task is not None:
        lines["classes"] = ", ".join(task.names) + (", each yes or no" if task.multilabel else "")
    if network is not None:
        millions = sum(each.numel() for each in network.parameters()) / 1e6
        lines["network"] = f"{type(network).__name__}, {millions:.3g} million parameters"
    if crop is not None:
        sides = [crop] * 3 if isinstance(crop, int) else list(crop)
        lines["input"] = f"{' x '.join(map(str, sides))} voxels{_of_mm(spacing_mm)}"
    if device is not None:
        lines["device"] = f"{device}{_threads(device)}"
    if epochs is not None:
        many = "" if epochs == 1 else "s"
        lines["length"] = f"{epochs:,} epoch{many}{f' of {length}' if length else ''}{_left(history, epochs)}"
    tqdm.write("\n".join([what, *(f"  {name:<{_WIDTH}}{told}" for name, told in lines.items())]))


def _of_mm(spacing: Any) -> str:
    if spacing is None:
        return " of each file's own size"
    if isinstance(spacing, (int, float)):
        return f" of {spacing:g} mm"
    if isinstance(spacing, Sequence) and not isinstance(spacing, str):
        return f" of {' x '.join(f'{side:g}' for side in spacing)} mm"
    return ""


def _threads(device: str | torch.device) -> str:
    """Return how many threads a CPU gives."""
    import torch  # not at the top: scores are made without it

    if torch.device(device).type != "cpu":
        return ""
    threads = torch.get_num_threads()
    return f", {threads} thread{'s' if threads > 1 else ''}"


def _left(history: str | None, epochs: int) -> str:
    """Return the time that is left, by the epochs that are done; nothing where none is."""
    if history is None or not as_path(history).is_file():
        return ""
    try:
        records = json.loads(as_path(history).read_text("utf-8"))
        seconds = [float(record["seconds"]) for record in records[-_RECENT:]]
        left = max(epochs - int(records[-1]["epoch"]), 0)
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
    return f", {left:,} of them left, about {duration(left * sum(seconds) / len(seconds))} at the pace of the last"


def tell_end(
    result: str,
    *,
    look: Sequence[str] = (),
    following: str | None = None,
    tool: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Print where the result is, where to look, and the next command, ready to paste.

    Args:
        result: file or folder.
        look: pictures or pages, the best first; the first that is there is named, or the result.
        following: config of the bundle to run next.
        tool: to run next instead, where the tools of the collection are at hand.
        settings: of either; those that are None are left out, and those that a bundle has anyway. ``BUNDLE`` becomes
            the name of the bundle that runs.
    """
    if not speaks():
        return
    there = next((path for each in look for path in _found(each)), result)
    command = next_command(following, tool=tool, settings=settings or {})
    tqdm.write(ending(near(as_path(result)), look=near(as_path(there)), following=command))


def _found(pattern: str) -> list[Path]:
    """Return the files that a path names, the newest first of a pattern in its last part."""
    path = as_path(pattern)
    if "*" in path.name:
        return sorted(path.parent.glob(path.name), key=lambda each: each.stat().st_mtime, reverse=True)
    return [path] if path.exists() else []
