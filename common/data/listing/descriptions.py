# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The ``dataset.json`` of nnU-Net (version 2) or of the Medical Segmentation Decathlon: what it says, and what is done.

=========================  =====================================================================================
key                        here
=========================  =====================================================================================
``labels``                 nnU-Net's ``{name: value}``, ``{name: [values]}`` for regions, ``ignore``; the Decathlon's
                           ``{value: name}``. A list of one value is a class. Regions come as soon as one list is longer
``regions_class_order``    the label value that each region is painted with, in the order of ``labels``
``dataset``                the files of each case, instead of those in ``imagesTr`` and ``labelsTr``
``channel_names``          read for names alone; nnU-Net normalises by them, which ``--normalization`` says here
``modality``               the same, of older versions and the Decathlon
``file_ending``            files of every format that can be read are taken
what describes             name, licence, numbers of cases and the like: nothing depends on them
everything else            is not followed, and named
=========================  =====================================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import DataError, SettingsError
from ...paths import as_path
from ...tasks import SegmentationTask
from ...transforms import ENDINGS
from ..cases import Case

__all__ = ["check_names_of_classes", "contradicted", "described_cases", "segmentation_task"]

_FOLLOWED = {"labels", "regions_class_order", "dataset"}
_DESCRIBING = {
    *("name", "dataset_name", "description", "reference", "citation", "licence", "license", "release", "relase", "url"),
    *("version", "author", "authors", "converted_by", "numTraining", "numTest", "tensorImageSize"),
    *("training", "validation", "test", "channel_names", "modality", "file_ending"),
}
_SCHEMES = {  # of nnU-Net, by what a channel is called: what to ask for here
    "ct": "--normalization ct does that",
    "nonorm": "--normalization none does that",
    "rescale_to_0_1": "there is no such scheme here",
    "rgb_to_0_1": "there is no such scheme here",
}


def segmentation_task(
    labels: Sequence[str] | Mapping[str, int] | str,
    *,
    regions: Mapping[str, Sequence[int]] | None = None,
    ignore_label: int | None = None,
    regions_class_order: Sequence[int] | None = None,
) -> SegmentationTask:
    """Build the task from names, or from a ``dataset.json``.

    Args:
        labels: names of the classes, background first; the value of each name; or the path of a ``dataset.json``, from
            which also all that follows is taken unless it is given.
        regions: sets of label values, by name.
        ignore_label: value of voxels without a verdict.
        regions_class_order: label value that each region is painted with.

    Raises:
        SettingsError: if the file does not say its labels, or the task makes no sense.
    """
    if not isinstance(labels, str) or not labels.endswith(".json"):
        return SegmentationTask(labels, regions, ignore_label, regions_class_order)  # type: ignore[arg-type]
    try:
        content = json.loads(as_path(labels).read_text("utf-8"))
        names, found, ignored = _labels(content["labels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SettingsError):
            raise SettingsError(f"{labels}: {error}") from error
        raise SettingsError(f"labels is {labels}, which cannot be read as a dataset.json ({error!r})") from error
    for note in _not_followed(content):
        tqdm.write(f"note: {labels} {note}")
    if regions is None and found is not None:
        regions, regions_class_order = found, regions_class_order or content.get("regions_class_order")
    return SegmentationTask(
        {name: value for value, name in names.items()},  # type: ignore[arg-type]
        regions,
        ignored if ignore_label is None else ignore_label,
        regions_class_order,
    )


def check_names_of_classes(labels: Any, *folders: str | Path) -> None:
    """Hold names of classes against the ``dataset.json`` that lies with the data, where there is one.

    Args:
        labels: as :func:`segmentation_task` takes them; a path says it itself.
        folders: in which it may lie.

    Raises:
        SettingsError: if the two contradict each other.
    """
    for folder in folders if labels and not isinstance(labels, str) else ():
        if told := contradicted(labels, as_path(folder) / "dataset.json"):
            raise SettingsError(told)


def contradicted(labels: Sequence[str] | Mapping[str, int], file: str | Path) -> str | None:
    """Return a sentence if a ``dataset.json`` gives the name of a class to another value, None if it does not.

    Other names may be given to the values. What cannot be read says nothing here.

    Args:
        labels: names of the values 0, 1, 2, ..., or the value of each name.
        file: the ``dataset.json`` beside the data.
    """
    try:
        theirs, _, _ = _labels(json.loads(as_path(file).read_text("utf-8"))["labels"])
        ours = labels if isinstance(labels, Mapping) else {str(name): value for value, name in enumerate(labels)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    values = {name.strip().casefold(): value for value, name in theirs.items()}
    for name, value in ours.items():
        there = values.get(str(name).strip().casefold(), value)
        if there != value:
            return (
                f"labels calls the value {value} {str(name)!r}, and {file} calls {there} so; every score would be of "
                f"another class. Write --labels {file}"
            )
    return None


def _labels(given: Mapping[str, Any]) -> tuple[dict[int, str], dict[str, list[int]] | None, int | None]:
    """Return the name of each value, the regions if there are any, and the ignored value."""
    names: dict[int, str] = {}
    found: dict[str, list[int]] = {}  # in the order of the file
    ignored: int | None = None
    for key, value in given.items():
        if isinstance(value, str):  # the Decathlon's
            key, value = value, int(key)
        elif key == "ignore":
            ignored = int(value)
            continue
        values = [int(one) for one in value] if isinstance(value, list) else [int(value)]
        if len(values) == 1:
            if values[0] in names:
                raise SettingsError(
                    f"it calls the value {values[0]} both {names[values[0]]!r} and {key!r}; keep one name"
                )
            names[values[0]] = key
        if set(values) != {0}:
            found[key] = values
    overlapping = any(len(values) > 1 for values in found.values())
    for value in (value for values in found.values() for value in values):
        names.setdefault(value, f"label {value}")
    twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if twice:
        raise SettingsError(f"it calls several values {twice[0]!r}; give each a name of its own")
    return names, found if overlapping else None, ignored


def _not_followed(content: Mapping[str, Any]) -> list[str]:
    """Return what is done otherwise than nnU-Net would, by what the file says."""
    notes = []
    unknown = [str(key) for key in content if key not in _FOLLOWED | _DESCRIBING]
    if unknown:
        notes.append(f"says {', '.join(unknown)}, which is not followed here")
    ending = content.get("file_ending")
    if ending is not None and str(ending).lower() not in ENDINGS:
        notes.append(f"says its files end in {ending}, which are not read here; convert them to .nii.gz")
    channels = content.get("channel_names") or content.get("modality") or {}
    named = {str(name) for name in (channels.values() if isinstance(channels, Mapping) else ())}
    notes += [
        f"calls a channel {name}, by which nnU-Net normalises in a way of its own; {_SCHEMES[name.lower()]}"
        for name in sorted(named)
        if name.lower() in _SCHEMES
    ]
    return notes


def described_cases(folder: Path) -> list[Case] | None:
    """Return the cases that the ``dataset.json`` in a folder lists under ``dataset``; None if it does not.

    Raises:
        DataError: if the list cannot be read, or a file of it is missing.
    """
    file = folder / "dataset.json"
    try:
        listed = json.loads(file.read_text("utf-8"))["dataset"]
        cases: list[Case] = []
        for name, entry in listed.items():
            images = [str((folder / one).absolute()) for one in entry["images"]]
            label = str((folder / entry["label"]).absolute())
            cases.append({"image": images[0] if len(images) == 1 else images, "label": label, "name": str(name)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not file.is_file() or (isinstance(error, KeyError) and error.args == ("dataset",)):
            return None
        raise DataError(
            f"{file} lists cases under dataset, but not as images and a label of each ({error!r})"
        ) from error
    return cases
