# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A full disk ends inference and features at once; the cases that are left did not fail."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.engines.features import extract_features
from common.engines.prediction import EachCase
from common.errors import sentence
from common.transforms.restoring import CASE

from ..conftest import write_volume

FULL = OSError(errno.ENOSPC, "No space left on device", "/out/scan.nii.gz")


def each_case(folder: Path) -> EachCase:
    cases = [{"image": "a.nii.gz"}, {"image": "b.nii.gz"}]
    return EachCase(cases, cases, output_dir=str(folder), labels=["background", "ball"])


@pytest.mark.parametrize("error", [FULL, OSError(errno.EDQUOT, "Disk quota exceeded", "/out/scan.nii.gz")])
def test_inference_stops_with_that_sentence(error: OSError, tmp_path: Path) -> None:
    def iteration(*_: Any) -> None:
        raise RuntimeError("applying transform") from error  # as MONAI wraps what its writers raise

    engine = SimpleNamespace(_iteration=iteration, state=SimpleNamespace(output=None, batch=None))
    handler = each_case(tmp_path)
    with pytest.raises(OSError, match="No space left") as raised:
        handler(engine, {CASE: ["a"], "file": ["a.nii.gz"]})  # type: ignore[arg-type]
    assert sentence(raised.value) == (
        f"the disk is full while writing {tmp_path}; free some space and run again, it goes on from there"
    )
    assert handler.failed == []
    assert not (tmp_path / "failed.json").exists()


def test_a_picture_that_fills_the_disk_stops_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr("common.engines.prediction.draw_prediction", draw)
    with pytest.raises(OSError, match="No space left"):
        each_case(tmp_path)._draw("a", "a.nii.gz")


def test_features_stop_with_that_sentence(tmp_path: Path) -> None:
    file = write_volume(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32))

    def write(*_: Any, **__: Any) -> None:
        raise FULL

    folder = SimpleNamespace(pending=[{"image": str(file)}], kept=0, write=write)
    with pytest.raises(OSError, match="No space left") as raised:
        extract_features(
            folder,  # type: ignore[arg-type]
            embedder=lambda image: SimpleNamespace(positions=100),  # type: ignore[arg-type, return-value]
            preprocessing=lambda case: {"image": torch.zeros(1, 8, 8, 8)},
        )
    assert str(sentence(raised.value)).startswith("the disk is full while writing /out/scan.nii.gz")
