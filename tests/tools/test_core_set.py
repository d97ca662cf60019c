# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The choice of the next scan in tools/monai_label_app; the app in a server is tested in tests/ecosystem."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from common.networks import Primus, ResEncUNet
from common.weights import read_checkpoint, write_checkpoint

from ..conftest import ROOT, blobs, write_volume

sys.path.insert(0, str(ROOT / "tools" / "monai_label_app"))
from core_set import ScanEmbeddings, farthest_first

from tools.commanding.settings import filled
from tools.exporting.new_task import new_task
from tools.exporting.settings import NewTask


def line(**places: float) -> dict[str, np.ndarray]:
    return {name: np.array([place, 0.0]) for name, place in places.items()}


def test_without_labels_the_most_central_scan_is_chosen() -> None:
    assert farthest_first(line(a=0, b=1, c=2, far=100), []) == ("b", (1 + 1 + 99) / 3)
    assert farthest_first(line(only=5), []) == ("only", 0.0)


def test_with_labels_the_scan_farthest_from_its_nearest_labelled_one_is_chosen() -> None:
    scans = line(a=0, b=1, middle=40, c=99, far=100)
    assert farthest_first(scans, ["a"]) == ("far", 100.0)
    assert farthest_first(scans, ["a", "far"]) == ("middle", 40.0)  # not b or c, which are near a labelled one
    assert farthest_first(scans, [*scans]) is None


def test_equal_scans_go_by_name_and_a_labelled_one_that_cannot_be_read_does_not_count() -> None:
    assert farthest_first(line(b=3, a=3, z=0), ["z"]) == ("a", 3.0)
    assert farthest_first(line(a=0, b=1, c=2), ["damaged"]) == ("b", 1.0)
    assert farthest_first({}, []) is None


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Path]:
    """A small exported bundle; its code does not stay loaded."""
    encoder, target = tmp_path / "encoder.pt", tmp_path / "bundles" / "small_task"
    sizes: dict[str, Any] = {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]}
    write_checkpoint(ResEncUNet(**sizes).state_dict(), encoder)
    new_task(filled(NewTask, "mae_resenc_l", str(target), labels="ball", pretrained=str(encoder), **sizes))
    yield target
    for name in [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]:
        del sys.modules[name]


@pytest.fixture
def scans(tmp_path: Path) -> dict[str, str]:
    """Three scans that differ by little noise, one of stripes, one that is constant and one cut short."""
    image, _ = blobs(0)
    noise = np.random.default_rng(1)
    volumes = {f"alike_{index}": image + noise.normal(0, 1, image.shape) for index in range(3)}
    volumes["stripes"] = np.broadcast_to(100.0 * (np.arange(image.shape[2]) % 4), image.shape) + volumes["alike_0"] / 20
    volumes["constant"] = np.full(image.shape, 7.0)
    files = {
        name: str(write_volume(tmp_path / "scans" / f"{name}.nii.gz", values.astype(np.float32)))
        for name, values in volumes.items()
    }
    files["cut"] = str(tmp_path / "scans" / "cut.nii.gz")
    Path(files["cut"]).write_bytes(Path(files["alike_0"]).read_bytes()[:2000])
    return files


def test_embeddings_find_the_outlier_leave_out_what_cannot_be_read_and_are_kept(
    bundle: Path, scans: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = ScanEmbeddings(bundle, tmp_path / "kept", device="cpu")
    found = embed(scans)
    assert sorted(found) == ["alike_0", "alike_1", "alike_2", "stripes"]
    assert farthest_first(found, ["alike_0"])[0] == "stripes"  # type: ignore[index]
    assert farthest_first(found, [])[0] != "stripes"  # type: ignore[index]
    assert embed.problems.keys() == {"constant", "cut"}
    assert "constant" in embed.problems["constant"]
    assert scans["cut"] in embed.problems["cut"]

    asked: list[str] = []
    original = ScanEmbeddings._embed

    def counting(self: ScanEmbeddings, files: Any, folder: Path) -> Any:
        asked.extend(Path(file).name for file in files)
        return original(self, files, folder)

    monkeypatch.setattr(ScanEmbeddings, "_embed", counting)
    again = embed(scans)
    assert asked == []  # nor are those read again that could not be
    assert embed.problems.keys() == {"constant", "cut"}
    for name, vector in found.items():
        np.testing.assert_array_equal(again[name], vector)

    renamed = tmp_path / "scans" / "renamed.nii.gz"  # the same file under another name, in another process
    shutil.copy(scans["stripes"], renamed)
    later = ScanEmbeddings(bundle, tmp_path / "kept", device="cpu")
    np.testing.assert_array_equal(later({"renamed": str(renamed)})["renamed"], found["stripes"])
    assert asked == []

    write_volume(Path(scans["alike_1"]), blobs(5)[0])  # another scan under the same name
    write_volume(tmp_path / "scans" / "new.nii.gz", blobs(6)[0])
    changed = embed(scans | {"new": str(tmp_path / "scans" / "new.nii.gz")})
    assert asked == ["alike_1.nii.gz", "new.nii.gz"]
    assert not np.array_equal(changed["alike_1"], found["alike_1"])


def test_another_encoder_makes_embeddings_of_its_own(bundle: Path, scans: dict[str, str], tmp_path: Path) -> None:
    scan = {"alike_0": scans["alike_0"]}
    first = ScanEmbeddings(bundle, tmp_path / "kept", device="cpu")(scan)["alike_0"]
    sizes: dict[str, Any] = {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]}
    write_checkpoint(ResEncUNet(**sizes).state_dict(), bundle / "models" / "pretrained_encoder.pt")
    (bundle / "models" / "pretrained_encoder.json").unlink()
    second = ScanEmbeddings(bundle, tmp_path / "kept", device="cpu")(scan)["alike_0"]
    assert not np.array_equal(first, second)
    features = bundle / "configs" / "features.json"
    features.write_text(features.read_text("utf-8").replace('"pooling": "mean"', '"pooling": "mean+std"'), "utf-8")
    assert ScanEmbeddings(bundle, tmp_path / "kept", device="cpu")(scan)["alike_0"].shape == (2 * len(second),)
    (bundle / "models" / "pretrained_encoder.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"pretrained_encoder\.pt is missing"):
        ScanEmbeddings(bundle, tmp_path / "kept")(scan)


def test_a_file_that_is_gone_and_an_embedding_that_is_damaged(
    bundle: Path, scans: dict[str, str], tmp_path: Path
) -> None:
    embed = ScanEmbeddings(bundle, tmp_path / "kept", device="cpu")
    scan = {"alike_0": scans["alike_0"]}
    whole = embed(scan)["alike_0"]
    (kept,) = (tmp_path / "kept").glob("*/*.npy")
    kept.write_bytes(kept.read_bytes()[:40])
    found = embed(scan | {"gone": str(tmp_path / "gone.nii.gz")})
    np.testing.assert_array_equal(found["alike_0"], whole)
    assert embed.problems.keys() == {"gone"}


def test_the_transformer_embeds_with_the_input_that_its_encoder_is_fitted_to(
    scans: dict[str, str], tmp_path: Path
) -> None:
    """Its position table is interpolated once, when the task is made, and then taken as it is."""
    sizes: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    original = Primus(input_size=32, **sizes).state_dict()
    write_checkpoint(original, tmp_path / "encoder.pt")
    target, given = tmp_path / "bundles" / "small_task", {"pretrained": str(tmp_path / "encoder.pt")} | sizes
    new_task(filled(NewTask, "mae_primus_m", str(target), labels="ball", patch_size=[16, 16, 16], **given))
    fitted = read_checkpoint(target / "models" / "pretrained_encoder.pt")["encoder.transformer.position_embedding"]
    assert fitted.shape[2:] == (2, 2, 2)
    assert original["encoder.transformer.position_embedding"].shape[2:] == (4, 4, 4)
    text = (target / "configs" / "features.json").read_text("utf-8").replace('"scripts.', '"common.')
    parser = ConfigParser(json.loads(text))
    parser.update({"bundle_root": str(target), "output_dir": str(tmp_path / "out")})
    used = parser.get_parsed_content("network").state_dict()["encoder.transformer.position_embedding"]
    torch.testing.assert_close(used, fitted, rtol=0, atol=0)
    try:
        found = ScanEmbeddings(target, tmp_path / "kept", device="cpu")(scans)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]
    assert sorted(found) == ["alike_0", "alike_1", "alike_2", "stripes"]
    assert farthest_first(found, ["alike_0"])[0] == "stripes"  # type: ignore[index]
