# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which labelled cases a pre-training is tried on, and how they are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...data import StoredVolume, StoreSettings, VolumeStore
from ...data.cases import LABEL, Case, images_of
from ...errors import SettingsError

__all__ = ["ProbeSource"]


@dataclass(frozen=True)
class ProbeSource:
    """Labelled cases: label maps beside their images, or a table with a class or a number for each.

    Attributes:
        data: folder of images, or a datalist; none if empty.
        labels: names of the classes of the label maps, as in fine-tuning; None takes every value as a class.
        table: CSV with a column ``case``.
        target: its column of classes or numbers; None for label maps.
        group: its column of what stays on one side of the split, such as the patient.
        cases: how many are looked at; None for 16 with label maps and 64 with a table.
        store_dir: where they are prepared, as the volumes to learn from.
        spacing_mm: of the store.
        reorient: of the store.
        store_dtype: of the store.
        num_workers: processes that prepare them.
        seed: of which cases are looked at, and of the split.

    Raises:
        SettingsError: if settings are told that do not go together.
    """

    data: str = ""
    labels: Any = None
    table: str | None = None
    target: str | None = None
    group: str | None = None
    cases: int | None = None
    store_dir: str = "store"
    spacing_mm: float | Sequence[float] | None = 1.0
    reorient: bool = True
    store_dtype: str = "float16"
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        told = [name for name in ("labels", "table", "target", "group", "cases") if getattr(self, name) is not None]
        if told and not self.data:
            raise SettingsError(f"probe_{told[0]} is told, but no labelled cases; add --probe_data FOLDER")
        if self.target is not None and self.table is None:
            raise SettingsError(f"probe_target is {self.target!r}, a column of no table; add --probe_table FILE.csv")
        if self.target is not None and self.labels is not None:
            raise SettingsError("probe_labels is of label maps, and probe_target of a table; leave one of them out")
        if self.table is not None and self.target is None and self.group is None:
            raise SettingsError(f"probe_table is {self.table}, but not which of its columns; add --probe_target COLUMN")
        if self.group is not None and self.table is None:
            raise SettingsError(f"probe_group is {self.group!r}, a column of no table; add --probe_table FILE.csv")
        if self.cases is not None and (type(self.cases) is not int or self.cases < 2):
            raise SettingsError(f"probe_cases is {self.cases!r}; it must be a whole number from 2")

    @property
    def folder(self) -> str:
        """The folder of the cases, empty if they are in a list."""
        return "" if self.datalist else self.data

    @property
    def datalist(self) -> str | None:
        """The list of the cases, None if they are in a folder."""
        return self.data if self.data.endswith(".json") else None

    def prepared(self, cases: Sequence[Case], *, maps: bool) -> list[tuple[Case, StoredVolume]]:
        """Return cases with their prepared volumes; those that cannot be used are told and left out.

        Args:
            cases: with ``image``, and ``label`` where it is used.
            maps: prepare the label maps too.

        Raises:
            DataError: if none can be used.
        """
        settings = StoreSettings(spacing_mm=self.spacing_mm, reorient=self.reorient, dtype=self.store_dtype)
        keys = ("image", "name", *((LABEL,) if maps else ()))
        plain = [{key: case[key] for key in keys if key in case} for case in cases]
        volumes, _ = VolumeStore(self.store_dir, settings).prepare(plain, num_workers=self.num_workers)
        by_source = {volume.source: volume for volume in volumes}
        found = ((case, by_source.get(images_of(case)[0])) for case in cases)
        return [(case, volume) for case, volume in found if volume is not None]
