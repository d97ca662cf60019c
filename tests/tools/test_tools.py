# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.errors import SettingsError
from tools.benchmarking.memory import step_memory
from tools.benchmarking.sections import write_section
from tools.benchmarking.settings import Benchmark
from tools.benchmarking.steps import measure_sparse
from tools.checking.configs import config_problems
from tools.commanding import environment
from tools.commanding.settings import filled
from tools.preparing import template as template_data
from tools.starting import quickstart, report
from tools.starting.settings import Quickstart

from ..conftest import ROOT, blobs, write_volume
from ..starts import python


def test_pins_are_met_here_and_missing_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.unmet("requirements.txt") == []
    (tmp_path / "pins.txt").write_text("# note\nno-such-package==1.0\nmonai==0.0.1  # old\n")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert len(environment.unmet("pins.txt")) == 2
    assert environment.unmet("pins.txt")[0] == "no-such-package==1.0 (here: missing)"


def test_every_runtime_import_is_pinned() -> None:
    pinned = {
        re.split("==", line)[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    }
    names = {"ignite": "pytorch-ignite", "yaml": "pyyaml", "skimage": "scikit-image", "sklearn": "scikit-learn"}
    for path in (ROOT / "common").rglob("*.py"):
        for module in re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.M):
            if module not in sys.stdlib_module_names:
                assert names.get(module, module) in pinned, f"{path} imports {module}"


def test_template_parts_do_not_touch_and_scans_differ(tmp_path: Path) -> None:
    parts = template_data.write_template_data(tmp_path, train=2, validation=1, test=1)
    assert set(parts) == {"learn", "test"}
    lists = json.loads((tmp_path / "datalist.json").read_text())
    extent = {}
    for split in ("training", "test"):
        image = nib.load(tmp_path / lists[split][0]["image"])
        low = image.affine[1, 3]
        extent[split] = (low, low + image.shape[1])
        assert nib.load(tmp_path / lists[split][0]["label"]).shape == image.shape
    assert extent["test"][0] - extent["training"][1] >= 10
    a, b = (nib.load(tmp_path / lists["training"][i]["image"]).get_fdata() for i in (0, 1))
    assert 0.5 < np.corrcoef(a.ravel()[::50], b.ravel()[::50])[0, 1] < 0.999
    whole = nib.load(tmp_path / lists["training"][0]["label"])
    _, labels, affine = template_data.template()
    np.testing.assert_allclose(whole.affine[[0, 2], 3], affine[[0, 2], 3])
    start = round(whole.affine[1, 3] - affine[1, 3])
    np.testing.assert_array_equal(np.asarray(whole.dataobj), labels[:, start : start + whole.shape[1]])


def test_thresholds_solve_what_intensity_alone_tells(tmp_path: Path) -> None:
    cases = []
    for index in range(2):
        _, ball = blobs(index)
        image = 0.2 + 0.7 * ball + 0.02 * np.random.default_rng(index).standard_normal(ball.shape)
        paths = {"image": tmp_path / f"i{index}.nii.gz", "label": tmp_path / f"l{index}.nii.gz"}
        write_volume(paths["image"], image.astype(np.float32))
        write_volume(paths["label"], ball)
        cases.append({k: str(v) for k, v in paths.items()})
    assert report.threshold_baseline(cases[:1], cases[1:], 1)[0] > 0.99


def test_quickstart_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    def last(*arguments: str) -> str:
        command = [python(), str(ROOT / "tools" / "quickstart.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1
        return result.stderr.strip().splitlines()[-1]

    assert "choose one of" in last("--bundle", "nothing")
    assert "there is no folder" in last("--data", "/nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").touch()
    assert "holds something else" in last("--output", "full")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_quickstart_goes_on_with_the_same_data_only(
    kind: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = filled(Quickstart, data=labelled, output=tmp_path / "q")
    began: list[str] = []

    monkeypatch.setattr(quickstart.Chain, "run", lambda _, title, *__: began.append(title))
    monkeypatch.setattr(quickstart, "write_report", lambda *_: tmp_path)
    quickstart.quickstart(asked)
    file = labelled / kind / "case_1.nii.gz"
    held = file.read_bytes()
    file.unlink()
    file.write_bytes(held)
    began.clear()
    quickstart.quickstart(asked)
    assert began == ["pre-training without labels"], "touched, the same in content: it goes on"
    values, affine = np.asarray(nib.load(file).dataobj), nib.load(file).affine
    nib.save(nib.Nifti1Image(np.roll(values, 1, 0), affine), file)
    with pytest.raises(SettingsError, match=rf"{file} was changed \(1 file\(s\)\); empty it or give another --output"):
        quickstart.quickstart(asked)
    file.write_bytes(held)
    quickstart.quickstart(asked)
    for part in ("images", "labels"):
        (labelled / part / "more.nii.gz").write_bytes((labelled / part / "case_1.nii.gz").read_bytes())
    with pytest.raises(SettingsError, match=r"images/more.nii.gz is new \(2 file\(s\)\)"):
        quickstart.quickstart(asked)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["mae_resenc_l", "mae_primus_m", "voco_resenc_l", "swinunetr_primus_m"])
def test_quickstart_on_own_labelled_data(bundle: str, labelled: Path, tmp_path: Path) -> None:
    command = [python(), str(ROOT / "tools" / "quickstart.py"), "--bundle", bundle, "--data", str(labelled)]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "q"), "--scale", "0.1"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    page = (tmp_path / "q" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "template" not in page


@pytest.mark.slow
def test_quickstart_on_own_images_without_labels(images: Path, tmp_path: Path) -> None:
    command = [
        python(),
        str(ROOT / "tools" / "quickstart.py"),
        "--data",
        str(images),
        "--output",
        str(tmp_path / "q"),
    ]
    result = subprocess.run([*command, "--scale", "0.1"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert (tmp_path / "q" / "report.html").read_text().count("data:image/png;base64,") == 2


@pytest.mark.slow
def test_quickstart_reaches_its_dice() -> None:
    """The command of the README; its folder is kept, so a run that was made by hand is not repeated."""
    result = subprocess.run([python(), str(ROOT / "tools" / "quickstart.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    rows = {
        line.split("  ")[0].strip(): float(line.split()[-1])
        for line in result.stdout.splitlines()
        if line.startswith(("network", "intensity"))
    }
    assert rows["network, pre-trained"] >= 0.70
    assert rows["network, from scratch"] >= 0.70
    assert len(rows) == 3
    assert re.search(r"scratch: [+-]0\.\d{3} \[[+-]0\.\d{3}, [+-]0\.\d{3}\] over 3 repeats: ", result.stdout)


def test_the_config_lint_finds_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "bundles" / "some" / "configs"
    folder.mkdir(parents=True)
    good = "lr: 0.1\nschedule:\n  _target_: common.optimizers.Poly\n  lr: '@lr'\n  epochs: 3\n"
    (folder / "good.yaml").write_text(good)
    assert config_problems(folder / "good.yaml") == []
    for name, text, words in (
        ("twice", good + "lr: 0.2\n", "repeated key"),
        ("nothing", good.replace("@lr", "@rate"), "@rate refers to nothing"),
        ("target", good.replace("Poly", "Polly"), "there is no common.optimizers.Polly"),
    ):
        (folder / f"{name}.yaml").write_text(text)
        assert any(words in problem for problem in config_problems(folder / f"{name}.yaml")), name


def test_the_benchmark_measures_a_cell_against_plain_code() -> None:
    """The plain code is an oracle too: the command fails if its loss or gradient differs."""
    tiny = ["--patch_size", "16", "--embed_dim", "24", "--depth", "1", "--num_heads", "2", "--decoder_depth", "1"]
    command = [python(), str(ROOT / "tools" / "benchmark.py"), "--cells", "mae_primus_m", "--parts", "steps"]
    result = subprocess.run([*command, *tiny, "--repeats", "1", "--profile", "true"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line for line in result.stdout.splitlines() if line.startswith("| mae_primus_m |")]
    cells = [cell.strip(" *") for cell in rows[0].strip("|").split("|")]
    assert len(rows) == 1
    assert cells[1] == "2 x 1 x 16 x 16 x 16"
    assert all(0 < float(cell) < 100 for cell in cells[2:6])
    assert "mae_primus_m, plain, one step:" in result.stdout


def test_the_benchmark_compares_sparse_with_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = {"features_per_stage": [4, 8], "blocks_per_stage": [1, 1], "hidden_ratio": 0.75, "checkpointing": "none"}
    found = measure_sparse(Benchmark(patch_size=32, batch_size=1, repeats=1, settings=small))
    assert 0 < found["seconds"] < 60
    assert 0 < found["time"] < 20
    dense, sparse = (
        step_memory(f"{name}_resenc_l", patch_size=32, batch_size=1, **settings).highest
        for name, settings in (("mae", {k: v for k, v in small.items() if k != "hidden_ratio"}), ("spark3d", small))
    )
    assert found["memory"] == sparse / dense


def test_the_benchmark_writes_each_section_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mine\n\n<!-- figures: steps -->\nold\n<!-- end of figures: steps -->\n\nKept.\n")
    write_section(page, "data", ["new data"])
    write_section(page, "steps", ["new steps"])
    write_section(page, "data", ["newer data"])
    steps = "<!-- figures: steps -->\n\nnew steps\n<!-- end of figures: steps -->"
    data = "<!-- figures: data -->\n\nnewer data\n<!-- end of figures: data -->"
    assert page.read_text() == f"# Mine\n\n{steps}\n\nKept.\n\n{data}\n"


def test_the_benchmark_refuses_what_it_does_not_know() -> None:
    for arguments, words in (
        (["--cells", "nothing"], "there is no bundle 'nothing'"),
        (["--parts", "speed"], "there is no part 'speed'"),
        (["--cells", "mae_resenc_l", "--embed_dim", "24"], "--embed_dim is neither an option nor a setting"),
        (["--parts", "data", "--scans", "nowhere.nii.gz"], "--scans is 'nowhere.nii.gz'; it must be paths"),
    ):
        command = [python(), str(ROOT / "tools" / "benchmark.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert words in result.stderr
