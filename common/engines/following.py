# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The command that a run proposes next, ready to paste: of MONAI, of a tool, or, where ``openmind`` runs, its verb."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundles import FOLDER, running_bundle, running_parser
from ..paths import as_path
from ..terminal import near, openmind

__all__ = ["next_command"]

_VERBS = {  # of openmind, for configs and tools
    "pretrain": "pretrain",
    "train": "finetune",
    "inference": "predict",
    "features": "embed",
    "train_classification": "classify",
    "inference_classification": "classify",
    "evaluate": "evaluate",
    "probe": "probe",
    "new_task": "new-task",
}
_RUNS = Path("openmind_runs")  # where verbs write unless they are told otherwise
_FIRST = {"probe": ("features",), "new_task": ("bundle",)}  # settings of tools that stand without their names
_PLAIN = re.compile(r"[\w .+-]+")  # names that stand with commas between
_MODELS = {"inference": "model.pt", "inference_classification": "classifier.pt"}


def next_command(kind: str | None, *, tool: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the command line that runs what is next, None if there is nothing.

    Args:
        kind: config of the bundle that runs.
        tool: to run instead, where the tools of the collection are at hand.
        settings: of either; those that are None are left out, and those that a bundle has anyway. ``BUNDLE`` becomes
            the name of the bundle that runs.
    """
    folder, given = running_bundle(), {name: value for name, value in settings.items() if value not in (None, "")}
    if folder is not None and given.get("bundle") == "BUNDLE":
        given["bundle"] = folder.name
    if (command := openmind()) is not None:
        words = _words_of_tool(tool, given) if tool else _words_of_verb(kind, given, folder) if kind and folder else []
        return " ".join([command, *words]) if words else None
    if tool is not None and (file := FOLDER.parents[1] / "tools" / f"{tool}.py").is_file():
        return f"python {shlex.quote(near(file))}{_options(given)}"
    return (_of_monai(kind, {} if tool else given, folder) or None) if kind and folder else None


def _words_of_tool(tool: str, given: dict[str, Any]) -> list[str]:
    first = [_quoted(given.pop(name)) for name in _FIRST[tool] if name in given]
    return [_VERBS[tool], *first, *_words(given)]


def _words_of_verb(kind: str, given: dict[str, Any], folder: Path) -> list[str]:
    """Return the words of the verb that runs another config of the bundle."""
    root = _root(folder)
    data = str(given.pop("dataset_dir", None) or given.pop("datalist", None) or "DATA")
    given.pop("datalist", None)
    if kind == "evaluate":
        first = [given.pop("predictions", "PREDICTIONS"), _references(as_path(data))]
    elif kind in _MODELS:
        model = as_path(str(given.pop("model", root / "models" / _MODELS[kind])))
        of_run = _is(model, root / "models" / _MODELS[kind])
        first = [near(root if of_run else model), _folder_for(kind, as_path(data))]
    else:
        first, usual = [folder.name, data], _RUNS / folder.name
        if kind == "features":  # whose output are embeddings; the encoder is looked for in the usual place
            root = usual
        elif not _is(root, usual):
            given["output"] = near(root)
        if kind == "train" and "labels" not in given and not (as_path(data) / "dataset.json").is_file():
            given["labels"] = ["background", "NAMES"]
    given = {name: value for name, value in given.items() if not _as_ever(name, value, root)}
    return [_VERBS[kind], *map(_quoted, first), *_words(given)]


def _of_monai(kind: str, given: Mapping[str, Any], folder: Path) -> str:
    """Return the command of MONAI that runs another config of the bundle, empty if it has none of this kind."""
    # a YAML first: beside it, in a bundle of the clone, lies a JSON for monai.bundle.load
    file = max((folder / "configs").glob(f"{kind}.*"), default=None)
    if file is None:
        return ""
    root = _root(folder)
    own = {} if root.absolute() == folder.absolute() else {"bundle_root": near(root)}
    told = own | {name: value for name, value in given.items() if not _as_ever(name, value, root)}
    if data := told.get("dataset_dir"):
        told["dataset_dir"] = _folder_for(kind, as_path(data))
    return f"python -m monai.bundle run --config_file {shlex.quote(near(file))}{_options(told)}"


def _root(folder: Path) -> Path:
    """Return the folder of the run, where weights are looked for and results are written."""
    parser = running_parser()
    return as_path(folder if parser is None else parser.get().get("bundle_root", folder))


def _as_ever(name: str, value: Any, root: Path) -> bool:
    """Return whether a path is where a bundle looks for it without being told."""
    usual = {
        "pretrained": "models/pretrained_encoder.pt",
        "model": "models/model.pt",
        "predictions": "output/predictions",
    }
    paths = (usual.get(name, ""), "models/classifier.pt" if name == "model" else "")
    return any(each and _is(as_path(str(value)), root / each) for each in paths)


def _is(path: Path, other: Path) -> bool:
    return path.absolute() == other.absolute()


def _folder_for(kind: str, data: Path) -> Path:
    """Return the folder of images of labelled data to predict, or that of labelled data for images to score."""
    if kind == "inference":
        return next((data / each for each in ("imagesTs", "images", "imagesTr") if (data / each).is_dir()), data)
    if kind == "evaluate" and data.name in ("images", "imagesTr"):
        return data.parent
    return data


def _references(data: Path) -> Path | str:
    """Return the folder of the labels of images, or a word for it."""
    beside = data.with_name(data.name.replace("images", "labels")) if "images" in data.name else data / "labels"
    return beside if beside.is_dir() else "REFERENCES"


def _options(settings: Mapping[str, Any]) -> str:
    return "".join(f" --{name} {_quoted(value)}" for name, value in settings.items())


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as openmind takes them: names with commas between need no quotes."""
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", shlex.quote(",".join(value)) if _are_plain(value) else _quoted(value))
    ]


def _are_plain(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) and _PLAIN.fullmatch(one) for one in value)


def _quoted(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return f'"{value!r}"' if not set('"$`\\') & set(repr(value)) else shlex.quote(repr(value))
    return shlex.quote(near(value) if isinstance(value, Path) else str(value))
