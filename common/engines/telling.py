# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a run says first, which is what it has understood, and last: the result, where to look, what is next."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..bundles import FOLDER, running_bundle, running_parser
from ..paths import as_path
from ..tasks import ClassificationTask, RegressionTask, SegmentationTask
from ..terminal import ending, near, speaks

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
        lines["length"] = f"{epochs:,} epochs{f' of {length}' if length else ''}{_left(history, epochs)}"
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
    """Return how many threads a CPU gives, and whether other programs keep it busy, where these wait for each other."""
    import torch  # not at the top: scores are made without it

    if torch.device(device).type != "cpu":
        return ""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    told = f", {threads} thread{'s' if threads > 1 else ''}"
    if threads == 1 or not hasattr(os, "getloadavg") or (load := os.getloadavg()[0]) < cores + 1:
        return told
    return f"{told}; busy with other work (load {load:.0f} on {cores} cores), where OMP_NUM_THREADS=1 may be faster"


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
    return f", {left:,} of them left, about {_in_words(left * sum(seconds) / len(seconds))} at the pace of the last"


def _in_words(seconds: float) -> str:
    """Return a time in its largest unit.

    Example:
        >>> _in_words(50), _in_words(5000), _in_words(500_000)
        ('50 s', '83 min', '139 h')
    """
    for unit, size, most in (("s", 1, 90), ("min", 60, 5400)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.0f} h"


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
    command = None
    folder, settings = running_bundle(), dict(settings or {})
    if folder is not None and settings.get("bundle") == "BUNDLE":
        settings["bundle"] = folder.name
    if tool is not None and (file := FOLDER.parents[1] / "tools" / f"{tool}.py").is_file():
        command = f"python {shlex.quote(near(file))}{_options(settings)}"
    elif following is not None and (line := _next(following, {} if tool else settings)):
        command = line
    tqdm.write(ending(near(as_path(result)), look=near(as_path(there)), following=command))


def _found(pattern: str) -> list[Path]:
    """Return the files that a path names, the newest first of a pattern in its last part."""
    path = as_path(pattern)
    if "*" in path.name:
        return sorted(path.parent.glob(path.name), key=lambda each: each.stat().st_mtime, reverse=True)
    return [path] if path.exists() else []


def _next(kind: str, settings: Mapping[str, Any]) -> str:
    """Return the command that runs another config of the bundle that runs, empty if it is in none."""
    folder, parser = running_bundle(), running_parser()
    if folder is None or parser is None:
        return ""
    file = next((each for each in sorted((folder / "configs").glob(f"{kind}.*"))), None)
    if file is None:
        return ""
    root = as_path(parser.get().get("bundle_root", folder))
    own = {} if root.absolute() == folder.absolute() else {"bundle_root": near(root)}
    given = own | {name: value for name, value in settings.items() if not _as_ever(name, value, root)}
    if data := given.get("dataset_dir"):
        given["dataset_dir"] = _folder_for(kind, as_path(data))
    return f"python -m monai.bundle run --config_file {shlex.quote(near(file))}{_options(given)}"


def _as_ever(name: str, value: Any, root: Path) -> bool:
    """Return whether a path is where a bundle looks for it without being told."""
    usual = {
        "pretrained": "models/pretrained_encoder.pt",
        "model": "models/model.pt",
        "predictions": "output/predictions",
    }
    paths = (usual.get(name, ""), "models/classifier.pt" if name == "model" else "")
    return any(each and as_path(str(value)).absolute() == (root / each).absolute() for each in paths)


def _folder_for(kind: str, data: Path) -> Path:
    """Return the folder of images of labelled data to predict, or that of labelled data for images to score."""
    if kind == "inference":
        return next((data / each for each in ("imagesTs", "images", "imagesTr") if (data / each).is_dir()), data)
    if kind == "evaluate" and data.name in ("images", "imagesTr"):
        return data.parent
    return data


def _options(settings: Mapping[str, Any]) -> str:
    return "".join(f" --{name} {_quoted(value)}" for name, value in settings.items() if value not in (None, ""))


def _quoted(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return f'"{value!r}"' if not set('"$`\\') & set(repr(value)) else shlex.quote(repr(value))
    return shlex.quote(near(value) if isinstance(value, Path) else str(value))
