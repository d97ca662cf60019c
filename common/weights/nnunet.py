# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Trained segmentations as folders of nnU-Net 2, out and in.

``plans.json``                  preprocessing, patch and network of a configuration; here always ``3d_fullres``
``dataset.json``                classes or regions, channels, and how files end
``fold_0/checkpoint_final.pth`` weights, the name of the trainer that builds the network, and the axes to mirror

Axes are (slice, row, column) in both programs. Canonical axes are those of nnU-Net's reader ``NibabelIOWithReorient``,
each file's own those of ``NibabelIO``. Residual U-Nets are built by nnU-Net from the plans, of any size. Primus is
built by trainers of four sizes (S, B, M, L), whatever the plans say, so only these go out.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError, WeightsError
from ..files import sha256, write_json, write_record
from ..networks import ResEncUNet
from ..networks.untrained import UNTRAINED
from ..paths import as_path
from ..tasks import SegmentationTask
from .export import IMPORTED, resenc_arguments
from .files import check_values, read_checkpoint, write_checkpoint
from .published import PRIMUS_HEADS, export_network_weights, import_network_weights
from .transfer import keep_previous, trained_settings

__all__ = [
    "ModelFolder",
    "PlannedConfiguration",
    "export_model_folder",
    "import_model",
    "is_model_folder",
    "read_configuration",
    "read_model_folder",
]

_CHECKPOINT = "checkpoint_final.pth"
_CONFIGURATION = "3d_fullres"
_RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
_PRIMUS = {(396, 12): "S", (792, 12): "B", (864, 16): "M", (1056, 24): "L"}  # by width and depth
_READERS = {
    "NibabelIOWithReorient": True,
    "SimpleITKIOWithReorient": True,
    "NibabelIO": False,
    "SimpleITKIO": False,
}  # and whether they turn images to canonical axes
_SCHEMES = {
    ("ZScoreNormalization", False): "zscore",
    ("ZScoreNormalization", True): "zscore_nonzero",
    ("NoNormalization", False): "none",
}  # and whether they look at what is not 0 only
_CT = ("percentile_00_5", "percentile_99_5", "mean", "std")
_RESAMPLING: dict[str, dict[str, Any]] = {
    "data": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "seg": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
    "probabilities": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
}
_RESAMPLE = "resample_data_or_seg_to_shape"


def export_model_folder(model: str | Path, *, output: str | Path, bundle: str = "") -> list[str]:
    """Write a fine-tuned model as a folder that nnU-Net predicts with.

    Args:
        model: flat state dict, ``model.json`` beside it.
        output: folder to write.
        bundle: that the model must be of, if given.

    Returns:
        what to know of it.

    Raises:
        WeightsError: if the model is missing, was not trained, or nothing beside it says what it was trained for.
        SettingsError: if nnU-Net has no way to do what the model does.
    """
    model, output = as_path(model), as_path(output)
    weights = read_checkpoint(model)
    settings = trained_settings(str(model))
    if not settings:
        raise WeightsError(f"nothing beside {model} says what it was trained for; restore {model.stem}.json")
    if bundle and settings.get("bundle", bundle) != bundle:
        raise WeightsError(f"{model} is of {settings['bundle']}, not of {bundle}; name that bundle")
    if UNTRAINED in weights:
        raise WeightsError(f"{model} has not been trained to segment; fine-tune first")
    check_values(weights, model)
    task = SegmentationTask(
        settings["labels"], settings.get("regions"), settings.get("ignore_label"), settings.get("regions_class_order")
    )
    dataset, notes = _dataset(task, int(settings["channels"]))
    trainer, architecture = _builder(settings)
    plans = _plans(settings, architecture)
    network = export_network_weights(weights)
    if architecture is not None:
        _add_side_heads(network, architecture["features_per_stage"])
    axes = settings.get("mirror_axes")
    content = {
        "network_weights": network,
        "trainer_name": trainer,
        "init_args": {"plans": plans, "configuration": _CONFIGURATION, "fold": 0, "dataset_json": dataset},
        "inference_allowed_mirroring_axes": tuple(axes) if axes else None,
    }
    checkpoint = output / "fold_0" / _CHECKPOINT
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    keep_previous(str(checkpoint))
    write_checkpoint(content, checkpoint)
    write_json(plans, output / "plans.json")
    write_json(dataset, output / "dataset.json")
    made = {"made_by": "export for nnU-Net", "source": str(model), "source_sha256": sha256(model)}
    write_record(made | {"sha256": sha256(checkpoint)}, checkpoint.with_suffix(".json"))
    if axes:
        notes.append(f'it mirrors along {list(axes)} unless told --disable_tta; here that is --mirror_axes "{axes}"')
    return notes


def _dataset(task: SegmentationTask, channels: int) -> tuple[dict[str, Any], list[str]]:
    """Return a ``dataset.json`` that means the task, and what to know of it."""
    notes: list[str] = []
    names = [f"{name}_class" if name in ("background", "ignore") else name for name in task.names]
    labels: dict[str, Any] = {"background": 0}
    described: dict[str, Any] = {"channel_names": {str(index): f"channel {index}" for index in range(channels)}}
    if task.regions is None:
        labels |= {name: index for index, name in enumerate(names, 1)}
        if not task.counted:
            told = ", ".join(f"{name} {index}" for index, name in enumerate(names[:5], 1))
            notes.append(f"nnU-Net numbers classes without gaps, so its label maps hold other values: {told} ...")
    else:
        if max(map(len, task.values)) < 2:
            raise SettingsError(
                "nnU-Net takes regions of one label value each for classes that exclude each other, which these do "
                "not; such a model cannot be handed to it"
            )
        labels |= {name: list(values) for name, values in zip(names, task.values, strict=True)}
        described["regions_class_order"] = task.painted
    if task.ignore_label == max(value for values in task.values for value in values) + 1:  # else it is refused
        labels["ignore"] = task.ignore_label
    return described | {"labels": labels, "file_ending": ".nii.gz"}, notes


def _builder(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Return nnU-Net's trainer that builds a network, and the arguments that it takes from the plans, if it does.

    Raises:
        SettingsError: if it has none.
    """
    if "embed_dim" not in settings:
        arguments = resenc_arguments(settings["features_per_stage"], settings["blocks_per_stage"])
        return "nnUNetTrainerNoDeepSupervision", arguments
    width, depth = settings["embed_dim"], settings["depth"]
    size = _PRIMUS.get((width, depth))
    token, heads = settings.get("token_size", 8), settings.get("num_heads")
    if size is None or token not in (8, [8, 8, 8]) or heads != PRIMUS_HEADS[width]:
        raise SettingsError(
            f"nnU-Net builds Primus S, B, M and L only, with tokens of 8 voxels; this one has {width} channels, "
            f"{depth} blocks, {heads} heads and tokens of {token}, so it cannot be handed to it"
        )
    return f"nnUNet_Primus_{size}_Trainer", None


def _plans(settings: Mapping[str, Any], architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the plans by which nnU-Net preprocesses as here."""
    channels = int(settings["channels"])
    spacing = settings["spacing_mm"]
    if spacing is None:
        raise SettingsError(
            "the model was trained at each file's own spacing (--spacing_mm null), and nnU-Net resamples every image "
            "to one; such a model cannot be handed to it"
        )
    spacing = [float(side) for side in ([spacing] * 3 if isinstance(spacing, (int, float)) else spacing)]
    schemes = settings["normalization"]
    schemes = [schemes] if isinstance(schemes, (str, Mapping)) else list(schemes)
    schemes = schemes * (channels if len(schemes) == 1 else 1)
    names = {ours: theirs for theirs, ours in _SCHEMES.items()}
    pairs = [("CTNormalization", False) if isinstance(scheme, Mapping) else names[scheme] for scheme in schemes]
    figures = [dict(zip(_CT, one["ct"], strict=True)) if isinstance(one, Mapping) else {} for one in schemes]
    patch = settings["patch_size"]
    configuration: dict[str, Any] = {
        "data_identifier": f"openmind_{_CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [patch] * 3 if isinstance(patch, int) else list(patch),
        "median_image_size_in_voxels": [0.0, 0.0, 0.0],
        "spacing": spacing,
        "normalization_schemes": [name for name, _ in pairs],
        "use_mask_for_norm": [inside for _, inside in pairs],
        "batch_dice": False,
        "architecture": {
            "network_class_name": _RESENC if architecture else "as the trainer says",
            "arch_kwargs": dict(architecture or {}),
            "_kw_requires_import": list(IMPORTED) if architecture else [],
        },
    }
    for what, arguments in _RESAMPLING.items():
        configuration |= {f"resampling_fn_{what}": _RESAMPLE, f"resampling_fn_{what}_kwargs": dict(arguments)}
    return {
        "dataset_name": f"Dataset000_{settings.get('bundle', 'openmind')}",
        "plans_name": "openmindPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": [0, 0, 0],
        "image_reader_writer": "NibabelIOWithReorient" if settings.get("reorient", True) else "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "openmind",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(number): one for number, one in enumerate(figures)},
        "configurations": {_CONFIGURATION: configuration},
    }


def _add_side_heads(network: dict[str, Tensor], features: Sequence[int]) -> None:
    """Add the heads of coarser levels, zeros, which nnU-Net loads and, in prediction, never asks."""
    last = len(features) - 2
    head = network[f"decoder.seg_layers.{last}.weight"]
    for level, width in enumerate(list(features)[-2:0:-1]):
        network[f"decoder.seg_layers.{level}.weight"] = torch.zeros(len(head), width, 1, 1, 1)
        network[f"decoder.seg_layers.{level}.bias"] = torch.zeros(len(head))


@dataclass(kw_only=True)
class PlannedConfiguration:
    """What a configuration of nnU-Net's plans says.

    Attributes:
        data: spacing, normalisation, channels and axes, as ``model.json`` has them.
        network: features and blocks of each stage.
        patch_size: of a tile, in voxels.
        order: of nnU-Net's axes among those of the image, where it exchanges them.
        notes: what is not followed.
    """

    data: dict[str, Any]
    network: dict[str, Any]
    patch_size: list[int]
    order: list[int]
    notes: list[str]


@dataclass(kw_only=True)
class ModelFolder(PlannedConfiguration):
    """What a folder of nnU-Net says of its models.

    Attributes:
        folder: with ``plans.json`` and ``dataset.json``.
        checkpoints: of its folds, or of the one that was asked for.
        mirror_axes: along which training mirrored.
        about: names of the data set, the plans and the trainer.
    """

    folder: Path
    checkpoints: list[Path]
    mirror_axes: list[int]
    about: dict[str, Any]


def is_model_folder(source: str | Path) -> bool:
    """Return whether a path is a folder of models of nnU-Net, or one of its folds."""
    path = as_path(source)
    return path.is_dir() and any(
        (folder / "plans.json").is_file() and (folder / "dataset.json").is_file() for folder in (path, path.parent)
    )


def read_model_folder(source: str | Path) -> ModelFolder:
    """Read what nnU-Net wrote beside its models, and refuse what this collection's networks or chain cannot do.

    Args:
        source: folder with ``plans.json``, whose folds are all taken (but not ``fold_all`` if there are others), or
            one of its folds.

    Raises:
        WeightsError: naming what cannot be done, or is missing.
    """
    path = as_path(source)
    whole = (path / "plans.json").is_file()
    folder = path if whole else path.parent
    found = sorted(folder.glob(f"fold_*/{_CHECKPOINT}")) if whole else [path / _CHECKPOINT]
    folds = [file for file in found if file.parent.name != "fold_all"] or found
    if not folds or not folds[0].is_file():
        raise WeightsError(f"{path} has no {_CHECKPOINT}; nnU-Net writes it at the end of a training")
    content = read_checkpoint(folds[0], mmap=True)
    told = content.get("init_args")
    name = told.get("configuration") if isinstance(told, dict) else None
    plans = _read(folder / "plans.json")
    planned = read_configuration(plans, _read(folder / "dataset.json"), str(name), folder)
    axes = content.get("inference_allowed_mirroring_axes") or ()
    about = {"data_set": plans.get("dataset_name"), "plans": plans.get("plans_name"), "configuration": name}
    return ModelFolder(
        folder=folder,
        checkpoints=folds,
        mirror_axes=sorted(planned.order[axis] for axis in axes),
        about=about | {"trainer": content.get("trainer_name")},
        **vars(planned),
    )


def read_configuration(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], name: str, folder: Path
) -> PlannedConfiguration:
    """Read what plans of nnU-Net say of a configuration, and refuse what this collection cannot do.

    Args:
        plans: content of ``plans.json``.
        dataset: content of ``dataset.json``.
        name: of the configuration.
        folder: of both, for messages.

    Raises:
        WeightsError: naming what cannot be done, or is missing.
    """
    configuration = _configuration(plans, name, folder)
    network = _network(configuration, folder)
    order = [int(axis) for axis in plans.get("transpose_forward", [0, 1, 2])]
    back = [order.index(axis) for axis in range(3)]
    reader = plans.get("image_reader_writer")
    if reader not in _READERS:
        raise WeightsError(f"{folder} reads images with {reader}, which is for other files than this collection reads")
    spacing, patch = configuration["spacing"], configuration["patch_size"]
    return PlannedConfiguration(
        data={
            "spacing_mm": [float(spacing[axis]) for axis in back],
            "normalization": _normalization(plans, configuration, folder),
            "channels": len(dataset.get("channel_names") or dataset.get("modality") or {}),
            "reorient": _READERS[reader],
        },
        network=network,
        patch_size=[int(patch[axis]) for axis in back],
        order=order,
        notes=_other_resampling(configuration),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read ({error}); restore it") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is not what nnU-Net writes; restore it")
    return content


def _configuration(plans: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return a configuration of the plans with what it inherits.

    Raises:
        WeightsError: if the plans have none, or it is of slices or of a cascade.
    """
    known = plans.get("configurations", {})
    chain: list[dict[str, Any]] = []
    wanted: Any = name
    while wanted is not None:
        if wanted not in known or len(chain) > len(known):
            raise WeightsError(f"the plans of {folder} have no configuration {wanted}; they are of another training")
        chain.insert(0, known[wanted])
        wanted = known[wanted].get("inherits_from")
    found = {key: value for part in chain for key, value in part.items()}
    if found.get("previous_stage") is not None:
        raise WeightsError(f"{name} of {folder} is the second stage of a cascade, which this collection has not")
    missing = {"architecture", "spacing", "patch_size", "normalization_schemes"} - found.keys()
    if missing or len(found["patch_size"]) != 3 or len(found["spacing"]) != 3:
        why = f"without {', '.join(sorted(missing))}" if missing else "of slices"
        raise WeightsError(f"{name} of {folder} is {why}; this collection takes 3-D models of nnU-Net 2.4 and newer")
    return found


def _network(configuration: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return features and blocks of each stage.

    Raises:
        WeightsError: if it is another network than a residual U-Net of this collection.
    """
    architecture = configuration["architecture"]
    kind = str(architecture.get("network_class_name")).rsplit(".", 1)[-1]
    given = dict(architecture.get("arch_kwargs") or {})
    if kind != "ResidualEncoderUNet" or not isinstance(given.get("features_per_stage"), list):
        raise WeightsError(
            f"{folder} is of a {kind}; of nnU-Net's networks this collection has the residual encoder U-Net "
            "(nnU-Net's plans ResEncM, ResEncL, ResEncXL)"
        )
    wanted = resenc_arguments(given["features_per_stage"], given.get("n_blocks_per_stage", []))
    others = [
        f"{name} is {given.get(name)}, here {wanted.get(name)}"
        for name in {**wanted, **given}
        if _bare(given.get(name)) != _bare(wanted.get(name))
    ]
    if others:
        raise WeightsError(
            f"{folder} is of another residual U-Net than this collection's ({'; '.join(others[:3])}); plan it at an "
            "isotropic spacing, where nnU-Net halves all axes alike"
        )
    return {"features_per_stage": wanted["features_per_stage"], "blocks_per_stage": wanted["n_blocks_per_stage"]}


def _bare(value: Any) -> Any:
    """Return an argument in a form in which equal meanings are equal: classes without their modules."""
    value = json.loads(json.dumps(value))
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else value


def _normalization(plans: Mapping[str, Any], configuration: Mapping[str, Any], folder: Path) -> list[Any]:
    schemes: list[Any] = []
    figures = plans.get("foreground_intensity_properties_per_channel", {})
    names, inside = configuration["normalization_schemes"], configuration.get("use_mask_for_norm", [])
    for number, name in enumerate(names):
        if name == "CTNormalization":
            schemes.append({"ct": [float(figures[str(number)][one]) for one in _CT]})
            continue
        masked = bool(inside[number]) if name == "ZScoreNormalization" and number < len(inside) else False
        if (name, masked) not in _SCHEMES:
            raise WeightsError(f"{folder} normalises a channel by {name}, which this collection has not")
        schemes.append(_SCHEMES[name, masked])
    return schemes


def _other_resampling(configuration: Mapping[str, Any]) -> list[str]:
    notes = []
    for what in ("data", "probabilities"):
        name = configuration.get(f"resampling_fn_{what}", _RESAMPLE)
        given = configuration.get(f"resampling_fn_{what}_kwargs", _RESAMPLING[what])
        if name != _RESAMPLE or any(given.get(key) != value for key, value in _RESAMPLING[what].items()):
            notes.append(f"nnU-Net resamples {what} by {name} with {given}; here it is done as by its default")
    return notes


def import_model(
    found: ModelFolder,
    checkpoint: Path,
    *,
    settings: Mapping[str, Any],
    output: str | Path,
    licence: str = "that of its source",
) -> None:
    """Write the model of one fold as this collection's inference reads it.

    Args:
        found: what the folder says.
        checkpoint: of the fold.
        settings: for the JSON beside the model; ``labels`` and ``regions`` give the number of outputs.
        output: ``model.pt`` to write; an earlier one is kept.
        licence: of the model.

    Raises:
        WeightsError: if the checkpoint is damaged or of another network than the plans say.
    """
    content = read_checkpoint(checkpoint, mmap=True)
    weights = content.get("network_weights")
    if not isinstance(weights, dict):
        raise WeightsError(f"{checkpoint} holds no network_weights; it is no checkpoint of nnU-Net")
    model = import_network_weights(weights).backbone
    back = [found.order.index(axis) for axis in range(3)]
    if back != [0, 1, 2]:  # the same network for images whose axes are not exchanged
        turned = [0, 1, *(2 + axis for axis in back)]
        model = {name: v.permute(turned).contiguous() if v.dim() == 5 else v for name, v in model.items()}
    outputs = len(settings["regions"] or settings["labels"])
    with torch.device("meta"):
        state = ResEncUNet(int(settings["channels"]), outputs, **found.network).state_dict()
    wrong = [name for name in state if name not in model or model[name].shape != state[name].shape]
    wrong += [name for name in model if name not in state]
    if wrong:
        raise WeightsError(
            f"{checkpoint} is of another network than plans.json and dataset.json beside it say ({len(wrong)} tensors "
            f"differ, among them {', '.join(wrong[:3])}); restore what belongs together"
        )
    model = {name: model[name].to(torch.float32).clone() for name in state}
    check_values(model, checkpoint)
    output = as_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    keep_previous(str(output))
    write_checkpoint(model, output)
    about = {
        "made_by": "import of a model of nnU-Net",
        "source": str(checkpoint),
        "source_sha256": sha256(checkpoint),
        "nnunet": found.about,
        "licence": licence,
        "sha256": sha256(output),
        "settings": dict(settings),
        "versions": {name: importlib.metadata.version(name) for name in ("monai", "torch")},
    }
    write_record(about, output.with_suffix(".json"))
