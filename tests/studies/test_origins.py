# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Weights of strangers in comparisons: told by their receipt, not by the bundle that they are tried in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.weights import Receipt
from tools.checkpoints.catalogue import checkpoints
from tools.choosing.candidates import not_at_hand, origin
from tools.choosing.showing import _origins
from tools.reporting.provenance import _stranger
from tools.studies.definition import Arm


def receipt(**about: Any) -> Receipt:
    return Receipt("a.pt", "0" * 64, backbone="ResEnc-L", **about)


def test_choose_tells_an_encoder_by_its_receipt() -> None:
    told = origin(receipt(name="Great Encoder", licence="CC-BY-NC-4.0"))
    assert _origins({"mae_resenc_l": told}) == [
        [
            "mae_resenc_l",
            "ResEnc-L encoder, method unknown (Great Encoder)",
            "CC-BY-NC-4.0; forbids commercial use",
        ]
    ]
    assert origin(receipt(method="MAE"))["what"] == "MAE with ResEnc-L"


def test_choose_counts_what_is_known_and_not_at_hand() -> None:
    known = [one for one in checkpoints() if one.backbone == "resenc_l" and "*" not in (one.file or "")]
    assert not_at_hand([], ["mae_resenc_l", "voco_resenc_l"]) == len(known)
    here = receipt(provenance={"source": "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE"})
    assert not_at_hand([here], ["mae_resenc_l"]) == len(known) - 1
    assert 0 < not_at_hand([here], ["mae_primus_m"]) < not_at_hand([here], ["mae_primus_m", "mae_resenc_l"])


def test_an_arm_is_of_the_method_of_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "encoder.pt"
    assert Arm("a", "mae_resenc_l", "scratch").method == "mae"
    assert Arm("a", "mae_resenc_l", str(file)).method == "mae", "nothing is said of them"
    for stated, method in (
        ("MAE", "mae"),
        ("unknown", "unknown"),
        ("VoCo", "voco"),
        ("DINO", "dino"),
        ("JEPA", "jepa"),
        ("MoCo", "MoCo"),
    ):
        file.with_suffix(".json").write_text(json.dumps({"method": stated}))
        assert Arm("a", "mae_resenc_l", str(file)).method == method


def test_a_report_says_what_the_weights_of_an_arm_are() -> None:
    results: Any = SimpleNamespace(about={"arms": {"a": {"bundle": "mae_resenc_l"}}})
    about = {"method": "unknown", "backbone": "ResEnc-L", "name": "Great Encoder", "licence": "CC-BY-SA-4.0"}
    assert _stranger("a", about, results) == ["ResEnc-L encoder, method unknown (Great Encoder), licence CC-BY-SA-4.0"]
    assert _stranger("a", {"method": "MAE", "backbone": "ResEnc-L"}, results) == []
    assert _stranger("a", {"source": "encoder.pt"}, results) == []
