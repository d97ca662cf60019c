# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The command that says what a GPU must have: its settings, words and tables."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.engines.budget.fitting import side_name
from common.engines.budget.parts import number_of_parts
from common.engines.budget.step import Step
from common.errors import SettingsError
from common.networks.blocks.recompute import mode_of
from tools.budgeting import budget as module
from tools.budgeting.settings import BUNDLES, Budget
from tools.commanding.settings import filled

from ..conftest import ROOT
from ..starts import python

GIB = 2**30


def step(content: Any, **_: Any) -> Step:
    """Pretend that memory follows the samples computed at once, and recomputing halves it at a third more work."""
    again = mode_of(content["checkpointing"]) == "full"
    samples = content["batch_size"] // number_of_parts(content) * content[side_name(content)][0] ** 3 / 160**3
    activations = int(samples * 4 * GIB / (1 + again))
    return Step(GIB, 0, GIB, activations, 0, activations, int((4 / 3 if again else 1) * 3e13), 10**8)


@pytest.fixture(autouse=True)
def _pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.engines.budget.fitting.training_step", step)
    monkeypatch.setattr(
        "common.engines.budget.fitting.inference_step", lambda content: Step(GIB, 0, 0, GIB, 0, GIB, 10**12, 0)
    )


def told(capsys: pytest.CaptureFixture[str], *values: str, **settings: Any) -> str:
    module.budget(filled(Budget, *values, **settings))
    return capsys.readouterr().out


def test_memory_work_and_hours_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "mae_resenc_l")
    assert "crops of 160 x 160 x 160, batch 8 in 1 part(s)" in text
    assert "34.00 GiB at the peak: weights 1.00, gradients 0.00, optimizer 1.00, activations 32.00" in text
    assert "plan for 37.7 GiB" in text
    assert "cuDNN" in text
    assert "250000 steps" in text
    a100 = next(line for line in text.splitlines() if line.startswith("  A100"))
    # 250000 steps of 3e13 multiply-adds at 40 % and 10 % of 312 TFLOP/s
    assert "33.4 to 134 h" in a100
    assert "fits" in a100
    assert "208 to 52" not in a100
    assert "52 to 208 MB/s" in a100
    assert "does not fit" in next(line for line in text.splitlines() if "RTX 3090" in line)


def test_what_fits_is_a_line_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert "40 GiB: plan for 37.7 with the settings as they are" in told(capsys, "mae_resenc_l", gpu=40)
    assert "24 GiB: plan for 20.4 with --accumulation_steps 2\n" in told(capsys, "mae_resenc_l", gpu=24)
    assert "with --accumulation_steps 8 --checkpointing full\n" in told(capsys, "mae_resenc_l", gpu=6)
    assert "--accumulation_steps 8\n" in told(capsys, "mae_resenc_l", gpu=6, checkpointing="true")
    assert "--patch_size '[" in told(capsys, "mae_resenc_l", gpu=4)
    assert "nothing that was tried fits" in told(capsys, "mae_resenc_l", gpu=1)


def test_a_volume_to_predict_is_told_by_its_tiles(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "mae_resenc_l", workflow="inference")
    assert "1 tera multiply-adds a tile; 108 tiles in 512 x 512 x 300 voxels" in text
    assert "0.16 GiB more for each class" in text


def test_a_classification_is_told_by_its_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "mae_resenc_l", workflow="train_classification", gpu=24)
    assert "classification, volumes of 160 x 160 x 160, batch 96 in 48 part(s), checkpointing selective" in text
    assert "2200 steps if there are 1000 cases" in text, "200 epochs of 11 steps"
    assert "24 GiB: plan for 11.8 with the settings as they are" in text, "two at a time, as published"
    text = told(capsys, "mae_resenc_l", workflow="train_classification", gpu=8)
    assert "with --accumulation_steps 96\n" in text
    text = told(capsys, "mae_resenc_l", workflow="train_classification", gpu=5)
    assert "--input_size '[" in text
    assert "another recipe" in text


def test_settings_are_those_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "mae_resenc_l", patch_size="[96,96,96]", batch_size="4", amp="false")
    assert "crops of 96 x 96 x 96, batch 4" in text
    assert "float32" in text
    with pytest.raises(SettingsError, match=r"unknown setting --patchsize \(did you mean --patch_size"):
        told(capsys, "mae_resenc_l", patchsize="3")
    for wrong in ({"output": "x.md"}, {"volume": "1,2"}, {"gpu": "0"}, {"check": 64, "gpu": 8}, {"workflow": "x"}):
        with pytest.raises(SettingsError):
            filled(Budget, "mae_resenc_l", **wrong)
    with pytest.raises(SettingsError, match="there is no bundle 'mae'"):
        filled(Budget, "mae")
    with pytest.raises(SettingsError, match="published settings"):
        filled(Budget, "all", lr=3)


def test_the_tables_of_a_page_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "budget.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n", "utf-8")
    told(capsys, "all", output=str(page))
    text = page.read_text("utf-8")
    assert text.startswith("before\n<!-- tables -->\n")
    assert text.endswith("<!-- end of tables -->\nafter\n")
    assert "old" not in text
    assert [text.count(f"| {bundle} |") for bundle in BUNDLES] == [8] * len(BUNDLES), "two tables of four workflows"
    (tmp_path / "other.md").write_text("no marks", "utf-8")
    with pytest.raises(SettingsError, match="has no line"):
        module._write(tmp_path / "other.md", "x")


def test_gpus_have_a_peak_a_memory_and_a_source() -> None:
    known = module.gpus()
    assert len({gpu["name"] for gpu in known}) == len(known) > 5
    for gpu in known:
        assert gpu["source"]
        assert 8 <= gpu["gib"] <= 288
        assert 20 <= gpu["tflops"] <= 3000


def test_the_command_runs_as_a_user_runs_it() -> None:
    command = [python(), str(ROOT / "tools" / "budget.py"), "mae_resenc_l", "--patch_size", "[32,32,32]"]
    narrow = ["--features_per_stage", "[4,8,8]", "--blocks_per_stage", "[1,1,1]", "--gpu", "8"]
    result = subprocess.run([*command, *narrow], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "8 GiB: plan for 1." in result.stdout
    assert "with the settings as they are" in result.stdout
