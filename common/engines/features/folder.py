# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The features of one encoder in a folder: one file for each case, and their table."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ...data.cases import Case, case_name, images_of
from ...errors import DataError, SettingsError, WeightsError
from ...files import read_record, replace_file, sha256, write_json
from ...weights.missing import encoder_remedy
from ...weights.receipt import CAVEAT
from .provenance import provenance_of, stamp_of, versions

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
        if not from_scratch and not Path(pretrained).is_file():
            raise WeightsError(
                f"there is no pre-trained encoder {pretrained}; {encoder_remedy(pretrained)}, or look at a random "
                "encoder with --from_scratch true"
            )
        twice = [name for name, count in Counter(map(case_name, cases)).items() if count > 1]
        if twice:
            raise DataError(f"several images are called {twice[0]}, and their features would replace each other")
        self.folder = Path(output_dir)
        self.identity: dict[str, Any] = json.loads(
            json.dumps({"weights_sha256": None if from_scratch else sha256(pretrained), "settings": dict(settings)})
        )
        self.weights = None if from_scratch else str(Path(pretrained).absolute())
        self.pending: list[Case] = []
        self.strangers: list[str] = []
        there = {path.stem: provenance_of(path) for path in sorted(self.folder.glob("*.npz"))}
        listed = {case_name(case): case for case in cases}
        for name, about in there.items():
            other = about is not None and self._differs(about)
            if other and overwrite and name not in listed:
                self.strangers.append(name)
            elif other and not overwrite:
                raise SettingsError(
                    f"{self.folder / name}.npz was made with {other}; give another --output_dir, or redo everything "
                    "there with --overwrite true"
                )
        for name, case in listed.items():
            about = None if overwrite else there.get(name)
            if about is not None and about["source"] != images_of(case):
                raise DataError(
                    f"{self.folder / name}.npz was made of {about['source'][0]}, not of {images_of(case)[0]}; rename "
                    "one, give another --output_dir, or redo it with --overwrite true"
                )
            if about is None or (Path(images_of(case)[0]).exists() and about["source_stamp"] != stamp_of(case)):
                self.pending.append(case)
        self.kept = len(listed) - len(self.pending)
        if self.kept:
            tqdm.write(
                f"{self.kept} of {len(listed)} embeddings are in {self.folder} already and are kept; "
                "--overwrite true redoes them"
            )

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

    def write(self, case: Case, embedding: Embedding, *, stamp: list[list[int]]) -> None:
        """Write the file of one case, whose source had this stamp when it was read, whole or not at all."""
        arrays: dict[str, np.ndarray] = {"embedding": embedding.vector}
        if len(embedding.stages) > 1:
            arrays |= {f"stage_{stage}": values for stage, values in embedding.stages.items()}
        if embedding.dense is not None and embedding.affine is not None:
            arrays |= {"dense": embedding.dense, "affine": embedding.affine}
        about = {
            "case": case_name(case),
            "source": images_of(case),
            "source_stamp": stamp,
            "weights": self.weights,
            **self.identity,
            "versions": versions(),
        }
        arrays["provenance"] = np.array(json.dumps(about))

        def write(temporary: str) -> None:
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

        replace_file(self.folder / f"{case_name(case)}.npz", write)

    def finish(self, *, columns: Sequence[Mapping[str, Any]], problems: Mapping[str, str]) -> int:
        """Write the table of everything in the folder, and where it comes from.

        Args:
            columns: what each number is.
            problems: of cases that were skipped, by name.

        Returns:
            how many rows it has.
        """
        rows, vectors = [], []
        for path in sorted(self.folder.glob("*.npz")):
            about = provenance_of(path)
            if about is None or path.stem in self.strangers or path.stem in problems:
                continue
            with np.load(path, allow_pickle=False) as content:
                vectors.append(content["embedding"])
            rows.append([path.stem, ";".join(about["source"])])
        digits = max(3, len(str(len(columns) - 1)))
        names = [f"f{index:0{digits}d}" for index in range(len(columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "source", *names])
        for row, vector in zip(rows, vectors, strict=True):
            writer.writerow([*row, *(str(value) for value in vector)])  # the shortest text that reads back as float32
        replace_file(self.folder / TABLE, lambda temporary: Path(temporary).write_text(text.getvalue(), "utf-8"))
        receipt = self.folder / "weights_receipt.json"
        write_json(
            {
                "weights": self.weights,
                **self.identity,
                "receipt": read_record(receipt, error=WeightsError) if self.weights and receipt.is_file() else None,
                "versions": versions(),
                "cases": len(rows),
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
        if len(vectors) > 1 and not np.ptp(np.stack(vectors), axis=0).any():
            tqdm.write("warning: all embeddings are the same; choose finer --stages, or check the weights")
        return len(rows)


def read_features(path: str | Path) -> tuple[list[str], np.ndarray]:
    """Read a table of features.

    Args:
        path: of ``features.csv``, or of the folder that holds it.

    Returns:
        names of the cases, and their features ``(cases, E)`` float32.

    Raises:
        DataError: if it is missing, damaged, or holds something else.
    """
    table = Path(path).expanduser()
    table = table / TABLE if table.is_dir() else table
    if not table.is_file():
        raise DataError(f"there is no table of features {table}; make one with a bundle's features config")
    with open(table, newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.reader(stream))
    if len(rows) < 2 or rows[0][:2] != ["case", "source"] or len(rows[0]) < 3:
        raise DataError(f"{table} is no table of features: it needs the columns case, source, f000, ... and a case")
    try:
        values = np.array([[float(text) for text in row[2:]] for row in rows[1:]], dtype=np.float32)
    except ValueError as error:
        raise DataError(
            f"{table} has rows of other lengths or texts among its numbers ({error}); make it anew"
        ) from error
    if values.shape[1] != len(rows[0]) - 2:
        raise DataError(f"{table} has {values.shape[1]} numbers under {len(rows[0]) - 2} names; make it anew")
    names = [row[0] for row in rows[1:]]
    bad = [name for name, row in zip(names, values, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise DataError(f"{table} holds NaN or infinite features of {bad[0]}; make it anew")
    if len(set(names)) < len(names):
        raise DataError(f"{table} has several rows of {Counter(names).most_common(1)[0][0]}; make it anew")
    return names, values
