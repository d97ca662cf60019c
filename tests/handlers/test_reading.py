# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Volumes that cannot be read while a run goes on: told once, listed at the end, not too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine

from common.data import CropDataset, EpochSampler, StoreSettings, VolumeStore, crop_loader
from common.errors import DataError, sentence
from common.handlers import UnreadableVolumes
from common.views import SpatialCrop


def stored(images: Path, root: Path, broken: int) -> tuple[CropDataset, list[str]]:
    """Prepare four volumes and delete the first ``broken`` of them; return the data and the deleted ones."""
    cases = [{"image": str(path)} for path in sorted(images.glob("*.nii.gz"))]
    table, _ = VolumeStore(root, StoreSettings()).prepare(cases)
    gone = [table[index].path for index in range(broken)]
    for path in gone:
        Path(path).unlink()
    return CropDataset(table, spatial=SpatialCrop(8), seed=0), gone


def train(
    data: CropDataset, file: Path, *, most: float, epochs: int = 2, num_workers: int = 0, done: int = 0
) -> UnreadableVolumes:
    sampler = EpochSampler(steps=8, batch_size=4)
    engine = Engine(lambda engine, batch: {"loss": len(batch["region"])})
    handler = UnreadableVolumes(file, most=most)
    handler.attach(engine)
    engine.state.epoch = done
    engine.state.max_epochs = epochs
    engine.run(crop_loader(data, sampler=sampler, num_workers=num_workers), max_epochs=epochs)
    return handler


@pytest.mark.parametrize("num_workers", [0, 2])
def test_they_are_told_once_and_listed(
    num_workers: int, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, (gone,) = stored(images, tmp_path / "store", 1)
    file = tmp_path / "unreadable.json"
    file.write_text('[{"volume": "of an earlier run"}]')
    train(data, file, most=0.9, num_workers=num_workers)
    out = capsys.readouterr().out
    assert out.count(f"{gone} (made from {images / 'case_0.nii.gz'}) cannot be read (FileNotFoundError") == 1
    assert "1 volume(s) could not be read and were replaced" in out
    (entry,) = json.loads(file.read_text())
    assert (entry["volume"], entry["source"]) == (gone, str(images / "case_0.nii.gz"))
    assert 5 < entry["samples"] < 40, "a quarter of 64, and some of their replacements"


def test_a_run_without_any_writes_no_file(images: Path, tmp_path: Path) -> None:
    data, _ = stored(images, tmp_path / "store", 0)
    train(data, tmp_path / "unreadable.json", most=0.0)
    assert not (tmp_path / "unreadable.json").exists()


def test_too_many_stop_the_run(images: Path, tmp_path: Path) -> None:
    data, _ = stored(images, tmp_path / "store", 2)
    with pytest.raises(DataError, match=r"of 1\d\d volumes drawn cannot be read, more than 10%.*verify STORE"):
        train(data, tmp_path / "unreadable.json", most=0.1, epochs=10)


def test_a_store_that_is_gone_stops_in_a_sentence(images: Path, tmp_path: Path) -> None:
    data, _ = stored(images, tmp_path / "store", 4)
    with pytest.raises(DataError) as caught:
        train(data, tmp_path / "unreadable.json", most=0.1, num_workers=1)
    told = sentence(caught.value)
    assert told is not None
    assert told.startswith("20 prepared volumes drawn one after the other cannot be read, the last ")
    assert told.endswith("is the disk of the store there?")


@pytest.mark.long
def test_a_resumed_run_keeps_what_was_listed(images: Path, tmp_path: Path) -> None:
    data, (gone,) = stored(images, tmp_path / "store", 1)
    file = tmp_path / "unreadable.json"
    train(data, file, most=0.9, epochs=1)
    before: Any = json.loads(file.read_text())
    handler = UnreadableVolumes(file)
    engine = Engine(lambda engine, batch: None)
    engine.state.epoch = 1
    handler._start(engine)
    assert handler.listed == {gone: before[0]}
