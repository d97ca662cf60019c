# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""nnssl's ``pretrain_data.json``: collection > data set > subject > session > images with their masks.

A path that starts with ``$NAME`` is resolved against that environment variable, as there; a relative one starts at the
file. Absolute ones stay as they are, since the file is the user's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from sys import intern
from typing import Any

from ....errors import DataError
from ....paths import as_path
from ...cases import INVERTED, MASKS, Case, stem
from .base import Found, Polarity, below, inverted, plain

__all__ = ["INDEX", "read_nnssl"]

INDEX = "pretrain_data.json"


def read_nnssl(path: Path, *, mask_polarity: Polarity = "as_named") -> Found:
    """List the images of the file, without looking at them.

    Args:
        path: of the file or its folder.
        mask_polarity: as for OpenMind.

    Raises:
        DataError: if the file is not of this form, or a variable is not set.
    """
    index = path / INDEX if path.is_dir() else path
    try:
        content = json.loads(index.read_text("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{index} is not JSON: {error}") from error
    turned, roots = inverted(mask_polarity), {}
    found = Found()

    def place(entry: Any) -> str:
        if not isinstance(entry, str) or not plain(entry):
            raise DataError(f"a path is {entry!r}")
        if entry.startswith("$"):
            variable, _, rest = entry[1:].partition("/")
            if variable not in roots:
                value = os.environ.get(variable)
                if not value:
                    raise LookupError(variable)
                roots[variable] = as_path(value).absolute()
            return f"{roots[variable]}/{below(rest)}"
        return entry if os.path.isabs(entry) else f"{index.absolute().parent}/{below(entry)}"

    for where, dataset, subject, session, image, scores in _images(content, index):
        try:
            case = _case(dataset, subject, session, image, scores, place)
        except LookupError as error:
            variable = error.args[0]
            raise DataError(
                f"{index} names paths below ${variable}, which is not set; export {variable}=FOLDER and run again"
            ) from None
        except DataError as error:
            found.left_out.note(f"{index}, {where}: {error}")
            continue
        if wrong := [mask for mask in turned if mask in case]:
            case[INVERTED] = wrong
        found.add(case, f"{index}, {where}", case["image"])
    return found


def _images(content: Any, index: Path) -> Iterator[tuple[str, str, str, str, Any, dict[tuple[str, str], Any]]]:
    """Yield every image with its data set, subject, session and the quality scores of its data set."""
    for dataset, about in _members(content, "datasets", index):
        info = about.get("dataset_info")
        table = info.get("image_quality_score") if isinstance(info, dict) else None
        scores = {
            (plain(entry.get("modality")), plain(entry.get("derived_from"))): entry.get("image_quality_score")
            for entry in (table if isinstance(table, list) else [])
            if isinstance(entry, dict)
        }
        for subject, subjects in _members(about, "subjects", index):
            for session, sessions in _members(subjects, "sessions", index):
                images = sessions.get("images")
                if not isinstance(images, list):
                    raise DataError(f'{index}: {dataset} > {subject} > {session} has no list "images"')
                for image in images:
                    yield f"{dataset} > {subject} > {session}", dataset, subject, session, image, scores


def _members(content: Any, key: str, index: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    members = content.get(key) if isinstance(content, dict) else None
    if not isinstance(members, dict) or not all(isinstance(member, dict) for member in members.values()):
        raise DataError(f'{index} is no pretrain_data.json of nnssl: it needs "{key}", an object of objects')
    yield from members.items()


def _case(dataset: str, subject: str, session: str, image: Any, scores: Any, place: Any) -> Case:
    if not isinstance(image, dict):
        raise DataError("an image is no object")
    masks = image.get("associated_masks") or {}
    info = image.get("image_info") or {}
    if not isinstance(masks, dict) or not isinstance(info, dict):
        raise DataError("associated_masks and image_info must be objects")
    file = place(image.get("image_path"))
    modality, derived = plain(image.get("modality")), plain(info.get("derived_from"))
    name = plain(image.get("name")) or file.rsplit("/", 1)[-1]
    case: Case = {
        "image": file,
        "name": f"{dataset}_{stem(name)}",
        "dataset": intern(dataset),
        "subject": intern(subject),
        "session": intern(session),
        "modality": intern(modality),
    }
    if derived:
        case["derived_from"] = intern(derived)
    quality = info.get("image_quality_score", scores.get((modality, derived)))
    if isinstance(quality, (int, float)) and not isinstance(quality, bool):
        case["quality"] = quality
    case |= {mask: place(masks[mask]) for mask in MASKS if plain(masks.get(mask))}
    return case
