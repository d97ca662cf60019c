# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Where cases come from, whatever form they are in.

==========  =======================================================================================
openmind    the OpenMind data set as published, ``openneuro_metadata.csv`` beside ``OpenMind/``
nnssl       ``pretrain_data.json``
bids        a BIDS data set, or a folder of several
folder      NIfTI, NRRD and MGH files and DICOM series at any depth
datalist    MONAI datalist JSON
==========  =======================================================================================

All but ``folder`` with DICOM, whose series are told apart by their headers, are read from metadata and names alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ....errors import DataError, SettingsError
from ....paths import as_path
from .base import Found, Polarity, inverted
from .bids import bids_roots, read_bids
from .folder import read_folder
from .nnssl import INDEX, read_nnssl
from .openmind import TABLE, read_openmind

__all__ = ["SOURCES", "Found", "Polarity", "detect", "read_source"]

SOURCES = ("openmind", "nnssl", "bids", "folder", "datalist")
_START = 2**16


def detect(path: str | Path) -> str:
    """Return the source that a file or folder is.

    Raises:
        DataError: if it is not there or not clear.
    """
    place = as_path(path)
    if place.is_dir():
        there = [name for name, file in (("openmind", TABLE), ("nnssl", INDEX)) if os.path.isfile(place / file)]
        if len(there) > 1:
            raise DataError(f"{place} holds both {TABLE} and {INDEX}; say which with --source openmind or nnssl")
        return there[0] if there else "bids" if bids_roots(place) else "folder"
    if not place.is_file():
        raise DataError(f"{place} cannot be read: there is no such file or folder; check the path")
    with open(place, "rb") as stream:
        start = stream.read(_START).decode("utf-8", "replace")
    if place.suffix.lower() == ".json":
        keys = re.findall(r'"(collection_name|collection_index|datasets|training|validation|test)"\s*:', start)
        return "nnssl" if keys and keys[0] not in ("training", "validation", "test") else "datalist"
    if "image_path" in start.split("\n", 1)[0]:
        return "openmind"
    raise DataError(
        f"{place} is neither OpenMind's table (a column image_path), nor nnssl's {INDEX}, nor a MONAI datalist; "
        f"if it is, say which with --source {', '.join(SOURCES)}"
    )


def read_source(path: str | Path, source: str | None = None, *, mask_polarity: Polarity = "as_named") -> Found:
    """List the cases of a file or folder; a datalist is not among these, see ``read_datalist``.

    Args:
        path: file or folder.
        source: which of ``SOURCES`` it is; found out if not given.
        mask_polarity: of a source's masks: ``as_named`` or ``inverted``, for all or for each.

    Raises:
        DataError: if it cannot be read or nothing is there.
        SettingsError: if the source or the polarity is unknown.
    """
    place = as_path(path)
    source = source or detect(place)
    inverted(mask_polarity)
    if source == "openmind":
        found = read_openmind(place, mask_polarity=mask_polarity)
    elif source == "nnssl":
        found = read_nnssl(place, mask_polarity=mask_polarity)
    elif source == "bids":
        found = read_bids(place)
    elif source == "folder":
        found = read_folder(place)
    else:
        raise SettingsError(f"source is {source!r}; it must be one of {', '.join(SOURCES)}")
    if not found.cases:
        more = "".join(f"; {sentence}" for sentence in found.left_out.told(1))
        raise DataError(f"{place} as {source} holds no volume{more}")
    return found
