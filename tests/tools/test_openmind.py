# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The verbs of openmind: settings of configs as options, the equal command of MONAI, a whole chain from any folder."""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from common.bundles import read_config
from common.errors import SettingsError, WeightsError
from common.terminal import near
from tools.checkpoints import announcing, cells, importing
from tools.checkpoints.settings import ImportCheckpoint
from tools.commanding import running
from tools.commanding.ending import by_verbs
from tools.commanding.locks import pins
from tools.commanding.parsing import parse
from tools.commanding.settings import filled
from tools.commanding.weights import encoder_at_hand
from tools.exporting.new_task import new_task
from tools.exporting.settings import NewTask
from tools.opening import doctor, listing, runs, weights
from tools.opening.entering import WORKFLOWS, enter
from tools.opening.listing import list_bundles
from tools.opening.options import config_file, judged, names_of, options, options_text
from tools.opening.serving import serve
from tools.opening.settings import Classify, Doctor, Embed, Finetune, ListBundles, Predict, Pretrain, Serve
from tools.openmind import GROUPS, VERBS

from ..conftest import BUNDLES, ROOT, blobs, write_volume

SIZE = {"features_per_stage": "4,8,8", "blocks_per_stage": "1,1,1"}
SMALL = {"patch_size": "16,16,16", "num_workers": "0"}
BRIEF = {"epochs": "1", "iterations_per_epoch": "2", "val_iterations": "1", "batch_size": "2"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, with labelled cases, where he stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for index in range(4):
        image, mask = blobs(index)
        write_volume(tmp_path / "task" / "images" / f"case_{index}.nii.gz", image)
        write_volume(tmp_path / "task" / "labels" / f"case_{index}.nii.gz", mask)
    return tmp_path


@pytest.mark.parametrize("bundle", BUNDLES)
def test_options_are_what_the_configs_say(bundle: str) -> None:
    for workflow in ("pretrain", "train", "inference", "features", "evaluate", "train_classification"):
        config, found = read_config(config_file(bundle, workflow)), options(bundle, workflow)
        assert set(names_of(bundle, workflow)) - {"shared"} == set(config) - {"_meta_"}, "every name is known"
        assert len(found) > 12
        assert {"dataset_dir", "output_dir"} <= found.keys()
        assert not {"network", "optimizer", "train", "run", "imports", "settings_check"} & found.keys()
        for name, option in found.items():
            value = config[name]
            assert option.default == value or isinstance(value, float), (workflow, name)
            assert not isinstance(value, dict), name
    text = options_text(bundle, "train")
    assert "  --epochs  a whole number; default 150\n      published: 150 and 1000\n" in text
    assert "  --output_dir  default RUN/output/train\n" in text
    assert "  --patch_size  whole numbers; default 160 160 160\n" in text


def test_no_setting_lacks_its_comment_by_the_way_it_is_written() -> None:
    lines = config_file("mae_resenc_l", "train").read_text("utf-8").splitlines()
    for name, option in options("mae_resenc_l", "train").items():
        line = next(line for line in lines if line.startswith(f"{name}:"))
        assert yaml.safe_load(line)[name] == option.default or isinstance(option.default, float)
        assert option.about == (line.split(" # ", 1)[1].strip() if " # " in line else "")


@pytest.mark.parametrize(
    ("name", "told", "word"),
    [
        ("labels", "background,edema,core", "['background','edema','core']"),
        ("labels", ["background", "it's"], "['background',\"it's\"]"),
        ("labels", {"background": 0, "pons": 7}, "{'background':0,'pons':7}"),
        ("patch_size", "96,96,96", "[96,96,96]"),
        ("patch_size", 96, "[96,96,96]"),
        ("patch_size", "[96, 96, 32]", "[96,96,32]"),
        ("spacing_mm", "median", "median"),
        ("spacing_mm", None, "None"),
        ("spacing_mm", "3,1,1", "3,1,1"),
        ("lr", "1e-3", "1e-3"),
        ("clip_norm", "null", "null"),
        ("mirror_axes", "inferior-superior,left-right", "['inferior-superior','left-right']"),
        ("mirror_axes", ["inferior-superior"], "['inferior-superior']"),
        ("mirror_axes", [0, 1], "[0,1]"),
        ("mirror_axes", "0,1", "[0,1]"),
        ("regions", {"whole": [1, 2], "core": [2]}, "{'whole':[1,2],'core':[2]}"),
        ("momentum", 0.5, "0.5"),
        ("epochs", "$@folds", "$@folds"),
        ("from_scratch", True, "true"),
        ("optimizer#momentum", "0.9", "0.9"),
        ("pretrained", "20_24", "20_24"),
    ],
)
def test_settings_become_words_of_the_command_line(name: str, told: Any, word: str) -> None:
    assert judged("mae_resenc_l", "train", {name: told}) == {name: word}


@pytest.mark.parametrize(
    ("name", "told", "sentence"),
    [
        ("epoch", "3", "unknown setting --epoch (did you mean --epochs"),
        ("epochs", "2.5", "--epochs is '2.5'; it must be a whole number, such as 150, the default"),
        ("epochs", "many", "--epochs is 'many'; it must be a whole number"),
        ("batch_size", True, "--batch_size is True; it must be a whole number"),
        ("patch_size", "96,a,96", "--patch_size is '96,a,96'; it must be whole numbers, such as 160 160 160"),
        ("momentum", "high", "--momentum is 'high'; it must be a number, such as 0.99"),
        ("labels", "a,,b", "--labels is 'a,,b'; it must be names with commas between"),
    ],
)
def test_what_is_no_setting_or_no_value_of_it_stops(name: str, told: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as error:
        judged("mae_resenc_l", "train", {name: told})
    assert sentence in str(error.value)


def test_lists_need_no_quotes(here: Path) -> None:
    line = "mae_resenc_l task --patch-size 96 96 32 --labels background,core --lr 0.1 --from-scratch --spacing-mm 3 1 1"
    found = parse("finetune", Finetune, line.split())
    assert found.settings == {
        "patch_size": "96,96,32",
        "labels": "background,core",
        "lr": "0.1",
        "from_scratch": "true",
        "spacing_mm": "3,1,1",
    }
    assert parse("predict", Predict, ["m", "task", "--mirror-axes", "0", "1", "-o", "x"]).output == Path("x")


def test_the_command_that_is_shown_is_the_one_that_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"labels": "background,it's", "from_scratch": "true", "lr": "-1"}
    call = runs.finetune(filled(Finetune, "mae_primus_m", "task", show_command=True, **told))
    shown = shlex.split(capsys.readouterr().out.strip())
    assert shown == ["python", "-m", "monai.bundle", *call.words]
    assert shown[3:7] == ["run", "--config_file", str(config_file("mae_primus_m", "train")), "--bundle_root"]
    assert shown[7:] == [
        *("openmind_runs/mae_primus_m", "--dataset_dir", "task", "--labels", "['background',\"it's\"]"),
        *("--from_scratch", "true", "--lr=-1"),
    ]
    assert not (here / "openmind_runs").exists(), "nothing is written"


def test_a_data_set_that_describes_itself_needs_no_labels(here: Path) -> None:
    (here / "task" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "lesion": 1}}))
    call = runs.finetune(filled(Finetune, "mae_resenc_l", "task", show_command=True, from_scratch=True))
    assert call.settings["labels"] == "task/dataset.json"
    own = runs.finetune(
        filled(Finetune, "mae_resenc_l", "task", show_command=True, from_scratch=True, labels="background,ball")
    )
    assert own.settings["labels"] == "['background','ball']"


def test_images_become_a_datalist_that_the_config_reads(here: Path) -> None:
    images = ["task/images/case_0.nii.gz", "task/images/case_1.nii.gz"]
    for call, part in (
        (runs.pretrain(filled(Pretrain, "mae_resenc_l", images, show_command=True)), "training"),
        (runs.embed(filled(Embed, "mae_resenc_l", images, show_command=True, from_scratch=True)), "test"),
    ):
        lists = json.loads(Path(call.settings["datalist"]).read_text())
        assert lists == {part: [{"image": str(here / image)} for image in images]}
    with pytest.raises(SettingsError, match=r"case_0.nii.gz has no label with it; give a folder"):
        runs.finetune(filled(Finetune, "mae_resenc_l", images, labels="background,ball"))


def test_weights_that_are_needed_are_announced_or_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "kept", lambda bundle: here / "kept" / bundle)
    with pytest.raises(SettingsError, match="simmim_resenc_l has no published weights and none are here; pre-train it"):
        runs.finetune(filled(Finetune, "simmim_resenc_l", "task", labels="background,ball"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    def cut(*_: Any, **__: Any) -> None:
        raise WeightsError("cut while fetching")

    monkeypatch.setattr(importing, "kept", lambda bundle: here / "kept" / bundle)
    monkeypatch.setattr(cells, "kept", lambda bundle: here / "kept" / bundle)
    monkeypatch.setattr(importing, "fetch", cut)
    monkeypatch.setattr(announcing, "_in_cache", lambda source: False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(announcing.urllib.request, "urlopen", refuse)
    place = here / "kept" / "mae_resenc_l" / "models" / "openmind" / "checkpoint_final.pth"
    wanted = rf"cannot be reached; fetch it where there is a network, put it at {re.escape(near(place))}"
    with pytest.raises(WeightsError, match=wanted):
        runs.embed(filled(Embed, "mae_resenc_l", "task/images"))
    assert (
        capsys.readouterr().out == "mae_resenc_l starts from its published weights, unless --pretrained names others\n"
    )
    with pytest.raises(WeightsError, match=wanted):
        importing.import_checkpoint(ImportCheckpoint("mae_resenc_l"))
    monkeypatch.setattr(announcing, "_size", lambda source: "491 MB")
    with pytest.raises(WeightsError, match="cut while fetching"):
        runs.embed(filled(Embed, "mae_resenc_l", "task/images"))
    said = capsys.readouterr().out
    assert "fetching https://huggingface.co/MIC-DKFZ/ResEncL-OpenMind-MAE" in said
    assert "(491 MB, CC-BY-4.0)" in said
    place.parent.mkdir(parents=True)
    place.touch()
    with pytest.raises(WeightsError, match="cut while fetching"):
        importing.import_checkpoint(ImportCheckpoint("mae_resenc_l"))
    assert capsys.readouterr().out == "", "what was brought is not announced"
    brought = here / "kept" / "mae_resenc_l" / "models" / "pretrained_encoder.pt"
    brought.touch()
    call = runs.embed(filled(Embed, "mae_resenc_l", "task/images", show_command=True))
    assert call.settings["pretrained"] == "kept/mae_resenc_l/models/pretrained_encoder.pt"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("none", "there is no model none; give the folder of a fine-tuning"),
        ("odd.pt", "does not say which bundle odd.pt"),
    ],
)
def test_a_model_that_is_none_is_named(here: Path, model: str, sentence: str) -> None:
    (here / "odd.pt").touch()
    with pytest.raises(SettingsError, match=sentence):
        runs.predict(filled(Predict, model, "task/images"))


def test_data_that_is_not_there_is_named_first(here: Path) -> None:
    with pytest.raises(SettingsError, match="there is no nowhere; name a folder of volumes, a datalist or an image"):
        filled(Pretrain, "mae_resenc_l", "nowhere", epochs=2.5)


def test_help_of_a_verb_has_the_settings_of_the_named_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    enter(VERBS, "About.", ["pretrain", "voco_resenc_l", "-h"], groups=GROUPS)
    said = capsys.readouterr().out
    assert "--grid  whole numbers; default 4 4 1\n      crops of the grid; patch_size is grid x crop_size\n" in said
    assert "name it before --help" not in said
    for verb in WORKFLOWS:
        enter(VERBS, "About.", [verb, "--help"], groups=GROUPS)
        said = capsys.readouterr().out
        assert "Settings of " in said
        assert "name it before --help" in said
    enter(VERBS, "About.", ["evaluate", "-h"], groups=GROUPS)
    assert "As a verb it writes to openmind_runs/evaluate_NAME" in capsys.readouterr().out


def test_a_reader_who_has_seen_enough_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "tools" / "openmind.py"), "pretrain", "-h"]
    result = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_whole_chain_from_a_folder_of_the_users(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {**SIZE, **SMALL}
    runs.pretrain(filled(Pretrain, "mae_resenc_l", "task/images", **narrow, **BRIEF, block_size="8"))
    run = Path("openmind_runs/mae_resenc_l")
    assert (run / "models" / "pretrained_encoder.pt").is_file()
    runs.finetune(filled(Finetune, "mae_resenc_l", "task", **narrow, **BRIEF, labels="background,ball"))
    told = json.loads((run / "models" / "model.json").read_text())["settings"]
    assert (told["bundle"], told["labels"]) == ("mae_resenc_l", ["background", "ball"])

    runs.predict(filled(Predict, "mae_resenc_l", "task/images/case_1.nii.gz", output="masks", num_workers=0))
    mask = nib.load("masks/case_1.nii.gz")
    assert np.array_equal(mask.affine, nib.load("task/images/case_1.nii.gz").affine)
    assert set(np.unique(np.asanyarray(mask.dataobj))) <= {0, 1}
    assert sorted(path.name for path in Path("masks").glob("*.nii.gz")) == ["case_1.nii.gz"]

    assert encoder_at_hand("mae_resenc_l") != (run / "models" / "pretrained_encoder.pt").absolute()
    with by_verbs():
        assert encoder_at_hand("mae_resenc_l") == (run / "models" / "pretrained_encoder.pt").absolute(), (
            "one's own first"
        )
    new_task(filled(NewTask, "mae_resenc_l", "ball", model=run / "models" / "model.pt"))
    one = "task/images/case_1.nii.gz"
    call = runs.predict(filled(Predict, "ball", one, output="others", num_workers=0, pictures=0))
    assert call.command.startswith(
        "PYTHONPATH=ball python -m monai.bundle run --config_file ball/configs/inference.json"
    )
    other = nib.load("others/case_1.nii.gz")
    assert np.array_equal(np.asanyarray(mask.dataobj), np.asanyarray(other.dataobj)), "the same by its own code"
    assert "scripts.engines" in sys.modules

    runs.embed(filled(Embed, "mae_resenc_l", "task/images", output="vectors", **narrow, pooling="mean+std"))
    with open("vectors/features.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == [f"case_{index}" for index in range(4)]
    assert len(rows[0]) >= 16, "means and deviations of eight channels"

    rows = "".join(f"case_{index},{'ab'[index % 2]}\n" for index in range(4))
    (here / "kinds.csv").write_text(f"case,kind\n{rows}")
    sizes = {**SIZE, "num_workers": 0, "table": "kinds.csv", "target": "kind", "validation_share": 0.5, "epochs": 1}
    runs.classify(filled(Classify, "mae_resenc_l", "task/images", **sizes, input_size=16, batch_size=2))
    runs.classify(filled(Classify, str(run), "task/images/case_0.nii.gz", output="kinds", num_workers=0))
    (row,) = csv.DictReader(Path("kinds/predictions.csv").read_text().splitlines())
    assert row["case"] == "case_0"
    assert float(row["probability_a"]) + float(row["probability_b"]) == pytest.approx(1, abs=1e-3)

    capsys.readouterr()
    with by_verbs():
        list_bundles(ListBundles())
    said = capsys.readouterr().out
    assert said.endswith("next:    openmind predict openmind_runs/mae_resenc_l/models/model.pt IMAGES\n")
    assert "openmind_runs/mae_resenc_l/models/model.pt: mae_resenc_l, segments background, ball" in said
    assert all(bundle in said for bundle in BUNDLES)
    assert Path.cwd() == here


def test_a_verb_and_the_tool_of_its_name_are_one_function() -> None:
    for verb, tool, name in (
        *(("evaluate", "evaluate", "evaluate"), ("probe", "probe", "probe"), ("choose", "choose", "choose")),
        *(("scan", "prepare_data", "scan"), ("import", "import_checkpoint", "import_checkpoint")),
        *(("inspect", "inspect_weights", "inspect_weights"), ("curve", "label_curve", "label_curve")),
        *(("export", "export_bundle", "export_bundle"), ("new-task", "new_task", "new_task")),
    ):
        assert VERBS[verb] is getattr(importlib.import_module(f"tools.{tool}"), name)
    assert GROUPS["study"] == importlib.import_module("tools.study").COMMANDS
    assert len(VERBS) + len(GROUPS) == 18


def test_tools_write_below_openmind_runs_when_they_are_verbs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(running, "ensure", lambda *files: None)
    monkeypatch.setattr(running, "run", lambda commands, arguments: told.append(list(arguments)))
    for words in (
        "evaluate masks truth",
        "evaluate masks truth -o x",
        "curve mae_resenc_l task --output=x",
        "curve mae_resenc_l task",
        "scan task",
        "study plan study.yaml",
    ):
        enter(VERBS, (importlib.import_module("tools.openmind").__doc__ or ""), words.split(), groups=GROUPS)
    assert [words[-1] for words in told] == [
        *("--output=openmind_runs/evaluate_masks", "x", "--output=x", "--output=openmind_runs/curve_mae_resenc_l"),
        *("task", "study.yaml"),
    ]
    enter(VERBS, "About.", ["evaluate", "-h"], groups=GROUPS)
    assert "default evaluation" in capsys.readouterr().out


def test_the_doctor_finds_what_is_missing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.doctor(Doctor())
    *said, last = capsys.readouterr().out.splitlines()
    assert last == "next:    openmind list"
    assert all(re.match(r"(good|note)  \S", line) for line in said)
    count = len(pins(ROOT / "requirements.txt"))
    assert f"good  {count} of {count} packages have the version that was tested" in said
    for word in ("Python 3", "memory:", "disk for runs:", "links can be made here", "extra peft is there"):
        assert any(word in line for line in said), word
    versions = {"monai": "9.9.9", "torch": "2.99.0+cu999"}

    def version(name: str) -> str:
        if name == "tqdm":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, pins(ROOT / "requirements.txt")[name])

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "is_installed", lambda: True)
    with pytest.raises(SystemExit):
        doctor.doctor(Doctor())
    *said, last = capsys.readouterr().out.splitlines()
    assert last == "next:    python -m pip install tqdm"
    assert f"missing  tqdm is not installed; {pins(ROOT / 'requirements.txt')['tqdm']} is what was tested" in said
    assert any(line.startswith("note     monai 9.9.9 is installed, 1.6.1 is what was tested") for line in said)
    assert any("torch 2.99.0 is installed" in line and "no other version of torch was tried" in line for line in said)


def test_serving_puts_app_and_bundle_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = here / "glioma"
    with pytest.raises(SettingsError, match="is no bundle that MONAI Label takes; make one"):
        serve(Serve("task", "task/images"))
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs" / "inference.json").write_text("{}")
    serve(Serve("glioma", "task/images", show_command=True))
    said = capsys.readouterr().out
    assert said.startswith(
        "monailabel start_server --app openmind_runs/monai_label --studies task/images --conf models"
    )
    assert "--host 127.0.0.1" in said
    with pytest.raises(SettingsError, match="there is no program nowhere; MONAI Label needs an environment of its own"):
        serve(Serve("glioma", "task/images", monailabel="nowhere"))
    program = here / "program"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    (here / "environment of its own").mkdir()
    beside = here / "environment of its own" / "python"
    beside.touch()
    label = shutil.copy(program, beside.with_name("monailabel"))
    serve(Serve("glioma", "task/images", monailabel=str(label), show_command=True))
    said = capsys.readouterr().out
    assert shlex.split(said)[:4] == [str(beside), "-m", "monailabel.main", "start_server"], "not the first python"
    for _ in range(2):  # and what was trained stays
        with pytest.raises(SystemExit) as end:
            serve(Serve("glioma", "task/images", monailabel=str(program)))
        assert end.value.code == 3
        (here / "openmind_runs/monai_label/model/glioma/trained").touch()
    assert (here / "openmind_runs/monai_label/main.py").is_file()
    assert (here / "openmind_runs/monai_label/model/glioma/trained").is_file()
    said = capsys.readouterr().out
    assert "going on with openmind_runs/monai_label/model/glioma" in said
    assert "labels go to task/images/labels/final; in 3D Slicer, MONAI Label server: http://127.0.0.1:8000;" in said


def test_the_list_ends_with_what_is_done_with_what_is_here(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "kept", lambda bundle: here / "kept" / bundle)

    def following() -> str:
        list_bundles(ListBundles())
        return capsys.readouterr().out.splitlines()[-1]

    with by_verbs():
        assert following() == "next:    openmind pretrain mae_resenc_l FOLDER"
        for encoder, bundle in (
            ("kept/voco_resenc_l", "voco_resenc_l"),
            ("openmind_runs/mae_primus_m", "mae_primus_m"),
        ):
            (here / encoder / "models").mkdir(parents=True)
            (here / encoder / "models" / "pretrained_encoder.pt").touch()
            assert following() == (f"next:    openmind finetune {bundle} LABELLED_FOLDER --labels background,NAMES"), (
                "one's own before one that is kept"
            )
