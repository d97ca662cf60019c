# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Losses of methods with a teacher that need the whole batch: two processes compute what one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .processes import distilling, foretelling, overlapping


@pytest.mark.parametrize(
    ("compute", "rounding"),
    [
        pytest.param(distilling, 1e-6, id="distilling"),
        pytest.param(foretelling, 1e-6, id="foretelling"),
        pytest.param(overlapping, 1e-5, id="overlapping"),  # divided by how little averages of maps differ
    ],
)
def test_many_processes_learn_from_a_teacher_like_one(
    compute: Any, rounding: float, processes: dict[str, list[Any]]
) -> None:
    """Averaged over processes, as DistributedDataParallel averages gradients."""
    averaged = [torch.stack(values).mean(0) for values in zip(*processes[compute.__name__], strict=True)]
    expected = compute(0, 1)
    assert len(expected) > 10
    largest = max(float(one.abs().max()) for one in expected[1:])
    assert float(averaged[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for actual, one in zip(averaged[1:], expected[1:], strict=True):
        torch.testing.assert_close(actual, one, rtol=0, atol=rounding * largest)
    apart = [float(one[0]) for one in processes[compute.__name__]]
    assert apart[0] != pytest.approx(apart[1], abs=1e-4), "each has samples of its own"
