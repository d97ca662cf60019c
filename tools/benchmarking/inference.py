# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Prediction of a whole volume by a bundle's inference config, and by nnU-Net's own predictor with the same weights.

Each run is a process of its own on one thread, from the start of Python to the written label map; the two sides take
turns. Both see the same file, the same tiles with overlap 0.5 and Gaussian weights, and mirror nothing. The weights are
drawn; the last layer is fitted to levels of intensity, so that classes are told apart as by a trained network. Both run
in nnU-Net's environment, which has this project's packages too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from common.engines.precision import cpu_has_bfloat16
from common.files import sha256, write_record
from common.networks import ResEncUNet
from common.transforms import volume_preprocessing
from common.weights import export_model_folder, write_checkpoint

from ..commanding.environment import ROOT
from ..preparing.template import template
from .settings import Benchmark
from .witness import PEER, nnunet_python, nnunet_version, on_one_thread

__all__ = ["ROWS", "Row", "inference_table", "measure_inference", "write_row"]

_BUNDLE = "bundles/mae_resenc_l"
_TILE = 64
_SPACING_MM = (0.8, 0.8, 1.5)
_DATA: dict[str, Any] = {"spacing_mm": 1.0, "normalization": ["zscore"], "reorient": True}
NARROW: dict[str, Any] = {"features_per_stage": [8, 16, 32, 32], "blocks_per_stage": [1, 2, 2, 2]}
FULL: dict[str, Any] = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "blocks_per_stage": [1, 3, 4, 6, 6, 6],
}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        classes: of the foreground.
        shape: of the file, voxels of 0.8 x 0.8 x 1.5 mm; the network's are 1 mm.
        network: ``features_per_stage`` and ``blocks_per_stage``.
        amp: ours in bfloat16; theirs stays in float32, which is all it does on a CPU.
    """

    classes: int
    shape: tuple[int, int, int] = (320, 320, 140)
    network: dict[str, Any] = field(default_factory=lambda: NARROW)
    amp: bool = False


_SMALL = (160, 160, 80)
ROWS = [*(Row(classes) for classes in (1, 3, 20)), Row(3, _SMALL, FULL), Row(3, _SMALL, FULL, amp=True)]


def measure_inference(options: Benchmark) -> Iterator[dict[str, Any]]:
    """Measure row by row; theirs only with peers.

    Yields:
        for each row ``ours`` and ``theirs``, medians of what :mod:`.measured` reports, and the share of voxels with the
        same label (``same``).
    """
    python = nnunet_python() if options.peers else None
    for row in ROWS:
        if row.amp and not cpu_has_bfloat16():
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_row(row, folder)
            rounds: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                if python:
                    rounds["theirs"].append(_theirs(folder, python))
                rounds["ours"].append(_ours(folder, python or Path(sys.executable), row.amp))
            figures: dict[str, Any] = {
                side: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                for side, runs in rounds.items()
                if runs
            }
            if python:
                maps = [np.asarray(nib.load(folder / side / "case.nii.gz").dataobj) for side in rounds]
                figures["same"] = float((maps[0] == maps[1]).mean())
        print(f"{row.classes} classes, {row.network['features_per_stage']}: {figures}", file=sys.stderr, flush=True)
        yield {"row": row, "nnunet": nnunet_version(python) if python else ""} | figures


def write_row(row: Row, folder: Path) -> None:
    """Write ``images/case_0000.nii.gz``, ``model.pt`` with its JSON, and ``nnunet/``, the same for nnU-Net."""
    image = folder / "images" / "case_0000.nii.gz"
    image.parent.mkdir()
    brain = template()[0]
    scale = [n / m for n, m in zip(brain.shape, row.shape, strict=True)]
    voxels = affine_transform(brain, np.diag(scale), output_shape=row.shape, order=1, output=np.float32)
    noise = np.random.default_rng(0).standard_normal(row.shape, dtype=np.float32)
    voxels = np.round(1000 * voxels / voxels.max() + 20 + 4 * noise).clip(1).astype(np.int16)  # no voxel is 0
    nib.save(nib.Nifti1Image(voxels, np.diag([*_SPACING_MM, 1.0])), image)
    torch.manual_seed(0)
    network = ResEncUNet(1, row.classes + 1, initialization="he", **row.network).eval()
    prepared = volume_preprocessing(**_DATA)({"image": str(image)})["image"].as_tensor()
    middle = [slice((n - _TILE) // 2, (n + _TILE) // 2) for n in prepared.shape[1:]]
    _fit(network, prepared[(None, slice(None), *middle)])
    model = folder / "model.pt"
    write_checkpoint(network.state_dict(), model)
    labels = ["background", *(f"class {index}" for index in range(1, row.classes + 1))]
    settings = {"labels": labels, "channels": 1, "patch_size": [_TILE] * 3, "mirror_axes": []}
    settings |= {**_DATA, **row.network, "bundle": Path(_BUNDLE).name}
    write_record({"sha256": sha256(model), "settings": settings}, model.with_suffix(".json"))
    export_model_folder(model, output=folder / "nnunet")


def _fit(network: ResEncUNet, tile: Tensor) -> None:
    """Fit the last layer so that it tells levels of intensity in a tile ``(1, 1, D, H, W)``, by least squares."""
    head: Any = network.head
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tile)
    hook.remove()
    classes = head.out_channels
    levels = torch.quantile(tile.flatten()[::7], torch.linspace(0, 1, classes + 1)[1:-1])
    wanted = nn.functional.one_hot(torch.bucketize(tile[0, 0].contiguous(), levels), classes).double()
    wanted = (wanted / wanted.mean((0, 1, 2)) - 1).flatten(0, 2)  # (voxels, classes): rare ones count as much
    features = seen[0][0].double().flatten(1).T  # (voxels, C)
    mean = features.mean(0)
    solved = torch.linalg.lstsq(features - mean, wanted).solution  # (C, classes)
    head.weight.data = solved.T.float()[..., None, None, None]
    head.bias.data = -(mean @ solved).float()


def _ours(folder: Path, python: Path, amp: bool) -> dict[str, float]:
    command = ["-m", "monai.bundle", "run", "--config_file", f"{_BUNDLE}/configs/inference.yaml"]
    command += ["--bundle_root", _BUNDLE, "--dataset_dir", str(folder / "images"), "--model", str(folder / "model.pt")]
    command += ["--output_dir", str(folder / "ours"), "--overwrite", "true", "--device", "cpu", "--num_workers", "0"]
    return _measured(python, [*command, "--pictures", "0", "--amp", str(amp).lower()], folder)


def _theirs(folder: Path, python: Path) -> dict[str, float]:
    return _measured(python, [str(PEER), *(str(folder / name) for name in ("nnunet", "images", "theirs"))], folder)


def _measured(python: Path, command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a program on one thread and return what it took.

    Raises:
        SystemExit: if it fails.
    """
    report = folder / "report.json"
    program = [str(python), "-W", "ignore", str(Path(__file__).with_name("measured.py")), str(report), *command]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=on_one_thread())
    if done.returncode:
        raise SystemExit(f"Stopped: a prediction failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(report.read_text())
    return figures


def inference_table(
    found: Sequence[dict[str, Any]], table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
) -> list[str]:
    """Return the text of a table: ours, and with peers theirs and the ratios."""
    peers = any("theirs" in one for one in found)
    head = ["network, file", "classes", "ours, s (imports)", "ours, GB"]
    head += ["nnU-Net, s (imports)", "nnU-Net, GB", "time", "memory", "same labels"] if peers else []
    rows = []
    for one in found:
        row, ours = one["row"], one["ours"]
        size = "narrow" if row.network == NARROW else "ResEnc-L"
        precision = ", ours in bfloat16" if row.amp else ""
        line = [f"{size}, {' x '.join(map(str, row.shape))}{precision}", str(row.classes)]
        for side in [ours, one["theirs"]] if peers else [ours]:
            line += [f"{side['seconds']:.1f} ({side['imports']:.1f})", f"{side['peak'] / 1e9:.2f}"]
        if peers:
            line += [f"**{ours[key] / one['theirs'][key]:.2f}**" for key in ("seconds", "peak")]
            line += [f"{one['same']:.2%}"]
        rows.append(line)
    told = f"nnunetv2 {found[0]['nnunet']}. " if peers else ""
    return [f"{told}Processor seconds of one thread, peak memory of the process.\n", table(head, rows)]
