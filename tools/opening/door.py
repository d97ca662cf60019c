# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The verbs as functions, for notebooks and programs: the same words, settings and results as on the command line.

    import openmind

    openmind.pretrain("scans", bundle="mae_resenc_l", epochs=100)
    model = openmind.finetune("task", bundle="mae_resenc_l", labels=["background", "lesion"])
    masks = openmind.predict("new", model=model)
    vectors = openmind.embed("scans", bundle="mae_resenc_l")

Any setting of the bundle's config is a keyword, with the values of Python: ``patch_size=[96, 96, 96]``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from .runs import Call

__all__ = ["embed", "example_data", "finetune", "predict", "pretrain"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def example_data(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write simulated MRI scans of the MNI152 template with labels of gray and white matter, to try things on.

    Nothing is fetched. The scans to learn from show the back of the brain and those to test on its front, 1 mm.

    Args:
        folder: gets ``images/`` and ``labels/``.
        seed: of the simulated scanners.

    Returns:
        the datalist, with four scans to train on, one to validate on and two to test on.
    """
    from ..preparing.template import write_template_data

    write_template_data(Path(folder), seed=seed)
    return Path(folder) / "datalist.json"


def pretrain(
    data: Paths,
    *,
    bundle: str,
    output: str | os.PathLike[str] | None = None,
    show_command: bool = False,
    **settings: Any,
) -> Path:
    """Pre-train a network on volumes without labels, as ``pretrain.yaml`` of the bundle says.

    Args:
        data: folder of volumes at any depth, a datalist (JSON), or paths of volumes, all of three spatial axes.
        bundle: of the collection, such as ``mae_resenc_l``.
        output: folder of the run; default ``openmind_runs/BUNDLE``. A run that was cut goes on.
        show_command: print the equal command of MONAI and run nothing.
        **settings: of the config: ``epochs``, ``patch_size`` (voxels, slice first), ``spacing_mm`` (millimetres), ...

    Returns:
        the file of the encoder.

    Raises:
        SettingsError: if a setting is unknown or contradicts another; the message names it and the remedy.
        DataError: if no volume can be used.
    """
    from .settings import Pretrain

    call = _run("pretrain", Pretrain, bundle, data, output=output, show_command=show_command, settings=settings)
    return _folder(call, "ckpt_dir", "models") / "pretrained_encoder.pt"


def finetune(
    data: Paths,
    *,
    bundle: str,
    labels: Sequence[str] | Mapping[str, int] | str | None = None,
    output: str | os.PathLike[str] | None = None,
    show_command: bool = False,
    **settings: Any,
) -> Path:
    """Fine-tune the encoder of a bundle for segmentation, as its ``train.yaml`` says.

    It starts from ``pretrained``, else the encoder that :func:`pretrain` wrote into the same run, else the one that is
    kept for the bundle, else the published one, which is fetched; from none with ``from_scratch=True``.

    Args:
        data: folder with ``images/`` and ``labels/``, an nnU-Net or Decathlon folder, or a datalist.
        bundle: of the collection.
        labels: names of the values 0, 1, ... in the label maps, background first; the value of each name; or the path
            of a ``dataset.json``, which is the default of a data set that has one.
        output: folder of the run; default ``openmind_runs/BUNDLE``.
        show_command: print the equal command of MONAI and run nothing.
        **settings: of the config: ``epochs``, ``patch_size`` (voxels, slice first), ``spacing_mm`` (millimetres), ...

    Returns:
        the file of the model; :func:`predict` needs nothing else.

    Raises:
        SettingsError: if a setting is unknown or contradicts another.
        DataError: if no case can be used.
        WeightsError: if the encoder cannot be had or does not fit.
    """
    from .settings import Finetune

    told = {**settings, **({} if labels is None else {"labels": labels})}
    call = _run("finetune", Finetune, bundle, data, output=output, show_command=show_command, settings=told)
    return _folder(call, "ckpt_dir", "models") / "model.pt"


def predict(
    images: Paths,
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    show_command: bool = False,
    **settings: Any,
) -> dict[str, Path]:
    """Segment volumes with a model that was fine-tuned, as ``inference.yaml`` of its bundle says.

    Args:
        images: folder of volumes, a datalist, or paths of volumes.
        model: file, or folder of a run or of models; bundle, network, classes and preprocessing are in it.
        output: folder of the label maps; default ``output/predictions`` of the run.
        show_command: print the equal command of MONAI and run nothing.
        **settings: of the config: ``overlap`` (share of a patch), ``mirror_axes``, ``probabilities``, ...

    Returns:
        the file of each case's label map by the name of the case: integers of the classes' values, of the shape,
        affine and grid of its image.

    Raises:
        SettingsError: if there is no such model, or a setting is unknown or contradicts it.
        DataError: if no volume can be used.
    """
    from .settings import Predict

    call = _run(
        "predict", Predict, os.fspath(model), images, output=output, show_command=show_command, settings=settings
    )
    if show_command:
        return {}
    from common.data import image_list
    from common.data.cases import case_name
    from common.paths import output_file
    from common.weights import trained_settings

    folder = _folder(call, "output_dir", "output/predictions")
    told = trained_settings(str(_folder(call, "model", "models/model.pt")))
    where = {name: call.settings[name] for name in ("dataset_dir", "datalist") if name in call.settings}
    cases = image_list(**where, channels=told.get("channels", 1), output_dir=str(folder))
    found = {case_name(case): output_file(folder, case_name(case), ".nii.gz") for case in cases}
    return {name: file for name, file in found.items() if file.is_file()}


def embed(
    images: Paths,
    *,
    bundle: str,
    output: str | os.PathLike[str] | None = None,
    show_command: bool = False,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Embed volumes with the pre-trained encoder of a bundle, as its ``features.yaml`` says.

    Args:
        images: folder of volumes, a datalist, or paths of volumes.
        bundle: of the collection; its encoder is found as :func:`finetune` finds it.
        output: folder of the embeddings; default ``output/features`` of the run.
        show_command: print the equal command of MONAI and run nothing.
        **settings: of the config: ``pooling``, ``stages``, ``pretrained``, ``spacing_mm`` (millimetres), ...

    Returns:
        the vector ``(E,)`` float32 of each case by its name; E is the number of channels of the chosen stages, times
        the number of poolings.

    Raises:
        SettingsError: if a setting is unknown, or contradicts the features that are there.
        DataError: if no volume can be used.
        WeightsError: if the encoder cannot be had or does not fit.
    """
    from .settings import Embed

    call = _run("embed", Embed, bundle, images, output=output, show_command=show_command, settings=settings)
    if show_command:
        return {}
    from common.engines.features import read_features

    names, vectors = read_features(_folder(call, "output_dir", "output/features"))
    return dict(zip(names, vectors, strict=True))


def _folder(call: Call, setting: str, default: str) -> Path:
    """Return a folder of a run: the one of a setting, or its place in the run."""
    return Path(call.settings[setting]) if setting in call.settings else call.folder / default


def _run(verb: str, cls: type, *needed: Any, **others: Any) -> Call:
    """Run a verb."""
    from . import runs

    with _in_a_sentence():
        call: Call = getattr(runs, verb)(cls(*needed, **others))
    return call


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Raise what a user can mend as such an error with its sentence, whatever MONAI wraps it into."""
    from common.errors import plainly

    before = sys.excepthook  # which a run on the command line replaces
    try:
        yield
    except Exception as error:
        if (reason := plainly(error)) is None:
            raise
    else:
        return
    finally:
        sys.excepthook = before
    raise reason
