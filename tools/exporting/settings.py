# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the commands that write bundles."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from common.errors import SettingsError

from ..commanding.ending import tool
from ..commanding.environment import ROOT
from ..commanding.settings import Bundle, From, Reads, RefusalError, Rests, read, settings

__all__ = ["ExportBundle", "NewTask", "config_names"]

_KNOWN = tuple(sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/metadata.json")))


def _bundles(value: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = read(tuple[str, ...], value)
    if names == ("all",):
        return _KNOWN
    for name in names:
        if name not in _KNOWN:
            raise RefusalError(f"there is no bundle {name!r}; choose all, or one of {', '.join(_KNOWN)}")
    return names


@settings
class ExportBundle:
    """What ``export_bundle`` is told."""

    bundles: Annotated[tuple[str, ...], Reads(_bundles, "bundles with commas between, or all")]
    """One, several with commas between, or all."""
    output: Path = Path("dist")
    """Folder to write into."""
    weights: Literal["auto", "true", "false"] = "auto"
    """true insists on a pre-trained encoder, false leaves weights out, auto takes them where there are any."""
    pretrained: Path | None = None
    """Encoder to carry instead of the bundle's own; of one bundle."""
    model: Path | None = None
    """Fine-tuned model to carry as models/model.pt, with its JSON beside it; of one bundle."""
    weights_url: str | None = None
    """Address under which the weights will be found: they are written into <bundle>_weights instead, and
    large_files.yml of the bundle says where to fetch them, with their digests; of one bundle."""
    source_url: str = ""
    """Address under which the zips will be found, for model_info.json."""
    push: str | None = None
    """Repository owner/name of the Hugging Face Hub to upload to; of one bundle. The token is that of 'hf auth login'
    or HF_TOKEN."""
    private: bool = True
    """Whether that repository is private."""
    overwrite: bool = False
    """Replace folders that are there, and that version in the repository."""
    settings: Rests = field(default_factory=dict)
    """Other defaults of its configs (--features_per_stage, --patch_size, ...): of each that has the setting, but that
    patch_size leaves pretrain of VoCo and SimCLR as it is, where it is the region that crops are cut from, and that
    what fine-tuning works out from data (--spacing_mm median, --normalization ct) is of train."""

    def __post_init__(self) -> None:
        for option in ("pretrained", "model", "push", "weights_url"):
            if len(self.bundles) > 1 and getattr(self, option) is not None:
                raise SettingsError(f"--{option} is for one bundle, and here are {len(self.bundles)}")
        if fixed := {"labels", "channels", "regions"} & self.settings.keys():
            raise SettingsError(f"{', '.join(sorted(fixed))} make another task; use {tool('new_task')}")


def _names(what: str, value: Any) -> list[str]:
    """Return names given with commas between, or as a list, which configs must read as names."""
    try:
        names = list(read(tuple[str, ...], value)) if not isinstance(value, (int, float)) else None
    except ValueError:
        names = [""] if isinstance(value, str) else None
    if names is None:
        raise RefusalError(f'{what} is {value!r}; give names with commas between: --{what} "one,two"')
    return config_names(what, names)


def config_names(what: str, names: list[str]) -> list[str]:
    """Return names that a bundle can have.

    Raises:
        SettingsError: if one would be a command.
    """
    for name in names:
        if name[:1] in ("$", "@", "%"):
            raise SettingsError(
                f"{what} {name!r}: in a bundle MONAI takes what starts with $, @ or % for a command; "
                "choose another name"
            )
    return names


def _classes(value: Any) -> tuple[str, ...]:
    """Return class names, background first; those that MONAI Label, which ignores case, could not tell are refused."""
    names = _names("labels", value)
    if not names or "" in names or names == ["background"]:
        raise RefusalError(f'labels is {value!r}; name the classes in the order of their values: --labels "edema,core"')
    if "background" in [name.lower() for name in names[1:]]:
        raise RefusalError(f"labels {names}: background is the class 0; leave it out, or name it first")
    if names[0].lower() != "background":
        names.insert(0, "background")
    twice = sorted({name for name in names if [other.lower() for other in names].count(name.lower()) > 1})
    if twice:
        raise RefusalError(f"labels {twice} are the same name to MONAI Label; give each class one of its own")
    return ("background", *names[1:])


def _images(value: Any) -> tuple[str, ...]:
    """Return the names of the images of a case; a number of them becomes names."""
    if str(value).isdigit():
        count = int(str(value))
        names = ["image"] if count == 1 else [f"image {index}" for index in range(count)]
    elif re.fullmatch(r"[-+]?[\d.]+", str(value)) or isinstance(value, bool):  # below 1, or a part of an image
        names = []
    else:
        names = _names("channels", value)
    if not names or "" in names or len(set(names)) < len(names):
        raise RefusalError(f"channels is {value!r}; give their number, or different names with commas between")
    return tuple(names)


def _folder(value: Any) -> Path:
    """Return the folder of a bundle, whose name MONAI and MONAI Label must take as it is."""
    folder: Path = read(Path, value).absolute()
    name = folder.name
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise RefusalError(f"{name!r} cannot be the name of a bundle; use letters, digits, _ and -, a letter first")
    if re.search(r"._v", name):
        raise RefusalError(
            f"MONAI takes what follows _v in a bundle's name for a version, and would call {name!r} "
            f"{re.split('_v', name)[0]!r}; choose a name without _v, such as {name.replace('_v', '-v')!r}"
        )
    if name.lower() in ("scripts", "common", "monai"):
        raise RefusalError(f"{name!r} is the name of a Python package that bundles use; choose another")
    return folder


Classes = Annotated[tuple[str, ...], Reads(_classes, "names with commas between")]
Images = Annotated[tuple[str, ...], Reads(_images, "a number, or names with commas between")]


@settings
class NewTask:
    """What ``new_task`` is told."""

    bundle: Bundle
    """Whose method and backbone to use."""
    output: Annotated[Path, Reads(_folder, "a path")]
    """Folder to write."""
    labels: Classes | None = None
    """Class names in the order of the values in the label maps."""
    channels: Images | None = None
    """How many images a case has, or their names; one unless given."""
    spacing: float | tuple[float, ...] | Literal["median", "pretrained", "null"] | None = None
    """Of the voxels in mm, one number or three (slice, row, column), median (of the data set), pretrained, or null
    (each file's)."""
    pretrained: Path | None = None
    """Encoder to start from; the bundle's models/pretrained_encoder.pt unless given."""
    model: Path | None = None
    """Fine-tuned model to carry, whose labels, channels, network and preprocessing the JSON beside it tells; with it
    the bundle's own encoder comes along only if it is there and fits."""
    from_scratch: bool = False
    """Start from a random network."""
    gpu_gib: Annotated[float, From(1)] | None = None
    """Memory of the GPU that it will be trained on: if the settings do not fit, those of accumulation, recomputation
    and perhaps patch_size that do become its defaults."""
    overwrite: bool = False
    """Replace a folder that is there."""
    settings: Rests = field(default_factory=dict)
    """Other defaults of its configs (--epochs, ...). Spacing and normalization are those of segmentation (train,
    inference), patch_size also that of features; all others reach every config that has them."""

    def __post_init__(self) -> None:
        if self.labels is None and self.model is None:
            raise SettingsError('name the classes in the order of their values: --labels "edema,core"')
        if self.settings.get("regions") or self.settings.get("regions_class_order"):
            raise SettingsError("regions overlap, which a bundle of this kind cannot name; give classes with --labels")
