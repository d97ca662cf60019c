# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What selective recomputation saves, at published sizes and without allocating anything."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.benchmarking.memory import Held, StepMemory, step_memory

from ..conftest import BUNDLES, ROOT

PUBLISHED = {"dtype": torch.bfloat16}
SMALLER = {"patch_size": 96, "batch_size": 2}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def measured(cell: str, workflow: str, how: dict[str, object]) -> list[StepMemory]:
    return [step_memory(cell, workflow, **how, checkpointing=mode) for mode in ("none", "selective")]


@pytest.mark.parametrize("backbone", ["resenc_l", "primus_m"])
def test_activations_and_temporaries_are_halved(backbone: str) -> None:
    plain, selective = measured(f"mae_{backbone}", "pretrain", PUBLISHED)
    assert selective.highest <= 0.55 * plain.highest
    assert (selective.weights, selective.gradients) == (plain.weights, plain.gradients)
    plain, selective = measured(f"mae_{backbone}", "train", SMALLER)
    assert selective.highest <= 0.65 * plain.highest


def test_a_sparse_encoder_takes_less_than_a_dense_one() -> None:
    """The MAE is the dense U-Net on the same image with the same blocks hidden."""
    how = {"patch_size": 96, "batch_size": 1, "hidden_ratio": 0.75, "checkpointing": "none"}
    dense, sparse = (step_memory(cell, **how) for cell in ("mae_resenc_l", "spark3d_resenc_l"))  # type: ignore[arg-type]
    assert sparse.highest <= 0.70 * dense.highest


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_cell_saves(bundle: str) -> None:
    shallow = {"features_per_stage": [32, 64, 128], "blocks_per_stage": [1, 1, 1]}
    settings = shallow if bundle.endswith("resenc_l") else {"depth": 4}
    plain, selective = measured(bundle, "pretrain", {"patch_size": 64, "batch_size": 2, **settings})
    assert selective.highest <= 0.8 * plain.highest


def test_what_is_counted() -> None:
    with FakeTensorMode(), Held() as held:
        a = torch.empty(1000)  # 4000 bytes
        b = a + 1  # 8000
        view = b[:10]
        del b
        assert held.now == 8000, "a view keeps its memory"
        del view, a
        c = torch.empty(500)
    assert (held.now, held.highest, held.parts) == (2000, 8000, {})
    assert c.shape == (500,)
