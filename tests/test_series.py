# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A run that was killed leaves what an uninterrupted one does, and so do two that start at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .series import Series, main


@pytest.mark.long
def test_a_preparation_is_killed_and_one_is_started_twice(tmp_path: Path) -> None:
    series = Series(tmp_path, in_a_row=1)
    assert series.kill("prepare", 0) >= 0
    assert series.pair("prepare", 0) == "both"


@pytest.mark.slow
def test_a_hundred_kills_and_forty_pairs(tmp_path: Path) -> None:
    main(tmp_path)
