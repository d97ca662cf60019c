# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Write bundles in the form that MONAI Label, the Model Zoo and Hugging Face take, as folders and as zips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..commanding.commands import path_of, truth
from ..commanding.environment import ROOT

__all__ = ["export_bundle"]


def export_bundle(
    bundles: str,
    output: str = "dist",
    weights: str | bool = "auto",
    pretrained: str | None = None,
    model: str | None = None,
    weights_url: str | None = None,
    source_url: str = "",
    push: str | None = None,
    private: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> None:
    """Export bundles.

    Args:
        bundles: one, several with commas between, or all.
        output: folder to write into.
        weights: true insists on a pre-trained encoder, false leaves weights out, auto takes them where there are any.
        pretrained: encoder to carry instead of the bundle's own; of one bundle.
        model: fine-tuned model to carry as models/model.pt, with its JSON beside it; of one bundle.
        weights_url: address under which the weights will be found: they are written into <bundle>_weights instead,
            and large_files.yml of the bundle says where to fetch them, with their digests; of one bundle.
        source_url: address under which the zips will be found, for model_info.json.
        push: repository owner/name of the Hugging Face Hub to upload to; of one bundle. The token is that of
            'hf auth login' or HF_TOKEN.
        private: whether that repository is private.
        overwrite: replace folders that are there, and that version in the repository.
        settings: other defaults of its configs (--features_per_stage, --patch_size, ...): of each that has the setting,
            but that patch_size leaves pretrain of VoCo and SimCLR as it is, where it is the region that crops are cut
            from, and that what fine-tuning works out from data (--spacing_mm median, --normalization ct) is of train.
    """
    from common.errors import end_in_a_sentence
    from common.files import write_json
    from common.settings import meant_values

    from .distribution import BUNDLES, bundle_names, check_settings, check_target, write_bundle, write_zip
    from .hub import check_repository, push_bundle

    end_in_a_sentence()
    settings = meant_values(settings)
    names = bundle_names(bundles if isinstance(bundles, str) else ",".join(bundles))
    folder = path_of("output", output)
    for option in ("pretrained", "model", "push", "weights_url"):
        if len(names) > 1 and locals()[option] is not None:
            raise SystemExit(f"Stopped: --{option} is for one bundle, and here are {len(names)}")
    fixed = {"labels", "channels", "regions"} & settings.keys()
    if fixed:
        raise SystemExit(f"Stopped: {', '.join(sorted(fixed))} make another task; use tools/new_task.py")
    wanted = str(weights).lower()
    if wanted not in ("auto", "true", "false"):
        raise SystemExit(f"Stopped: --weights is {weights!r}; it must be auto, true or false")
    trained = None if model is None else path_of("model", model)
    if trained is not None:
        _check_model(trained)
    replace = truth(overwrite)
    carried: dict[str, Path | None] = {}
    places: dict[str, dict[str, Any]] = {}
    for name in names:  # all of them, before anything is written
        check_settings(name, settings)
        encoder = ROOT / "bundles" / name / "models" / "pretrained_encoder.pt"
        if pretrained is not None:
            encoder = path_of("pretrained", pretrained)
        if wanted != "false" and not encoder.is_file() and (wanted == "true" or pretrained is not None):
            raise SystemExit(
                f"Stopped: there is no encoder {encoder}; pre-train, run python tools/import_checkpoint.py {name}, or "
                "export without weights (--weights false)"
            )
        carried[name] = encoder if wanted != "false" and encoder.is_file() else None
        if weights_url and carried[name] is None and trained is None:
            raise SystemExit(f"Stopped: there are no weights of {name} to be fetched from {weights_url}")
        check_target(folder / name, overwrite=replace)
        version = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text("utf-8"))["version"]
        places[name] = {"version": version, "private": truth(private)}
    there = check_repository(push, overwrite=replace, **places[names[0]]) if push is not None else None
    info = folder / "model_info.json"
    for name in names:
        target = write_bundle(
            name,
            folder / name,
            settings=settings,
            encoder=carried[name],
            optional=trained is not None and pretrained is None and wanted == "auto",
            model=trained,
            weights_url=weights_url,
            overwrite=replace,
        )
        packed, digest = write_zip(target, version=places[name]["version"])
        entries = json.loads(info.read_text("utf-8")) if info.is_file() else {}
        address = f"{source_url.rstrip('/')}/{packed.name}" if source_url else ""
        write_json(dict(sorted((entries | {packed.stem: {"checksum": digest, "source": address}}).items())), info)
        held = "a fine-tuned model" if trained else "a pre-trained encoder" if carried[name] else "no weights"
        print(f"{target}: {held}; {packed.name}, {packed.stat().st_size / 1e6:.1f} MB, sha1 {digest}", flush=True)
        if push is not None:
            push_bundle(target, push, there=there, **places[name])


def _check_model(model: Path) -> None:
    """Refuse a model that was trained for another task than the bundle's, or without the JSON beside it."""
    from common.weights import read_checkpoint, trained_settings

    read_checkpoint(model)
    sidecar = model.with_suffix(".json")
    if not sidecar.is_file():
        raise SystemExit(f"Stopped: {sidecar} is missing; training writes it beside the model, and inference needs it")
    told = trained_settings(str(model))
    task = told.get("labels"), told.get("channels", 1), told.get("regions")
    if task != (["background", "foreground"], 1, None):
        raise SystemExit(
            f"Stopped: {model} was trained for labels {task[0]}, channels {task[1]} and regions {task[2]}; make a "
            "bundle for this task with tools/new_task.py, which takes --model too"
        )
