# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings that come together: those of a preset, and those with which an encoder was pre-trained.

What the user says stands above both. The network is that of the encoder, whatever the preset; crops and budget are the
preset's. Nothing of it need be said again by what follows, since a pre-training writes it into the JSON beside its
encoder.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..bundles import FOLDER, bundle_name, read_config, runs_for_a_user
from ..errors import SettingsError
from ..terminal import speaks
from ..weights.made import NETWORK, PATCH, crop_of, data_made_with, made_with, same

__all__ = ["chosen_settings", "preset_settings", "tell_small"]

_PUBLISHED = "published"
_SHOWN = ("features_per_stage", "embed_dim", "depth", "patch_size", "input_size", "epochs", "iterations_per_epoch")


def chosen_settings(parser: Any, presets: Sequence[str] | str, given: Collection[str]) -> dict[str, Any]:
    """Return what a config must hold by its ``preset`` and the encoder that it reads, where nobody says otherwise.

    Args:
        parser: of the running config.
        presets: the workflow and the backbone, which name a section of ``preset_<name>_<backbone>.yaml``; or, in a
            bundle that is exported, JSON with the settings of each preset by its name.
        given: settings that the call gave; what is not as published somebody wrote into a config, and is said as well.

    Raises:
        SettingsError: if there is no such preset, or the user says another network than the encoder's.
    """
    config = parser.get()
    published = _preset(presets, _PUBLISHED, config)
    said = {*given, *(name for name, value in published.items() if name in config and not same(config[name], value))}
    preset = config.get("preset")
    chosen = {} if preset is None else _preset(presets, preset, config)
    found = {name: value for name, value in chosen.items() if name in config and name not in said}
    return found | _of_encoder(parser, said, {*found})


def _preset(presets: Sequence[str] | str, preset: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(presets, str):
        told = json.loads(presets)
        names, found = [*told], told.get(preset, {})
    else:
        workflow, backbone = presets
        names = [each.name.split("_")[1] for each in sorted(FOLDER.glob(f"preset_*_{backbone}.yaml"))]
        found = preset_settings(workflow, backbone, preset, _bundle(config)) if preset in names else {}
    if preset not in names:
        near = difflib.get_close_matches(str(preset), names, n=1)
        raise SettingsError(
            f"there is no preset {preset!r}; {f'did you mean {near[0]}?' if near else f'choose {names}'}"
        )
    return dict(found)


def preset_settings(workflow: str, backbone: str, preset: str, bundle: str) -> dict[str, Any]:
    """Return the settings of a preset.

    Args:
        workflow: ``pretrain``, ``train``, ``train_classification`` or ``features``.
        backbone: as file names have it.
        preset: its name.
        bundle: whose method may have some of its own.
    """
    sections = read_config(FOLDER / f"preset_{preset}_{backbone}.yaml")
    method = bundle.removesuffix(f"_{backbone}")
    return {**sections.get(workflow, {}), **sections.get(f"{workflow}_{method}", {})}


def _bundle(config: Mapping[str, Any]) -> str:
    try:
        return bundle_name(config.get("bundle_root", "."))
    except SettingsError:  # said where the name is needed
        return ""


def _of_encoder(parser: Any, said: Collection[str], preset: Collection[str]) -> dict[str, Any]:
    """Return what the JSON beside an encoder says of its network, crop and data."""
    config = parser.get()
    if "pretrained" not in config or "from_scratch" not in config or parser.get_parsed_content("from_scratch"):
        return {}
    file = parser.get_parsed_content("pretrained")
    theirs, found = made_with(file), {}
    partly = "allow_partial" in config and bool(parser.get_parsed_content("allow_partial"))
    for name in NETWORK & theirs.keys() & config.keys():
        if same(config[name], theirs[name]) or partly:
            continue
        if name in said:
            raise SettingsError(
                f"{file} was made with {name} {theirs[name]}, and --{name} says {config[name]}; leave it out: the JSON "
                "beside the encoder says it"
            )
        found[name] = theirs[name]
    crop = crop_of(theirs)
    if PATCH in config and crop is not None and PATCH not in {*said, *preset} and not same(config[PATCH], crop):
        found[PATCH] = crop
    for name, value in data_made_with(file).items():
        if name in config and name not in said and not same(config[name], value):
            found[name] = value
    if found and speaks():
        read = ", ".join(f"{name} {value}" for name, value in found.items())
        tqdm.write(f"as {file} was made, by the JSON beside it: {read}")
    return found


def tell_small(parser: Any, presets: Sequence[str] | str, given: Collection[str]) -> None:
    """Say in one line what ``--preset small`` would do, where a user trains the published network on a CPU."""
    config = parser.get()
    if not runs_for_a_user() or "preset" not in config or config["preset"] is not None or "epochs" in given:
        return
    published = _preset(presets, _PUBLISHED, config)
    large = all(same(config[name], published[name]) for name in NETWORK & published.keys())
    if not large or torch.device(parser.get_parsed_content("device")).type != "cpu":
        return
    small = _preset(presets, "small", config)
    told = ", ".join(f"{name} {small[name]}" for name in _SHOWN if name in small)
    tqdm.write(f"this is the published size, which takes a CPU days; --preset small takes minutes: {told}")
