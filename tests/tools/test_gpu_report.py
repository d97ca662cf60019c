# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The report of a GPU runs to its end where there is none, saves each part, and says what was wrong or left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import SettingsError
from tools.budgeting import gpu_report as module
from tools.budgeting.settings import GpuReport

from ..conftest import ROOT

NARROW = {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1], "embed_dim": 24, "depth": 2, "num_heads": 2}


def settings(folder: Path, **others: Any) -> GpuReport:
    told: dict[str, Any] = {"device": "cpu", "cells": "mae_resenc_l,simclr_primus_m", "patch_size": 32, "repeats": 1}
    told |= {"small_size": 32, "volume": (33, 34, 35), "minutes": 30, "settings": NARROW | {"block_size": 8}, **others}
    return GpuReport(output=folder, **told)


def test_all_parts_run_to_their_end_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    saved: list[int] = []
    write = module.write_json

    def watched(report: Any, path: Path) -> None:
        saved.append(len(report["parts"]))
        write(report, path)

    monkeypatch.setattr(module, "write_json", watched)
    module.gpu_report(settings(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    parts = report["parts"]
    kinds = [name.split(",")[0] for name in parts]
    assert list(dict.fromkeys(kinds)) == [
        "convolution in bfloat16",
        "CPU and GPU",
        "step",
        "inference",
        "channels_last_3d",
        "torch.compile",
    ]
    assert saved == [*range(1, len(parts) + 1)], "each part is saved as it ends"
    failed = {name: found["failed"] for name, found in parts.items() if "failed" in found}
    assert failed == {}
    assert parts["convolution in bfloat16"]["right"]
    compared = parts["CPU and GPU, mae_resenc_l"]
    assert compared["float32"]["loss"] < 1e-5, "the same device"
    assert compared["bfloat16"]["right"]
    step = parts["step, simclr_primus_m"]
    assert min(step["s a step"], step["peak GiB"], step["estimated GiB"]) > 0
    text = (tmp_path / "report.md").read_text("utf-8")
    assert all(name in text for name in parts)
    assert "left out: nothing" in text


def test_what_there_is_no_time_for_is_named_and_a_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(*_: Any) -> Any:
        yield "one", lambda: {"right": False}
        yield "two", lambda: 1 / 0
        yield "three", lambda: {"s": 2.0}

    monkeypatch.setattr(module, "_parts", parts)
    ticks = iter([0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 100.0, 100.0, 100.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(module, "ProcessPoolExecutor", _NoPool)
    module.gpu_report(settings(tmp_path, minutes=1))
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))["parts"]
    assert "ZeroDivisionError" in found["two"]["failed"]
    assert found["three"] == {"left out": "no time was left"}
    lines = (tmp_path / "report.md").read_text("utf-8").splitlines()
    assert {"wrong: one", "failed: two", "left out: three"} <= {*lines}


class _NoPool:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _NoPool:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, *_: Any) -> None: ...

    def shutdown(self, **_: Any) -> None: ...


def test_a_gpu_is_needed_unless_another_device_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="there is no GPU here; with --device cpu"):
        module.gpu_report(settings(tmp_path, device="cuda"))
    with pytest.raises(SettingsError, match="three numbers of voxels"):
        settings(tmp_path, volume=(3, 4))
