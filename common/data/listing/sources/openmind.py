# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The OpenMind data set as published: ``openneuro_metadata.csv`` beside the folder ``OpenMind``.

Each row is an image with its modality, quality score, masks and, for maps computed from diffusion images, what it was
derived from. Which value means what in the published masks is not confirmed, so ``mask_polarity`` can turn each of them
round; this code takes them by their names, unlike the reference, whose preprocessing swaps the two.

Source: https://huggingface.co/datasets/MIC-DKFZ/OpenMind, Wald et al., arXiv:2412.17041.
"""

from __future__ import annotations

import math
from pathlib import Path
from sys import intern

from ....errors import DataError
from ....tables import table_rows
from ...cases import INVERTED, MASKS, Case, stem
from .base import Found, Polarity, below, inverted, plain

__all__ = ["TABLE", "read_openmind"]

TABLE = "openneuro_metadata.csv"
_FOLDER = "OpenMind"
_MASK_COLUMNS = dict(zip(MASKS, ("anon_mask_path", "anat_mask_path"), strict=True))


def read_openmind(path: Path, *, mask_polarity: Polarity = "as_named") -> Found:
    """List the images of the table, without looking at them.

    Args:
        path: of the table or the folder that holds it.
        mask_polarity: ``as_named`` (1 where anonymised, 1 where there is anatomy) or ``inverted``, for both masks or
            for each by its name.

    Raises:
        DataError: if the table cannot be read or lacks ``image_path`` or ``modality``.
    """
    table = path / TABLE if path.is_dir() else path
    root = table.absolute().parent
    root = root / _FOLDER if (root / _FOLDER).is_dir() else root
    turned = inverted(mask_polarity)
    found = Found()
    for line, row in table_rows(table, ("image_path", "modality")):
        try:
            case = _case(row, root, turned)
        except DataError as error:
            found.left_out.note(f"{table}, line {line}: {error}")
            continue
        found.add(case, f"{table}, line {line}", row["image_path"])
    return found


def _inner(entry: str) -> str:
    return below(entry).removeprefix(f"{_FOLDER}/")


def _case(row: dict[str, str], root: Path, turned: list[str]) -> Case:
    image = _inner(plain(row["image_path"]))
    parts = image.split("/")
    if len(parts) < 3:
        raise DataError(f"image_path is {row['image_path']!r}; it names data set, subject and file")
    dataset, subject = intern(parts[0]), intern(parts[1])
    derived = plain(row.get("derived_from"))
    # maps of one diffusion image have plain names such as FA in a folder called after it, "..._dwi__Data"
    name = parts[-2].removesuffix("_Data") + parts[-1] if derived else parts[-1]
    case: Case = {
        "image": f"{root}/{image}",
        "name": f"{dataset}_{stem(name)}",
        "dataset": dataset,
        "subject": subject,
        "session": intern(parts[2] if parts[2].startswith("ses-") else "ses-DEFAULT"),
        "modality": intern(plain(row["modality"])),
    }
    if derived:
        case["derived_from"] = intern(derived)
    if quality := plain(row.get("image_quality_score")):
        case["quality"] = _number(quality)
    for mask, column in _MASK_COLUMNS.items():
        if entry := plain(row.get(column)):
            case[mask] = f"{root}/{_inner(entry)}"
    if wrong := [mask for mask in turned if mask in case]:
        case[INVERTED] = wrong
    return case


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"image_quality_score is {text!r}, not a number")
    return value
