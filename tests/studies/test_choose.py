# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch

from common.errors import DataError, SettingsError, WeightsError
from common.transforms import volume_preprocessing
from common.weights import write_checkpoint
from tools.choosing import candidates, choice
from tools.choosing import choose as tool
from tools.choosing.data import read_data
from tools.choosing.probes import Encoder, paired_difference
from tools.choosing.settings import Choose
from tools.choosing.verdicts import Difference, judge
from tools.commanding.settings import filled
from tools.studies import execution
from tools.studies.reading import read_study

from ..conftest import ROOT, write_volume
from ..starts import python
from .encoders import LABELS, textured, train, write_task

SMALL: dict[str, Any] = {"patch_size": [24, 24, 24], "resamples": 300, "bundles": "none"}
B = "mae_resenc_l"
PLAIN, MEAN = "plain CNN", "mean of training"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A random, a half-trained and a trained encoder."""
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("trained"), steps=[0, 25, 150], bundle=B, seed=7)


def named(trained: list[Path]) -> str:
    return ",".join(f"{B}/{name}={file}" for name, file in zip(("random", "half", "full"), trained, strict=True))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "choose.json").read_text())


def pretend(dice: dict[str, float], spread: float = 0.02, fails: Any = lambda _: False) -> Any:
    """Return a stand-in for the fine-tunings: runs end at once with Dice around known values, or fail."""

    def run_pieces(study: Any, where: Any, **_: Any) -> dict[str, str]:
        for run in study.runs():
            if fails(run):
                continue
            rng = np.random.default_rng([run.seed, run.fold, *run.arm.encode()])
            unseen = study.data_sets[run.data_set].parts[run.fold]["validation"]
            cases = {
                Path(case["image"]).name.removesuffix(".nii.gz"): {
                    "group": None,
                    "scores": {
                        name: {"dice": dice[run.arm] + spread * rng.standard_normal(), "nsd": 0.5}
                        for name in LABELS[1:]
                    },
                }
                for case in unseen
            }
            folder = study.folder / "runs" / run.name
            folder.mkdir(parents=True)
            content = {"run": {"name": run.name, "task": "segmentation"}, "cases": cases}
            (folder / "result.json").write_text(json.dumps(content))
        return {run.name: "out of memory" for run in study.runs() if fails(run)}

    return run_pieces


def pretend_classes(right: dict[str, float]) -> Any:
    """Return a stand-in for the fine-tunings of a classification: runs end at once, knowing the class so well."""

    def run_pieces(study: Any, where: Any, **_: Any) -> dict[str, str]:
        for run in study.runs():
            rng = np.random.default_rng([run.seed, run.fold])
            cases = {}
            for case in study.data_sets[run.data_set].parts[run.fold]["validation"]:
                truth = ["=a", "$1/0"].index(case["%kind"])
                sure = float(np.clip(0.5 + right[run.arm] * (truth - 0.5) + 0.2 * rng.standard_normal(), 0.01, 0.99))
                cases[case["name"]] = {"group": None, "truth": truth, "probabilities": [1 - sure, sure]}
            folder = study.folder / "runs" / run.name
            folder.mkdir(parents=True)
            about = {"name": run.name, "task": "classification"}
            (folder / "result.json").write_text(json.dumps({"run": about, "classes": ["=a", "$1/0"], "cases": cases}))
        return {}

    return run_pieces


def pretend_numbers(error: dict[str, float]) -> Any:
    """Return a stand-in for the fine-tunings of a regression: runs end at once, so far off."""

    def run_pieces(study: Any, where: Any, **_: Any) -> dict[str, str]:
        for run in study.runs():
            rng = np.random.default_rng([run.seed, run.fold])
            cases = {}
            for case in study.data_sets[run.data_set].parts[run.fold]["validation"]:
                truth = float(case["bright"])
                told = truth + error[run.arm] * rng.standard_normal()
                cases[case["name"]] = {"group": None, "truth": truth, "predicted": [told]}
            folder = study.folder / "runs" / run.name
            folder.mkdir(parents=True)
            about = {"name": run.name, "task": "regression"}
            (folder / "result.json").write_text(json.dumps({"run": about, "classes": ["bright"], "cases": cases}))
        return {}

    return run_pieces


# what is said


def gaps(table: dict[tuple[str, str], tuple[float, float, float]]) -> Any:
    return lambda first, second: Difference(*table[first, second])


def test_an_arm_is_recommended_only_over_those_that_it_is_clear_of() -> None:
    scores = {"a": 0.8, "b": 0.7, "scratch": 0.6}
    clear = gaps({("a", "b"): (0.1, 0.02, 0.2), ("a", "scratch"): (0.2, 0.1, 0.3)})
    found = judge(scores, clear, units=10, what="Dice", scratch=["scratch"], seeds=2)
    assert (found.best, found.decided, found.tied) == ("a", True, [])
    assert found.sentences == [
        "Use a: Dice 0.800, better than b (+0.100 [+0.020, +0.200]), scratch (+0.200 [+0.100, +0.300])."
    ]
    close = gaps({("a", "b"): (0.1, -0.1, 0.3), ("a", "scratch"): (0.2, 0.1, 0.3)})
    found = judge(scores, close, units=10, what="Dice", scratch=["scratch"], seeds=2)
    assert (found.decided, found.tied) == (False, ["b"])
    assert found.sentences[0].startswith("Too close to call between a and b")
    assert found.sentences[1] == "Clearly worse than a: scratch (+0.200 [+0.100, +0.300])."
    # an interval of +-0.2 shrinks to +-0.1 with four times the cases
    assert "about 40 labelled cases instead of 10" in found.sentences[-1]
    assert "or more seeds than 2" in found.sentences[-1]


@pytest.mark.parametrize("units", [6, 20])
def test_arms_that_are_alike_are_seldom_told_apart(units: int) -> None:
    """Of cases without any difference, 5 in 100 may be called different; a plain bootstrap of 6 calls 14."""
    rng = np.random.default_rng(1)
    plain, widened = 0, 0
    for _ in range(400):
        cases = rng.standard_normal((units, 1))
        gap = paired_difference(cases, np.zeros_like(cases), resamples=300)
        found = Difference(gap["estimate"], *gap["interval"])
        plain += found.low > 0 or found.high < 0
        wide = found.widened(gap["units"])
        widened += wide.low > 0 or wide.high < 0
    assert widened <= 0.09 * 400, "5 to 6 in 100, and chance"
    assert widened < plain


def test_scratch_and_small_differences_are_told_plainly() -> None:
    scores = {"scratch": 0.8, "a": 0.79}
    clear = judge(scores, gaps({("scratch", "a"): (0.01, 0.005, 0.02)}), units=9, what="Dice", scratch=["scratch"])
    assert clear.sentences[0].startswith("Train from scratch, as scratch: Dice 0.800")
    tied = judge(scores, gaps({("scratch", "a"): (0.01, -0.1, 0.12)}), units=9, what="Dice", scratch=["scratch"])
    assert "That pre-training helps on these data is not shown." in tied.sentences
    assert "more than 90 labelled cases" in tied.sentences[-1]
    assert "either will do" in tied.sentences[-1]
    few = judge(scores, gaps({("scratch", "a"): (0.01, 0.005, 0.02)}), units=5, what="Dice")
    assert not few.decided, "five cases of one sign are no more than chance"
    assert few.sentences[1] == "What would settle it: at least 6 labelled cases, better 20."
    assert judge({"a": float("nan")}, gaps({}), units=9, what="Dice").best == ""
    assert "nothing to compare a with" in judge({"a": 0.5}, gaps({}), units=9, what="Dice").sentences[0]


def test_one_run_of_each_gives_an_order_and_no_recommendation() -> None:
    scores = {"b": 0.7, "a": 0.8, "zero": 0.6}
    clear = gaps({("a", "b"): (0.1, 0.02, 0.2), ("a", "zero"): (0.2, 0.1, 0.3)})
    found = judge(scores, clear, units=10, what="Dice", scratch=["zero"], seeds=1)
    assert (found.best, found.decided, found.tied) == ("a", False, ["b", "zero"])
    assert found.sentences == [
        "None. By Dice the order is a 0.800, b 0.700, zero 0.600, but one run of each does not tell luck from skill.",
        "What would settle it: more runs, at least --seeds 2, better 3.",
    ]
    assert judge(scores, clear, units=10, what="Dice", seeds=0).decided, "probes have no runs"
    lone = judge({"a": 0.8, "b": 0.7}, lambda *_: None, units=10, what="Dice", seeds=3)
    assert lone.sentences[0].endswith("0.700; they have too few runs in common to be compared.")


def test_what_is_at_hand_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bundle in ("mae_primus_m", B, "simclr_resenc_l"):
        (tmp_path / "bundles" / bundle / "configs").mkdir(parents=True)
        (tmp_path / "bundles" / bundle / "configs" / "features.yaml").touch()
    for bundle in ("mae_primus_m", B):
        (tmp_path / "bundles" / bundle / "models").mkdir()
        (tmp_path / "bundles" / bundle / "models" / "pretrained_encoder.pt").touch()
    monkeypatch.setattr(candidates, "ROOT", tmp_path)
    monkeypatch.setattr(
        candidates, "encoder_at_hand", lambda bundle: tmp_path / "bundles" / bundle / "models" / "pretrained_encoder.pt"
    )
    other = tmp_path / "other.pt"
    other.touch()
    assert list(candidates.find_candidates()) == ["mae_primus_m", B]
    assert list(candidates.find_candidates(("mae_primus_m",))) == ["mae_primus_m"]
    found = candidates.find_candidates(["none"], [f"simclr_resenc_l={other}", f"{B}/mine={other}"])
    assert {name: encoder.bundle for name, encoder in found.items()} == {
        "simclr_resenc_l": "simclr_resenc_l",
        f"{B}/mine": B,
    }
    assert list(candidates.find_candidates((), [f"{B}={other}"])) == ["mae_primus_m", B], (
        "a file goes before the bundle's own"
    )
    assert candidates.find_candidates((), [f"{B}={other}"])[B].weights == str(other)


def test_median_spacing_and_ct_windows_become_numbers_for_the_probes(tmp_path: Path) -> None:
    folder = write_task(tmp_path, 3, spacing=0.8)
    data = read_data(Choose(folder, labels=tuple(LABELS)))
    assert data.spacing_mm == pytest.approx([0.8, 0.8, 0.8], abs=1e-4)
    told = choice._in_numbers({"normalization": "ct", "spacing_mm": "median", "lr": 0.1}, data)
    assert told["spacing_mm"] == pytest.approx([0.8, 0.8, 0.8], abs=1e-4)
    ((low, high, mean, _),) = (scheme["ct"] for scheme in told["normalization"])
    assert low < mean < high
    assert choice._in_numbers({"spacing_mm": "pretrained", "lr": 0.1}, data) == {"lr": 0.1}
    assert choice._in_numbers({"normalization": "zscore"}, data) == {"normalization": "zscore"}
    assert len(read_data(Choose(folder, labels=tuple(LABELS), cases=2)).cases) == 2


# whole runs


def test_encoders_are_ranked_by_what_they_know(
    task_folder: Path, trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {**SMALL, "labels": LABELS, "weights": named(trained), "best": 0}
    tool.choose(filled(Choose, str(task_folder), output=str(tmp_path / "out"), **arguments))
    content = read(tmp_path / "out")
    probes = content["probes"]
    ranked = sorted(probes, key=lambda name: -probes[name]["estimate"])
    assert ranked[:2] == [f"{B}/full", f"{B}/half"]
    assert set(ranked[2:]) == {f"{B}/random", "random resenc_l"}
    assert content["verdict"]["best"] == f"{B}/full"
    assert content["verdict"]["decided"]
    assert content["verdict"]["by"] == "probes"
    assert probes[f"{B}/half"]["over_random"]["interval"][0] > 0
    assert probes[f"{B}/half"]["to_best"]["interval"][0] > 0
    told = capsys.readouterr().out
    assert f"Recommendation, by probes: Use {B}/full" in told
    assert "| what it is" in told
    assert "further public checkpoints of these backbones" in told
    assert set(content["origins"]) == {f"{B}/full", f"{B}/half", f"{B}/random"}
    assert told.split("\n\n")[2] in (tmp_path / "out" / "choose.md").read_text()
    assert matplotlib.image.imread(tmp_path / "out" / "choose.png").shape[2] >= 3
    before = (tmp_path / "out" / "choose.json").read_bytes()
    tool.choose(filled(Choose, str(task_folder), output=str(tmp_path / "out"), **arguments))
    assert capsys.readouterr().out.count("kept, probed before") == 4
    assert (tmp_path / "out" / "choose.json").read_bytes() == before


@pytest.mark.parametrize(("gain", "decided"), [(0.2, True), (0.0, False)])
def test_the_best_go_on_to_fine_tuning_with_scratch_at_equal_budget(
    gain: float, decided: bool, task_folder: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, half, scratch = f"{B}/full", f"{B}/half", "scratch resenc_l"
    dice = {full: 0.6 + gain, half: 0.6 + gain / 2, scratch: 0.6, PLAIN: 0.5}
    monkeypatch.setattr(choice, "run_pieces", pretend(dice))
    options = {**SMALL, "labels": LABELS, "weights": named(trained), "epochs": 3, "momentum": 0.9}
    tool.choose(filled(Choose, str(task_folder), output=str(tmp_path), **options))
    study = json.loads((tmp_path / "fine-tuning" / "study.json").read_text())
    assert list(study["arms"]) == [full, half, scratch, PLAIN]
    assert study["seeds"] == [0, 1, 2]
    told = study["backbones"]["resenc_l"]["settings"]
    assert (told["epochs"], told["momentum"], told["patch_size"]) == (3, 0.9, [24, 24, 24])
    for name, arm in study["arms"].items():
        assert name == PLAIN or arm["bundle"] == B
        assert arm["settings"]["features_per_stage"] == [4, 8, 8], "scratch has the same network"
        assert arm["settings"]["spacing_mm"] == 1.0
    content = read(tmp_path)
    assert content["verdict"]["by"] == "fine-tuning"
    assert content["verdict"]["decided"] is decided
    arms = content["fine_tuning"]["arms"]
    for name, value in dice.items():
        assert arms[name]["estimate"] == pytest.approx(value, abs=0.03)
    said = (tmp_path / "choose.md").read_text()
    assert content["verdict"]["best"] != PLAIN
    assert PLAIN not in content["verdict"]["tied"], "a plain row is no candidate"
    beaten = f"Against the plain rows: {full}, {half} and {scratch} beat {PLAIN}."
    assert beaten in said
    assert arms[full]["over_plain_rows"][PLAIN]["estimate"] == pytest.approx(0.1 + gain, abs=0.03)
    assert "None of them is recommended." in said
    assert ("Use mae_resenc_l/full: Dice" in said) is decided
    assert ("Too close to call" in said) is not decided
    assert ("That pre-training helps on these data is not shown." in said) is not decided
    other = tmp_path / "fine-tuning" / "runs" / "data" / "mae_resenc_l_full" / "budget_all" / "fold_0" / "seed_0"
    (other / "run.json").write_text(json.dumps({"settings": {"epochs": 300}}))
    written = {file: file.read_bytes() for file in (tmp_path / "fine-tuning").glob("*.*")}
    assert {"study.yaml", "card.yaml", "cases.json"} < {file.name for file in written}
    with pytest.raises(SettingsError, match=r"was run with other .*settings#epochs.* another output"):
        tool.choose(filled(Choose, str(task_folder), output=str(tmp_path), **{**options, "epochs": 4, "cases": 7}))
    assert {file: file.read_bytes() for file in written} == written, "a rerun that is refused changes nothing"


def test_arms_that_are_not_complete_are_not_compared(
    task_folder: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm that has only seen the easy fold has no score to be compared."""
    full, half, scratch = f"{B}/full", f"{B}/half", "scratch resenc_l"
    dice = {full: 0.7, half: 0.9, scratch: 0.5, PLAIN: 0.8}
    options = {**SMALL, "labels": LABELS, "weights": named(trained), "epochs": 1, "seeds": 4}

    def ask(place: str, fails: Any, **changes: Any) -> tuple[dict[str, Any], str]:
        shutil.copytree(tmp_path / "probes", tmp_path / place / "probes")
        monkeypatch.setattr(choice, "run_pieces", pretend(dice, fails=fails))
        tool.choose(filled(Choose, str(task_folder), output=str(tmp_path / place), **{**options, **changes}))
        return read(tmp_path / place), (tmp_path / place / "choose.md").read_text()

    tool.choose(filled(Choose, str(task_folder), output=str(tmp_path), **{**options, "best": 0}))
    content, said = ask("one", lambda run: run.arm == half and run.fold == 1)
    assert content["verdict"]["best"] == full
    assert content["verdict"]["decided"]
    assert content["fine_tuning"]["arms"][half]["to_best"] is None
    ranks = said.split("| fine-tuned shortly |")[1].split("\n\n")[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in ranks] == [PLAIN, full, scratch, half]
    assert f"Against the plain rows: {full} and {scratch} are worse than {PLAIN}." in said
    assert "| incomplete: 4 of 8 runs" in said
    assert "Not compared, since not all of their unseen cases are scored: mae_resenc_l/half; the same command" in said
    for place, fails in {
        "half": lambda run: run.fold == 1,
        "either": lambda run: run.fold == (run.arm == full),
        "all": lambda _: True,
    }.items():
        content, said = ask(place, fails)
        assert content["verdict"]["by"] == "probes"
        assert "No fine-tuning is compared, since not all of their unseen cases are scored" in said
        assert not any(arm["complete"] for arm in content["fine_tuning"]["arms"].values())
    assert said.count("| incomplete: 0 of 8 runs") == 4
    content, said = ask("lone", lambda run: run.arm == full and run.seed > 0)
    assert content["fine_tuning"]["arms"][full]["complete"]
    assert full in content["verdict"]["tied"], "one run does not tell luck from skill"
    content, said = ask("single", lambda _: False, seeds=1)
    assert not content["verdict"]["decided"]
    assert "None. By Dice the order is mae_resenc_l/half" in said
    assert "over the runs of fine-tuning" not in said


def test_fine_files_are_warned_of_and_tried_at_their_own_spacing(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = write_task(tmp_path / "fine", 3, spacing=0.5)
    own = "scratch resenc_l, own spacing"
    monkeypatch.setattr(
        choice, "run_pieces", pretend({f"{B}/full": 0.6, "scratch resenc_l": 0.5, own: 0.8}, spread=0.0)
    )
    options = {**SMALL, "labels": LABELS, "weights": f"{B}/full={trained[2]}", "best": 1, "patch_size": [16, 16, 16]}
    options["plain_rows"] = False
    tool.choose(filled(Choose, str(fine), output=str(tmp_path / "out"), **options))
    told = capsys.readouterr().out
    assert "warning: Your files have 0.5 x 0.5 x 0.5 mm voxels (median), far from the pre-training spacing" in told
    assert "does better from scratch at its own spacing" in told
    arm = json.loads((tmp_path / "out" / "fine-tuning" / "study.json").read_text())["arms"][own]
    assert arm["spacing"] == "median"
    assert "spacing_mm" not in arm["settings"]
    assert read(tmp_path / "out")["verdict"]["best"] == own
    assert "Too close to call: with 3 case(s)" in told, "three cases settle nothing"


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "ASL", "PIR"])
@pytest.mark.parametrize("reorient", [True, False])
def test_the_files_own_spacing_is_in_the_order_of_prepared_axes(codes: str, reorient: bool, tmp_path: Path) -> None:
    sides = {"R": 0.5, "A": 0.7, "S": 3.0}  # along left-right, back-front, down-up
    axes = {"L": "R", "P": "A", "I": "S"}
    own = [sides[axes.get(code, code)] for code in codes]
    image, labels = textured(np.random.default_rng(0), side=16)
    upright = nib.Nifti1Image(image, np.diag([0.5, 0.7, 3.0, 1]))
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    for name in ("c0", "c1"):
        for part, values in (("images", image), ("labels", labels)):
            (tmp_path / part).mkdir(exist_ok=True)
            turned = nib.Nifti1Image(values, upright.affine).as_reoriented(turn)
            nib.save(turned, tmp_path / part / f"{name}.nii.gz")
    found = read_data(filled(Choose, str(tmp_path), labels=LABELS, reorient=reorient))
    prepared = volume_preprocessing(spacing_mm=None, reorient=reorient)({"image": found.cases[0]["image"]})["image"]
    assert found.spacing_mm == ([3.0, 0.7, 0.5] if reorient else own[::-1])
    assert found.spacing_mm == pytest.approx(prepared.pixdim.tolist())


def test_classification_is_probed_by_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(16):
        image, labels = textured(rng, side=16)
        kind = index % 2
        values = image + 3.0 * kind * (labels > 0)
        write_volume(tmp_path / "images" / f"c{index:02d}.nii.gz", values.astype(np.float32))
        # in a table nothing is a command, and nothing that is written from it a formula
        rows.append({"case": f"c{index:02d}", "%kind": ("=a", "$1/0")[kind], "@who": f"@p{index // 2}"})
    with open(tmp_path / "t.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    weights = train(tmp_path / "w", steps=[0], bundle=B, seed=3)[0]
    options: dict[str, Any] = {**SMALL, "resamples": 100, "num_workers": 0}
    options |= {"table": str(tmp_path / "t.csv"), "weights": f"{B}={weights}", "best": 0, "patch_size": [16, 16, 16]}
    for group in (None, "@who"):
        out = tmp_path / f"out_{group}"
        tool.choose(filled(Choose, str(tmp_path / "images"), target="%kind", patient=group, output=str(out), **options))
        content = read(out)
        assert content["metric"]["probe"] == "AP"
        assert content["units"] == (8 if group else 16)
        assert content["probes"][B]["estimate"] > 0.6
        assert content["probes"][B]["over_random"] is not None
        assert f"{B} is not shown to beat random resenc_l." in (out / "choose.md").read_text()
    monkeypatch.setattr(choice, "run_pieces", pretend_classes({B: 0.9, "scratch resenc_l": 0.0, PLAIN: 0.3}))
    options |= {"best": 1, "input_size": [16, 16, 16], "epochs": 2, "seeds": 5}
    tool.choose(filled(Choose, str(tmp_path / "images"), target="%kind", output=str(tmp_path / "out_None"), **options))
    content = read(tmp_path / "out_None")
    assert content["verdict"]["by"] == "fine-tuning"
    assert content["verdict"]["decided"]
    assert content["verdict"]["best"] == B
    told = json.loads((tmp_path / "out_None" / "fine-tuning" / "study.json").read_text())
    assert told["backbones"]["resenc_l"]["settings"]["input_size"] == [16, 16, 16]
    assert told["data_sets"]["data"]["target"] == "%kind"
    assert told["data_sets"]["data"]["classes"] == ["$1/0", "=a"]
    with pytest.raises(DataError, match="no column 'grade'"):
        tool.choose(filled(Choose, str(tmp_path / "images"), target="grade", output=str(tmp_path / "x"), **options))
    with pytest.raises(SettingsError, match="needs both"):
        tool.choose(filled(Choose, str(tmp_path / "images"), output=str(tmp_path / "x"), **options))


def test_numbers_are_probed_by_ridge_regression_and_fine_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = ["case,bright"]
    for index in range(16):
        image, labels = textured(rng, side=16)
        values = (image + 0.4 * index * (labels > 0)).astype(np.float32)
        write_volume(tmp_path / "images" / f"c{index:02d}.nii.gz", values)
        rows.append(f"c{index:02d},{10 + 0.4 * index:.1f}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    weights = train(tmp_path / "w", steps=[0], bundle=B, seed=3)[0]
    options: dict[str, Any] = {**SMALL, "resamples": 100, "num_workers": 0, "seeds": 3, "best": 1}
    options |= {"table": str(tmp_path / "t.csv"), "weights": f"{B}={weights}", "patch_size": [16, 16, 16]}
    options |= {"target": "bright", "input_size": [16, 16, 16], "epochs": 2, "units": "grey levels"}
    monkeypatch.setattr(choice, "run_pieces", pretend_numbers({B: 0.1, "scratch resenc_l": 3.0, PLAIN: 2.0, MEAN: 2.5}))
    tool.choose(filled(Choose, str(tmp_path / "images"), output=str(tmp_path / "out"), **options))
    content = read(tmp_path / "out")
    assert content["task"] == "regression"
    assert content["metric"] == {"probe": "R2", "fine_tuning": "r2"}
    assert content["verdict"]["by"] == "fine-tuning"
    assert (content["verdict"]["decided"], content["verdict"]["best"]) == (True, B)
    assert content["fine_tuning"]["arms"][B]["estimate"] > 0.9
    said = (tmp_path / "out" / "choose.md").read_text()
    assert "R2 of the probe" in said
    assert f"{B} beats {PLAIN} and {MEAN}" in said
    mean = content["probes"][MEAN]["estimate"]
    assert -0.5 < mean < 0.0, "the mean of other cases is a little worse than the mean of these"
    assert content["probes"][B]["over_plain_rows"][MEAN]["estimate"] == pytest.approx(
        content["probes"][B]["estimate"] - mean
    )
    told = json.loads((tmp_path / "out" / "fine-tuning" / "study.json").read_text())
    assert told["data_sets"]["data"]["card"]["task"] == "regression"
    assert told["backbones"]["resenc_l"]["settings"]["units"] == "grey levels"
    with pytest.raises(SettingsError, match="which needs --table"):
        filled(Choose, str(tmp_path / "images"), task="regression")


def test_what_cannot_be_asked_ends_in_a_sentence(task_folder: Path, trained: list[Path], tmp_path: Path) -> None:
    good: dict[str, Any] = {**SMALL, "labels": LABELS, "weights": f"{B}={trained[2]}", "best": 0}

    def ask(data: Path = task_folder, **changes: Any) -> None:
        tool.choose(filled(Choose, str(data), output=str(tmp_path / "out"), **{**good, **changes}))

    one, unlabelled = tmp_path / "one", tmp_path / "unlabelled"
    for part in ("images", "labels"):
        (one / part).mkdir(parents=True)
        shutil.copy(task_folder / part / "case_00.nii.gz", one / part)
    shutil.copytree(task_folder / "images", unlabelled)
    half = tmp_path / "half"
    shutil.copytree(task_folder, half)
    shutil.copy(trained[1], tmp_path / "half.pt")
    (half / "labels" / "case_03.nii.gz").unlink()
    empty = tmp_path / "empty"
    shutil.copytree(task_folder, empty)
    for file in (empty / "labels").iterdir():
        nib.save(nib.Nifti1Image(np.zeros((24, 24, 24), np.uint8), np.eye(4)), file)
    for kind, words, changes in (
        (WeightsError, r"no pre-trained encoders to choose from.*tools/import_checkpoint.py", {"weights": ""}),
        (WeightsError, "which does not exist; correct the path", {"weights": f"{B}={tmp_path}/none.pt"}),
        (SettingsError, "write NAME=PATH", {"weights": str(trained[0])}),
        (SettingsError, "write NAME=PATH", {"weights": f"unet={trained[0]}"}),
        (SettingsError, "--bundles names 'unet'; choose from .*mae_primus_m", {"bundles": "unet"}),
        (WeightsError, "mae_primus_m has no weights .* name a file: --weights", {"bundles": "mae_primus_m"}),
        (DataError, "holds no labelled data: it needs images/", {"data": unlabelled}),
        (DataError, r"case_03.nii.gz has no label", {"data": half}),
        (DataError, "1 usable labelled case; .* at least 2, better 20", {"data": one}),
        (DataError, "no label map marks any class", {"data": empty}),
        (DataError, r"holds the values 2, but the classes are", {"labels": LABELS[:2]}),
        (SettingsError, "name the classes, background first: --labels", {"labels": None}),
        (SettingsError, "list all classes, background first", {"labels": ["background"]}),
        (SettingsError, r"unknown setting --lrr \(did you mean --lr", {"lrr": 0.1}),
        (SettingsError, "--datalist is no setting here: cases come from --data", {"datalist": "a.json"}),
        (
            SettingsError,
            f"--weights names {B} twice; write {B}/other=.*half.pt for one",
            {"weights": f"{B}={trained[2]},{B}={tmp_path / 'half.pt'}"},
        ),
        (
            SettingsError,
            f"{B}/a b and {B}/a_b, which would share a folder",
            {"weights": f"{B}/a b={trained[2]},{B}/a_b={trained[2]}"},
        ),
        (DataError, r"has no 'patient'; add it", {"patient": "patient"}),
        (SettingsError, "--group is called --patient here; write --patient", {"group": "patient"}),
        (WeightsError, "is of another network", {"features_per_stage": [8, 8, 8]}),
    ):
        with pytest.raises(kind, match=words):
            ask(**changes)


def test_too_few_cases_with_a_class_are_told_before_any_encoder_runs(
    task_folder: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = tmp_path / "rare"
    shutil.copytree(task_folder, rare)
    for file in sorted((rare / "labels").iterdir())[1:]:
        nib.save(nib.Nifti1Image(np.zeros((24, 24, 24), np.uint8), np.eye(4)), file)
    monkeypatch.setattr("tools.choosing.choice.probe_encoder", lambda *_, **__: pytest.fail("an encoder ran"))
    with pytest.raises(DataError, match="only 1 of 8 cases hold any class"):
        tool.choose(
            filled(
                Choose,
                str(rare),
                output=str(tmp_path / "o"),
                **{**SMALL, "labels": LABELS, "weights": f"{B}={trained[2]}"},
            )
        )


def test_the_answer_for_other_data_is_never_replaced(
    task_folder: Path, trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of the same name would write to the same place."""
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "find_candidates", lambda *_: {B: Encoder(B, str(trained[2]))})
    for patient in ("p1", "p2"):
        shutil.copytree(task_folder, tmp_path / patient / "scans")
    monkeypatch.setattr(choice, "run_pieces", pretend({B: 0.7, "scratch resenc_l": 0.6, PLAIN: 0.5}))
    options: dict[str, Any] = {**SMALL, "labels": LABELS, "epochs": 1}
    tool.choose(filled(Choose, str(tmp_path / "p1" / "scans"), **{**options, "best": 0}))
    answer = tmp_path / "choose" / "scans" / "choose.json"
    before = answer.read_bytes()
    with pytest.raises(SettingsError, match=r"holds the answer for .*p1/scans, not for .*p2/scans; .* with --output"):
        tool.choose(filled(Choose, str(tmp_path / "p2" / "scans"), **options))
    assert answer.read_bytes() == before
    answer.unlink()  # as if it was cut during the fine-tunings
    tool.choose(filled(Choose, str(tmp_path / "p1" / "scans"), **options))
    answer.unlink()
    study = read_study(answer.parent / "fine-tuning" / "study.yaml", output=answer.parent / "fine-tuning")
    run = study.runs()[0]
    (study.folder / "runs" / run.name / "run.json").write_text(json.dumps(execution._about(study, run, "runs")))
    with pytest.raises(SettingsError, match=r"holds fine-tunings of other cases.* with --output"):
        tool.choose(filled(Choose, str(tmp_path / "p2" / "scans"), **options))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("best", -1), ("seeds", 0), ("tuning_folds", 1), ("cases", -1), ("cases", 1), ("cases", 2.5), ("folds", 1)],
        *[("resamples", 0), ("resamples", 1), ("seed", -1), ("jobs", -1), ("channels", 0), ("folds", "five")],
    ],
)
def test_numbers_that_cannot_be_are_told_before_any_work(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "find_candidates", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SettingsError, match=rf"--{name} is {value!r}; it must be a whole number from \d+"):
        tool.choose(filled(Choose, tmp_path, **{name: value}))
    with pytest.raises(SettingsError, match="--gpus names 99, but this machine has"):
        tool.choose(filled(Choose, tmp_path, gpus="99"))


def test_weights_that_do_not_fit_are_left_out_and_told(task_folder: Path, trained: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt"
    write_checkpoint({"encoder.x": torch.ones(3)}, broken)
    (tmp_path / "text.pt").write_text("no weights")
    weights = f"{B}={trained[1]},{B}/broken={broken},{B}/text={tmp_path / 'text.pt'}"
    tool.choose(
        filled(
            Choose,
            str(task_folder),
            output=str(tmp_path / "o"),
            **{**SMALL, "labels": LABELS, "weights": weights, "best": 0},
        )
    )
    content = read(tmp_path / "o")
    assert set(content["left_out"]) == {f"{B}/broken", f"{B}/text"}
    assert "another network" in content["left_out"][f"{B}/broken"]
    assert f"Left out: {B}/text" in (tmp_path / "o" / "choose.md").read_text()
    assert content["verdict"]["best"] == B


@pytest.mark.slow
def test_the_whole_way_as_a_user_goes_it(task_folder: Path, trained: list[Path], tmp_path: Path) -> None:
    """Probes and real fine-tunings from the command line; cut once, it goes on."""
    command = [python(), "-W", "ignore", "tools/choose.py", "--data", str(task_folder)]
    command += ["--labels", str(LABELS), "--weights", named(trained), "--bundles", "none", "--output", str(tmp_path)]
    command += ["--patch_size", "[16,16,16]", "--epochs", "2", "--iterations_per_epoch", "10", "--lr", "0.05"]
    command += ["--seeds", "1", "--num_workers", "0"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=40)
    first.terminate()
    first.wait()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "kept, probed before" in result.stdout
    content = read(tmp_path)
    arms = content["fine_tuning"]["arms"]
    assert list(arms) == [f"{B}/full", f"{B}/half", "scratch resenc_l", PLAIN]
    assert not content["fine_tuning"]["failed"]
    assert content["verdict"]["best"] == f"{B}/full"
    assert not content["verdict"]["decided"], "one run of each gives an order"
    assert arms[f"{B}/full"]["complete"]
    assert arms[f"{B}/full"]["estimate"] > arms["scratch resenc_l"]["estimate"]
