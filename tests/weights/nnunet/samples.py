# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Weights and images that this project and nnU-Net are both given.

Weights are drawn by their names; the last layer is fitted to levels of intensity, so that classes are told apart as by
a trained network. The image is the MNI152 template, an average of real brains, which nilearn ships, at 2 mm.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import nilearn
import numpy as np
import torch
from torch import Tensor, nn

from common.files import sha256, write_json, write_record
from common.networks import Primus, ResEncUNet
from common.transforms import volume_preprocessing
from common.weights import export_checkpoint, export_model_folder, write_checkpoint
from tools.checkpoints.cells import bundle_cell
from tools.checkpoints.importing import import_checkpoint as import_tool
from tools.checkpoints.settings import ImportCheckpoint
from tools.commanding.settings import filled

from ...conftest import ROOT
from ...parity.golden import draw
from ...starts import python

__all__ = [
    "ENCODERS",
    "SEGMENTATIONS",
    "Segmentation",
    "encoder_features",
    "labels_of",
    "model_of",
    "predict",
    "write_samples",
]

_SALT = "nnunet"
_NARROW = {"features_per_stage": [8, 16, 16], "blocks_per_stage": [1, 2, 1]}
# settings of the pretrain config of each backbone
ENCODERS: dict[str, dict[str, Any]] = {
    "mae_resenc_l": {**_NARROW, "patch_size": [32, 32, 32], "block_size": 8},
    "mae_primus_m": {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": [24, 32, 16]},
}


@dataclass(frozen=True)
class Segmentation:
    """A model, the image it is given, and how.

    Attributes:
        bundle: of the model.
        image: ``even`` (2 mm, axes turned over) or ``thick`` (slices of 8 mm).
        network: what ``model.json`` says of the network.
        data: what it says of preprocessing.
        patch_size: of a tile.
        mirror_axes: averaged over.
        order: of nnU-Net's axes, for a model that comes from there.
    """

    bundle: str
    image: str
    network: dict[str, Any]
    data: dict[str, Any]
    patch_size: list[int]
    mirror_axes: list[int] = field(default_factory=list)
    order: tuple[int, ...] | None = None


SEGMENTATIONS = {
    "resenc": Segmentation(
        "mae_resenc_l",
        "even",
        _NARROW,
        {"spacing_mm": 2.5, "normalization": ["zscore"], "reorient": True},
        [32, 32, 32],
        mirror_axes=[2],
    ),
    "thick_slices": Segmentation(
        "mae_resenc_l",
        "thick",
        _NARROW,
        {"spacing_mm": [6.0, 2.5, 2.5], "normalization": ["zscore_nonzero"], "reorient": False},
        [12, 24, 24],
    ),
    "primus": Segmentation(
        "mae_primus_m",
        "even",
        {"embed_dim": 396, "depth": 12, "num_heads": 6, "token_size": 8},
        {"spacing_mm": 3.0, "normalization": ["zscore"], "reorient": True},
        [24, 24, 24],
    ),
    "from_nnunet": Segmentation(
        "mae_resenc_l",
        "even",
        _NARROW,
        {"spacing_mm": [3.0, 2.5, 4.0], "normalization": [{"ct": [50.0, 900.0, 400.0, 250.0]}], "reorient": False},
        [32, 32, 16],
        mirror_axes=[0],
        order=(1, 2, 0),
    ),
}


def write_images(folder: Path) -> None:
    """Write both images, each in a folder of its own, named as nnU-Net names the first channel of a case."""
    template = Path(nilearn.__file__).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    whole = nib.load(template)
    values = np.asarray(whole.dataobj)[::2, ::2, ::2]
    values = np.round(values / values.max() * 1000).astype(np.int16)
    affine = whole.affine @ np.diag([2, 2, 2, 1.0])
    image = nib.Nifti1Image(values, affine)
    thick = nib.Nifti1Image(values[:, :, ::4], affine @ np.diag([1, 1, 4, 1.0]))
    for name, turned in (("even", image.as_reoriented([[1, -1], [0, -1], [2, 1]])), ("thick", thick)):
        (folder / name).mkdir(parents=True)
        nib.save(turned, folder / name / "case_0000.nii.gz")


def _fill(network: nn.Module) -> None:
    """Draw every tensor by its name."""
    state = {}
    for name, value in network.state_dict().items():
        z = draw(_SALT, name, tuple(value.shape))
        if value.dim() >= 2 and not name.endswith("position_embedding"):
            state[name] = z / float(np.sqrt(np.prod(value.shape[1:])))
        else:
            state[name] = 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
    network.load_state_dict(state)


def _fit(network: nn.Module, image: Tensor) -> None:
    """Fit the last layer so that it tells three levels of intensity in an image ``(1, 1, D, H, W)``."""
    last: Any = network.head if isinstance(network, ResEncUNet) else network.decoder.upsamplings[-1]  # type: ignore
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(image)
    hook.remove()
    levels = torch.quantile(image, torch.tensor([0.4, 0.75]))
    wanted = nn.functional.one_hot(torch.bucketize(image[0, 0].contiguous(), levels), 3).double()  # (D, H, W, 3)
    wanted = wanted / wanted.mean((0, 1, 2)) - 1  # rare ones count as much
    features = seen[0][0].double().flatten(1).T  # (voxels, C)
    if isinstance(last, nn.Conv3d):
        mean = features.mean(0)
        solved = torch.linalg.lstsq(features - mean, wanted.flatten(0, 2)).solution  # (C, 3)
        last.weight.data = solved.T.float()[..., None, None, None]
        last.bias.data = -(mean @ solved).float()
        return
    weight = torch.empty(last.weight.shape, dtype=torch.float64)  # (C, 3, 2, 2, 2): each voxel of a block by itself
    for z, y, x in np.ndindex(2, 2, 2):
        block = wanted[z::2, y::2, x::2].flatten(0, 2)
        weight[:, :, z, y, x] = torch.linalg.lstsq(features, block).solution
    last.weight.data, last.bias.data = weight.float(), torch.zeros(3)


def write_model(sample: Segmentation, images: Path, path: Path) -> None:
    """Write a model and the JSON beside it as fine-tuning does."""
    if "embed_dim" in sample.network:
        sizes = {name: value for name, value in sample.network.items() if name != "token_size"}
        network: nn.Module = Primus(1, 3, input_size=sample.patch_size, **sizes)
    else:
        network = ResEncUNet(1, 3, **sample.network)
    network.eval()
    _fill(network)
    image = volume_preprocessing(**sample.data)({"image": str(images / sample.image / "case_0000.nii.gz")})
    middle = [
        slice((n - p) // 2, (n + p) // 2) for n, p in zip(image["image"].shape[1:], sample.patch_size, strict=True)
    ]
    _fit(network, image["image"].as_tensor()[(None, slice(None), *middle)])
    write_checkpoint(network.state_dict(), path)
    settings = {
        "labels": ["background", "grey", "white"],
        "channels": 1,
        **sample.data,
        **sample.network,
        "bundle": sample.bundle,
        "patch_size": sample.patch_size,
        "mirror_axes": sample.mirror_axes,
    }
    write_record({"sha256": sha256(path), "settings": settings}, path.with_suffix(".json"))


def _as_nnunet_trains(folder: Path, order: tuple[int, ...]) -> None:
    """Make an exported folder one that nnU-Net might have trained: axes exchanged, side heads learned, a log."""
    plans = json.loads((folder / "plans.json").read_text())
    back = [order.index(axis) for axis in range(3)]
    plans |= {"transpose_forward": list(order), "transpose_backward": back, "image_reader_writer": "SimpleITKIO"}
    configuration = plans["configurations"]["3d_fullres"]
    for name in ("spacing", "patch_size"):
        configuration[name] = [configuration[name][axis] for axis in order]
    write_json(plans, folder / "plans.json")
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)
    turned = [0, 1, *(2 + axis for axis in order)]
    content["network_weights"] = {
        name: (
            draw(_SALT, name, tuple(v.shape)) if "seg_layers.0" in name else v.permute(turned) if v.dim() == 5 else v
        )
        for name, v in content["network_weights"].items()
    }
    axes = content["inference_allowed_mirroring_axes"]
    content["inference_allowed_mirroring_axes"] = tuple(back[axis] for axis in axes)
    content["init_args"]["device"] = torch.device("cuda")
    content |= {"trainer_name": "nnUNetTrainer", "logging": {"ema_fg_dice": [np.float64(0.5)]}, "current_epoch": 1000}
    file.with_suffix(".json").unlink()
    torch.save(content, file)


def encoder_features(bundle: str, folder: Path | None = None) -> list[Tensor]:
    """Return the features of an encoder of a drawn image.

    Args:
        bundle: of :data:`ENCODERS`.
        folder: to export the encoder to, with the image.
    """
    cell, _ = bundle_cell(bundle, ENCODERS[bundle])
    network = cell.backbone.to_empty(device="cpu").eval()
    _fill(network)
    image = draw(_SALT, bundle, (1, 1, *ENCODERS[bundle]["patch_size"]))
    if folder is not None:
        write_checkpoint(network.state_dict(), folder / "encoder.pt")
        export_checkpoint(folder / "encoder.pt", cell, output=folder / "checkpoint_final.pth")
        np.save(folder / "image.npy", image.numpy())
    with torch.no_grad():
        found: list[Tensor] = network.encode(image)  # type: ignore[operator]
    return found


def write_samples(folder: Path) -> None:
    """Write images, models and, for nnU-Net, their exports: ``images/``, ``models/<name>/`` and ``nnunet/<name>/``."""
    write_images(folder / "images")
    for name, sample in SEGMENTATIONS.items():
        model = folder / "models" / name / "model.pt"
        write_model(sample, folder / "images", model)
        export_model_folder(model, output=folder / "nnunet" / name)
        if sample.order:
            _as_nnunet_trains(folder / "nnunet" / name, sample.order)


def model_of(name: str, folder: Path) -> Path:
    """Return the model of a sample; one that comes from nnU-Net is imported as its tool imports it."""
    sample = SEGMENTATIONS[name]
    if sample.order is None:
        return folder / "models" / name / "model.pt"
    output = folder / "imported" / name / "model.pt"
    with contextlib.redirect_stdout(io.StringIO()):
        import_tool(filled(ImportCheckpoint, sample.bundle, source=str(folder / "nnunet" / name), output=str(output)))
    return output


def predict(name: str, model: Path, folder: Path, output: Path) -> np.ndarray:
    """Return the label map that the bundle's inference config gives of a sample's image."""
    sample = SEGMENTATIONS[name]
    root = f"bundles/{sample.bundle}"
    command = ["-m", "monai.bundle", "run", "--config_file", f"{root}/configs/inference.yaml", "--bundle_root", root]
    command += ["--dataset_dir", str(folder / "images" / sample.image), "--model", str(model)]
    command += ["--output_dir", str(output), "--mirror_axes", json.dumps(sample.mirror_axes).replace(" ", "")]
    command += ["--pictures", "0", "--num_workers", "0"]
    done = subprocess.run([python(), "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return labels_of(output / "case.nii.gz")


def labels_of(path: Path) -> np.ndarray:
    """Read a label map."""
    return np.asarray(nib.load(path).dataobj).astype(np.uint8)
