# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The comparison of whole predictions: what both sides are given, and how what they take is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from common.networks import ResEncUNet
from common.transforms import volume_preprocessing
from common.weights import trained_network, trained_settings
from tools.benchmarking import measured
from tools.benchmarking.inference import FULL, NARROW, Row, inference_table, write_row


def test_both_are_given_the_same_weights_and_every_class_is_predicted(tmp_path: Path) -> None:
    network = {"features_per_stage": [8, 8, 8], "blocks_per_stage": [1, 1, 1]}
    write_row(Row(3, (88, 88, 48), network), tmp_path)
    settings = trained_settings(str(tmp_path / "model.pt"))
    assert settings["labels"] == ["background", "class 1", "class 2", "class 3"]
    trained = trained_network(ResEncUNet(1, 4, **network), str(tmp_path / "model.pt"), settings={}).eval()
    chain = volume_preprocessing(**{name: settings[name] for name in ("spacing_mm", "normalization", "reorient")})
    image = chain({"image": str(tmp_path / "images" / "case_0000.nii.gz")})["image"].as_tensor()
    assert image.shape == (1, 72, 70, 70), "no voxel is 0, so nothing is cropped away"
    with torch.no_grad():
        labels = trained(image[None, :, :64, :64, :64]).argmax(1)
    assert min(torch.bincount(labels.flatten(), minlength=4)) > 0.02 * labels.numel()
    theirs = torch.load(tmp_path / "nnunet" / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert any(torch.equal(value, trained.head.weight) for value in theirs.values())


def test_imports_are_counted_apart_and_memory_at_its_peak(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    )
    (tmp_path / "program.py").write_text(
        "import sys, time\nimport slow\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass\n"
        "held = b'x' * (100 * 2**20)\ndel held\nsys.exit(sys.argv[1:] != ['asked'])"
    )
    report = tmp_path / "report.json"
    command = [sys.executable, measured.__file__, str(report), str(tmp_path / "program.py"), "asked"]
    subprocess.run(command, check=True)
    found = json.loads(report.read_text())
    assert found["imports"] >= 0.4
    assert found["seconds"] - found["imports"] >= 0.6
    assert 100 * 2**20 < found["peak"] < 160 * 2**20


def test_ratios_are_ours_over_theirs() -> None:
    theirs = {"seconds": 100.0, "imports": 5.0, "peak": 3e9}
    ours = {"seconds": 50.0, "imports": 6.0, "peak": 1.2e9}
    rows = [{"row": row, "ours": ours, "theirs": theirs, "same": 0.9995, "nnunet": "2.8.1"} for row in (Row(20),)]
    text = "\n".join(inference_table(rows, lambda head, lines: "\n".join(" | ".join(line) for line in lines)))
    assert "nnunetv2 2.8.1" in text
    assert (
        "narrow, 320 x 320 x 140 | 20 | 50.0 (6.0) | 1.20 | 100.0 (5.0) | 3.00 | **0.50** | **0.40** | 99.95%" in text
    )
    alone = [{"row": Row(3, network=FULL, amp=True), "ours": ours, "nnunet": ""}]
    text = "\n".join(inference_table(alone, lambda head, lines: "\n".join(" | ".join(line) for line in lines)))
    assert "ResEnc-L, 320 x 320 x 140, ours in bfloat16 | 3 | 50.0 (6.0) | 1.20" in text
    assert max(NARROW["features_per_stage"]) == 32
