# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""One bit changed in files that runs leave for later ones: refused by name, made anew, or nothing else is read.

Images are in tests/transforms, stores in tests/data, weights and their JSON in tests/weights. What people write
(datalists, tables, configs) has no checksum: a change that leaves it readable is read as it stands.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.data.identity import Origins, identity_of
from common.data.listing.datalists import read_datalist
from common.data.prediction import pending_cases
from common.engines.features import FeatureFolder, read_features
from common.errors import DataError, SettingsError
from common.files import read_content, write_record
from common.tables import read_table
from tools.studies.results import read_json, read_results

from .conftest import ROOT, blobs, write_volume
from .studies.synthetic import write_study
from .weights.test_damage import flipped

FLIPS = 80
AGAIN = "made again"  # what was made is not taken for what is asked for

Made = tuple[Path, Callable[[], Any]]


def _read(function: Callable[[], Any]) -> tuple[Any, str]:
    """Return what is read, or the sentence that says why nothing is."""
    try:
        return function(), ""
    except (DataError, SettingsError) as error:
        return None, str(error)


def _features(folder: Path) -> FeatureFolder:
    cases = [{"image": str(folder.parent / "images" / f"c{index}.nii.gz")} for index in range(3)]
    return FeatureFolder(cases, output_dir=str(folder), pretrained="", from_scratch=True, settings={"stages": [3]})


def _embedded(tmp_path: Path) -> Path:
    for index in range(3):
        write_volume(tmp_path / "images" / f"c{index}.nii.gz", blobs(index)[0])
    folder = _features(tmp_path / "out")
    for index, case in enumerate(folder.pending):
        vector = np.random.default_rng(index).standard_normal(6).astype(np.float32)
        folder.write(case, SimpleNamespace(vector=vector, stages={3: vector}, dense=None), images=identity_of(case))  # type: ignore[arg-type]
    again = _features(tmp_path / "out")
    again.finish(columns=[{"stage": 3, "channel": index} for index in range(6)], problems={})
    return tmp_path / "out"


def table_of_features(tmp_path: Path) -> Made:
    folder = _embedded(tmp_path)
    return folder / "features.csv", lambda: _plain(read_features(folder))


def about_features(tmp_path: Path) -> Made:
    folder = _embedded(tmp_path)
    return folder / "features.json", lambda: _plain(read_features(folder))


def _plain(found: tuple[list[str], np.ndarray]) -> list[Any]:
    return [found[0], found[1].tolist()]


def features(tmp_path: Path) -> Made:
    folder = _embedded(tmp_path)
    file = folder / "c1.npz"

    def read() -> Any:
        if _features(folder).pending:
            return AGAIN
        with np.load(file, allow_pickle=False) as content:
            return content["embedding"].tolist()

    return file, read


def made_of(tmp_path: Path) -> Made:
    """Predictions of images that are others now: none may be kept."""
    cases = []
    for index in range(3):
        file = write_volume(tmp_path / "images" / f"c{index}.nii.gz", blobs(index)[0])
        cases.append({"image": str(file)})
        write_volume(tmp_path / "out" / f"c{index}.nii.gz", blobs(index)[1])
        Origins(tmp_path / "out").note([f"c{index}.nii.gz"], identity_of(cases[-1]), {"overlap": 0.5})
    for index in range(3):
        write_volume(tmp_path / "images" / f"c{index}.nii.gz", blobs(index + 3)[0])
    settings = {"overlap": 0.5}
    return tmp_path / "out" / "made_of.jsonl", lambda: [
        case["image"] for case in pending_cases(cases, output_dir=str(tmp_path / "out"), settings=settings)
    ]


def _study(tmp_path: Path) -> Path:
    gains = {"mae_resenc_l": 0.1, "scratch_resenc_l": 0.0}
    folder = write_study(tmp_path, gains=gains, data_sets={"balls": {}}, folds=1, seeds=1, cases=3)
    for file in [folder / "study.json", *folder.rglob("result.json"), *folder.rglob("run.json")]:
        write_record(json.loads(file.read_text("utf-8")), file)  # as a study writes them
    return folder


def result_of_a_study(tmp_path: Path) -> Made:
    folder = _study(tmp_path)
    file = sorted(folder.rglob("result.json"))[0]

    def read() -> Any:
        found = read_results(folder)
        if len(found.finished) < 2:
            (told,) = found.failed.values()
            assert "result.json is not as it was written; run the study again" in told
            return AGAIN
        return {name: _of(names[name], one) for name, one in found.finished.items()}

    names = {name: list(one) for name, one in read_results(folder).finished.items()}
    return file, read


def run_of_a_study(tmp_path: Path) -> Made:
    file = sorted(_study(tmp_path).rglob("run.json"))[0]
    names = list(read_json(file) or {})
    return file, lambda: _of(names, read_json(file) or AGAIN)


def _of(names: list[str], found: Any) -> Any:
    """Return what is called so: where the name of the checksum itself is damaged, it is one more entry."""
    return {name: found[name] for name in names} if isinstance(found, dict) else found


def study(tmp_path: Path) -> Made:
    folder = _study(tmp_path)
    names = list(read_results(folder).about)
    return folder / "study.json", lambda: [_of(names, read_results(folder).about), read_results(folder).finished]


@pytest.mark.parametrize(
    "make", [table_of_features, about_features, features, made_of, result_of_a_study, run_of_a_study, study]
)
def test_a_changed_bit_is_never_used(make: Callable[[Path], Made], tmp_path: Path) -> None:
    file, read = make(tmp_path)
    right, content, rng = read(), file.read_bytes(), np.random.default_rng(0)
    found = 0
    for _ in range(FLIPS):
        file.write_bytes(flipped(content, rng))
        after, told = _read(read)
        assert told or after in (AGAIN, right)
        assert not told or str(file.parent) in told
        found += bool(told) or after == AGAIN
    assert make is made_of or found > FLIPS / 2


@pytest.mark.parametrize("name", ["list.json", "table.csv", "config.json", "history.json"])
def test_what_people_write_is_read_as_it_stands_or_refused_by_name(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "list.json":
        cases = [{"image": f"c{index}.nii.gz", "label": f"l{index}.nii.gz"} for index in range(3)]
        file.write_text(json.dumps({"training": cases, "validation": cases[:1]}), "utf-8")
    elif name == "config.json":
        shutil.copyfile(ROOT / "bundles" / "mae_resenc_l" / "configs" / "metadata.json", file)
    elif name == "history.json":
        history = [{"epoch": epoch, "train_loss": 1 / (1 + epoch), "val_loss": 0.5, "lr": 1e-3} for epoch in range(9)]
        file.write_text(json.dumps(history, indent=2), "utf-8")
    else:
        file.write_text("case,diagnosis\n" + "".join(f"c{index},{'ill' if index else 'well'}\n" for index in range(9)))

    def texts() -> list[str]:
        if name == "table.csv":
            return [text for _, row in read_table(file) for text in row.values()]
        if name != "list.json":
            return re.findall(r"[\w.]+", json.dumps(read_content(file), ensure_ascii=False))
        found = read_datalist(file, tmp_path)
        return [text.removeprefix(f"{tmp_path}/") for part in found.values() for case in part for text in case.values()]

    content, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(FLIPS):
        file.write_bytes(flipped(content, rng))
        after, told = _read(texts)
        assert told or after is not None
        assert not told or name in told
        refused += bool(told)
        if name in ("list.json", "table.csv"):
            assert told or all(text in file.read_text("utf-8") for text in after)
    assert refused > FLIPS / 8
