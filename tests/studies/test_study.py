# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Studies: what a file expands to, what is refused, in which order pieces run, and a whole tiny one that is cut."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser

from common.data.cases import case_name
from common.errors import DataError, SettingsError
from tools.studies import commands as study_tool
from tools.studies import execution, scheduling
from tools.studies.contents import size_of
from tools.studies.cost import estimate
from tools.studies.definition import Study
from tools.studies.execution import check_results, check_same, pieces, pretraining_of, starting_weights
from tools.studies.reading import read_study
from tools.studies.scheduling import ELSEWHERE, Place, places, run_pieces
from tools.studies.settings import Run, Slurm, WriteCard

from ..conftest import ROOT, write_cases, write_volume
from ..starts import python

NARROW: dict[str, Any] = {
    "settings": {"patch_size": [16, 16, 16], "epochs": 1, "iterations_per_epoch": 2, "num_workers": 0},
    "pretraining": {"epochs": 1, "iterations_per_epoch": 2, "val_iterations": 1, "batch_size": 2},
    "backbones": {
        "resenc_l": {
            "settings": {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1]},
            "pretraining": {"block_size": 8},
        },
        "primus_m": {
            "settings": {"embed_dim": 24, "depth": 2, "num_heads": 2},
            "pretraining": {"warmup_epochs": 0},
        },
    },
}
TWO = {
    "MAE": {"bundle": "mae_resenc_l", "weights": "pretraining"},
    "scratch": {"bundle": "mae_resenc_l", "weights": "scratch"},
}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Six labelled cases, and a card."""
    write_cases(tmp_path / "task", 6)
    card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
    (tmp_path / "ball.yaml").write_text(yaml.safe_dump(card), "utf-8")
    return tmp_path / "task"


def written(folder: Path, **content: Any) -> Path:
    """Write study.yaml with what is given over a small study of two arms."""
    whole: dict[str, Any] = {"arms": TWO, "data_sets": {"ball": {"card": "ball.yaml", "folder": "task"}}, **NARROW}
    whole["plain_rows"] = False
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**whole, **content}, sort_keys=False), "utf-8")
    return path


def small(folder: Path, **content: Any) -> Study:
    return read_study(written(folder, **content))


def test_a_file_expands_to_all_runs(task: Path) -> None:
    study = small(task.parent, folds=2, seeds=[0, 1, 2], budgets=[2, "all"], lengths=[1, 3], schedules=[None, "warmup"])
    assert len(study.arms) == 2 * 2 * 2
    assert "MAE, warmup, 3 epochs" in study.arms
    runs = study.runs()
    assert len(runs) == 8 * 1 * 2 * 2 * 3 == len({run.name for run in runs})
    assert {run.cases for run in runs if run.budget == "all"} == {3}
    arm = study.arms["MAE, warmup, 3 epochs"]
    told = study.training_settings(arm, study.data_sets["ball"])
    assert (told["epochs"], told["schedule"], told["features_per_stage"]) == (3, "warmup", [4, 8, 8])
    assert [run.seed for run in runs] == sorted(run.seed for run in runs), "a cut study has something of every arm"


def test_arms_train_on_the_same_cases_and_never_on_unseen_ones(task: Path) -> None:
    study = small(task.parent, folds=2, seeds=[0, 1], budgets=[1, 2, "all"])
    unseen_once: list[str] = []
    for fold in study.folds:
        unseen = {case["image"] for case in study.data_sets["ball"].parts[fold]["validation"]}
        unseen_once += unseen
        for seed in study.seeds:
            drawn = {
                (run.arm, run.budget): [case["image"] for case in study.training_cases(run)]
                for run in study.runs()
                if (run.fold, run.seed) == (fold, seed)
            }
            assert not unseen & {image for images in drawn.values() for image in images}
            for budget in study.budgets:
                assert drawn["MAE", budget] == drawn["scratch", budget]
            assert drawn["MAE", "all"][:2] == drawn["MAE", "2"]
            assert drawn["MAE", "2"][:1] == drawn["MAE", "1"]
    assert len(unseen_once) == 6 == len(set(unseen_once)), "every case is unseen in one fold"


def test_patients_stay_together_and_groups_are_for_the_report(task: Path) -> None:
    names = sorted(path.name.split(".")[0] for path in (task / "images").iterdir())
    rows = [f"{name},{'AB'[i % 2]},{30 + 10 * i},p{i // 2}" for i, name in enumerate(names)]
    table = task.parent / "cases.csv"
    table.write_text("\n".join(["case,site,age,who", *rows]), "utf-8")
    entry = {"card": "ball.yaml", "folder": "task", "groups": "cases.csv", "group": "site,age:40", "patient": "who"}
    study = small(task.parent, data_sets={"ball": entry}, folds=3)
    data = study.data_sets["ball"]
    assert data.kept_together is None
    for part in data.parts:
        unseen = {case["who"] for case in part["validation"]}
        assert len(unseen) == 1
        assert not unseen & {case["who"] for case in part["training"]}
    case = next(case for part in data.parts for case in part["validation"] if case_name(case) == names[0])
    assert execution._belonging(data, case) == {
        "group": None,
        "groups": {"site": "A", "age": "below 40"},
        "patient": "p0",
    }
    assert study.as_plain()["data_sets"]["ball"]["patient"] == "who"
    alone = small(task.parent, data_sets={"ball": {**entry, "group": "site", "patient": None}}, folds=2).data_sets[
        "ball"
    ]
    assert alone.kept_together == "site"
    assert execution._belonging(alone, case) == {"group": "A"}
    for told, words in (
        ({"patient": "nobody"}, "has no 'nobody'"),
        ({"group": "centre,site"}, "no case has a centre"),
        ({"group": "age:60,40"}, "let them ascend"),
    ):
        with pytest.raises((DataError, SettingsError), match=words):
            small(task.parent, data_sets={"ball": {**entry, **told}}, folds=2)


def test_half_of_the_cases_is_unseen_without_folds(task: Path) -> None:
    part = small(task.parent).data_sets["ball"].parts
    assert [len(part[0][name]) for name in ("training", "validation")] == [3, 3]


def test_nearer_settings_win(task: Path) -> None:
    study = small(
        task.parent,
        settings={"epochs": 1, "lr": 1.0, "num_workers": 0, "batch_size": 8},
        backbones={"resenc_l": {"settings": {"epochs": 2, "lr": 2.0, "batch_size": 7}}},
        data_sets={"ball": {"card": "ball.yaml", "folder": "task", "settings": {"lr": 3.0, "batch_size": 6}}},
        arms={"a": {"bundle": "mae_resenc_l", "weights": "scratch", "settings": {"batch_size": 5}}},
    )
    told = study.training_settings(study.arms["a"], study.data_sets["ball"])
    assert told == {"epochs": 2, "lr": 3.0, "num_workers": 0, "batch_size": 5}


def test_a_pretraining_is_shared_and_comes_first(task: Path) -> None:
    study = small(task.parent, folds=2, seeds=[0, 1], settings={**NARROW["settings"], "schedule": "warmup"})
    order = pieces(study)
    first = [name for name in order if name.startswith("pretraining/")]
    assert list(order)[: len(first)] == first
    assert len(first) == 2, "one for each fold, whatever the number of seeds"
    for run in study.runs():
        needs = order[f"runs/{run.name}"]
        assert needs == ([f"pretraining/{pretraining_of(study, run)}"] if run.arm == "MAE" else [])
        assert starting_weights(study, run)["from_scratch"] is (run.arm == "scratch")
    told = study.pretraining_settings(study.arms["MAE"], study.data_sets["ball"])
    assert told["features_per_stage"] == [4, 8, 8], "of the same size as in fine-tuning"
    assert told["iterations_per_epoch"] == 2
    assert "lr" not in told
    assert "schedule" not in told, "of fine-tuning a word, of pre-training an object"


def test_data_sets_can_share_a_pretraining(task: Path) -> None:
    ball = {"card": "ball.yaml", "folder": "task"}
    study = small(task.parent, folds=2, data_sets={"ball": ball, "again": {**ball, "pretrain_on": "ball"}})
    order = pieces(study)
    assert [name for name in order if name.startswith("pretraining/") and "/ball/" not in name] == []
    assert sum(name.startswith("pretraining/") for name in order) == 2, "one for each fold"
    mine = [run for run in study.runs() if run.arm == "MAE"]
    assert {run.data_set for run in mine} == {"ball", "again"}
    assert all(order[f"runs/{run.name}"][0].endswith(f"fold_{run.fold}") for run in mine)
    with pytest.raises(SettingsError, match="pretrain_on of again is 'bal'; it must be one of ball, again"):
        small(task.parent, data_sets={"ball": ball, "again": {**ball, "pretrain_on": "bal"}})
    part = study.data_sets["ball"].parts[0]
    names = {key: [case_name(case) for case in part[key]] for key in part}
    (task.parent / "turned.json").write_text(json.dumps([{"train": names["validation"], "val": names["training"]}]))
    other = {**ball, "pretrain_on": "ball", "splits": "turned.json"}
    with pytest.raises(SettingsError, match="on which ball pre-trains; give both the same splits"):
        small(task.parent, folds={"of": 2, "use": [0]}, data_sets={"ball": ball, "again": other})


def test_each_seed_can_have_a_pretraining_of_its_own(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(task.parent, seeds=[3, 5], pretrain_each_seed=True)
    first = [name for name in pieces(study) if name.startswith("pretraining/")]
    assert [name.rpartition("/")[2] for name in first] == ["seed_3", "seed_5"]
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(execution, "run_config", lambda *_, **settings: told.append(settings))
    for name in first:
        execution.do(study, name)
    assert [settings["seed"] for settings in told] == [3, 5]
    about = [json.loads((study.folder / name / "run.json").read_text()) for name in first]
    assert [each["seed"] for each in about] == [3, 5]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"armz": {}}, "no 'armz'; did you mean arms"),
        ({"arms": {}}, "names no arms"),
        ({"arms": {"mae_resnet": {}}}, "there is no bundle 'mae_resnet'; did you mean mae_resenc_l"),
        ({"arms": {"mae_resenc_l": {"weights": "no.pt"}}}, "there are no weights"),
        ({"arms": {"mae_resenc_l": {"wieghts": "scratch"}}}, "did you mean weights"),
        ({"settings": {"epocs": 3}}, "unknown setting epocs (did you mean epochs"),
        ({"settings": {"seed": 3}}, "which the study itself decides"),
        ({"inference": {"overlapp": 0.5}}, "unknown setting overlapp"),
        ({"budgets": [4]}, "ball has 3 cases to train on"),
        ({"seeds": [-1]}, "seeds has -1"),
        ({"folds": {"of": 2, "use": [2]}}, "fold 2 of ball does not exist"),
        ({"data_sets": {"ball": {"card": "ball.yaml", "folder": "nowhere"}}}, "nowhere"),
        ({"data_sets": {"ball": {"card": "ball.yaml"}}}, "ball has no folder"),
        ({"data_sets": {"ball": {"card": "bowl.yaml", "folder": "task"}}}, "bowl.yaml"),
        ({"spacings": ["wide"]}, "must be fixed"),
        ({"pretrain_each_seed": "no"}, "pretrain_each_seed is 'no'"),
        ({"keep": ["everything"]}, "keep has no 'everything'"),
        ({"arms": {"a b": TWO["scratch"], "a_b": TWO["scratch"]}}, "share the folder a_b"),
        ({"arms": {"a": "mae_resenc_l"}}, "the arm a is 'mae_resenc_l'"),
        ({"arms": [{"x": 1}]}, "names no arms"),
        ({"data_sets": {"ball": "task"}}, "the data set ball is 'task'"),
        ({"backbones": {"resenc_l": {"settings": ["lr"]}}}, "settings of backbone resenc_l is ['lr']"),
        ({"backbones": {"resenc_l": {"settings": {"labels": ["a", "b"]}}}}, "which the study itself decides"),
        ({"inference": {"model": "x.pt"}}, "inference of the study name model"),
        ({"settings": {1: 2}}, "unknown setting"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [0, 0]}, "seeds has 0 twice"),
        ({"lengths": [2, 2]}, "lengths has 2 twice"),
        ({"folds": {"of": 2, "use": []}}, "use is empty"),
        ({"budgets": ["²"]}, "budgets has ²"),
        ({"schedules": ["sawtoth"]}, "schedule is 'sawtoth'; it must be one of default"),
        ({"settings": {"schedule": "sawtoth"}}, "schedule is 'sawtoth'"),
        ({"settings": {"lr": "high"}}, "lr is 'high'; it must be a number"),
        ({"settings": {"epochs": 0}}, "epochs is 0; it must be above 0"),
        ({"settings": {"patch_size": [16, 16]}}, "it must have three numbers"),
        ({"data_sets": {"ball": {"card": "ball.yaml", "folder": "task", "labels": ["background"]}}}, "labels"),
        ({"data_sets": {"ball": {"card": "ball.yaml", "folder": "task", "channels": 1.5}}}, "channels of the data set"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(task: Path, content: Any, words: str) -> None:
    with pytest.raises((DataError, SettingsError), match=r".") as error:
        small(task.parent, **content)
    assert words in str(error.value)
    assert "study.yaml" in str(error.value) or "nowhere" in words


def test_a_result_of_other_settings_is_not_taken_for_done(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"lr": 0.1, "epochs": 3}, "seed": 0}), "utf-8")
    check_same(tmp_path, {"settings": {"lr": "high", "epochs": 3}, "seed": 0})  # nothing was trained: corrected
    (tmp_path / "models").mkdir()
    check_same(tmp_path, {"settings": {"lr": 0.1, "epochs": 3}, "seed": 0})
    with pytest.raises(SettingsError, match="other settings#lr; give the study another output"):
        check_same(tmp_path, {"settings": {"lr": 0.2, "epochs": 3}, "seed": 0})
    (tmp_path / "run.json").write_text("")
    with pytest.raises(SettingsError, match=r"run.json cannot be read, .* remove that folder"):
        check_same(tmp_path, {})


def test_whatever_changes_a_result_is_noticed(task: Path) -> None:
    study = small(task.parent)
    for piece in pieces(study):
        kind, run = execution.runs_by_piece(study)[piece]
        (study.folder / piece / "models").mkdir(parents=True)
        (study.folder / piece / "run.json").write_text(json.dumps(execution._about(study, run, kind)), "utf-8")
    check_results(small(task.parent))
    shutil.copytree(task, task.parent / "moved")
    check_results(small(task.parent, data_sets={"ball": {"card": "ball.yaml", "folder": "moved"}}))
    with pytest.raises(SettingsError, match=r"MAE.* other pretraining; give"):
        check_results(small(task.parent, pretraining={**NARROW["pretraining"], "epochs": 2}))
    card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
    for name, value in {"ignore_label": 2, "regions": {"all": [1]}}.items():
        (task.parent / "ball.yaml").write_text(yaml.safe_dump({**card, name: value}), "utf-8")
        with pytest.raises(SettingsError, match=rf"other task#{name}.*; and 1 more folders"):
            check_results(small(task.parent))
    (task.parent / "ball.yaml").write_text(yaml.safe_dump(card), "utf-8")
    check_results(small(task.parent))
    file = task / "images" / "case_0.nii.gz"
    os.utime(file)
    check_results(small(task.parent))
    status, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(SettingsError, match=r"other contents; give.*; and 1 more folders"):
        check_results(small(task.parent))


def test_a_result_of_an_earlier_version_is_told_by_the_sizes_of_its_files(
    task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = small(task.parent, arms={"scratch": TWO["scratch"]})
    ((piece, (kind, run)),) = execution.runs_by_piece(study).items()
    about = execution._about(study, run, kind)
    (study.folder / piece / "models").mkdir(parents=True)
    before = {name: value for name, value in about.items() if name != "contents"}
    (study.folder / piece / "run.json").write_text(json.dumps(before), "utf-8")
    check_results(study)
    assert f"note: {study.folder / piece} tells its files by their sizes alone" in capsys.readouterr().out
    write_volume(task / "images" / "case_0.nii.gz", np.zeros((4, 4, 4), np.float32))
    size_of.cache_clear()
    with pytest.raises(SettingsError, match="other files"):
        check_results(study)


def test_names_and_paths_are_texts_however_they_look(task: Path) -> None:
    (task.parent / "20_24").symlink_to(task)
    (task.parent / "study.yaml").write_text(
        "arms: {2024-01-01: {bundle: mae_resenc_l, weights: scratch}}\noutput: 10_0\n"
        "data_sets: {1_0: {card: ball.yaml, folder: 20_24}, yes: {card: ball.yaml, folder: task}}\n"
        "plain_rows: false\n"
    )
    study = read_study(task.parent / "study.yaml")
    assert (list(study.arms), list(study.data_sets)) == (["2024-01-01"], ["1_0", "yes"])
    assert study.folder == task.parent / "10_0"
    assert "/20_24/" in study.data_sets["1_0"].parts[0]["training"][0]["image"]


def test_what_a_card_says_is_no_command(task: Path) -> None:
    card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
    (task.parent / "ball.yaml").write_text(yaml.safe_dump({**card, "settings": {"spacing_mm": "$1/0"}}), "utf-8")
    told = small(task.parent).data_sets["ball"].settings
    assert ConfigParser(dict(told)).get_parsed_content("spacing_mm") == "$1/0"


def test_a_result_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"run": {')
    assert execution.state(tmp_path) == "missing"
    (tmp_path / "result.json").write_text("{}")
    assert execution.state(tmp_path) == "finished"


def test_fixed_is_the_spacing_of_the_configs(task: Path) -> None:
    card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
    (task.parent / "ball.yaml").write_text(yaml.safe_dump({**card, "settings": {"spacing_mm": "median"}}), "utf-8")
    study = small(task.parent, spacings=["fixed", "median", "own"])
    told = {name: study.training_settings(arm, study.data_sets["ball"]) for name, arm in study.arms.items()}
    assert {name: each["spacing_mm"] for name, each in told.items() if name.startswith("MAE")} == {
        "MAE, spacing fixed": 1.0,
        "MAE, spacing median": "median",
        "MAE, spacing own": None,
    }
    study = small(task.parent)
    assert study.training_settings(study.arms["MAE"], study.data_sets["ball"])["spacing_mm"] == "median"
    with pytest.raises(SettingsError, match="the card of ball has no spacing_mm"):
        small(task.parent, spacings="card")


def test_no_case_is_tested_on_that_was_trained_on(task: Path) -> None:
    names = [f"case_{index}" for index in range(6)]
    for split, words in (
        ({"train": names[:4], "val": names[3:]}, "would test on case_3, on which it trains"),
        ({"train": [], "val": names}, "no case to train on"),
        ({"train": names, "val": []}, "no case to test on"),
    ):
        (task.parent / "splits.json").write_text(json.dumps([split]))
        with pytest.raises((DataError, SettingsError), match=words):
            small(task.parent, data_sets={"ball": {"card": "ball.yaml", "folder": "task", "splits": "splits.json"}})
    for index in range(1, 6):
        for part in ("images", "labels"):
            (task / part / f"case_{index}.nii.gz").unlink()
    with pytest.raises((DataError, SettingsError), match=r"two cases|case_0"):
        small(task.parent)


def test_names_of_any_script_have_folders_of_their_own(task: Path) -> None:
    study = small(task.parent, arms={"脳": TWO["scratch"], "腦": TWO["MAE"]})
    assert len({run.name for run in study.runs()}) == 2
    for names, words in ((("a", "A"), "'a' and 'A' would share"), (("..",), r"no folder can be called '\.\.'")):
        with pytest.raises(SettingsError, match=words):
            small(task.parent, arms=dict.fromkeys(names, TWO["scratch"]))
    with pytest.raises(SettingsError, match="called like a mean"):
        small(task.parent, data_sets={"All": {"card": "ball.yaml", "folder": "task"}})


def test_numbers_are_numbers_however_they_are_written(task: Path) -> None:
    file = task.parent / "study.yaml"
    written(task.parent)
    file.write_text(file.read_text().replace("epochs: 1\n", "epochs: 1\n  lr: 1e-3\n", 1), "utf-8")
    assert read_study(file).settings["lr"] == 0.001
    file.write_text(file.read_text() + "seeds: 0\nseeds: 1\n", "utf-8")
    with pytest.raises(SettingsError, match="'seeds' is written twice below line 0; leave"):
        read_study(file)


def test_shards_share_all_runs(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(task.parent, arms={"scratch": TWO["scratch"]}, folds=2, seeds=[0, 1, 2, 3])
    monkeypatch.setattr(scheduling, "_start", _pretend({}))
    done: list[int] = []
    for shard in ("0/3", "1/3", "2/3"):
        told = Run(task, shard=shard).shard
        assert run_pieces(study, [Place(None, 1)] * 2, shard=told or (0, 1)) == {}
        done.append(len(list(study.folder.glob("runs/**/result.json"))))
    assert done == [3, 6, 8]
    for wrong in ("3/3", "a/b", "1"):
        with pytest.raises(SettingsError, match="such as 0/8"):
            Run(task, shard=wrong)


def test_processes_share_the_cores() -> None:
    assert len(places(jobs=2)) == 2
    assert places(jobs=1)[0].threads == 2 * places(jobs=2)[0].threads or places(jobs=1)[0].threads == 1
    with pytest.raises(SettingsError, match="--gpus names 99"):
        places(gpus="99")


def _pretend(how: Mapping[str, str]) -> Any:
    """Return a start of processes that do what is said of the piece whose name holds the key."""

    def start(study: Study, name: str, place: Place) -> subprocess.Popen[bytes]:
        folder = study.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        result, failed, log = (str(folder / each) for each in ("result.json", "failed.json", "started"))
        what = next((value for key, value in how.items() if key in name), "finish")
        code = {
            "finish": f"open({result!r}, 'w').write('{{}}')",
            "fail": f"open({failed!r}, 'w').write('{{\"why\": \"no luck\"}}'); raise SystemExit(1)",
            "die": "import os; os.kill(os.getpid(), 9)",
            "elsewhere": f"import os; first = not os.path.exists({log!r}); open({log!r}, 'w')\n"
            f"if first: raise SystemExit({ELSEWHERE})\nopen({result!r}, 'w').write('{{}}')",
        }[what]
        return subprocess.Popen([sys.executable, "-c", code])

    return start


def test_one_that_fails_does_not_stop_the_others(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(task.parent, folds=2, seeds=[0, 1])
    how = {"scratch/budget_all/fold_0/seed_1": "fail", "scratch/budget_all/fold_1/seed_1": "die"}
    monkeypatch.setattr(scheduling, "_start", _pretend(how))
    failed = run_pieces(study, [Place(None, 1)] * 3)
    assert set(failed) == {f"runs/ball/scratch/budget_all/fold_{fold}/seed_1" for fold in (0, 1)}
    assert failed["runs/ball/scratch/budget_all/fold_0/seed_1"] == "no luck"
    assert "signal 9, perhaps for want of memory" in failed["runs/ball/scratch/budget_all/fold_1/seed_1"]
    monkeypatch.setattr(scheduling, "_start", _pretend({}))
    assert run_pieces(study, [Place(None, 1)]) == {}, "the next call tries them again"
    monkeypatch.setattr(scheduling, "_start", _pretend({"": "fail"}))
    assert run_pieces(study, [Place(None, 1)]) == {}, "and then nothing is left"


def test_without_its_pretraining_nothing_starts(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(task.parent)
    monkeypatch.setattr(scheduling, "_start", _pretend({"pretraining": "fail"}))
    failed = run_pieces(study, [Place(None, 1)])
    assert len(failed) == 2
    assert any("its pre-training failed" in why for why in failed.values())
    assert (study.folder / "runs/ball/scratch/budget_all/fold_0/seed_0/result.json").exists()


def test_what_another_machine_does_is_waited_for(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(task.parent)
    monkeypatch.setattr(scheduling, "_start", _pretend({"MAE": "elsewhere"}))
    monkeypatch.setattr(scheduling, "_POLL_ELSEWHERE", 0.1)
    assert run_pieces(study, [Place(None, 1)], shard=(0, 1)) == {}
    assert all((study.folder / name / "result.json").exists() for name in pieces(study))


def test_costs_add_up(task: Path) -> None:
    study = small(task.parent, folds=2, settings={**NARROW["settings"], "epochs": 10, "iterations_per_epoch": 20})
    cost = {"start": 5.0, "step": 0.5, "predict_start": 7.0, "predict": 2.0, "score_start": 4.0, "score": 1.0}
    run = next(run for run in study.runs() if run.arm == "MAE")
    assert estimate(study, run, "train", cost) == pytest.approx(5 + 200 * 0.5 + 7 + 4 + 3 * (2 + 1))
    assert estimate(study, run, "pretrain", cost) == pytest.approx(5 + 2 * 0.5 + 0.5 * 1 * 0.5)


def test_a_cluster_gets_a_script(
    task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(task.parent)
    file = written(task.parent, folds=2)
    study_tool.slurm(Slurm(file, tasks=16, options="--gres=gpu:1 --time=24:00:00"))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        *("result:  study/study.sbatch", "look at: study/study.sbatch", "next:    sbatch study/study.sbatch")
    ], "from where the user stands"
    assert Path.cwd() == task.parent
    script = task.parent / "study" / "study.sbatch"
    text = script.read_text("utf-8")
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "#SBATCH --array=0-3\n" in text, "no more tasks than runs"
    assert "#SBATCH --time=24:00:00\n" in text
    assert f'--shard "$SLURM_ARRAY_TASK_ID/{4}"' in text
    assert len(json.loads((task.parent / "study" / "study.json").read_text("utf-8"))["runs"]) == 4


def test_a_card_is_proposed_and_not_written_over(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = task.parent / "proposed.yaml"
    study_tool.card(WriteCard(task, output=file))
    assert "to be completed, and named in a study as card: " in capsys.readouterr().out
    study = small(task.parent, data_sets={"mine": {"card": "proposed.yaml", "folder": "task"}})
    assert len(study.data_sets["mine"].labels) == 2
    with pytest.raises(SettingsError, match=r"proposed.yaml exists"):
        study_tool.card(WriteCard(task, output=file))


def study_py(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [python(), "-W", "ignore", str(ROOT / "tools" / "study.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result


def test_a_whole_study_is_killed_goes_on_and_is_reported(task: Path) -> None:
    name = "=ball #1, @home"
    card = {"name": "Balls", "task": "segmentation", "labels": ["background", name]}
    (task.parent / "ball.yaml").write_text(yaml.safe_dump(card), "utf-8")
    file = written(task.parent, arms={**TWO, "bad": {"bundle": "mae_resenc_l", "weights": str(task / "bad.pt")}})
    (task / "bad.pt").write_bytes(b"no checkpoint")
    command = [sys.executable, str(ROOT / "tools" / "study.py"), "run", str(file)]  # a group that can be killed
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(task.parent.glob("study/pretraining/*/*/*/result.json")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = [path.stat().st_mtime_ns for path in task.parent.glob("study/pretraining/*/*/*/result.json")]
    assert first
    result = study_py("run", file, check=False)
    assert result.returncode == 1
    assert "2 of 3 runs finished" in result.stdout
    assert "runs/ball/bad/budget_all/fold_0/seed_0: " in result.stderr
    assert "bad.pt" in result.stderr
    assert [path.stat().st_mtime_ns for path in task.parent.glob("study/pretraining/*/*/*/result.json")] == first
    folder = task.parent / "study" / "runs" / "ball" / "MAE" / "budget_all" / "fold_0" / "seed_0"
    found = json.loads((folder / "result.json").read_text("utf-8"))
    receipt = json.loads((folder / "train" / "weights_receipt.json").read_text("utf-8"))
    assert receipt
    assert len(found["cases"]) == 3
    assert {path.name for path in (folder / "predictions").iterdir()} <= {f"{name}.nii.gz" for name in found["cases"]}
    assert not (folder / "models").exists()
    with open(folder / "scores.csv", newline="", encoding="utf-8") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == found["cases"].keys()
    for case, row in rows.items():
        assert row["class"] == f"'{name}", "which no spreadsheet computes"
        assert float(row["dice"] or "nan") == pytest.approx(found["cases"][case]["scores"][name]["dice"], nan_ok=True)
    assert not (folder / "trained.json").exists()
    # the config beside the result is complete and trains the same again
    again = [python(), "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(folder / "train.json")]
    other = ["--ckpt_dir", str(task.parent / "again"), "--output_dir", str(task.parent / "again")]
    repeated = subprocess.run([*again, *other], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert repeated.returncode == 0, repeated.stderr[-2000:]
    losses = [
        json.loads((place / "history.json").read_text("utf-8"))[-1]["train_loss"]
        for place in (folder / "train", task.parent / "again")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    study_py("report", file)
    report = (task.parent / "study" / "report" / "report.html").read_text("utf-8")
    assert "bad.pt" in report
    changed = written(task.parent, settings={**NARROW["settings"], "epochs": 2})
    with pytest.raises(SettingsError, match="other settings#epochs"):
        check_results(read_study(changed))


def test_a_plan_is_measured_here(task: Path) -> None:
    file = written(task.parent, seeds=[0, 1, 2], arms={"scratch": TWO["scratch"]})
    result = study_py("plan", file, "--steps", "2", "--hours", "0.0001", "--memory_gib", "0.1")
    plan = json.loads((task.parent / "study" / "plan.json").read_text("utf-8"))
    assert plan["runs"] == 3
    assert 0 < plan["hours"] < 1
    assert 0.1 < plan["peak_gib"] < 8
    assert "3 runs: " in result.stdout
    assert "nor fewer seeds, folds, epochs or arms alone would do" in result.stdout
    assert "make patch_size smaller" in result.stdout
    assert not list((task.parent / "study").glob("runs/*")), "nothing was trained for good"
    costs = {path: path.stat().st_mtime_ns for path in (task.parent / "study" / "costs").iterdir()}
    study_py("plan", file, "--steps", "2")
    assert costs == {path: path.stat().st_mtime_ns for path in costs}, "measured once"


def test_what_was_cut_after_its_training_is_not_trained_again(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = small(task.parent)
    (run,) = (run for run in study.runs() if run.arm == "scratch")
    done: list[str] = []

    def pretend(_: Study, __: Any, folder: Path, *rest: Any) -> None:
        done.append("train" if rest else "predict")
        (folder / "models").mkdir(exist_ok=True)
        if done == ["train", "predict"]:
            raise KeyboardInterrupt

    def scored(_: Study, __: Any, folder: Path, ___: Any) -> dict[str, Any]:
        (folder / "train").mkdir()
        (folder / "train" / "history.json").write_text('[{"train_loss": 1.0}]', "utf-8")
        return {"cases": {}}

    monkeypatch.setattr(execution, "train", pretend)
    monkeypatch.setattr(execution, "predict", pretend)
    monkeypatch.setitem(execution._GATHER, "segmentation", scored)
    with pytest.raises(KeyboardInterrupt):
        execution.do(study, f"runs/{run.name}")
    assert execution.do(study, f"runs/{run.name}") == "finished"
    assert done == ["train", "predict", "predict"]
    assert not (study.folder / "runs" / run.name / "models").exists()


def test_a_number_is_studied_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["case,volume"]
    for index in range(8):
        write_volume(tmp_path / "images" / f"case_{index}.nii.gz", rng.normal(100, 10, (18, 18, 18)).astype(np.float32))
        rows.append(f"case_{index},{1000 + 50 * index}")
    (tmp_path / "table.csv").write_text("\n".join(rows), "utf-8")
    card = {"name": "Volumes", "task": "regression", "target": "volume", "units": "ml", "input_size": [16, 16, 16]}
    (tmp_path / "volumes.yaml").write_text(yaml.safe_dump(card), "utf-8")
    content = {
        "arms": {"scratch": TWO["scratch"]},
        "data_sets": {"volumes": {"card": "volumes.yaml", "folder": "images", "table": "table.csv"}},
        "settings": {"epochs": 1, "num_workers": 0, "batch_size": 2, "accumulation_steps": 1},
        "backbones": {"resenc_l": {"settings": NARROW["backbones"]["resenc_l"]["settings"]}},
        "budgets": [2],
        "plain_rows": False,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content), "utf-8")
    study = read_study(tmp_path / "study.yaml")
    (run,) = study.runs()
    assert execution.do(study, f"runs/{run.name}") == "finished"
    found = json.loads((study.folder / "runs" / run.name / "result.json").read_text("utf-8"))
    assert (found["run"]["task"], found["target"]) == ("regression", "volume")
    assert len(found["cases"]) == 4
    for name, case in found["cases"].items():
        assert case["truth"] == 1000 + 50 * int(name[-1])
        assert 700 < case["predicted"][0] < 1700, "in the target's own units"
    told = json.loads((study.folder / "runs" / run.name / "train.json").read_text("utf-8"))
    assert (told["task"], told["units"], told["input_size"]) == ("regression", "ml", [16, 16, 16])


def test_classification_is_studied_too_and_what_a_table_says_is_no_command(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mark = tmp_path / "mark"
    yes, no = f"$__import__('pathlib').Path('{mark}').touch()", "=1+1 #1"
    rows = ["case,%sick,@patient"]
    for index in range(8):
        image = rng.normal(100 + 40 * (index % 2), 10, (18, 18, 18)).astype(np.float32)
        write_volume(tmp_path / "images" / f"case_{index}.nii.gz", image)
        rows.append(f"case_{index},{yes if index % 2 else no},$p{index}")
    (tmp_path / "table.csv").write_text("\n".join(rows), "utf-8")
    (tmp_path / "sick.yaml").write_text(
        yaml.safe_dump({"name": "Sick", "task": "classification", "target": "%sick", "classes": [no, yes]}), "utf-8"
    )
    content = {
        "arms": {"scratch": TWO["scratch"]},
        "data_sets": {"sick": {"card": "sick.yaml", "folder": "images", "table": "table.csv", "group": "@patient"}},
        "settings": {
            "input_size": [16, 16, 16],
            "epochs": 1,
            "num_workers": 0,
            "batch_size": 2,
            "accumulation_steps": 1,
        },
        "backbones": {"resenc_l": {"settings": NARROW["backbones"]["resenc_l"]["settings"]}},
        "budgets": [2],
        "plain_rows": False,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content), "utf-8")
    study = read_study(tmp_path / "study.yaml")
    drawn = study.training_cases(study.runs()[0])
    assert {case["%sick"] for case in drawn} == {no, yes}, "a small budget holds every class"
    study_py("run", tmp_path / "study.yaml")
    (file,) = tmp_path.glob("study/runs/*/*/*/*/*/result.json")
    found = json.loads(file.read_text("utf-8"))
    assert found["classes"] == [no, yes]
    assert len(found["cases"]) == 4
    for name, case in found["cases"].items():
        assert case["truth"] == int(name[-1]) % 2
        assert sum(case["probabilities"]) == pytest.approx(1, abs=1e-3)
        assert case["group"] == f"$p{name[-1]}"
    study_py("report", tmp_path / "study.yaml")
    with open(tmp_path / "study" / "report" / "cases.csv", newline="", encoding="utf-8") as stream:
        assert {row["class"] for row in csv.DictReader(stream)} == {yes, f"'{no}", ""}
    again = [python(), "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", str(file.parent / "train.json")]
    places = ["--ckpt_dir", str(tmp_path / "again"), "--output_dir", str(tmp_path / "again")]
    subprocess.run([*again, *places], cwd=ROOT, check=True, capture_output=True, timeout=300)
    about = json.loads((tmp_path / "again" / "classifier.json").read_text("utf-8"))
    assert about["settings"]["classes"] == [no, yes]
    assert not mark.exists()
