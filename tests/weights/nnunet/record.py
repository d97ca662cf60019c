# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Run nnU-Net on what is exported for it, compare with this project, and renew what the tests compare with.

  python -m tests.weights.nnunet.record [FOLDER]     # of nnU-Net's environment; .venv-nnunet unless given

tools/check.py --all runs it. It fails if encoders differ by more than 1e-5, or a segmentation in more than one voxel of
a thousand.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import write_json

from .environment import nnunet_python
from .samples import ENCODERS, SEGMENTATIONS, encoder_features, labels_of, model_of, predict, write_samples

__all__ = ["CLOSE", "LEAST_AGREEMENT", "RECORDING", "STEP", "packed", "read_recording", "thinned", "unpacked"]

RECORDING = Path(__file__).with_name("recording.json")
CLOSE, LEAST_AGREEMENT = 1e-5, 0.999
STEP = 3  # of the recorded voxels of a label map, along each axis
_NUMBERS = 50  # recorded of the features of each stage
_ALMOST = 1e-7  # numbers that differ by less are the same recording


def read_recording() -> dict[str, Any]:
    """Return what nnU-Net said."""
    return json.loads(RECORDING.read_text("utf-8"))


def thinned(features: np.ndarray) -> list[float]:
    """Return some numbers of a map of features, evenly spread."""
    flat = features.reshape(-1)
    return [float(flat[place]) for place in np.linspace(0, len(flat) - 1, min(_NUMBERS, len(flat))).astype(int)]


def packed(labels: np.ndarray) -> dict[str, Any]:
    """Return every third voxel of a label map along each axis, as text."""
    thin = labels[::STEP, ::STEP, ::STEP]
    return {"shape": list(thin.shape), "labels": base64.b85encode(zlib.compress(thin.tobytes(), 9)).decode()}


def unpacked(recorded: dict[str, Any]) -> np.ndarray:
    """Return the voxels of :func:`packed`."""
    values = zlib.decompress(base64.b85decode(recorded["labels"]))
    return np.frombuffer(values, np.uint8).reshape(recorded["shape"])


def run(folder: Path, python: Path) -> dict[str, Any]:
    """Let both programs work on the samples, and return what nnU-Net said and how well they agree."""
    ours: dict[str, list[Any]] = {}
    for bundle in ENCODERS:
        (folder / "encoders" / bundle).mkdir(parents=True)
        ours[bundle] = encoder_features(bundle, folder / "encoders" / bundle)
    write_samples(folder)
    images = {name: sample.image for name, sample in SEGMENTATIONS.items()}
    (folder / "todo.json").write_text(json.dumps({"encoders": list(ENCODERS), "segmentations": images}))
    command = [str(python), "-W", "ignore", str(Path(__file__).with_name("peer.py")), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet_", "PYTHON"))}
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    if told.returncode:
        raise SystemExit(f"Stopped: nnU-Net failed:\n{told.stdout[-2000:]}{told.stderr[-4000:]}")
    found: dict[str, Any] = {"versions": json.loads((folder / "versions.json").read_text())}
    found["encoders"], found["segmentations"] = {}, {}
    for bundle, features in ours.items():
        with np.load(folder / "encoders" / bundle / "features.npz") as stored:
            theirs = list(stored.values())
        error = max(float(np.abs(one.numpy() - other).max()) for one, other in zip(features, theirs, strict=True))
        stages = [thinned(stage) for stage in theirs]
        found["encoders"][bundle] = {"largest_difference": error, "features": stages}
    for name in SEGMENTATIONS:
        own = predict(name, model_of(name, folder), folder, folder / "ours" / name)
        theirs = {sums: labels_of(folder / "theirs" / sums / name / "case.nii.gz") for sums in ("float16", "float32")}
        agreement = {f"agreement_{sums}": round(float((own == one).mean()), 6) for sums, one in theirs.items()}
        found["segmentations"][name] = agreement | {f"labels_{sums}": packed(one) for sums, one in theirs.items()}
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """Return where the two programs differ too much."""
    wrong = [
        f"{bundle}: features differ by {recorded['largest_difference']:.1e}"
        for bundle, recorded in found["encoders"].items()
        if not recorded["largest_difference"] <= CLOSE
    ]
    return wrong + [
        f"{name}: {recorded['agreement_float16']:.4%} of the voxels agree"
        for name, recorded in found["segmentations"].items()
        if not recorded["agreement_float16"] >= LEAST_AGREEMENT
    ]


def _same(one: Any, other: Any) -> bool:
    """Return whether two recordings say the same but for the last digits."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, (int, float)):
        return abs(one - other) <= _ALMOST * max(1.0, abs(one))
    return bool(one == other)


def main(folder: Path | None = None) -> None:
    """Run both programs, print how they agree, and write the recording anew if it has changed.

    Raises:
        SystemExit: if they differ too much.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = run(Path(scratch), nnunet_python(folder))
    for bundle, recorded in found["encoders"].items():
        print(f"{bundle:14} features differ by {recorded['largest_difference']:.1e} at most")
    for name, recorded in found["segmentations"].items():
        told = [f"{recorded[f'agreement_{sums}']:.4%} where nnU-Net sums in {sums}" for sums in ("float16", "float32")]
        print(f"{name:14} voxels that agree: {', '.join(told)}")
    if wrong := problems(found):
        raise SystemExit("Stopped: " + "; ".join(wrong))
    if not RECORDING.is_file() or not _same(found, read_recording()):
        write_json(found, RECORDING)
        print(f"written: {RECORDING}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
