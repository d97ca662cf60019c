# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A flipped bit in any file of a store is found before a voxel of it is used, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import StoreSettings, VolumeStore
from common.data.storing.checksums import ENDING, checksums_beside
from common.data.storing.stored import StoredVolume
from common.errors import DataError

from ..conftest import blobs, write_volume

SHAPE = (70, 66, 68)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """A store with two labelled volumes of several chunks."""
    folder = tmp_path_factory.mktemp("store")
    cases = []
    for index in range(2):
        image, ball = blobs(index, SHAPE)
        cases.append({"image": str(write_volume(folder / "images" / f"c{index}.nii.gz", image))})
        cases[-1]["label"] = str(write_volume(folder / "labels" / f"c{index}.nii.gz", ball))
    VolumeStore(folder / "store", StoreSettings()).prepare(cases)
    return folder, cases


def voxels(table: Any) -> list[tuple[Any, ...]]:
    """Return all that training can read of prepared volumes."""
    checksums_beside.cache_clear()
    found = []
    for index in range(len(table)):
        volume: StoredVolume = table[index]
        rng = np.random.default_rng(0)
        whole = [volume.read((0, 0, 0), volume.shape, mask=mask).tobytes() for mask in (None, "label")]
        found.append((volume.path, volume.shape, dict(volume.values), *whole, volume.voxel([1], rng)))
    return found


def flipped(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


@pytest.mark.parametrize("ending", [".b2nd", ".label.b2nd", ".voxels.npy", ".json", ENDING, ".table"])
def test_a_flipped_bit_is_never_used(
    prepared: tuple[Path, list[dict[str, str]]], ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cases = prepared
    before = voxels(VolumeStore(folder / "store", StoreSettings()).prepare(cases)[0])
    root = folder / "store"
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.name.endswith(ending))
    files = [file for file in files if ending != ".json" or not file.name.endswith(ENDING)]
    files = [file for file in files if ending != ".b2nd" or not file.name.endswith(".label.b2nd")]
    rng = np.random.default_rng(len(ending))
    told: list[str] = []
    for number in range(60):
        file = files[number % len(files)]
        kept = {each: each.read_bytes() for each in root.rglob("*") if each.is_file()}
        flipped(file, rng)
        capsys.readouterr()
        try:
            after = voxels(VolumeStore(root, StoreSettings()).prepare(cases)[0])
            assert after == before, f"{file.name} was used although a bit of it was flipped"
        except DataError as error:
            told.append(str(error))
            named = file.name in told[-1] and "remove" in told[-1]
            assert named, told[-1]
        shutil.rmtree(root)
        for each, content in kept.items():
            each.parent.mkdir(parents=True, exist_ok=True)
            each.write_bytes(content)
    if ending in (".b2nd", ".label.b2nd", ".voxels.npy", ENDING):
        assert len(told) > 30  # bits that change nothing, such as those of a version, may be left


def test_a_store_of_an_earlier_version_is_compared_once_and_stays_readable(
    prepared: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    folder, cases = prepared
    root = folder / "store"
    before = voxels(VolumeStore(root, StoreSettings()).prepare(cases)[0])
    for file in root.glob(f"*{ENDING}"):
        file.unlink()
    assert voxels(VolumeStore(root, StoreSettings()).prepare(cases)[0]) == before
    assert len(list(root.glob(f"*{ENDING}"))) == 2
    one = next(file for file in root.glob("*.b2nd") if not file.name.endswith(".label.b2nd"))
    content = one.read_bytes()
    one.with_suffix(ENDING).unlink()
    one.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(DataError, match="is damaged"):
        voxels(VolumeStore(root, StoreSettings()).prepare(cases)[0])
    assert not one.with_suffix(ENDING).exists()
    one.write_bytes(content)


def test_a_chunk_is_compared_once_in_a_process(
    prepared: tuple[Path, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.data.storing import checksums

    folder, cases = prepared
    volume = VolumeStore(folder / "store", StoreSettings()).prepare(cases)[0][0]
    checksums_beside.cache_clear()
    checksums_beside(volume.path)
    compared: list[int] = []
    crc = checksums._crc
    monkeypatch.setattr(checksums, "_crc", lambda data: compared.append(len(data)) or crc(data))
    for _ in range(3):
        volume.read((0, 0, 0), (8, 8, 8))
    assert len(compared) == 1
    volume.read((0, 0, 0), volume.shape)
    wanted = json.loads(Path(volume.path).with_suffix(ENDING).read_text())["files"][".b2nd"]["crc32"]
    assert len(compared) == len(wanted) == 8
