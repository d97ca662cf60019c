# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What both sides are given: nnU-Net's raw folder, and its own plan made narrow."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
from nibabel.filebasedimages import ImageFileError

from common.data.cases import Case, case_name, images_of
from common.errors import DataError, SettingsError
from common.files import read_content, replace_file, write_json
from common.tasks import SegmentationTask
from common.weights import PlannedConfiguration, read_configuration

from ..benchmarking.witness import on_one_thread
from .settings import BesideNnunet

__all__ = ["CONFIGURATION", "DATASET", "NARROW", "NnunetFolders", "narrowed", "prepare", "run_nnunet", "write_raw"]

CONFIGURATION = "3d_fullres"
DATASET, _NUMBER = "Dataset001_Beside", "1"
_PLANNER, _PLANNED, NARROW = "nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans", "narrowPlans"
_ENDING = ".nii.gz"


class NnunetFolders:
    """Where nnU-Net reads and writes.

    Args:
        folder: of all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = folder / "raw" / DATASET
        self.preprocessed = folder / "preprocessed" / DATASET
        self.unseen = folder / "unseen"  # images, by the names that nnU-Net knows
        self.dataset = self.raw / "dataset.json"
        self.plans = self.preprocessed / f"{NARROW}.json"

    def environment(self, results: Path | None = None) -> dict[str, str]:
        """Return the variables with which nnU-Net finds them.

        With a folder for results it augments in the process that trains, so that this is timed; its planner (2.8.1)
        cannot be told so, and fails at no process.
        """
        return on_one_thread() | {
            "nnUNet_raw": str(self.raw.parent),
            "nnUNet_preprocessed": str(self.preprocessed.parent),
            "nnUNet_results": str(results or self.folder / "results"),
            "nnUNet_n_proc_DA": "0" if results else "1",
        }


def run_nnunet(command: Sequence[str | Path], *, environment: Mapping[str, str], log: Path) -> None:
    """Run a command of nnU-Net with its output in a file.

    Raises:
        SystemExit: if it fails, with the end of what it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        began = stream.tell()
        words = [str(word) for word in command]
        status = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment)).returncode
    if status:
        said = log.read_bytes()[began:].decode(errors="replace").strip().splitlines()[-5:]
        raise SystemExit(f"Stopped: nnU-Net failed, see {log}: " + " / ".join(said))


def write_raw(folders: NnunetFolders, task: SegmentationTask, training: Sequence[Case], unseen: Sequence[Case]) -> None:
    """Write the cases under numbers, as nnU-Net reads them; those that are not gzipped NIfTI are written anew.

    Raises:
        SettingsError: if the task is one that nnU-Net takes in another way.
        DataError: if a file cannot be read.
    """
    if task.regions is not None or task.ignore_label is not None or not task.counted:
        raise SettingsError(
            "the comparison takes classes with the values 0, 1, 2, ... that exclude each other; renumber the labels, "
            "or leave regions and the ignored label out"
        )
    for number, case in enumerate(training):
        for channel, image in enumerate(images_of(case)):
            _put(image, folders.raw / "imagesTr" / f"case_{number:03d}_{channel:04d}{_ENDING}")
        _put(case["label"], folders.raw / "labelsTr" / f"case_{number:03d}{_ENDING}")
    for number, case in enumerate(unseen):
        for channel, image in enumerate(images_of(case)):
            _put(image, folders.unseen / f"case_{number:03d}_{channel:04d}{_ENDING}")
    channels = {str(channel): f"channel {channel}" for channel in range(len(images_of(training[0])))}
    labels = dict(zip(task.labels, task.label_values, strict=True))
    content = {"channel_names": channels, "labels": {"background" if not v else k: v for k, v in labels.items()}}
    write_json(content | {"numTraining": len(training), "file_ending": _ENDING}, folders.dataset)


def _put(source: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.endswith(_ENDING):
        replace_file(target, lambda temporary: shutil.copyfile(source, temporary))
        return
    try:
        volume = nib.load(source)
        nib.save(volume, target)
    except (OSError, ImageFileError) as error:
        raise DataError(f"{source} is no NIfTI, which is what nnU-Net is given here; convert it ({error})") from error


def narrowed(plans: Mapping[str, Any], asked: BesideNnunet) -> dict[str, Any]:
    """Return nnU-Net's plans with one configuration, whose network, batch and patch are as asked; all else is kept.

    Raises:
        SettingsError: if a side of the patch is no multiple of what the network divides it by.
    """
    made = {**deepcopy(dict(plans)), "plans_name": NARROW}
    configuration = made["configurations"][CONFIGURATION]
    network = configuration["architecture"]["arch_kwargs"]
    count = min(asked.stages, network["n_stages"])
    network |= {
        "n_stages": count,
        "features_per_stage": [
            min(asked.features * 2**stage, most) for stage, most in enumerate(network["features_per_stage"][:count])
        ],
        "n_blocks_per_stage": [min(asked.blocks, most) for most in network["n_blocks_per_stage"][:count]],
        "n_conv_per_stage_decoder": list(network["n_conv_per_stage_decoder"][: count - 1]),
        "kernel_sizes": network["kernel_sizes"][:count],
        "strides": network["strides"][:count],
    }
    configuration |= {"batch_size": asked.batch_size, "batch_dice": False}
    if asked.patch_size is not None:
        order = made.get("transpose_forward", [0, 1, 2])
        configuration["patch_size"] = [asked.patch_size[axis] for axis in order]
    for axis, side in enumerate(configuration["patch_size"]):
        whole = 1
        for stride in network["strides"]:
            whole *= stride[axis]
        if side % whole:
            raise SettingsError(
                f"a side of the patch is {side}, which {count} stages do not halve evenly; give --patch_size with "
                f"multiples of {whole}, or fewer --stages"
            )
    made["configurations"] = {CONFIGURATION: configuration}
    return made


def prepare(
    folder: Path,
    asked: BesideNnunet,
    *,
    task: SegmentationTask,
    training: Sequence[Case],
    unseen: Sequence[Case],
    python: Path,
) -> PlannedConfiguration:
    """Let nnU-Net plan and preprocess, unless it has, and return what its narrow plan says.

    Args:
        folder: of nnU-Net's folders.
        asked: how narrow.
        task: classes.
        training: cases.
        unseen: cases, whose images are put where nnU-Net predicts them.
        python: of nnU-Net's environment.

    Raises:
        SystemExit: if nnU-Net fails.
        WeightsError: if it plans what this collection cannot do.
        SettingsError: if the plan cannot be made narrow as asked.
    """
    folders = NnunetFolders(folder)
    done, log, environment = folder / "prepared.json", folder / "log.txt", folders.environment()
    known = {"training": [*map(case_name, training)], "unseen": [*map(case_name, unseen)]}
    if not done.is_file():
        write_raw(folders, task, training, unseen)

        def call(name: str, *words: str) -> None:
            print(f"nnU-Net: {name}", flush=True)
            program = python.with_name(f"{name}{'.exe' if os.name == 'nt' else ''}")
            run_nnunet([program, "-d", _NUMBER, *words], environment=environment, log=log)

        call("nnUNetv2_extract_fingerprint", "-np", "1", "--verify_dataset_integrity")
        call("nnUNetv2_plan_experiment", "-pl", _PLANNER)
        write_json(narrowed(read_content(folders.preprocessed / f"{_PLANNED}.json"), asked), folders.plans)
        _configuration(folders)  # is refused before volumes are prepared
        call("nnUNetv2_preprocess", "-plans_name", NARROW, "-c", CONFIGURATION, "-np", "1")
        write_json(known, done)
    return _configuration(folders)


def _configuration(folders: NnunetFolders) -> PlannedConfiguration:
    return read_configuration(
        read_content(folders.plans), read_content(folders.dataset), CONFIGURATION, folders.preprocessed
    )
