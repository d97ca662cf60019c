# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Fine-tuned models as folders of nnU-Net, out and in."""

from __future__ import annotations

import shlex

from common.data import segmentation_task
from common.engines import model_settings
from common.errors import SettingsError
from common.terminal import near
from common.weights import export_model_folder, import_model, read_model_folder

from ..commanding.ending import end, model_command
from ..commanding.environment import kept
from .settings import ExportCheckpoint, ImportCheckpoint

__all__ = ["export_model", "import_models"]


def export_model(settings: ExportCheckpoint) -> None:
    """Export a fine-tuned model as a folder that nnU-Net predicts with.

    Raises:
        SettingsError: if a setting of the pretrain config is given, or nnU-Net has no way to do what the model does.
        WeightsError: if the model is missing or was not trained.
    """
    models = kept(settings.bundle) / "models"
    if settings.settings:
        raise SettingsError(
            f"--{next(iter(settings.settings))} says nothing to --format nnunet: what the network is, model.json tells"
        )
    folder = settings.output or models / "exported" / "nnunet"
    for note in export_model_folder(settings.source or models / "model.pt", output=folder, bundle=settings.bundle):
        print(f"note: {note}")
    following = f"nnUNetv2_predict_from_modelfolder -m {shlex.quote(near(folder))} -i IMAGES -o LABELS -f 0"
    end(folder, look=folder / "plans.json", following=following)


def import_models(settings: ImportCheckpoint, bundle: str) -> None:
    """Import the model of each fold of a folder of nnU-Net.

    Args:
        settings: ``source`` is the folder.
        bundle: whose inference is to read the models.

    Raises:
        SettingsError: if the bundle is of another backbone, or a setting of its pretrain config is given.
        WeightsError: if the folder is not complete, or of a network that this collection has not.
    """
    if settings.settings:
        raise SettingsError(
            f"--{next(iter(settings.settings))} says nothing here: what the network is, plans.json tells"
        )
    if not bundle.endswith("_resenc_l"):
        raise SettingsError(f"a model of nnU-Net is a residual U-Net; name a bundle of ResEnc-L, not {bundle}")
    found = read_model_folder(settings.source or "")
    told = model_settings(
        segmentation_task(str(found.folder / "dataset.json")),
        data=found.data,
        network=found.network,
        bundle=bundle,
        patch_size=found.patch_size,
        mirror_axes=found.mirror_axes,
    )
    target = settings.output or kept(bundle) / "models" / "model.pt"
    licence = settings.licence or "that of its source"
    several = len(found.checkpoints) > 1
    for checkpoint in found.checkpoints:
        output = target.with_stem(f"{target.stem}_{checkpoint.parent.name}") if several else target
        import_model(found, checkpoint, settings=told, output=output, licence=licence)
        print(f"written: {output} and {output.with_suffix('.json').name}, from {checkpoint}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"licence: {licence}; trained by {found.about['trainer']} on {found.about['data_set']}")
    models = target.with_stem(f"{target.stem}_fold_*") if several else target
    print("what is named below predicts as nnU-Net does")
    mirror = ("--mirror_axes", str(found.mirror_axes).replace(" ", "")) if found.mirror_axes else ()
    end(target.parent if several else target, following=model_command(bundle, models, "IMAGES", *mirror))
