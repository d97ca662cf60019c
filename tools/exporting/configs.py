# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The configs of a bundle as they are distributed: complete, with other defaults, and of a task of the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import __name__ as PACKAGE
from common.bundles import read_config, read_metadata
from common.data import check_spacing
from common.engines.presets import preset_settings
from common.errors import SettingsError
from common.literals import as_data, literal
from common.settings import unknown_settings
from common.weights import differences, trained_settings
from common.weights.made import NETWORK, PATCH, crop_of, made_with, same

from ..commanding.environment import ROOT

__all__ = [
    "BUNDLES",
    "OVERLAYS",
    "Derived",
    "check_settings",
    "complete_configs",
    "known_settings",
    "metadata_of",
    "of_encoder",
    "of_model",
    "with_settings",
]

BUNDLES = ROOT / "bundles"
# files of common/configs that are added to a config on the command line, and what they are called in a bundle
OVERLAYS = {
    "multi_gpu.yaml": "multi_gpu_pretrain.json",
    "multi_gpu_train.yaml": "multi_gpu_train.json",
    "fsdp.yaml": "fsdp_pretrain.json",
}
# the workflows that get these settings of a derived task: features are computed as the encoder was pre-trained, but
# with the input that its position table is fitted to
_OF_TASK = {
    "spacing_mm": ["train", "inference"],
    "normalization": ["train", "inference"],
    "patch_size": ["train", "inference", "features"],
}


@dataclass(frozen=True)
class Derived:
    """What a bundle made for a task of the user's has of its own.

    Attributes:
        name: of the new bundle.
        labels: class names, background first.
        channels: names of the images of a case.
    """

    name: str
    labels: Sequence[str]
    channels: Sequence[str] = field(default_factory=lambda: ["image"])

    def settings(self) -> dict[str, Any]:
        """Return what they are to the configs."""
        return {"labels": list(self.labels), "channels": len(self.channels)}


def _on_its_own(value: Any, bundle: str) -> Any:
    """Return a complete config that asks no other file what it is, and in which the shared package is ``scripts``."""
    if isinstance(value, dict):
        if value.get("_target_") == f"{PACKAGE}.bundles.bundle_name":
            return bundle
        if value.get("_target_") == f"{PACKAGE}.engines.check_settings" and "presets" in value:
            workflow, backbone = value["presets"]
            files = sorted((ROOT / "common" / "configs").glob(f"preset_*_{backbone}.yaml"))
            names = [file.stem.split("_")[1] for file in files]
            told = {name: preset_settings(workflow, backbone, name, bundle) for name in names}
            value = value | {"presets": json.dumps(told)}  # a text, in which nothing is an expression
        return {key: _on_its_own(one, bundle) for key, one in value.items()}
    if isinstance(value, list):
        completes = [isinstance(one, dict) and one.get("_target_") == f"{PACKAGE}.bundles.complete" for one in value]
        return [_on_its_own(one, bundle) for one, done in zip(value, completes, strict=True) if not done]
    return re.sub(rf"\b{re.escape(PACKAGE)}(?=\.[a-z])", "scripts", value) if isinstance(value, str) else value


def with_settings(
    config: dict[str, Any],
    name: str,
    settings: Mapping[str, Any],
    *,
    data: Mapping[str, Any] | None = None,
    task: bool = False,
) -> dict[str, Any]:
    """Return a config with other defaults; what it reads from a trained model's JSON keeps doing so.

    Args:
        config: of one workflow.
        name: of the workflow.
        settings: of which it takes those that it has and that mean the same there; a text may be an expression.
        data: further ones, below these, which are what they are, such as the names of classes.
        task: they are of a derived task, which only its segmentation follows.
    """
    changed = dict(config)
    for key, value in {**(data or {}), **settings}.items():
        if key not in config or (task and name not in _OF_TASK.get(key, (name,))):
            continue
        if name != "train" and _is_rule(key, value):
            continue
        if key == "patch_size" and "crop_size" in config:  # there it is the region that the crops are cut from
            continue
        from_model = re.match(r"\$@trained\.get\('(\w+)'", str(config[key]))
        if from_model:
            changed[key] = f"$@trained.get({from_model[1]!r}, {literal(value)})"
        else:
            changed[key] = value if key in settings else as_data(value)
    return changed


def _is_rule(key: str, value: Any) -> bool:
    """Return whether fine-tuning turns a setting into numbers, which inference reads beside the model."""
    if key == "spacing_mm":
        return isinstance(value, str)
    return key == "normalization" and (value == "ct" or (isinstance(value, list) and "ct" in value))


def of_model(bundle: str, model: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what inference has to know of a fine-tuned model, by the JSON beside it.

    It reads that JSON itself, but a TorchScript file with the config inside is used where there is none.

    Raises:
        SettingsError: if the model is of another bundle, or ``settings`` say otherwise.
    """
    inference = read_config(BUNDLES / bundle / "configs" / "inference.yaml")
    asked = {key for key, value in inference.items() if str(value).startswith(f"$@trained.get('{key}'")}
    told = trained_settings(str(model))
    if told.get("bundle", bundle) != bundle:
        raise SettingsError(f"{model} was trained with {told['bundle']}, not with {bundle}; name that bundle")
    fixed = {key: value for key, value in settings.items() if key in asked and not _is_rule(key, value)}
    for key, (theirs, ours) in differences({"settings": told}, fixed).items():
        raise SettingsError(
            f"{model} was trained with {key} {theirs}, and here it is {ours}; leave it out: the JSON beside "
            "the model says it"
        )
    return {key: value for key, value in told.items() if key in asked}


def of_encoder(bundle: str, encoder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training and inference have to know of a pre-trained encoder, by the JSON beside it.

    Raises:
        SettingsError: if ``settings`` name another network.
    """
    train, made = read_config(BUNDLES / bundle / "configs" / "train.yaml"), made_with(encoder)
    told = {name: made[name] for name in NETWORK & made.keys() & train.keys()}
    for name, theirs in told.items():
        if name in settings and not same(settings[name], theirs):
            raise SettingsError(
                f"{encoder} was made with {name} {theirs}, and here it is {settings[name]}; leave it out: the JSON "
                "beside the encoder says it"
            )
    if (crop := crop_of(made)) is not None:
        told[PATCH] = crop
    told |= {name: made[name] for name in ("spacing_mm", "reorient") if name in made}
    return {name: value for name, value in told.items() if name not in settings}


def complete_configs(
    bundle: str,
    settings: Mapping[str, Any],
    told: Mapping[str, Any] | None = None,
    derived: Derived | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the complete configs of a bundle by the names of their JSON files.

    Args:
        bundle: of the collection.
        settings: other defaults for all of them.
        told: what a fine-tuned model was made for: defaults of segmentation, the network's size of all, and the
            input that an encoder is fitted to, of features.
        derived: task that the bundle is made for, whose classes and channels all of them have.
    """
    configs, told = {}, told or {}
    of_task = {} if derived is None else derived.settings()
    network = read_config(BUNDLES / bundle / "configs" / "train.yaml")["network_settings"]
    sizes = {key: value for key, value in told.items() if key in network}
    for file in sorted((BUNDLES / bundle / "configs").glob("*.yaml")):
        config = _on_its_own(read_config(file), bundle)
        own = dict(told if file.stem in ("train", "inference", "evaluate") else sizes)
        if file.stem == "train" and isinstance(own.get("normalization"), list):
            # figures of the model's data; training finds its own
            own["normalization"] = ["ct" if isinstance(one, dict) else one for one in own["normalization"]]
        if file.stem == "features" and "patch_size" in told:
            own["patch_size"] = told["patch_size"]
        changed = _on_its_own(dict(settings), bundle)
        configs[f"{file.stem}.json"] = with_settings(
            config, file.stem, changed, data={**own, **of_task}, task=derived is not None
        )
    for source, name in OVERLAYS.items():
        if (overlay := ROOT / "common" / "configs" / source).is_file():
            configs[name] = _on_its_own(read_config(overlay), bundle)
    return configs


def known_settings(bundle: str) -> dict[str, Any]:
    """Return every top-level name of a bundle's configs with its default."""
    return {name: value for config in complete_configs(bundle, {}).values() for name, value in config.items()}


def check_settings(bundle: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the bundle does not have, or whose values can be nothing but mistakes.

    Raises:
        SettingsError: naming the setting.
        SettingsError: if the spacing is none to train at.
    """
    known = known_settings(bundle)
    if told := unknown_settings(settings, known):
        raise SettingsError(f"{told}")
    if "spacing_mm" in settings:
        check_spacing(settings["spacing_mm"])
    for name, value in settings.items():
        default = known.get(name)
        numbers = default if isinstance(default, list) and default else [default]
        number = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers)
        if name != "spacing_mm" and number and isinstance(value, str) and value[:1] not in ("$", "@"):
            raise SettingsError(f"{name} is {value!r}; it must be like {default}, the default")


def metadata_of(bundle: str, settings: Mapping[str, Any], derived: Derived | None, start: str) -> dict[str, Any]:
    """Return the metadata of a bundle with these settings, or of the task that it is made for."""
    metadata = read_metadata(BUNDLES / bundle)
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    if patch := settings.get("patch_size"):
        image["spatial_shape"] = pred["spatial_shape"] = [patch] * 3 if isinstance(patch, int) else list(patch)
    if derived is None:
        return metadata
    image |= {"num_channels": len(derived.channels), "channel_def": {str(i): n for i, n in enumerate(derived.channels)}}
    pred |= {"num_channels": len(derived.labels), "channel_def": {str(i): n for i, n in enumerate(derived.labels)}}
    classes = ", ".join(derived.labels[1:])
    return metadata | {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"derived from {bundle} {metadata['version']}"},
        "name": derived.name,
        "task": f"Segmentation of {classes}",
        "description": f"Segmentation of {classes}, {start} {bundle}. " + metadata["description"],
        "data_source": "The user's own",
        "image_classes": f"{len(derived.channels)} channel(s): {', '.join(derived.channels)}",
        "label_classes": "integer label map: " + ", ".join(f"{i} {name}" for i, name in enumerate(derived.labels)),
    }
