# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A run begins with what it understood, and ends with the result, where to look, and a command that can be pasted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from common.bundles import FOLDER
from common.engines.telling import tell_beginning, tell_end
from common.tasks import ClassificationTask, SegmentationTask
from common.terminal import OPENMIND, near
from tools.commanding.ending import by_verbs, config_command, model_command, tool, tool_command
from tools.commanding.environment import RUNS


def test_it_begins_with_what_it_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "history.json").write_text(json.dumps([{"epoch": n, "seconds": 60.0} for n in (1, 2, 3)]))
    tell_beginning(
        "fine-tuning, mae_resenc_l",
        cases={"to learn from": range(1200), "to validate on": 3},
        task=SegmentationTask({"background": 0, "edema": 1, "core": 4}, regions={"whole": [1, 4], "core": [4]}),
        network=nn.Linear(1000, 2000),
        device="meta",
        crop=96,
        spacing_mm=[3.0, 1.0, 1.0],
        epochs=33,
        length="25 steps, batch 2",
        history=str(tmp_path / "history.json"),
    )
    assert capsys.readouterr().out.splitlines() == [
        "fine-tuning, mae_resenc_l",
        "  cases    1,200 to learn from, 3 to validate on",
        "  labels   0 background, 1 edema, 4 core",
        "  regions  whole (1, 4), core (4)",
        "  network  Linear, 2 million parameters",
        "  input    96 x 96 x 96 voxels of 3 x 1 x 1 mm",
        "  device   meta",
        "  length   33 epochs of 25 steps, batch 2, 30 of them left, about 30 min at the pace of the last",
    ]
    tell_beginning("classifying", cases={"cases": 2}, task=ClassificationTask(("acl", "meniscus"), multilabel=True))
    assert capsys.readouterr().out.splitlines()[2] == "  classes  acl, meniscus, each yes or no"


def test_others_than_the_first_process_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    tell_beginning("x", cases={})
    tell_end("y")
    assert capsys.readouterr().out == ""


def ended(bundle: Path, capsys: pytest.CaptureFixture[str], **end: Any) -> list[str]:
    """Return what a workflow of a bundle says last."""
    config = {"bundle_root": end.pop("bundle_root", str(bundle))}
    config["end"] = {"_target_": "common.engines.tell_end", **end}
    (bundle / "configs" / "train.json").write_text(json.dumps(config | {"run": ["@end"]}))
    ConfigWorkflow(str(bundle / "configs" / "train.json"), logging_file=False).run()
    return capsys.readouterr().out.splitlines()


def test_it_ends_with_the_result_where_to_look_and_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, data = tmp_path / "my bundle", tmp_path / "data"
    (bundle / "configs").mkdir(parents=True)
    for name in ("metadata.json", "inference.json", "evaluate.json"):
        (bundle / "configs" / name).write_text("{}")
    (data / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model, out = str(bundle / "models" / "model.pt"), bundle / "output"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "epoch_1.png").touch()
    look = [str(out / "progress.html"), str(out / "pictures" / "*.png")]
    settings = {"dataset_dir": str(data), "datalist": None, "model": model}
    told = ended(bundle, capsys, result=model, look=look, following="inference", settings=settings)
    assert told == [
        "result:  my bundle/models/model.pt",
        "look at: my bundle/output/pictures/epoch_1.png",
        "next:    python -m monai.bundle run --config_file 'my bundle/configs/inference.json' "
        "--dataset_dir data/images",
    ]
    settings = {"dataset_dir": str(data / "images"), "predictions": "p", "labels": ["background", "it's"]}
    told = ended(bundle, capsys, result="p", following="evaluate", settings=settings, bundle_root=str(tmp_path / "r"))
    assert told[:2] == ["result:  p", "look at: p"], "nothing to look at is there"
    words = shlex.split(told[2].removeprefix("next:"))
    assert (
        words[5:]
        == [
            *("--config_file", "my bundle/configs/evaluate.json", "--bundle_root", "r", "--dataset_dir", "data"),
            *("--predictions", "p", "--labels", "['background', \"it's\"]"),
        ][1:]
    )
    told = ended(bundle, capsys, result="p", tool="probe", settings={"features": "p", "table": "T.csv"})
    assert told[2] == f"next:    python {near(FOLDER.parents[1] / 'tools' / 'probe.py')} --features p --table T.csv"
    assert len(ended(bundle, capsys, result="p", tool="none", following="absent")) == 2


@pytest.mark.parametrize(
    ("end", "line"),
    [
        (
            {"following": "train", "settings": {"dataset_dir": "task"}},
            "finetune mae_resenc_l task --labels background,NAMES",
        ),
        ({"following": "train", "settings": {"dataset_dir": "told"}}, "finetune mae_resenc_l told"),
        (
            {
                "following": "train",
                "settings": {"dataset_dir": "told", "pretrained": "RUN/models/pretrained_encoder.pt"},
            },
            "finetune mae_resenc_l told",
        ),
        (
            {"following": "features", "settings": {"datalist": "a b.json", "pretrained": "x.pt", "dataset_dir": ""}},
            "embed mae_resenc_l 'a b.json' --pretrained x.pt",
        ),
        (
            {"following": "inference", "settings": {"dataset_dir": "task", "model": "RUN/models/model.pt"}},
            "predict RUN task/images",
        ),
        ({"following": "inference", "settings": {"dataset_dir": "new", "model": "x/m.pt"}}, "predict x/m.pt new"),
        (
            {
                "following": "evaluate",
                "settings": {
                    "dataset_dir": "task/images",
                    "predictions": "masks",
                    "labels": ["background", "the core"],
                },
            },
            "evaluate masks task/labels --labels 'background,the core'",
        ),
        (
            {"following": "evaluate", "settings": {"dataset_dir": "new", "predictions": "m", "labels": {"core": 2}}},
            "evaluate m REFERENCES --labels \"{'core': 2}\"",
        ),
        (
            {"following": "inference_classification", "settings": {"dataset_dir": "new", "table": "t.csv"}},
            "classify RUN new --table t.csv",
        ),
        (
            {"tool": "probe", "settings": {"features": "vectors", "table": "TABLE.csv", "target": "COLUMN"}},
            "probe vectors --table TABLE.csv --target COLUMN",
        ),
        (
            {"tool": "new_task", "settings": {"bundle": "BUNDLE", "model": "m.pt", "output": "mine"}},
            "new-task mae_resenc_l --model m.pt --output mine",
        ),
    ],
)
def test_where_openmind_runs_its_verbs_are_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: dict[str, Any], line: str
) -> None:
    bundle = tmp_path / "bundles" / "mae_resenc_l"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs" / "metadata.json").write_text("{}")
    for folder in ("task/images", "task/labels", "told"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "told" / "dataset.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(OPENMIND, "openmind")
    end = json.loads(json.dumps(end).replace("RUN/", "openmind_runs/mae_resenc_l/"))
    told = ended(bundle, capsys, result="r", bundle_root=str(RUNS / "mae_resenc_l"), **end)
    assert told[-1] == f"next:    openmind {line}".replace(" RUN ", " openmind_runs/mae_resenc_l ")
    if end.get("following") == "train":
        told = ended(bundle, capsys, result="r", bundle_root="mine", **end)
        assert "--output mine" in told[-1]


def test_tools_propose_verbs_where_openmind_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(OPENMIND, raising=False)
    assert tool("import_checkpoint") == "python tools/import_checkpoint.py"
    with by_verbs():
        assert tool("import_checkpoint") == "openmind import"
        assert tool_command("study", "run", Path("a b.yaml")) == "openmind study run 'a b.yaml'"
        assert tool_command("prepare_data", "verify", "x").startswith("python "), "which is no verb"
        assert (
            config_command("voco_resenc_l", "train", "DATA", "--epochs", "3")
            == "openmind finetune voco_resenc_l DATA --epochs 3"
        )
        assert model_command("voco_resenc_l", tmp_path / "m.pt", "DATA") == "openmind predict m.pt DATA"
    assert config_command("voco_resenc_l", "train", "x.json").endswith("train.yaml --datalist x.json")
    monkeypatch.setattr("sys.argv", ["tools/openmind.py"])
    with by_verbs():
        assert re.fullmatch(r"python \S*tools/openmind.py import", tool("import_checkpoint"))


@pytest.mark.parametrize(
    ("predictions", "model"),
    [
        *((None, "runs/a/models/model.pt"), ("runs/a/other", "runs/a/models/model.pt")),
        *(("masks", "MODEL"), ("runs/ab/output/predictions", "MODEL")),
    ],
)
def test_an_evaluation_names_the_model_only_if_the_predictions_are_of_its_run(
    predictions: str | None, model: str
) -> None:
    parser = ConfigParser()
    parser.read_config(FOLDER / "evaluate.yaml")
    parser["bundle_root"] = "runs/a"
    if predictions:
        parser["predictions"] = predictions
    assert parser.get_parsed_content("end#settings") == {"bundle": "BUNDLE", "output": "my_task", "model": model}
