# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The notebook docs/first_steps.ipynb: its form, and that its code runs, briefly."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools.packing import backend

from ..conftest import ROOT
from ..starts import python

NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"
# each number of the notebook that makes it last, and what a test puts there
BRIEFLY = [
    (r'"epochs": \d+', '"epochs": 1'),
    (r'"iterations_per_epoch": \d+', '"iterations_per_epoch": 1'),
    (r'"val_iterations": \d+', '"val_iterations": 1'),
    (r'"features_per_stage": \[[^\]]*\]', '"features_per_stage": [4, 8, 8]'),
    (r'"blocks_per_stage": \[[^\]]*\]', '"blocks_per_stage": [1, 1, 1]'),
    (r'"patch_size": \[[^\]]*\]', '"patch_size": [32, 32, 32]'),
    (r'"spacing_mm": [\d.]+', '"spacing_mm": 4.0'),
]


def cells(kind: str) -> list[dict[str, Any]]:
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def run(source: str, folder: Path) -> str:
    with zipfile.ZipFile(folder / backend.build_editable(str(folder))) as archive:
        archive.extractall(folder)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport matplotlib; matplotlib.use('Agg')\n{source}"
    line = [python(), "-W", "ignore", "-c", code]
    result = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result.stdout


def sources() -> str:
    return "\n".join("".join(cell["source"]) for cell in cells("code"))


def test_it_shows_what_it_printed_and_drew() -> None:
    kinds = {output["output_type"] for cell in cells("code") for output in cell["outputs"]}
    assert {"stream", "execute_result", "display_data"} <= kinds
    text = NOTEBOOK.read_text("utf-8")
    assert "Traceback" not in text
    assert "/tmp/" not in text
    assert "/root" not in text
    assert len(text) < 200_000
    for link in re.findall(r"\]\((\w+\.md)\)", text):
        assert (NOTEBOOK.parent / link).is_file()


def test_its_code_runs(tmp_path: Path) -> None:
    code = sources()
    for pattern, briefly in BRIEFLY:
        code, count = re.subn(pattern, briefly, code)
        assert count == 1, pattern
    end = """
assert sorted(scores) == ["test_1", "test_2"]
assert all(0 <= score <= 1 for each in scores.values() for score in each.values())
assert found.shape == truth.shape == image.shape
assert len(vectors) == 7 and {vector.shape for vector in vectors.values()} == {(8,)}
print("FOUND", encoder, model)
"""
    assert "FOUND openmind_runs/mae_resenc_l/models/pretrained_encoder.pt" in run(code + end, tmp_path)


@pytest.mark.slow
def test_its_code_learns_within_minutes(tmp_path: Path) -> None:
    found = run(
        f"{sources()}\nprint('FOUND', *(score for each in scores.values() for score in each.values()))", tmp_path
    )
    numbers = next(line for line in found.splitlines() if line.startswith("FOUND")).split()[1:]
    assert len(numbers) == 4
    assert all(float(number) > 0.5 for number in numbers), "the classes are found where it never looked"
