# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Make a bundle for your own classes and channels from a pre-trained encoder, ready for training and MONAI Label.

  python tools/new_task.py mae_resenc_l --labels "gray matter,white matter" --output bundles_of_mine/brain_tissue
  python tools/new_task.py mae_primus_m --labels "edema,core" --channels "T1,FLAIR" --output glioma
  python tools/new_task.py mae_resenc_l --labels lesion --from_scratch true --output lesion
  python tools/new_task.py mae_resenc_l --model trained/model.pt --output ready    # of what you fine-tuned already

The folder runs on its own: metadata, training and inference agree on labels and channels, the encoder is fitted to
them, and its receipt lies beside it. The name of the folder is the name of the bundle. What the class 0 is need not be
said: it is the background.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundle_cells import truth
from environment import ROOT, RUNTIME, ensure

__all__ = ["new_task"]


def new_task(
    bundle: str,
    output: str,
    labels: str | Sequence[str] | None = None,
    channels: int | str | Sequence[str] = 1,
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
        channels: how many images a case has, or their names with commas between.
        spacing: of the voxels in mm, one number or three, median (of the data set), pretrained, or null (each file's).
        pretrained: encoder to start from; the bundle's models/pretrained_encoder.pt unless given.
        model: fine-tuned model to carry, whose labels and channels the JSON beside it tells.
        from_scratch: start from a random network.
        overwrite: replace a folder that is there.
        settings: other defaults of its configs (--patch_size, --epochs, ...).
    """
    sys.path.insert(0, str(ROOT))
    from distribution import Derived, bundle_names, check_name, known_settings, write_bundle

    from common.engines.settings import meant_values, unknown_settings
    from common.errors import end_in_a_sentence

    end_in_a_sentence()
    settings = meant_values(settings)
    if len(bundle_names(bundle)) > 1:
        raise SystemExit(f"Stopped: a task is made from one bundle, not from {bundle}")
    target = Path(output).expanduser().absolute()
    check_name(target.name)
    told = unknown_settings(settings, known_settings(bundle))
    if told:
        raise SystemExit(f"Stopped: {told}")
    if model is not None:
        settings = _settings_of(Path(model)) | settings
        labels = settings.pop("labels") if labels is None else labels
        channels = settings.pop("channels", 1) if channels == 1 else channels
    names, images = _labels(labels), _channels(channels)
    if spacing is not None:
        settings["spacing_mm"] = None if str(spacing).lower() in ("null", "none") else spacing
    encoder = (
        Path(pretrained).expanduser() if pretrained else ROOT / "bundles" / bundle / "models/pretrained_encoder.pt"
    )
    from_scratch = truth(from_scratch)
    if not from_scratch and not encoder.is_file() and model is None:
        raise SystemExit(
            f"Stopped: there is no encoder {encoder}; pre-train, run python tools/import_checkpoint.py {bundle}, name "
            "one with --pretrained, or start from a random network with --from_scratch true"
        )
    write_bundle(
        bundle,
        target,
        settings=settings | {"labels": names, "channels": len(images)},
        encoder=encoder if encoder.is_file() and not from_scratch else None,
        model=Path(model).expanduser() if model else None,
        from_scratch=from_scratch,
        derived=Derived(target.name, names, images),
        overwrite=truth(overwrite),
    )
    classes = ", ".join(f"{value} {name}" for value, name in enumerate(names))
    start = "a fine-tuned model" if model else "a random network" if from_scratch else f"the encoder {encoder}"
    print(f"written: {target}, with {start}; classes {classes}; images of a case: {', '.join(images)}")
    print(f"train it: cd {target} && python -m monai.bundle run --config_file configs/train.json --dataset_dir FOLDER")


def _parts(value: str | Sequence[str]) -> list[str]:
    """Return names given with commas between, or as the list that the command line makes of them."""
    return [part.strip() for part in (value.split(",") if isinstance(value, str) else map(str, value))]


def _labels(value: str | Sequence[str] | None) -> list[str]:
    """Return class names, background first.

    Raises:
        SystemExit: if names are missing, empty or equal to each other for MONAI Label, which ignores case.
    """
    names = _parts(value) if value is not None else []
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


def _channels(value: int | str | Sequence[str]) -> list[str]:
    """Return the names of the images of a case.

    Raises:
        SystemExit: if there is none, or names are equal.
    """
    if str(value).isdigit():
        count = int(str(value))
        names = ["image"] if count == 1 else [f"image {index}" for index in range(count)]
    else:
        names = _parts(str(value) if isinstance(value, int) else value)
    if not names or "" in names or len(set(names)) < len(names):
        raise SystemExit(f"Stopped: channels is {value!r}; give their number, or different names with commas between")
    return names


def _settings_of(model: Path) -> dict[str, Any]:
    """Return what a fine-tuned model was made for.

    Raises:
        SystemExit: if the JSON beside it is missing, or its classes overlap, which one label map cannot hold.
    """
    sidecar = model.with_suffix(".json")
    if not model.is_file() or not sidecar.is_file():
        raise SystemExit(f"Stopped: {model} or {sidecar} is missing; training writes both, and both are needed")
    told: dict[str, Any] = json.loads(sidecar.read_text("utf-8")).get("settings", {})
    if told.get("regions"):
        raise SystemExit(f"Stopped: {model} has overlapping classes (regions), which a bundle of this kind cannot name")
    return {name: told[name] for name in ("labels", "channels") if name in told}


if __name__ == "__main__":
    ensure(RUNTIME)
    import fire

    fire.Fire(new_task)
