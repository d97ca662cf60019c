# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make a bundle for your own classes and channels from a pre-trained encoder, ready for training and MONAI Label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..commanding.commands import path_of, truth
from ..commanding.environment import ROOT

__all__ = ["new_task"]


def new_task(
    bundle: str,
    output: str,
    labels: str | Sequence[str] | None = None,
    channels: int | str | Sequence[str] | None = None,
    spacing: Any = None,
    pretrained: str | None = None,
    model: str | None = None,
    from_scratch: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Make a bundle for a task.

    Args:
        bundle: whose method and backbone to use.
        output: folder to write.
        labels: class names in the order of the values in the label maps, with commas between.
        channels: how many images a case has, or their names with commas between; one unless given.
        spacing: of the voxels in mm, one number or three (slice, row, column), median (of the data set), pretrained, or
            null (each file's).
        pretrained: encoder to start from; the bundle's models/pretrained_encoder.pt unless given.
        model: fine-tuned model to carry, whose labels, channels, network and preprocessing the JSON beside it tells;
            with it the bundle's own encoder comes along only if it is there and fits.
        from_scratch: start from a random network.
        overwrite: replace a folder that is there.
        settings: other defaults of its configs (--epochs, ...). Spacing and normalization are those of segmentation
            (train, inference), patch_size also that of features; all others reach every config that has them.
    """
    from common.errors import end_in_a_sentence
    from common.settings import meant_values

    from .distribution import ENCODER, Derived, bundle_names, check_name, check_settings, write_bundle

    end_in_a_sentence()
    settings = meant_values(settings)
    if len(bundle_names(str(bundle))) > 1:
        raise SystemExit(f"Stopped: a task is made from one bundle, not from {bundle}")
    target = path_of("output", output).absolute()
    check_name(target.name)
    if settings.get("regions") or settings.get("regions_class_order"):
        raise SystemExit(
            "Stopped: regions overlap, which a bundle of this kind cannot name; give classes with --labels"
        )
    if spacing is not None:
        settings["spacing_mm"] = None if str(spacing).lower() in ("null", "none") else spacing
    check_settings(bundle, settings)
    trained = None if model is None else path_of("model", model)
    if trained is None:
        names, images = _labels(labels), _channels(1 if channels is None else channels)
    else:
        names, images = _of_model(trained, labels, channels)
    encoder = ROOT / "bundles" / bundle / "models" / "pretrained_encoder.pt"
    if pretrained is not None:
        encoder = path_of("pretrained", pretrained)
    from_scratch = truth(from_scratch)
    if not from_scratch and not encoder.is_file() and (trained is None or pretrained is not None):
        raise SystemExit(
            f"Stopped: there is no encoder {encoder}; pre-train, run python tools/import_checkpoint.py {bundle}, name "
            "one with --pretrained, or start from a random network with --from_scratch true"
        )
    write_bundle(
        bundle,
        target,
        settings=settings,
        encoder=encoder if encoder.is_file() and not from_scratch else None,
        optional=trained is not None and pretrained is None,
        model=trained,
        from_scratch=from_scratch,
        derived=Derived(target.name, names, images),
        overwrite=truth(overwrite),
    )
    classes = ", ".join(f"{value} {name}" for value, name in enumerate(names))
    carried = f"the encoder {encoder}" if (target / ENCODER).is_file() else "a random network"
    start = carried if trained is None else "a fine-tuned model"
    if trained is not None and (target / ENCODER).is_file():
        start += f" and {carried}"
    voxels = ""
    if isinstance(spacing, (list, tuple)):
        voxels = f"; voxels of {' x '.join(f'{side:g}' for side in spacing)} mm (slice, row, column)"
    print(f"written: {target}, with {start}; classes {classes}; images of a case: {', '.join(images)}{voxels}")
    if trained is not None and encoder.is_file() and not from_scratch and not (target / ENCODER).is_file():
        print(f"left out: the encoder {encoder}, which is of another network than the model")
    run = f"cd {target} && python -m monai.bundle run --config_file configs"
    if trained is not None:
        print(f"predict with it: {run}/inference.json --dataset_dir FOLDER")
    if trained is None or (target / ENCODER).is_file():
        print(f"train it: {run}/train.json --dataset_dir FOLDER")


def _parts(option: str, value: object) -> list[str]:
    """Return names given with commas between, or as the list that the command line makes of them.

    Raises:
        SystemExit: if they are something else, or configs would not read them as names.
    """
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or any(isinstance(part, (list, tuple, dict, set)) for part in parts):
        raise SystemExit(f'Stopped: {option} is {value!r}; give names with commas between: --{option} "one,two"')
    return _named(option, [str(part).strip() for part in parts])


def _named(option: str, names: list[str]) -> list[str]:
    """Return names that a bundle can have.

    Raises:
        SystemExit: if one would be a command.
    """
    for name in names:
        if name[:1] in ("$", "@", "%"):
            raise SystemExit(
                f"Stopped: {option} {name!r}: in a bundle MONAI takes what starts with $, @ or % for a command; "
                "choose another name"
            )
    return names


def _labels(value: object) -> list[str]:
    """Return class names, background first.

    Raises:
        SystemExit: if names are missing, empty or equal to each other for MONAI Label, which ignores case.
    """
    names = _parts("labels", value) if value is not None else []
    if not names or "" in names or names == ["background"]:
        raise SystemExit(
            f'Stopped: labels is {value!r}; name the classes in the order of their values: --labels "edema,core"'
        )
    if "background" in [name.lower() for name in names[1:]]:
        raise SystemExit(f"Stopped: labels {names}: background is the class 0; leave it out, or name it first")
    if names[0].lower() != "background":
        names.insert(0, "background")
    twice = sorted({name for name in names if [other.lower() for other in names].count(name.lower()) > 1})
    if twice:
        raise SystemExit(f"Stopped: labels {twice} are the same name to MONAI Label; give each class one of its own")
    return ["background", *names[1:]]


def _channels(value: object) -> list[str]:
    """Return the names of the images of a case.

    Raises:
        SystemExit: if there is none, or names are equal.
    """
    if str(value).isdigit():
        count = int(str(value))
        names = ["image"] if count == 1 else [f"image {index}" for index in range(count)]
    elif re.fullmatch(r"[-+]?[\d.]+", str(value)) or isinstance(value, bool):  # below 1, or a part of an image
        names = []
    else:
        names = _parts("channels", value)
    if not names or "" in names or len(set(names)) < len(names):
        raise SystemExit(f"Stopped: channels is {value!r}; give their number, or different names with commas between")
    return names


def _of_model(model: Path, labels: object, channels: object) -> tuple[list[str], list[str]]:
    """Return the class names of a fine-tuned model and names of its images.

    Raises:
        SystemExit: if the JSON beside it is missing, its classes overlap, which one label map cannot hold, or the
            command line says otherwise.
    """
    from common.weights import trained_settings

    sidecar = model.with_suffix(".json")
    if not model.is_file() or not sidecar.is_file():
        raise SystemExit(f"Stopped: {model} or {sidecar} is missing; training writes both, and both are needed")
    told = trained_settings(str(model))
    if told.get("regions"):
        raise SystemExit(f"Stopped: {model} has overlapping classes (regions), which a bundle of this kind cannot name")
    if isinstance(told.get("labels"), dict):
        raise SystemExit(
            f"Stopped: the classes of {model} are not numbered 0, 1, 2, ..., which a bundle of this kind needs; "
            "predict with the bundle that it was trained with"
        )
    names = _named("labels", list(map(str, told["labels"]))) if "labels" in told else _labels(labels)
    if labels is not None and _labels(labels)[1:] != names[1:]:
        raise SystemExit(
            f"Stopped: {model} was trained for the classes {', '.join(names[1:])}, and --labels names "
            f"{', '.join(_labels(labels)[1:])}; leave --labels out"
        )
    images = _channels(told.get("channels", 1) if channels is None else channels)
    if len(images) != told.get("channels", len(images)):
        raise SystemExit(
            f"Stopped: {model} was trained for {told['channels']} channel(s), and --channels names {len(images)}; give "
            "each a name, or leave --channels out"
        )
    return names, images
