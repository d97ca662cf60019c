# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make a bundle for your own classes and channels from a pre-trained encoder, ready for training and MONAI Label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.bundles import read_config
from common.engines.budget.starting import memory_problem
from common.errors import SettingsError, WeightsError
from common.settings import meant_values
from common.terminal import near
from common.weights import trained_settings

from ..commanding.ending import end, exported_command, tool
from ..commanding.environment import ROOT
from ..commanding.weights import encoder_at_hand
from .configs import Derived, check_settings
from .distribution import Carried, write_bundle
from .settings import NewTask, config_names
from .weights import ENCODER

__all__ = ["new_task"]


def new_task(settings: NewTask) -> None:
    """Make a bundle for a task."""
    bundle, target, trained = settings.bundle, settings.output, settings.model
    others = meant_values(settings.settings)
    if settings.spacing is not None:
        others["spacing_mm"] = None if settings.spacing == "null" else settings.spacing
    check_settings(bundle, others)
    if trained is None:
        names, images = list(settings.labels or ()), list(settings.channels or ("image",))
    else:
        names, images = _of_model(trained, settings)
    if settings.gpu_gib is not None:
        others |= _fitting(settings, others, names, images)
    encoder = settings.pretrained or encoder_at_hand(bundle)
    from_scratch = settings.from_scratch
    if not from_scratch and not encoder.is_file() and (trained is None or settings.pretrained is not None):
        raise WeightsError(
            f"there is no encoder {encoder}; pre-train, run {tool('import_checkpoint')} {bundle}, name "
            "one with --pretrained, or start from a random network with --from_scratch true"
        )
    write_bundle(
        bundle,
        target,
        settings=others,
        carried=Carried(
            encoder=encoder if encoder.is_file() and not from_scratch else None,
            optional=trained is not None and settings.pretrained is None,
            model=trained,
            from_scratch=from_scratch,
        ),
        derived=Derived(target.name, names, images),
        overwrite=settings.overwrite,
    )
    _tell(settings, names, images, encoder)


def _fitting(settings: NewTask, others: dict[str, Any], names: list[str], images: list[str]) -> dict[str, Any]:
    """Return the settings with which the training fits the GPU, and say so."""
    assert settings.gpu_gib is not None
    bundle = ROOT / "bundles" / settings.bundle
    content = {**read_config(bundle / "configs" / "train.yaml"), **others, "bundle_root": str(bundle)}
    content |= {"labels": names, "channels": len(images), "amp": True, "amp_dtype": "bfloat16"}
    problem = memory_problem(content, settings.gpu_gib)
    if problem is None:
        print(f"training fits a GPU of {settings.gpu_gib:g} GiB, by the estimate of tools/budget.py")
        return {}
    print(problem["text"].replace("; add ", "; its defaults become "))
    return dict(problem["changes"])


def _tell(settings: NewTask, names: list[str], images: list[str], encoder: Path) -> None:
    """Print what was written, and what to do with it."""
    target, trained, spacing = settings.output, settings.model, settings.spacing
    classes = ", ".join(f"{value} {name}" for value, name in enumerate(names))
    carried = f"the encoder {near(encoder)}" if (target / ENCODER).is_file() else "a random network"
    start = carried if trained is None else "a fine-tuned model"
    if trained is not None and (target / ENCODER).is_file():
        start += f" and {carried}"
    voxels = ""
    if isinstance(spacing, (list, tuple)):
        voxels = f"; voxels of {' x '.join(f'{side:g}' for side in spacing)} mm (slice, row, column)"
    print(f"{target.name}: {start}; classes {classes}; images of a case: {', '.join(images)}{voxels}")
    if trained is not None and encoder.is_file() and not settings.from_scratch and not (target / ENCODER).is_file():
        print(f"left out: the encoder {encoder}, which is of another network than the model")
    if trained is not None and (target / ENCODER).is_file():
        print(f"it can be trained further: {exported_command(target, trained=False)}")
    following = exported_command(target, trained=trained is not None)
    end(target, look=target / "docs" / "README.md", following=following)


def _of_model(model: Path, settings: NewTask) -> tuple[list[str], list[str]]:
    """Return the class names of a fine-tuned model and names of its images.

    Raises:
        SystemExit: if the JSON beside it is missing, its classes overlap, which one label map cannot hold, or the
            command line says otherwise.
    """
    sidecar = model.with_suffix(".json")
    if not model.is_file() or not sidecar.is_file():
        raise WeightsError(f"{model} or {sidecar} is missing; training writes both, and both are needed")
    told: dict[str, Any] = trained_settings(str(model))
    if told.get("regions"):
        raise SettingsError(f"{model} has overlapping classes (regions), which a bundle of this kind cannot name")
    if isinstance(told.get("labels"), dict):
        raise SettingsError(
            f"the classes of {model} are not numbered 0, 1, 2, ..., which a bundle of this kind needs; predict with "
            "the bundle that it was trained with"
        )
    labels = list(settings.labels or ())
    names = config_names("labels", list(map(str, told["labels"]))) if "labels" in told else labels
    if labels and labels[1:] != names[1:]:
        raise SettingsError(
            f"{model} was trained for the classes {', '.join(names[1:])}, and --labels names {', '.join(labels[1:])}; "
            "leave --labels out"
        )
    count = int(told.get("channels", len(settings.channels or ("image",))))
    images = list(settings.channels or (["image"] if count == 1 else [f"image {index}" for index in range(count)]))
    if len(images) != count:
        raise SettingsError(
            f"{model} was trained for {count} channel(s), and --channels names {len(images)}; give each a name, or "
            "leave --channels out"
        )
    return names, images
