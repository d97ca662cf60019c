# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Damaged files of weights and of the JSON beside them: whatever is changed is refused, or changes nothing."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import DataError, WeightsError
from common.files import is_as_recorded, read_record, sha256, write_record
from common.networks import ResEncUNet
from common.weights import read_checkpoint, write_checkpoint
from common.weights.files import read_metadata, write_safetensors
from common.weights.transfer import fine_tuning_network, origin_receipt, trained_network, trained_settings

FLIPS = 120


def unet() -> ResEncUNet:
    return ResEncUNet(features_per_stage=[2, 4], blocks_per_stage=[1, 1])


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """Return ``content`` with one bit changed; half of the times near an end, where archives keep what they hold."""
    place = int(rng.integers(len(content)))
    if rng.random() < 0.5:
        place = int(rng.choice([place % 300, len(content) - 1 - place % 1500]))
    changed = bytearray(content)
    changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def model(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    write_checkpoint(unet().state_dict(), folder / "model.pt")
    about = {"sha256": sha256(folder / "model.pt"), "settings": {"spacing_mm": 1.0, "labels": ["background", "lesion"]}}
    write_record(about, folder / "model.json")
    network = unet()
    return folder / "model.pt", lambda path: dict(trained_network(network, str(path), settings={}).state_dict())


def encoder_alone(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    write_checkpoint(unet().state_dict(), folder / "pretrained_encoder.pt")
    return folder / "pretrained_encoder.pt", read_checkpoint


def state(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    content = {"method": unet().state_dict(), "epoch": 3, "settings": {"lr": 0.1}, "history": [{"train_loss": 0.5}]}
    write_checkpoint(content, folder / "pretraining_state.pt")
    return folder / "pretraining_state.pt", read_checkpoint


def safetensors(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    path = folder / "encoder.safetensors"
    write_safetensors(unet().state_dict(), path, receipt={"method": "MAE", "spacing_mm": 1.0})
    return path, lambda path: dict(sorted(read_checkpoint(path).items())) | read_metadata(path)


def beside(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    model(folder)
    return folder / "model.json", lambda path: trained_settings(str(path.with_suffix(".pt")))


@pytest.mark.parametrize("make", [model, encoder_alone, state, safetensors, beside])
def test_no_changed_bit_changes_what_is_read(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path, read = make(tmp_path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    right, told = read(path), []
    right = {name: value.clone() for name, value in right.items()} if make is model else right
    for _ in range(FLIPS):
        path.write_bytes(flipped(content, rng))
        try:
            assert same(right, read(path))
        except WeightsError as error:
            told.append(str(error))
    assert all(path.stem in sentence for sentence in told)
    assert len(told) > FLIPS / 2


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, _ = state(tmp_path)
    content = path.read_bytes()
    for length in np.random.default_rng(0).integers(len(content), size=20):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match=r"pretraining_state\.pt .*fetch or write it again"):
            read_checkpoint(path)


def test_another_whole_file_is_not_taken_for_the_one_that_the_json_is_about(tmp_path: Path) -> None:
    path, read = model(tmp_path)
    write_checkpoint(unet().state_dict(), path)
    for use in (
        read,
        origin_receipt,
        lambda path: fine_tuning_network(unet(), pretrained=str(path), settings={}),
    ):
        with pytest.raises(WeightsError, match=r"model\.pt is not the file that model\.json beside it is about.*move"):
            use(path)
    (tmp_path / "model.json").unlink()
    read(path)
    fine_tuning_network(unet(), pretrained=str(path), settings={})  # which writes down what it took
    assert read_record(tmp_path / "model.json")["sha256"] == sha256(path)
    write_checkpoint(unet().state_dict(), path)
    with pytest.raises(WeightsError, match="is not the file"):
        fine_tuning_network(unet(), pretrained=str(path), settings={})


def test_a_file_is_whole_if_the_record_beside_it_names_it(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt"
    assert not is_as_recorded(path)
    path.write_bytes(b"whole")
    assert not is_as_recorded(path), "nothing is said of it"
    write_record({"sha256": sha256(path)}, path.with_suffix(".json"))
    assert is_as_recorded(path)
    path.write_bytes(b"whol")
    assert not is_as_recorded(path)
    path.write_bytes(b"whole")
    path.with_suffix(".json").write_text("{")
    assert not is_as_recorded(path)


def test_a_record_that_was_changed_is_told_from_one_of_before_there_were_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {
        "settings": {"spacing_mm": [1.0, 0.5], "labels": ["ä", "b"]},
        "score": float("inf"),
        "parts": {"1": None},
    }
    write_record(content, path)
    assert read_record(path) == content
    written = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(written.items()))))
    assert read_record(path) == content, "order and white space say nothing"
    written["settings"]["spacing_mm"] = [1.0, 0.25]
    path.write_text(json.dumps(written))
    with pytest.raises(DataError, match=r'a\.json is not as it was written.*remove its line "checksum"'):
        read_record(path)
    del written["checksum"]
    path.write_text(json.dumps(written))
    assert read_record(path)["settings"]["spacing_mm"] == [1.0, 0.25]
    for text in ("", "[1]", '{"a": 1', "\udcff"):
        path.write_text(text, "utf-8", errors="surrogateescape")
        with pytest.raises(DataError, match=r"a\.json is not the JSON that was written"):
            read_record(path)
    with pytest.raises(KeyError, match="is not the JSON that was written"):
        read_record(path, error=KeyError)


def renamed(path: Path, old: bytes, new: bytes) -> None:
    """Exchange a name in the pickle of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("version", [1, 2])
def test_numbers_of_numpy_come_as_plain_numbers(version: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    kinds = [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint16, np.complex128]
    values: dict[str, Any] = {kind.__name__: kind(3) for kind in kinds}
    values |= {"true": np.bool_(True), "text": np.str_("best"), "big": np.float64(0.5).astype(">f8")}
    values |= {"losses": np.array([0.31, 0.3]), "empty": np.zeros((0, 3)), "objects": np.array([1, "a", None], object)}
    values |= {"by rows": np.arange(24).reshape(2, 3, 4), "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    torch.save({"network_weights": {"a": torch.ones(2)}, "logging": values}, path)
    if version == 1:
        renamed(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    found = read_checkpoint(path)["logging"]
    for name, value in values.items():
        plain = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        assert found[name] == plain, name
        assert not isinstance(found[name], (np.ndarray, np.generic)), name
    assert isinstance(found["int64"], int)
    assert found["true"] is True


class Call:
    """What unpickles to a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_only_what_is_incomplete_is_to_be_fetched_again(tmp_path: Path) -> None:
    contents: dict[str, Any] = {
        "PosixPath": Path("a"),
        "numpy.random": np.random.default_rng(0),
        "numpy.load": Call(np.load, "a.npy"),
        "structured": np.zeros(2, np.dtype([("a", "f8")])),
    }
    for name, content in contents.items():
        path = tmp_path / "odd.pt"
        torch.save({"a": torch.ones(1), "odd": content}, path)
        with pytest.raises(WeightsError, match=r"odd\.pt holds other things than tensors and plain values") as error:
            read_checkpoint(path)
        assert "again" not in str(error.value), name
    scripted = tmp_path / "scripted.pt"
    torch.jit.script(torch.nn.Identity()).save(scripted)
    with pytest.raises(WeightsError, match="TorchScript"):
        read_checkpoint(scripted)
    old, text = tmp_path / "old.pt", tmp_path / "text.pt"
    torch.save({"a": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(old)["a"], torch.ones(3))
    old.write_bytes(old.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=r"is not a complete checkpoint.*fetch or write it again"):
        read_checkpoint(old)
    text.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match=r"is a plain pickle, and no checkpoint .*check the path"):
        read_checkpoint(text)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "is an HDF5 file"),
        (gzip.compress(b"abc", mtime=0), "is compressed with gzip"),
        (b"\x93NUMPY\x01\x00" + bytes(40), "is a NumPy array"),
        (json.dumps({"a": [1] * 40}).encode(), "looks like JSON"),
        (b"anything else " * 10, "does not begin as a file of torch.save"),
    ],
)
def test_a_complete_file_of_another_kind_is_told_what_it_is(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"weights\.pth {told}|weights\.pth .*{told}") as error:
        read_checkpoint(path)
    assert ("again" in str(error.value)) == ("LFS" in told), "only a pointer stands for a file that is not here"


def test_archives_and_old_files_that_hold_something_else_are_told_so(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/a.png", b"x")
    with pytest.raises(WeightsError, match=r"zip archive of something else \(images/a\.png\)"):
        read_checkpoint(path)
    torch.save({"a": torch.ones(3), "where": Path("a")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"holds other things than tensors .*pathlib") as error:
        read_checkpoint(path)
    assert "again" not in str(error.value)
    numbers = {"log": [np.float64(0.5)], "a": torch.ones(3)}
    torch.save(numbers, path, _use_new_zipfile_serialization=False)
    assert read_checkpoint(path)["log"] == [0.5], "NumPy's numbers, before torch 1.6 too"
    whole = path.read_bytes()
    for length in (len(whole) - 4, len(whole) // 2, 300, 60):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"is not a complete checkpoint.*again"):
            read_checkpoint(path)


def test_safetensors_of_others_are_read_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"  # whatever it is called
    save_file({"a": torch.ones(3, dtype=torch.bfloat16)}, path, metadata={"format": "pt", "receipt": "paid in full"})
    assert torch.equal(read_checkpoint(path)["a"].float(), torch.ones(3))
    assert read_metadata(path) == {}
    header = json.dumps({"a": {"dtype": "F1", "shape": [8], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(WeightsError, match="complete safetensors file with tensors that cannot be read here") as error:
        read_checkpoint(path)
    assert "again" not in str(error.value)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"is not a complete safetensors file .*again"):
        read_checkpoint(path)


def test_a_copy_keeps_its_name_and_json(tmp_path: Path) -> None:
    """Files that move together stay a pair."""
    path, _ = model(tmp_path)
    (tmp_path / "there").mkdir()
    for file in (path, path.with_suffix(".json")):
        shutil.copy(file, tmp_path / "there")
    assert trained_settings(str(tmp_path / "there" / "model.pt"))["labels"] == ["background", "lesion"]
