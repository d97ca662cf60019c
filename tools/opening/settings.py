# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of the verbs that run the configs of bundles, and of those that look around."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from common.errors import SettingsError

from ..commanding.environment import RUNS
from ..commanding.settings import Bundle, Existing, From, Reads, RefusalError, Rest, settings

__all__ = ["Classify", "Doctor", "Embed", "Finetune", "ListBundles", "Predict", "Pretrain", "Serve", "model_error"]


def _data(value: Any) -> tuple[str, ...]:
    """Return a folder, a datalist or images, as told; what is not there is refused."""
    values = [value] if isinstance(value, (str, os.PathLike)) else list(value)
    paths = [str(Path(each).expanduser()) if str(each).startswith("~") else str(each) for each in values]
    if not paths:
        raise RefusalError("no data given; name a folder of volumes, a datalist or images")
    for path in paths:
        if not Path(path).exists():
            raise RefusalError(f"there is no {path}; name a folder of volumes, a datalist or an image")
    return tuple(paths)


def _as_written(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(value)
    return dict(value)


Data = Annotated[tuple[str, ...], Reads(_data, "a folder of volumes, a datalist, or an image")]
Written = Annotated[dict[str, Any], Rest(), Reads(_as_written, "settings of the config")]


@settings
class ListBundles:
    """What ``list`` is told."""

    folder: Path = RUNS
    """Of runs, whose encoders and models are listed too."""


@settings
class Pretrain:
    """What ``pretrain`` is told."""

    bundle: Bundle
    """Whose method and network to pre-train."""
    data: Data
    """Folder of volumes at any depth, or a datalist."""
    output: Path | None = None
    """Folder of the run: models/, output/, store/; default openmind_runs/BUNDLE."""
    show_command: bool = False
    """Only print the equal command of MONAI."""
    settings: Written = field(default_factory=dict)
    """Any setting of pretrain.yaml; name the bundle before --help to see them."""


@settings
class Finetune:
    """What ``finetune`` is told."""

    bundle: Bundle
    """Whose encoder to fine-tune."""
    data: Data
    """Folder with images/ and labels/, an nnU-Net or Decathlon folder, or a datalist."""
    output: Path | None = None
    """Folder of the run: models/, output/, store/; default openmind_runs/BUNDLE."""
    show_command: bool = False
    """Only print the equal command of MONAI."""
    settings: Written = field(default_factory=dict)
    """Any setting of train.yaml, above all --labels background,edema,core, or the path of a dataset.json; of a folder
    that has a dataset.json, that is the default. Name the bundle before --help to see all."""


@settings
class Predict:
    """What ``predict`` is told."""

    model: str
    """Folder of a run or of models, a file model.pt, a pattern with *, an exported bundle, or the bundle that was
    fine-tuned in openmind_runs. Classes, network and preprocessing are in it."""
    data: Data
    """Folder of volumes, a datalist, or an image."""
    output: Path | None = None
    """Folder of the label maps; default output/predictions of the run."""
    show_command: bool = False
    """Only print the equal command of MONAI."""
    settings: Written = field(default_factory=dict)
    """Any setting of inference.yaml, such as --overlap or --mirror_axes."""


@settings
class Embed:
    """What ``embed`` is told."""

    bundle: Bundle
    """Whose encoder to embed with."""
    data: Data
    """Folder of volumes, a datalist, or an image."""
    output: Path | None = None
    """Folder of the embeddings; default output/features of the run."""
    show_command: bool = False
    """Only print the equal command of MONAI."""
    settings: Written = field(default_factory=dict)
    """Any setting of features.yaml, such as --pooling or --dense; name the bundle before --help to see all."""


@settings
class Classify:
    """What ``classify`` is told."""

    bundle: str
    """Whose encoder to train a classifier from; or a trained one: the folder of its run or of models, or a file
    classifier.pt."""
    data: Data
    """Folder of volumes, or a datalist."""
    output: Path | None = None
    """Folder of the run that trains; or of the predictions, by default output/classification of the run."""
    show_command: bool = False
    """Only print the equal command of MONAI."""
    settings: Written = field(default_factory=dict)
    """Any setting of train_classification.yaml, above all --table labels.csv --target diagnosis, for a number also
    --task regression; of a trained one, of inference_classification.yaml."""


@settings
class Serve:
    """What ``serve`` is told."""

    bundle: Existing
    """Folder of a bundle that new-task or export wrote."""
    studies: Existing
    """Folder of the scans to label."""
    app: Path = RUNS / "monai_label"
    """Folder of MONAI Label's app, made if it is not there; the bundle is copied into it, and trained there."""
    monailabel: str = "monailabel"
    """Program of MONAI Label, which has an environment of its own."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in."""
    port: Annotated[int, From(1)] = 8000
    """Port to listen on."""
    show_command: bool = False
    """Only print the command of MONAI Label."""


@settings
class Doctor:
    """``doctor`` needs to be told nothing."""


def model_error(model: str) -> SettingsError:
    """Return what to say if there is no such model."""
    return SettingsError(
        f"there is no model {model}; give the folder of a fine-tuning, its models/model.pt, or an exported bundle"
    )
