# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Figures draw texts as they are, and leave alone what a notebook has set for its own."""

from __future__ import annotations

import os
import subprocess

import matplotlib
import pytest
from matplotlib import figure

from common.figures import subplots

from .starts import python

NO_MATHEMATICS = r"a $\frac b$"


def test_texts_are_as_they_are(tmp_path) -> None:
    own = figure.Figure()
    own.subplots().set_title(NO_MATHEMATICS)
    with pytest.raises(ValueError, match="frac"):  # what matplotlib does with it
        own.savefig(tmp_path / "own.png")
    ours, axes = subplots(1, 2, figsize=(4, 3), squeeze=False)
    for axis in axes[0]:
        axis.plot([0, 1], label=NO_MATHEMATICS)
        axis.set_title(NO_MATHEMATICS)
        axis.set_xticks([0, 1], [NO_MATHEMATICS] * 2)
        axis.legend()
    ours.suptitle(NO_MATHEMATICS)
    for tight in (None, "tight"):
        ours.savefig(tmp_path / "ours.png", bbox_inches=tight)
    assert matplotlib.rcParams["text.parse_math"]


def test_a_notebook_goes_on_showing_its_figures(tmp_path) -> None:
    """Its kernel names a backend; what draws here changes no setting."""
    code = """
import sys, matplotlib
before = dict(matplotlib.rcParams)
import common.drawing, common.figures, common.handlers.pictures, common.metrics.reports
common.figures.subplots(1, 1, figsize=(1, 1))[0].savefig(sys.argv[1])
assert dict(matplotlib.rcParams) == before
print(matplotlib.get_backend())
"""
    line = [python(), "-W", "ignore", "-c", code, str(tmp_path / "figure.png")]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "svg"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["svg"]
