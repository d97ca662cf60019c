# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The features of one encoder in a folder: one file for each case, and their table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ...data.cases import Case, case_name, images_of
from ...data.identity import same_images
from ...errors import DataError, SettingsError, WeightsError
from ...files import read_record, replace_file, sha256, write_record
from ...paths import as_path, check_names, file_name, output_file
from ...tables import table_rows, write_table
from ...weights.missing import encoder_remedy
from ...weights.receipt import CAVEAT
from .provenance import provenance_of, versions

if TYPE_CHECKING:
    from .embedder import Embedding

__all__ = ["FROZEN_CAVEAT", "TABLE", "FeatureFolder", "read_features"]

FROZEN_CAVEAT = (
    "Frozen features are weak for segmentation: 55 against 76 Dice in the study's comparison of schedules. Judge what "
    "they tell about your own question with tools/probe.py."
)
TABLE, ABOUT = "features.csv", "features.json"


class FeatureFolder:
    """The features of one encoder in one folder: which are there, which are to be made, and their table.

    ``<case>.npz`` holds ``embedding`` (float32), ``stage_<index>`` where several stages are joined, ``dense`` (float16)
    and ``affine`` where asked for, and ``provenance`` (JSON); all load with ``allow_pickle=False``. Features of other
    weights or settings are never mixed with these.

    Args:
        cases: to embed.
        output_dir: the folder.
        pretrained: weights of the encoder.
        from_scratch: it has none.
        settings: that decide what the features are.
        overwrite: make everything anew.

    Attributes:
        pending: cases that are not there yet.
        kept: how many are.

    Raises:
        DataError: if two cases have one name, or there is a case of the same name from another file.
        SettingsError: if the folder holds features of other weights or settings.
        WeightsError: if there are no weights.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        output_dir: str,
        pretrained: str,
        from_scratch: bool = False,
        settings: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        if not from_scratch and not as_path(pretrained).is_file():
            raise WeightsError(
                f"there is no pre-trained encoder {pretrained}; {encoder_remedy(pretrained)}, or look at a random "
                "encoder with --from_scratch true"
            )
        check_names(map(case_name, cases))
        self.folder = as_path(output_dir)
        self.identity: dict[str, Any] = json.loads(
            json.dumps(
                {"weights_sha256": None if from_scratch else sha256(as_path(pretrained)), "settings": dict(settings)}
            )
        )
        self.weights = None if from_scratch else str(as_path(pretrained).absolute())
        self.pending: list[Case] = []
        self.strangers: list[str] = []
        there = {self._key(path): provenance_of(path) for path in sorted(self.folder.rglob("*.npz"))}
        listed = {file_name(case_name(case)): case for case in cases}
        for key, about in there.items():
            other = about is not None and self._differs(about)
            if other and overwrite and key not in listed:
                self.strangers.append(key)
            elif other and not overwrite:
                raise SettingsError(
                    f"{self.folder / key}.npz was made with {other}; give another --output_dir, or redo everything "
                    "there with --overwrite true"
                )
        seen: dict[str, str] = {}
        untold = 0
        for key, case in listed.items():
            about = None if overwrite else there.get(key)
            untold += about is not None and not about.get("images")
            if about is not None and _is_of(about, case, seen, otherwise=about["source"] == images_of(case)):
                continue
            if about is not None and about["source"] != images_of(case):
                raise DataError(
                    f"{self.folder / key}.npz was made of {about['source'][0]}, not of {images_of(case)[0]}; rename "
                    "one, give another --output_dir, or redo it with --overwrite true"
                )
            self.pending.append(case)
        self._seen, self._listed = seen, listed
        if untold:
            tqdm.write(
                f"nothing tells of which content {untold} embedding(s) are that an earlier version wrote: redone"
            )
        self.kept = len(listed) - len(self.pending)
        if self.kept:
            tqdm.write(
                f"{self.kept} of {len(listed)} embeddings are in {self.folder} already and are kept; "
                "--overwrite true redoes them"
            )

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix().removesuffix(".npz")

    def _differs(self, about: Mapping[str, Any]) -> str:
        """Return in words how features differ from those of this run, empty if they do not."""
        theirs, ours = about["settings"], self.identity["settings"]
        wrong = [
            f"{name} {theirs.get(name)}, here {ours.get(name)}"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
        if about["weights_sha256"] != self.identity["weights_sha256"]:
            told = (
                str(value)[:12] if value else "none"
                for value in (about["weights_sha256"], self.identity["weights_sha256"])
            )
            wrong.insert(0, "other weights (sha256 {}, here {})".format(*told))
        return "; ".join(wrong[:3])

    def write(self, case: Case, embedding: Embedding, *, images: list[dict[str, Any]]) -> None:
        """Write the file of one case, whose images had this identity when they were read, whole or not at all."""
        arrays: dict[str, np.ndarray] = {"embedding": embedding.vector}
        if len(embedding.stages) > 1:
            arrays |= {f"stage_{stage}": values for stage, values in embedding.stages.items()}
        if embedding.dense is not None and embedding.affine is not None:
            arrays |= {"dense": embedding.dense, "affine": embedding.affine}
        about = {
            "case": case_name(case),
            "source": images_of(case),
            "images": images,
            "weights": self.weights,
            **self.identity,
            "versions": versions(),
        }
        arrays["provenance"] = np.array(json.dumps(about))

        def write(temporary: str) -> None:
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

        replace_file(output_file(self.folder, case_name(case), ".npz"), write)

    def finish(self, *, columns: Sequence[Mapping[str, Any]], problems: Mapping[str, str]) -> int:
        """Write the table of everything in the folder, and where it comes from.

        Args:
            columns: what each number is.
            problems: of cases that were skipped, by name.

        Returns:
            how many rows it has.
        """
        rows, vectors = [], []
        changed: list[str] = []
        skipped = {file_name(name) for name in problems}
        for path in sorted(self.folder.rglob("*.npz")):
            about, key = provenance_of(path), self._key(path)
            if about is None or key in self.strangers or key in skipped:
                continue
            if key not in self._listed and not _is_of(about, {"image": about["source"]}, self._seen, otherwise=True):
                changed.append(about["case"])
                continue
            with np.load(path, allow_pickle=False) as content:
                vectors.append(content["embedding"])
            case = self._listed.get(key, {"image": about["source"]})
            rows.append([about["case"], ";".join(images_of(case))])
        digits = max(3, len(str(len(columns) - 1)))
        names = [f"f{index:0{digits}d}" for index in range(len(columns))]
        numbers = ([*row, *vector] for row, vector in zip(rows, vectors, strict=True))
        write_table(self.folder / TABLE, ["case", "source", *names], numbers)
        receipt = self.folder / "weights_receipt.json"
        write_record(
            {
                "weights": self.weights,
                **self.identity,
                "receipt": read_record(receipt, error=WeightsError) if self.weights and receipt.is_file() else None,
                "versions": versions(),
                "cases": len(rows),
                "table_sha256": sha256(self.folder / TABLE),
                "skipped": dict(problems),
                "columns": {name: dict(column) for name, column in zip(names, columns, strict=True)},
                "caveat": [CAVEAT, FROZEN_CAVEAT],
            },
            self.folder / ABOUT,
        )
        if self.strangers:
            tqdm.write(
                f"{len(self.strangers)} file(s) there, such as {self.strangers[0]}.npz, are of other weights or "
                "settings and are not in the table; remove them"
            )
        if changed:
            tqdm.write(
                f"{len(changed)} embedding(s) there, such as that of {changed[0]}, are of images that were changed "
                "since, or nothing tells of which content: they are not in the table; embed these images again"
            )
        if len(vectors) > 1 and not np.ptp(np.stack(vectors), axis=0).any():
            tqdm.write("warning: all embeddings are the same; choose finer --stages, or check the weights")
        return len(rows)


def _is_of(about: Mapping[str, Any], case: Case, seen: dict[str, str], *, otherwise: bool) -> bool:
    """Return whether features are those of the images of a case, ``otherwise`` where these are gone."""
    try:
        return same_images(about.get("images"), case, seen)
    except OSError:
        return otherwise


def read_features(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Read a table of features.

    Args:
        path: of ``features.csv``, or of the folder that holds it.

    Returns:
        names of the cases, and their features ``(cases, E)`` float32.

    Raises:
        DataError: if it is missing, damaged, or holds something else.
    """
    table = as_path(path)
    table = table / TABLE if table.is_dir() else table
    if not table.is_file():
        raise DataError(f"there is no table of features {table}; make one with a bundle's features config")
    about = table.with_name(ABOUT)
    wanted = read_record(about).get("table_sha256") if table.name == TABLE and about.is_file() else None
    if wanted not in (None, sha256(table)):
        raise DataError(
            f"{table} is not the table that {about} is about: it was changed, damaged, or a run was cut; run the "
            f"features config again, or move {about.name} away"
        )
    rows = [list(row.items()) for _, row in table_rows(table, ("case", "source"), exact=True)]
    if not rows or len(rows[0]) < 3 or [name for name, _ in rows[0][:2]] != ["case", "source"]:
        raise DataError(f"{table} is no table of features: it needs the columns case, source, f000, ... and a case")
    try:
        values = np.array([[float(text) for _, text in row[2:]] for row in rows], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{table} has texts or nothing among its numbers ({error}); make it anew") from error
    names = [row[0][1] for row in rows]
    bad = [name for name, row in zip(names, values, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise DataError(f"{table} holds NaN or infinite features of {bad[0]}; make it anew")
    if len(set(names)) < len(names):
        raise DataError(f"{table} has several rows of {Counter(names).most_common(1)[0][0]}; make it anew")
    return names, values
