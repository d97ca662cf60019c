# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Measures of features without labels, against values by hand; trends against chance."""

from __future__ import annotations

import numpy as np
import pytest

from common.metrics.representations import effective_rank, view_agreement
from common.metrics.trends import falls


def test_the_effective_rank_has_the_values_of_the_paper() -> None:
    assert effective_rank(7 * np.eye(6, 9)) == pytest.approx(6)
    assert effective_rank(np.tile([[1.0, -2.0, 3.0]], (8, 1))) == pytest.approx(1)
    assert effective_rank(np.zeros((4, 3))) == 0
    shares = np.array([0.75, 0.25])  # of the singular values 3 and 1
    assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 30))
    assert 3 < effective_rank(features) < 4
    assert effective_rank(features.astype(np.float16)) == pytest.approx(effective_rank(features), rel=0.1)
    turn = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    assert effective_rank(-5 * features @ turn) == pytest.approx(effective_rank(features)), "of the directions alone"


def test_views_agree_as_far_as_they_tell_their_volume() -> None:
    rng = np.random.default_rng(0)
    volumes = rng.standard_normal((8, 200))
    assert view_agreement(np.eye(8), np.eye(8)) == pytest.approx(8 / 7)
    assert view_agreement(volumes, volumes) == pytest.approx(8 / 7, abs=0.05)
    noisy = [volumes + rng.standard_normal(volumes.shape) for _ in range(2)]
    assert view_agreement(*noisy) == pytest.approx(0.5 * 8 / 7, abs=0.1), "half of each is noise"
    assert view_agreement(noisy[0] + 100, noisy[1] + 100) == pytest.approx(view_agreement(*noisy))
    assert abs(view_agreement(*rng.standard_normal((2, 8, 200)))) < 0.1
    assert view_agreement(np.ones((4, 5)), np.ones((4, 5))) == 0, "collapsed"
    with pytest.raises(ValueError, match="two volumes or more"):
        view_agreement(np.ones((1, 5)), np.ones((1, 5)))


def test_a_fall_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    assert falls(np.linspace(1, 0, 8).tolist())
    assert falls([0.80, 0.81, 0.79, 0.77, 0.78, 0.74, 0.73, 0.70])
    assert not falls(np.linspace(0, 1, 8).tolist())
    assert not falls([0.5] * 8)
    noise = [falls(rng.standard_normal(8).tolist()) for _ in range(1000)]
    assert 0 <= np.mean(noise) < 0.02
