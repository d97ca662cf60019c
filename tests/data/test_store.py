# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import CropDataset, EpochSampler, StoreSettings, VolumeStore, crop_loader, prepare_pretraining_data
from common.data.preparing import estimates
from common.errors import DataError, SettingsError
from common.transforms import volume_preprocessing
from common.views import SpatialCrop

from ..conftest import ROOT, blobs, write_volume
from ..starts import python


def cases(folder: Path) -> list[dict[str, str]]:
    return [{"image": str(path)} for path in sorted(folder.glob("*.nii.gz"))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 1e-6)])
def test_the_store_holds_the_preprocessed_volume(images: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings(spacing_mm=0.8, dtype=dtype))
    volumes, problems = store.prepare(cases(images))
    assert not problems
    expected = volume_preprocessing("image", spacing_mm=0.8)(cases(images)[0])["image"][0].numpy()
    assert volumes[0].shape == expected.shape
    np.testing.assert_allclose(volumes[0].read((0, 0, 0), expected.shape), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        volumes[0].read((3, 4, 5), (9, 8, 7)), expected[3:9, 4:8, 5:7], rtol=tolerance, atol=tolerance
    )
    meta = json.loads(Path(volumes[0].path).with_suffix(".json").read_text())
    assert meta["source"]["path"] == str((images / "case_0.nii.gz").resolve())


def test_only_the_touched_chunks_are_read(tmp_path: Path) -> None:
    path = write_volume(
        tmp_path / "big.nii.gz", np.random.default_rng(0).standard_normal((200, 200, 200)).astype(np.float32)
    )
    store = VolumeStore(tmp_path / "store", StoreSettings())
    (volume,), _ = store.prepare([{"image": str(path)}])

    def bytes_read() -> int:
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    before = bytes_read()
    volume.read((0, 0, 0), (60, 60, 60))
    assert bytes_read() - before < os.path.getsize(volume.path) / 10


def test_prepared_volumes_are_not_prepared_again_but_changed_files_are(images: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    first, _ = store.prepare(cases(images))
    times = [os.stat(volume.path).st_mtime_ns for volume in first]
    again, _ = store.prepare(cases(images))
    assert [os.stat(volume.path).st_mtime_ns for volume in again] == times
    write_volume(images / "case_0.nii.gz", blobs(9)[0])
    changed, _ = store.prepare(cases(images))
    assert changed[0].path != first[0].path
    assert changed[1:] == first[1:]
    other, _ = VolumeStore(tmp_path / "store", StoreSettings(spacing_mm=2.0)).prepare(cases(images))
    assert {v.path for v in other}.isdisjoint({v.path for v in changed})


@pytest.mark.long
def test_processes_give_the_same_store_as_one(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "_FEW_VOXELS", 0)
    one, _ = VolumeStore(tmp_path / "one", StoreSettings()).prepare(cases(images))
    many, _ = VolumeStore(tmp_path / "many", StoreSettings()).prepare(cases(images), num_workers=2)
    for a, b in zip(one, many, strict=True):
        assert Path(a.path).read_bytes() == Path(b.path).read_bytes()


def _prepare(root: str, images: list[dict[str, str]]) -> None:
    VolumeStore(root, StoreSettings()).prepare(images)


def test_two_processes_on_one_store(images: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_prepare, args=(str(tmp_path / "store"), cases(images))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(list((tmp_path / "store").glob("*.b2nd"))) == 4
    assert list((tmp_path / "store").glob(".*")) == []


def test_connected_processes_prepare_in_orders_of_their_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [{"image": str(path)} for path in sorted(images.iterdir())]
    begun: dict[int, list[str]] = {0: [], 1: []}
    prepare = VolumeStore.prepare_one
    for rank, order in begun.items():
        for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": 2}.items():
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)

        def counted(store: VolumeStore, case: dict[str, str], order: list[str] = order) -> object:
            order.append(case["image"])
            return prepare(store, case)

        monkeypatch.setattr(VolumeStore, "prepare_one", counted)
        volumes, _ = VolumeStore(tmp_path / f"store_{rank}", StoreSettings()).prepare(cases)
        assert [volume.source for volume in volumes] == [case["image"] for case in cases]
    assert sorted(begun[0]) == sorted(begun[1]) == [case["image"] for case in cases]
    assert begun[0] != begun[1]


def test_a_kill_in_the_middle_loses_nothing_and_a_rerun_goes_on(tmp_path: Path) -> None:
    for index in range(30):
        write_volume(tmp_path / "images" / f"case_{index:02}.nii.gz", blobs(index, (40, 40, 40))[0])
    program = (
        "import sys; from common.data import *;"
        "VolumeStore(sys.argv[1], StoreSettings(spacing_mm=0.5)).prepare(pretraining_lists(sys.argv[2])['training'])"
    )
    arguments = [python(), "-c", program, str(tmp_path / "store"), str(tmp_path / "images")]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "store").glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = VolumeStore(tmp_path / "store", StoreSettings(spacing_mm=0.5))
    done = [v for case in cases(tmp_path / "images") if (v := store.get(case)) is not None]
    assert 3 <= len(done) < 25
    for volume in done:
        assert np.isfinite(volume.read((0, 0, 0), volume.shape)).all()
    for leftover in (tmp_path / "store").glob(".*"):
        os.utime(leftover, (0, 0))
    volumes, problems = store.prepare(cases(tmp_path / "images"))
    assert len(volumes) == 30
    assert not problems
    assert list((tmp_path / "store").glob(".*")) == []


def test_a_volume_cut_short_in_the_store_is_prepared_again(images: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    (first, *_), _ = store.prepare(cases(images))
    Path(first.path).write_bytes(Path(first.path).read_bytes()[:100])
    assert store.get(cases(images)[0]) is None
    (again, *_), _ = store.prepare(cases(images))
    assert np.isfinite(again.read((0, 0, 0), again.shape)).all()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a tiny disk needs root")
def test_a_full_disk_stops_with_a_sentence_and_keeps_what_is_done(tmp_path: Path) -> None:
    for index in range(6):
        noise = np.random.default_rng(index).standard_normal((64, 64, 64)).astype(np.float32)
        write_volume(tmp_path / "images" / f"case_{index}.nii.gz", noise)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this system does not let tests mount a disk")
    try:
        with pytest.raises(OSError, match="No space left"):
            prepare_pretraining_data(str(tmp_path / "images"), store_dir=str(disk), output_dir=str(tmp_path))
        kept = list(disk.glob("*.b2nd"))
        assert kept
        assert list(disk.glob(".*")) == []
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        data = prepare_pretraining_data(str(tmp_path / "images"), store_dir=str(disk), output_dir=str(tmp_path))
        assert sum(map(len, data.values())) == 6
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_bad_volumes_are_listed_and_skipped_or_fatal(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "text.nii.gz").write_text("no image")
    arguments = {"store_dir": str(tmp_path / "store"), "output_dir": str(tmp_path / "out")}
    data = prepare_pretraining_data(str(images), **arguments)
    assert sum(map(len, data.values())) == 4
    assert "text.nii.gz" in capsys.readouterr().out
    assert "text.nii.gz" in json.loads((tmp_path / "out" / "skipped.json").read_text())[0]
    with pytest.raises(DataError, match=r"text\.nii\.gz"):
        prepare_pretraining_data(str(images), **arguments, strict=True)


def test_a_store_that_cannot_be_made_and_a_wrong_dtype(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--store_dir"):
        VolumeStore(tmp_path / "file" / "store", StoreSettings())
    with pytest.raises(DataError, match="float16 or float32"):
        StoreSettings(dtype="int8")


def test_one_spacing_has_one_spelling(images: Path, tmp_path: Path) -> None:
    spellings = [1, 1.0, [1, 1.0, 1]]
    names = {
        VolumeStore(tmp_path, StoreSettings(spacing_mm=s)).location({"image": str(images / "case_0.nii.gz")})
        for s in spellings
    }
    assert len(names) == 1


def test_samples_do_not_depend_on_workers_or_accumulation(images: Path, tmp_path: Path) -> None:
    volumes, _ = VolumeStore(tmp_path / "store", StoreSettings()).prepare(cases(images))
    dataset = CropDataset(volumes, spatial=SpatialCrop(8), seed=5)

    def keys(epoch: int, num_workers: int = 0, **options: int) -> list[tuple[int, int, int]]:
        sampler = EpochSampler(steps=3, batch_size=4, **options)
        loader = crop_loader(dataset, sampler=sampler, num_workers=num_workers)
        sampler.set_epoch(epoch)
        batches = list(loader)
        flat = [
            (key, region.sum().item())
            for batch in batches
            for key, region in zip(batch["key"], batch["region"], strict=True)
        ]
        return sorted(flat)

    assert keys(1) == keys(1, num_workers=2) == keys(1, accumulation_steps=2)
    assert keys(1) != keys(2)
    with pytest.raises(SettingsError, match="multiple of 3"):
        EpochSampler(steps=1, batch_size=4, accumulation_steps=3)
