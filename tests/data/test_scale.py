# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The store at scale: its catalogue, its older layout, kills, writers at the same time, damage."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common.data import CropDataset, StoreSettings, VolumeStore, VolumeTable, prepare_pretraining_data
from common.data.listing.splits import split_by_subject
from common.data.preparing import estimates, filling
from common.data.preparing import volume as preparation
from common.data.preparing.estimates import DiskEstimate, memory_needed
from common.data.preparing.filling import each
from common.data.storing import tables
from common.data.storing.arrays import frame
from common.data.storing.tables import pack
from common.errors import DataError, SettingsError
from common.views import SpatialCrop, reading_stream
from tools.preparing.filling import prepare, verify
from tools.preparing.settings import Prepare, Verify

from ..conftest import ROOT, blobs, write_volume

Case = dict[str, Any]


def listed(folder: Path) -> list[Case]:
    return [{"image": str(path)} for path in sorted(folder.glob("*.nii.gz"))]


def with_mask(folder: Path, mask: np.ndarray | None = None, **more: Any) -> Case:
    """Write a volume and its anatomy mask."""
    image, ball = blobs(0)
    return {
        "image": str(write_volume(folder / "image.nii.gz", image)),
        "anatomy_mask": str(write_volume(folder / "mask.nii.gz", ball if mask is None else mask)),
        **more,
    }


def content(root: Path) -> dict[str, bytes]:
    """Return all files of the volumes of a store."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def forked(function: Callable[[], object]) -> int:
    """Run a function in a child of this process, which needs no imports, and return its id."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


# the catalogue


def test_a_table_gives_what_was_packed_and_its_pickle_is_a_path(tmp_path: Path) -> None:
    rows = [
        ["a-1.b2nd", [1, 2, 3], "/a.nii", {"": 5}, {}, {}],
        ["b-2.b2nd", [4, 5, 6], "/ü.nii", {"": 7, "label": 8}, {"0": 9, "3": 1}, {"3": [0, 1]}],
    ]
    path = tmp_path / "store" / "catalogues" / "x.table"
    path.parent.mkdir(parents=True)
    path.write_bytes(pack([json.dumps(row).encode() for row in rows], ["c is bad"]))
    table = VolumeTable(path)
    assert (len(table), table.problems) == (2, ["c is bad"])
    assert table[1].path == str(tmp_path / "store" / "b-2.b2nd")
    assert (table[1].shape, table[1].source, table[1].masks) == ((4, 5, 6), "/ü.nii", ("label",))
    assert (table[1].values, table[1].places) == ({0: 9, 3: 1}, {3: (0, 1)})
    assert table[-1] == table[1] == list(table)[1] == table[1:][0]
    with pytest.raises(IndexError):
        table[2]
    assert len(pickle.dumps(table)) < 1000
    assert list(pickle.loads(pickle.dumps(table))) == list(table)
    for size in (0, 10, 30, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size]) if size else path.write_bytes(b"")
        with pytest.raises(DataError, match="remove it and run again"):
            VolumeTable(path)
        path.write_bytes(pack([json.dumps(row).encode() for row in rows], ["c is bad"]))


def test_an_opened_list_is_opened_again_without_reading_a_single_json(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    first, _ = store.prepare(listed(images))
    with monkeypatch.context() as patch:
        patch.setattr(VolumeStore, "_row", lambda *_: pytest.fail("a JSON was read"))
        again, _ = store.prepare(listed(images))
    assert list(again) == list(first)
    assert again.path == first.path

    write_volume(images / "case_1.nii.gz", blobs(9)[0])  # a changed source
    changed, _ = store.prepare(listed(images))
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True, True]
    Path(changed[2].path).unlink()  # a lost volume, one cut short
    Path(changed[3].path).write_bytes(Path(changed[3].path).read_bytes()[:50])
    mended, problems = store.prepare(listed(images))
    assert not problems
    assert all(np.isfinite(volume.read((0, 0, 0), volume.shape)).all() for volume in mended)
    (images / "case_0.nii.gz").unlink()
    left, problems = store.prepare([*listed(images), {"image": str(images / "case_0.nii.gz")}])
    assert len(left) == 3
    assert "there is no file" in str(problems[0])


def test_without_a_look_at_the_sources_a_store_is_opened_as_it_was(images: Path, tmp_path: Path) -> None:
    (images / "bad.nii.gz").write_text("no image")
    cases = listed(images)
    store = VolumeStore(tmp_path / "store", StoreSettings())
    first, problems = store.prepare(cases)
    assert len(problems) == 1
    shutil.rmtree(images)
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    moved = VolumeStore(tmp_path / "elsewhere", StoreSettings())
    opened, told = moved.prepare(cases, check_sources=False)
    assert [volume.source for volume in opened] == [volume.source for volume in first]
    assert Path(opened[0].path).parent == tmp_path / "elsewhere"
    assert [str(problem) for problem in told] == [str(problem) for problem in problems]
    with pytest.raises(DataError, match="there is no file"):
        moved.prepare(cases)
    Path(opened[0].path).unlink()
    with pytest.raises(DataError, match="there is no file"):
        moved.prepare(cases, check_sources=False)


def test_a_store_that_cannot_be_written_is_read(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    first, _ = store.prepare(listed(images))
    shutil.rmtree(tmp_path / "store" / "catalogues")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tables, "replace_file", refuse)
    opened, _ = store.prepare(listed(images))
    assert list(opened) == list(first)
    assert list(pickle.loads(pickle.dumps(opened))) == list(first)
    path = opened.path
    assert path.exists()
    del opened
    assert not path.exists()


class _Walk(Dataset[torch.Tensor]):
    """Walk over all volumes, as a long run does in the end, and return the memory of this process alone."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> torch.Tensor:
        assert sum(volume.shape[0] for volume in self.data) == 256 * len(self.data)
        return torch.tensor(psutil.Process().memory_full_info().uss / 2**20)


def synthetic(folder: Path, count: int) -> Path:
    """Write a datalist of tiny files and a store that looks as if they had been prepared."""
    store = VolumeStore(folder / "store", StoreSettings())
    array = frame(np.zeros((4, 4, 4), np.float16))
    entries = []
    for index in range(count):
        source = folder / "data" / f"sub-{index // 3:05}" / f"run-{index % 3}_T1w.nii.gz"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(b"x")
        entries.append({"image": str(source)})
        path = store.location(entries[-1])
        path.write_bytes(array)
        meta = {"layout": 2, "shape": [256, 256, 200], "bytes": len(array), "settings": asdict(store.settings)}
        path.with_suffix(".json").write_text(json.dumps(meta | {"source": {"path": str(source)}}))
    path = folder / "list.json"
    path.write_text(json.dumps({"training": entries[count // 100 :], "validation": entries[: count // 100]}))
    return path


@pytest.mark.parametrize(
    ("count", "seconds", "mebibytes"), [(3000, 5, 40), pytest.param(114_000, 60, 300, marks=pytest.mark.slow)]
)
def test_a_large_store_opens_in_seconds_and_workers_hold_no_copy(
    count: int, seconds: float, mebibytes: float, tmp_path: Path
) -> None:
    datalist = synthetic(tmp_path, count)

    def opened() -> dict[str, VolumeTable]:
        return prepare_pretraining_data(
            "", datalist=str(datalist), store_dir=str(tmp_path / "store"), output_dir=str(tmp_path)
        )

    opened()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.process_time()  # other work on the machine does not count
    data = opened()
    assert time.process_time() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - peak < mebibytes
    assert sum(map(len, data.values())) == count
    assert len(pickle.dumps(data["training"])) < 1000, "what a process that is not forked gets"

    def own(data: Any) -> float:
        return max(float(value) for value in DataLoader(_Walk(data), batch_size=None, num_workers=2))

    table, copied = own(data["training"]), own(list(data["training"]))
    assert table < copied + 2, "no more than a list that was there before the fork"
    if count > 100_000:
        assert table < copied - 10


# the older layout


def layout_1(root: Path, case: Case, settings: StoreSettings) -> Path:
    """Write a volume and its mask as the first layout did: no checksums, no voxels of the anatomy mask."""
    identity: list[object] = [1]
    for key in ("image", "anatomy_mask"):
        source = Path(case[key]).resolve()
        status = source.stat()
        identity += [str(source), status.st_size, status.st_mtime_ns] + ([key] if key != "image" else [])
    identity.append({key: value for key, value in asdict(settings).items() if (key, value) != ("size", None)})
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    root.mkdir()
    path = root / f"image-{digest}.b2nd"
    image, ball = blobs(0)
    arrays = {
        path: np.float16(image).transpose(2, 1, 0),
        path.with_suffix(".anatomy_mask.b2nd"): ball.transpose(2, 1, 0),
    }
    for file, array in arrays.items():
        blosc2.asarray(
            np.ascontiguousarray(array),
            chunks=array.shape,
            blocks=array.shape,
            cparams={"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.BITSHUFFLE]},
            urlpath=str(file),
            mode="w",
        )
    meta = {
        "layout": 1,
        "shape": list(arrays[path].shape),
        "values": {},
        "places": {},
        "bytes": path.stat().st_size,
        "masks": {"anatomy_mask": path.with_suffix(".anatomy_mask.b2nd").stat().st_size},
    }
    path.with_suffix(".json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    return path


def test_a_store_of_the_first_layout_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = with_mask(tmp_path)
    path = layout_1(tmp_path / "store", case, StoreSettings())
    before = content(tmp_path / "store")
    (volume,), _ = VolumeStore(tmp_path / "store", StoreSettings()).prepare([case])
    assert volume.path == str(path)
    assert content(tmp_path / "store") == before, "it was not prepared again"
    image, ball = blobs(0)
    np.testing.assert_array_equal(volume.read((0, 0, 0), volume.shape), np.float16(image).transpose(2, 1, 0))
    voxels = {volume.anatomy_voxel(np.random.default_rng(seed)) for seed in range(20)}
    assert len(voxels) > 10
    assert all(voxel is not None and ball.transpose(2, 1, 0)[voxel] for voxel in voxels)
    verify(Verify(str(tmp_path / "store")))
    assert "1 of an earlier version without checksums" in capsys.readouterr().out


def test_a_later_layout_is_refused(tmp_path: Path) -> None:
    case = with_mask(tmp_path)
    store = VolumeStore(tmp_path / "store", StoreSettings())
    sidecar = Path(store.prepare_one(case).path).with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"layout": 3}))
    with pytest.raises(DataError, match=r"written by a later version of this project .layout 3.*update"):
        store.prepare([case])


# masks


def test_crops_are_centred_on_anatomy(tmp_path: Path) -> None:
    case = with_mask(tmp_path)
    bare = {"image": str(write_volume(tmp_path / "bare.nii.gz", blobs(1)[0]))}
    table, _ = VolumeStore(tmp_path / "store", StoreSettings()).prepare([case, bare])
    crop = SpatialCrop(5, rotation_probability=0, zoom_probability=0, flip_probability=0)
    mask = table[0].read((0, 0, 0), table[0].shape, mask="anatomy_mask")

    def centres(share: float) -> list[float]:
        data = CropDataset(table[:1], spatial=crop, seed=0, anatomy_centred=share)
        draws = [data[1, index]["spatial"][0] for index in range(60)]
        return [float(mask[tuple(np.clip(np.array(draw.low) + 2, 0, np.array(mask.shape) - 1))]) for draw in draws]

    assert np.mean(centres(1.0)) > 0.95
    assert np.mean(centres(0.0)) < 0.3
    assert np.mean(centres(0.0)) < np.mean(centres(0.5)) < np.mean(centres(1.0))
    both = CropDataset(table, spatial=crop, seed=0, anatomy_centred=1.0)
    assert {both[1, index]["path"][0] for index in range(10)} == {case["image"], bare["image"]}
    with pytest.raises(DataError, match=r"--anatomy_centred needs a mask for at least one volume.*anatomy_mask"):
        CropDataset(table[1:], spatial=crop, seed=0, anatomy_centred=0.5)
    with pytest.raises(SettingsError, match="a share of the crops"):
        CropDataset(table, spatial=crop, seed=0, anatomy_centred=2)


def test_a_large_mask_keeps_some_voxels_and_an_empty_one_none(tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    whole = store.prepare_one(with_mask(tmp_path / "whole", np.ones(blobs(0)[0].shape, np.uint8)))
    kept = np.load(Path(whole.path).with_suffix(".anatomy_mask.voxels.npy"))
    assert kept.shape == (1000, 3)
    assert len(np.unique(kept, axis=0)) == 1000
    empty = store.prepare_one(with_mask(tmp_path / "empty", np.zeros(blobs(0)[0].shape, np.uint8)))
    assert empty.anatomy_voxel(np.random.default_rng(0)) is None
    data = CropDataset([empty], spatial=SpatialCrop(8), seed=0, anatomy_centred=1.0)
    assert len(data[1, 0]["region"]) == 1


def test_inverted_masks_are_exchanged_and_are_another_volume(tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    case = with_mask(tmp_path)
    plain = store.prepare_one(case)
    turned = store.prepare_one(case | {"inverted_masks": ["anatomy_mask"]})
    assert turned.path != plain.path
    ours, theirs = (volume.read((0, 0, 0), volume.shape, mask="anatomy_mask") for volume in (plain, turned))
    np.testing.assert_array_equal(ours, 1 - theirs)
    voxel = turned.anatomy_voxel(np.random.default_rng(0))
    assert voxel is not None
    assert ours[voxel] == 0
    assert store.location(case | {"inverted_masks": []}) == Path(plain.path)
    with pytest.raises(DataError, match="names 'anatomy'; the masks are"):
        store.location(case | {"inverted_masks": ["anatomy"]})


# draws and volumes that cannot be read


def test_draws_are_those_of_a_list_from_which_volumes_are_taken(images: Path, tmp_path: Path) -> None:
    table, _ = VolumeStore(tmp_path / "store", StoreSettings()).prepare(listed(images))
    spatial = SpatialCrop(8)
    for count in (1, 2, 3, 6):
        data = CropDataset(table, spatial=spatial, seed=3, volumes_per_sample=count)
        for index in range(20):
            rng = reading_stream((3, 1, index))
            left = list(range(len(table))) if count > 1 else []
            for path, draw in zip(data[1, index]["path"], data[1, index]["spatial"], strict=True):
                place = int(rng.integers(len(left) or len(table)))
                volume = table[left.pop(place) if left else place]
                assert (volume.source, spatial.draw(rng, volume.shape)) == (path, draw)


@pytest.mark.parametrize("damage", ["deleted", "cut short", "altered"])
def test_a_volume_that_cannot_be_read_is_replaced(damage: str, images: Path, tmp_path: Path) -> None:
    table, _ = VolumeStore(tmp_path / "store", StoreSettings()).prepare(listed(images))
    data = CropDataset(table, spatial=SpatialCrop(8), seed=0)
    before = [data[1, index] for index in range(24)]
    assert not any(item["unreadable"] for item in before)
    broken = Path(table[2].path)
    if damage == "deleted":
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:100] if damage == "cut short" else b"\0" * broken.stat().st_size)
    after = [data[1, index] for index in range(24)]
    for old, new in zip(before, after, strict=True):
        if old["path"] == [table[2].source]:
            assert {entry[:2] for entry in new["unreadable"]} == {(str(broken), table[2].source)}
            assert new["path"] != old["path"]
        else:
            assert (new["path"], new["spatial"]) == (old["path"], old["spatial"])
            assert torch.equal(new["region"][0], old["region"][0])
            assert not new["unreadable"]
    assert sum(old["path"] == [table[2].source] for old in before) > 2
    again = [data[1, index]["path"] for index in range(24)]
    assert again == [item["path"] for item in after]
    for volume in table:
        Path(volume.path).unlink(missing_ok=True)
    with pytest.raises(DataError, match="is the disk of the store there"):
        data[1, 0]


# kills and writers at the same time


def test_a_kill_at_every_write_leaves_no_half_volume(tmp_path: Path) -> None:
    case = with_mask(tmp_path)
    wanted = VolumeStore(tmp_path / "whole", StoreSettings()).prepare_one(case)
    reference = content(tmp_path / "whole")
    reached = 0
    for step in range(1, 40):
        root = tmp_path / f"store_{step}"
        store = VolumeStore(root, StoreSettings())

        def run(step: int = step, store: VolumeStore = store) -> None:
            left = [step]

            def counted(function: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*arguments)

                return call

            os.replace, os.fsync = counted(os.replace), counted(os.fsync)
            store.prepare_one(case)

        _, status = os.waitpid(forked(run), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        reached += 1
        found = store.get(case)
        if found is not None:
            assert content(root).items() >= reference.items()
        again = store.prepare_one(case)
        assert Path(again.path).name == Path(wanted.path).name
        assert {name: data for name, data in content(root).items() if not name.startswith(".")} == reference
    assert reached >= 8, "four files are flushed and renamed"


def test_kills_at_random_instants(tmp_path: Path) -> None:
    for index in range(6):
        write_volume(tmp_path / "images" / f"case_{index}.nii.gz", blobs(index)[0])
    cases = listed(tmp_path / "images")
    reference = VolumeStore(tmp_path / "whole", StoreSettings(spacing_mm=0.9))
    reference.prepare(cases)
    store = VolumeStore(tmp_path / "store", StoreSettings(spacing_mm=0.9))
    clock = random.Random(0)
    for _ in range(12):
        child = forked(lambda: store.prepare(cases))
        time.sleep(clock.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for case in cases:
            volume = store.get(case)
            assert volume is None or np.isfinite(volume.read((0, 0, 0), volume.shape)).all()
    store.prepare(cases)
    ours = {name: data for name, data in content(store.root).items() if not name.startswith(".")}
    assert ours == content(reference.root)


@pytest.mark.parametrize("shards", [1, 3])
def test_writers_at_the_same_time(shards: int, images: Path, tmp_path: Path) -> None:
    cases = listed(images)
    VolumeStore(tmp_path / "one", StoreSettings()).prepare(cases)
    store = VolumeStore(tmp_path / "many", StoreSettings())
    children = [
        forked(lambda part=part: store.prepare(cases[part % shards :: shards], order=part)) for part in range(3)
    ]
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert len(store.prepare(cases)[0]) == len(cases)


@pytest.mark.slow
def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    for index in range(40):
        write_volume(tmp_path / "images" / f"case_{index:02}.nii.gz", blobs(index, (60, 60, 60))[0])
    command = [sys.executable, "tools/prepare_data.py", "prepare", str(tmp_path / "images"), "--spacing_mm", "0.5"]
    process = subprocess.Popen([*command, "--store_dir", str(tmp_path / "store"), "--num_workers", "2"], cwd=ROOT)
    while len(list((tmp_path / "store").glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    prepare(Prepare(str(tmp_path / "images"), str(tmp_path / "store"), spacing_mm=0.5, num_workers=1))
    verify(Verify(str(tmp_path / "store")))


def test_a_source_that_changes_meanwhile_is_not_taken(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"image": str(images / "case_0.nii.gz")}
    store = VolumeStore(tmp_path / "store", StoreSettings())
    chain = preparation.volume_preprocessing

    def slow(*arguments: Any, **options: Any) -> Any:
        write_volume(images / "case_0.nii.gz", blobs(7)[0])
        return chain(*arguments, **options)

    monkeypatch.setattr(preparation, "volume_preprocessing", slow)
    with pytest.raises(DataError, match="changed while it was prepared"):
        store.prepare_one(case)
    assert not list(store.root.iterdir())


# memory and disk


def test_cases_are_handed_out_within_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"image": str(write_volume(tmp_path / "small.nii.gz", np.zeros((10, 10, 10), np.uint8)))}
    large = {"image": str(write_volume(tmp_path / "large.nii.gz", np.zeros((100, 100, 100), np.uint8), spacing=2.0))}
    settings = StoreSettings()
    process = memory_needed(small, settings)
    assert memory_needed(large, settings) - process == pytest.approx(26e6 + 10 * 8e6, rel=0.01)
    assert memory_needed(large | {"anatomy_mask": "x"}, settings) > memory_needed(large, settings)
    monkeypatch.setattr(filling, "comfortable_bytes", lambda: (process + 2**20) // 2)
    done: list[Case] = []
    results = list(each(done.append, [small, large], settings))
    assert done == [small]
    assert results[0] == (small, None)
    assert "GiB of memory" in str(results[1][1])


def test_a_handful_of_small_volumes_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"image": str(write_volume(tmp_path / "small.nii.gz", np.zeros((10, 10, 10), np.uint8)))}
    large = {"image": str(write_volume(tmp_path / "large.nii.gz", np.zeros((100, 100, 100), np.uint8), spacing=4.0))}
    started = list[int]()

    def start(_function: object, queue: Any, *_: object) -> Iterator[Any]:
        started.append(len(queue))
        while queue:
            yield queue.popleft(), None

    monkeypatch.setattr(filling, "_in_processes", start)
    for cases, processes in (([small] * 20, []), ([small] * 4 + [large], [5]), ([small] * 201, [201])):
        started.clear()
        done: list[Case] = []
        assert len(list(each(done.append, cases, StoreSettings(), num_workers=20))) == len(cases)
        assert (started, len(done)) == (processes, 0 if processes else len(cases))


def _die(case: Case) -> None:
    if case["name"] == "bad":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_volume_whose_process_dies_is_named_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "_FEW_VOXELS", 0)
    image = str(write_volume(tmp_path / "a.nii.gz", np.zeros((4, 4, 4), np.uint8)))
    cases = [{"image": image, "name": name} for name in ("a", "bad", "b", "c")]
    results = {case["name"]: error for case, error in each(_die, cases, StoreSettings(), num_workers=2)}
    assert [name for name, error in results.items() if error is not None] == ["bad"]
    assert set(results) == {"a", "bad", "b", "c"}
    assert "died twice" in str(results["bad"])


def test_the_disk_needed_is_told_and_too_small_a_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(write_volume(tmp_path / "a.nii.gz", np.zeros((10, 10, 10), np.uint8), spacing=2.0))
    cases = [{"image": image, "name": str(index)} for index in range(100)]
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda _: usage(0, 0, 12_500_000))

    def run(**options: Any) -> None:
        estimate = DiskEstimate(cases, StoreSettings(), tmp_path, **options)
        for case in cases:
            estimate.add(case, lambda _: 12_000)

    run()
    first, second = capsys.readouterr().out.splitlines()
    assert "the 100 volumes will take up to about 5.7 MiB" in first, "1.72 bytes for each voxel of blocks, and 3 KiB"
    assert "the 100 volumes will take about 1.1 MiB" in second
    assert "11.9 MiB are free" in first
    assert "11.9 MiB are free" in second
    run(shares=10)
    assert "10 shares of about 100 volumes will take about 11.4 MiB" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"about 13\.7 MiB .* another --store_dir"):
        run(shares=12)
    assert "up to about 68.0 MiB" in capsys.readouterr().out, "it may be too small: the first eight decide"
    with pytest.raises(DataError, match=r"up to about 226\.7 MiB .* another --store_dir"):
        DiskEstimate(cases, StoreSettings(), tmp_path, shares=40)
    run(shares=40, refuse=False)
    capsys.readouterr()
    DiskEstimate(cases[:1], StoreSettings(), tmp_path)
    assert "the 1 volume will take up to about 58.0 KiB" in capsys.readouterr().out


# the commands


def test_shards_together_are_the_whole_and_verify_finds_damage(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "store"
    for shard in ("0/2", "1/2"):
        prepare(Prepare(str(images), str(root), num_workers=1, shard=shard))
    assert len(list(root.glob("*.json"))) == 4
    capsys.readouterr()
    verify(Verify(str(root)))
    assert "4 volumes, 0 damaged" in capsys.readouterr().out
    first, second, third, _ = sorted(root.glob("*.b2nd"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    third.with_suffix(".json").write_text("{")
    left, young = f"left-{'0' * 20}.b2nd", f"young-{'0' * 20}.b2nd"
    (root / left).write_text("of a killed run")
    os.utime(root / left, (0, 0))
    (root / young).write_text("being written")
    with pytest.raises(SystemExit):
        verify(Verify(str(root)))
    out = capsys.readouterr().out
    assert f"{first.stem}: {first.name} does not have the checksum" in out
    assert f"{second.stem}: {second.name} has" in out
    assert f"{third.stem}: its JSON is damaged" in out
    assert f"{left}: belongs to no volume" in out
    assert "young" not in out
    assert "4 volumes, 4 damaged" in out
    assert len((root / "damaged.txt").read_text().splitlines()) == 4
    verify(Verify(str(root), repair="true"))
    assert sorted(path.name for path in root.glob("*.b2nd")) == sorted(
        [path.name for path in root.glob("case_3*.b2nd")] + [young]
    )
    prepare(Prepare(str(images), str(root), num_workers=1))
    capsys.readouterr()
    verify(Verify(str(root)))
    assert "4 volumes, 0 damaged" in capsys.readouterr().out
    assert not (root / "damaged.txt").exists()


def test_verify_touches_nothing_but_what_a_store_writes(images: Path, tmp_path: Path) -> None:
    foreign = images / "sub-01_T1w.json"
    foreign.write_text('{"EchoTime": 3}')
    write_volume(images / "sub-01_T1w.nii.gz", blobs(0)[0])
    (images / "other.b2nd").write_text("of somebody")
    (images / f"content-{'a' * 20}.json").write_text("[1, 2]")
    (images / f"content-{'a' * 20}.nii.gz").write_text("x")
    before = content(images)
    for file in images.iterdir():
        os.utime(file, (0, 0))
    with pytest.raises(DataError, match=r"holds no prepared volume.*give the --store_dir of a run"):
        verify(Verify(str(images), repair="true"))
    assert content(images) == before, "neither removed nor damaged.txt written"

    VolumeStore(images, StoreSettings()).prepare([{"image": str(images / "case_0.nii.gz")}])
    (sidecar,) = images.glob("case_0-*.json")
    theirs = json.loads(sidecar.read_text()) | {"masks": {"../../x": 3}}
    theirs.pop("digest")
    sidecar.write_text(json.dumps(theirs))
    verify(Verify(str(images), repair="true"))
    left = content(images)
    assert left.pop("damaged.txt")
    assert left == before


def test_verify_finds_an_altered_json(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    (volume,), _ = store.prepare(listed(images)[:1])
    sidecar = Path(volume.path).with_suffix(".json")
    meta = json.loads(sidecar.read_text())
    older = {key: value for key, value in meta.items() if key != "digest"}
    for written, told in (
        (meta | {"affine_mm": np.eye(4).tolist()[::-1]}, "its JSON is not as it was written"),
        (older | {"shape": [24, 24, 24]}, "is of shape (26, 28, 24), but its JSON says (24, 24, 24)"),
    ):
        sidecar.write_text(json.dumps(written))
        with pytest.raises(SystemExit):
            verify(Verify(str(store.root)))
        assert told in capsys.readouterr().out
    for whole in (older, meta):
        sidecar.write_text(json.dumps(whole))
        verify(Verify(str(store.root)))


@pytest.mark.parametrize(
    "damage",
    [b"\xff\xfe", b"[" * 100_000, b"[]", b'{"layout": 2, "bytes": 3, "shape": "abc", "masks": {"a\\u0000": 3}}', b"{"],
)
def test_a_damaged_json_is_a_volume_that_is_not_there(damage: bytes, images: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    (volume,), _ = store.prepare(listed(images)[:1])
    sidecar = Path(volume.path).with_suffix(".json")
    whole = sidecar.read_bytes()
    sidecar.write_bytes(damage)
    shutil.rmtree(store.root / "catalogues")
    assert store.get(listed(images)[0]) is None
    (again,), problems = store.prepare(listed(images)[:1])
    assert (again, problems) == (volume, [])
    assert sidecar.read_bytes() == whole


def test_commands_refuse_in_a_sentence(images: Path, tmp_path: Path) -> None:
    for shard in ("2/2", "a", "1", "-1/3"):
        with pytest.raises(SettingsError, match="it must be i/n"):
            prepare(Prepare(str(images), str(tmp_path / "store"), shard=shard))
    with pytest.raises(SettingsError, match="it must be a number"):
        prepare(Prepare(str(images), str(tmp_path / "store"), spacing_mm="one"))
    with pytest.raises(SettingsError, match=r"nothing'; it must be a file or folder that is there"):
        verify(Verify(str(tmp_path / "nothing")))
    with pytest.raises(DataError, match="holds no prepared volume"):
        verify(Verify(str(images)))


def test_names_stay_within_the_store_and_its_limits(images: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    for name in ("../../out", "/etc/x", ".hidden", "脳" * 100, "a b"):
        volume = store.prepare_one({"image": str(images / "case_0.nii.gz"), "name": name})
        assert Path(volume.path).parent == store.root
        assert not Path(volume.path).name.startswith(".")


def test_names_that_no_file_can_have_are_reported(images: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(bytes(images / "caf") + b"\xe9.nii.gz")
    shutil.copy(images / "case_0.nii.gz", odd)
    wrong = [str(images / name) for name in ("a\0b.nii.gz", "\ud800.nii.gz", "\udcff.nii.gz")]
    cases = [{"image": path} for path in [odd, str(images / "case_1.nii.gz"), *wrong]]
    cases.append({"image": str(images / "case_2.nii.gz"), "name": "\ud800 two"})
    store = VolumeStore(tmp_path / "store", StoreSettings())
    found, problems = store.prepare(cases)
    assert [volume.source for volume in found] == [cases[index]["image"] for index in (0, 1, 5)]
    assert len(problems) == 3
    assert all("correct the list or restore the file" in str(problem) for problem in problems)
    assert split_by_subject(cases, [case["image"] for case in cases], seed=0)


def test_parts_that_killed_runs_left_are_removed(images: Path, tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "store", StoreSettings())
    store.prepare(listed(images))
    parts = [store.root / ".x.0.part", store.root / "catalogues" / ".y.table.z.part"]
    for part in [*parts, store.root / "catalogues" / ".young.part"]:
        part.write_text("x")
    for part in parts:
        os.utime(part, (0, 0))
    store.prepare(listed(images))
    assert [path.name for path in store.root.rglob("*.part")] == [".young.part"]


def test_intensities_beyond_float16_are_refused(tmp_path: Path) -> None:
    image = blobs(0)[0] * 1000
    case = {"image": str(write_volume(tmp_path / "a.nii.gz", image))}
    with pytest.raises(DataError, match="float16 cannot hold; use float32"):
        VolumeStore(tmp_path / "store", StoreSettings(normalization="none")).prepare_one(case)
    VolumeStore(tmp_path / "store", StoreSettings(normalization="none", dtype="float32")).prepare_one(case)


# Dask


def test_a_scheduler_without_workers_ends_in_a_sentence(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(filling, "_WAIT_SECONDS", 0.3)
    options = {"n_workers": 0, "processes": False, "protocol": "tcp", "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as cluster,
        pytest.raises(SettingsError, match=r"has no workers after 0\.3 s; start some"),
    ):
        VolumeStore(tmp_path / "store", StoreSettings()).prepare(listed(images), scheduler=cluster.scheduler_address)


@pytest.mark.slow
def test_dask_workers_prepare_the_volumes(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    for index in range(12):
        write_volume(tmp_path / "images" / f"case_{index:02}.nii.gz", blobs(index)[0])
    (tmp_path / "images" / "bad.nii.gz").write_text("no image")
    file = tmp_path / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:]]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    processes = [start("dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))]
    try:
        worker = ("--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard")
        processes += [start("dask_worker", *worker) for _ in range(2)]
        while not file.exists():
            time.sleep(0.2)
        address = json.loads(file.read_text())["address"]
        prepare(Prepare(str(tmp_path / "images"), str(tmp_path / "store"), scheduler=address))
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait()
    assert len(list((tmp_path / "store").glob("*.json"))) == 12
    VolumeStore(tmp_path / "one", StoreSettings()).prepare(listed(tmp_path / "images"))
    assert content(tmp_path / "store") == content(tmp_path / "one")
    with pytest.raises(SettingsError, match="no Dask scheduler answers"):
        prepare(Prepare(str(tmp_path / "images"), str(tmp_path / "other"), scheduler="tcp://127.0.0.1:1"))
