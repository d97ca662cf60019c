# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Bundles run through monai.bundle as a user runs them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.weights import read_checkpoint

from ..conftest import ROOT, WHOLE_CHAIN, command, pretraining, run
from ..starts import python
from .processes import torchrun


def digest(folder: Path, name: str = "pretraining_state.pt") -> str:
    state = read_checkpoint(folder / "models" / name)
    total = hashlib.sha256()
    for key, value in sorted((state.get("method") or state).items()):
        total.update(key.encode() + value.numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_the_whole_chain(bundle: str, images: Path, labelled: Path, tmp_path: Path) -> None:
    run(bundle, "pretrain", *pretraining(tmp_path, images))
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2]
    assert all(np.isfinite([record["train_loss"], record["val_loss"]]).all() for record in history)
    assert (tmp_path / "out" / "pictures" / "epoch_2.png").stat().st_size > 10_000
    assert list((tmp_path / "out").glob("events.out.tfevents.*"))
    encoder = tmp_path / "models" / "pretrained_encoder.pt"
    facts = json.loads(encoder.with_suffix(".json").read_text())
    assert facts["sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert all(isinstance(value, torch.Tensor) for value in read_checkpoint(encoder).values())
    assert (tmp_path / "models" / "pretrained_encoder_best.pt").exists()

    labels = ("--labels", "['background','ball']")
    places = ("--ckpt_dir", tmp_path / "seg", "--output_dir", tmp_path / "train", "--pretrained", encoder)
    result = run(
        *(bundle, "train", "--dataset_dir", labelled, *labels, *places, "--store_dir", tmp_path / "store"),
        *("--epochs", "2", "--iterations_per_epoch", "2", "--val_interval", "1", "--warmup_epochs", "0"),
    )
    assert "encoder covered 100.0 %" in result.stdout
    assert json.loads((tmp_path / "train" / "weights_receipt.json").read_text())["source"] == str(encoder)

    predict = (bundle, "inference", "--dataset_dir", labelled, *labels, "--ckpt_dir", tmp_path / "seg")
    run(*predict, "--output_dir", tmp_path / "predictions")
    source = nib.load(labelled / "images" / "case_2.nii.gz")
    predicted = nib.load(tmp_path / "predictions" / "case_2.nii.gz")
    assert predicted.shape == source.shape
    assert predicted.get_data_dtype() == np.uint8
    np.testing.assert_allclose(predicted.affine, source.affine)
    kept = run(*predict, "--output_dir", tmp_path / "predictions")
    assert "5 of 5 predictions are" in kept.stdout

    places = ("--predictions", tmp_path / "predictions", "--output_dir", tmp_path / "scores")
    run(bundle, "evaluate", "--dataset_dir", labelled, *labels, *places)
    with open(tmp_path / "scores" / "scores.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["case"] for row in rows) == [f"case_{i}" for i in range(5)]
    assert {row["class"] for row in rows} == {"ball"}
    truth = np.asarray(nib.load(labelled / "labels" / f"{rows[0]['case']}.nii.gz").dataobj) == 1
    marked = np.asarray(nib.load(tmp_path / "predictions" / f"{rows[0]['case']}.nii.gz").dataobj) == 1
    dice = 2 * (truth & marked).sum() / (truth.sum() + marked.sum())
    assert float(rows[0]["dice"]) == pytest.approx(dice, rel=1e-5)


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_a_killed_run_resumes_to_the_same_bits(bundle: str, images: Path, tmp_path: Path) -> None:
    run(bundle, "pretrain", *pretraining(tmp_path / "whole", images, epochs=4))
    arguments = [
        *pretraining(tmp_path / "killed", images, epochs=4),
        "--iterations_per_epoch",
        "3",
        "--num_workers",
        "1",
    ]
    log = tmp_path / "killed" / "out" / "history.json"
    process = subprocess.Popen(
        command(bundle, "pretrain", *arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = tmp_path / "killed" / "models" / "pretraining_state.pt"
    while not (state.exists() and len(json.loads(log.read_text())) >= 2):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = read_checkpoint(state)["epoch"]
    result = run(bundle, "pretrain", *arguments)
    assert f"{done} of 4 epochs are done" in result.stdout
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")
    assert digest(tmp_path / "whole", "pretrained_encoder.pt") == digest(tmp_path / "killed", "pretrained_encoder.pt")
    curves = [json.loads((tmp_path / name / "out" / "history.json").read_text()) for name in ("whole", "killed")]
    assert [r["train_loss"] for r in curves[0]] == [r["train_loss"] for r in curves[1]]


def test_a_kill_between_state_and_encoder_is_mended(images: Path, tmp_path: Path) -> None:
    arguments = pretraining(tmp_path, images, epochs=1)
    run("mae_resenc_l", "pretrain", *arguments)
    encoder = tmp_path / "models" / "pretrained_encoder.pt"
    before = encoder.read_bytes()
    encoder.unlink()
    encoder.with_suffix(".json").unlink()
    run("mae_resenc_l", "pretrain", *arguments)
    assert encoder.read_bytes() == before
    encoder.write_bytes(before.replace(before[2000:2004], b"\1\2\3\4", 1))  # as is one that a disk damaged since
    run("mae_resenc_l", "pretrain", *arguments)
    assert encoder.read_bytes() == before


@pytest.mark.parametrize("bundle", WHOLE_CHAIN[:1])
def test_seeds_decide_the_run(bundle: str, images: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(bundle, "pretrain", *pretraining(tmp_path / name, images, epochs=1, seed=seed))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize("bundle", ["mae_primus_m", "voco_resenc_l"])
def test_runs_from_inside_the_bundle(bundle: str, images: Path, tmp_path: Path) -> None:
    line = command(bundle, "pretrain", *pretraining(tmp_path, images, epochs=1))
    line[line.index("--config_file") + 1] = "configs/pretrain.yaml"
    del line[line.index("--bundle_root") : line.index("--bundle_root") + 2]
    result = subprocess.run(line, cwd=ROOT / "bundles" / bundle, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "models" / "pretrained_encoder.pt").exists()


def test_runs_from_any_folder(images: Path, tmp_path: Path) -> None:
    folder = ROOT / "bundles" / "voco_resenc_l"
    line = command(folder.name, "pretrain", *pretraining(tmp_path, images, epochs=3), "--train#trainer#max_epochs", "1")
    line[line.index("--config_file") + 1] = str(folder / "configs" / "pretrain.yaml")
    line[line.index("--bundle_root") + 1] = str(folder)
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())) == 1, "what the command line says within"


@pytest.mark.parametrize(
    ("bundle", "extra"),
    [
        ("mae_resenc_l", []),
        ("mae_primus_m", ["--drop_path", "0.0"]),
        ("simclr_resenc_l", []),
        ("voco_primus_m", ["--drop_path", "0.0", "--teacher_momentum", "0.9"]),
    ],
)
def test_two_processes_equal_one(bundle: str, extra: list[str], images: Path, tmp_path: Path) -> None:
    """Five SGD steps at the same global batch, over two gloo processes, in two micro-batches, and in one."""
    sgd = ["--optimizer", json.dumps({"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01})]
    base = [*extra, *sgd, "--lr", "0.01", "--iterations_per_epoch", "5", "--epochs", "1", "--batch_size", "4"]

    def arguments(name: str) -> list[str]:
        line = pretraining(tmp_path / name, images)
        for key in ("--iterations_per_epoch", "--epochs", "--batch_size"):
            at = line.index(key)
            del line[at : at + 2]
        return [*line, *base]

    run(bundle, "pretrain", *arguments("one"))
    run(bundle, "pretrain", *arguments("accumulated"), "--accumulation_steps", "2")
    statuses, said = torchrun(command(bundle, "pretrain", *arguments("two")), "multi_gpu").end()
    assert statuses == [0], said[-3000:]
    one = read_checkpoint(tmp_path / "one" / "models" / "pretraining_state.pt")
    start_differs = False
    for name in ("two", "accumulated"):
        other = read_checkpoint(tmp_path / name / "models" / "pretraining_state.pt")
        assert one["method"].keys() == other["method"].keys()
        worst = max(float((one["method"][key] - other["method"][key]).abs().max()) for key in one["method"])
        assert worst <= 1e-6, (name, worst)
        start_differs |= worst > 0
        assert one["history"][0]["val_loss"] == pytest.approx(other["history"][0]["val_loss"], rel=1e-4)
    assert start_differs, "bit-equal runs would mean that one of them did not really split the batch"


def test_fine_tuning_on_two_machines_equals_one_process(labelled: Path, tmp_path: Path) -> None:
    """Through the decoder's phase and into that of the whole network, with momentum, clip and forced foreground."""
    bundle = "mae_resenc_l"
    own = ["--epochs", "3", "--decoder_epochs", "2", "--warmup_epochs", "0", "--iterations_per_epoch", "2"]
    own += ["--batch_size", "4", "--val_iterations", "1", "--from_scratch", "true", "--schedule", "sawtooth"]
    own += ["--dataset_dir", str(labelled), "--labels", "['background','ball']", "--store_dir", str(tmp_path / "store")]

    def line(name: str, *more: str) -> list[str]:
        places = ["--output_dir", str(tmp_path / name), "--ckpt_dir", str(tmp_path / name / "models")]
        return command(bundle, "train", *own, *places, *more)

    for arguments in (line("one"), line("accumulated", "--accumulation_steps", "2")):
        result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    statuses, said = torchrun(line("two"), "multi_gpu_train", machines=2).end()
    assert statuses == [0, 0], said[-3000:]
    assert said.count("the encoder is frozen until epoch 2") == 1, "told once"
    one = read_checkpoint(tmp_path / "one" / "models" / "model_final.pt")
    scores = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "accumulated", "two")]
    for name, history in zip(("accumulated", "two"), scores[1:], strict=True):
        other = read_checkpoint(tmp_path / name / "models" / "model_final.pt")
        assert max(float((one[key] - other[key]).abs().max()) for key in one) <= 1e-5, name
        for mine, theirs in zip(scores[0], history, strict=True):
            assert mine["val_dice"] == pytest.approx(theirs["val_dice"], abs=1e-3)
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_a_mistyped_setting_stops_the_run(images: Path, tmp_path: Path) -> None:
    bundle = "mae_resenc_l"
    wrong = run(bundle, "pretrain", *pretraining(tmp_path, images), "--lrr", "0.1", check=False)
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("Stopped: unknown setting --lrr (did you mean --lr?)")
    assert not (tmp_path / "models").exists()
    for config in ("train", "inference", "evaluate"):
        wrong = run(bundle, config, "--labelss", "x", check=False)
        assert wrong.returncode == 1
        assert "did you mean --labels" in wrong.stderr
    (tmp_path / "arguments.json").write_text(json.dumps({"epoch": 3}))
    wrong = run(
        bundle, "pretrain", *pretraining(tmp_path, images), "--args_file", tmp_path / "arguments.json", check=False
    )
    assert "did you mean --epochs" in wrong.stderr
    nested = run(bundle, "pretrain", *pretraining(tmp_path, images, epochs=1), "--optimizer#momentum", "0.5")
    assert nested.returncode == 0


def test_python_callers_keep_their_own_overrides(labelled: Path, tmp_path: Path) -> None:
    """The call that MONAI Label makes, and a ConfigWorkflow built by hand with a name of its own."""
    cases = [
        {"image": str(labelled / "images" / f"case_{i}.nii.gz"), "label": str(labelled / "labels" / f"case_{i}.nii.gz")}
        for i in range(3)
    ]
    program = f"""
from monai.bundle import ConfigWorkflow, run
settings = dict(from_scratch=True, patch_size=[16, 16, 16], features_per_stage=[4, 8], blocks_per_stage=[1, 1],
    num_workers=0, iterations_per_epoch=2, warmup_epochs=0, val_interval=1, ckpt_dir={str(tmp_path / "models")!r},
    output_dir={str(tmp_path)!r}, store_dir={str(tmp_path / "store")!r})
run("run", config_file="bundles/mae_resenc_l/configs/train.yaml", **settings, **{{"bundle_root": "bundles/mae_resenc_l",
    "train#trainer#max_epochs": 1, "train#dataset#data": {cases[:2]!r}, "validate#dataset#data": {cases[2:]!r}}})
workflow = ConfigWorkflow("bundles/mae_resenc_l/configs/train.yaml", workflow_type="train", my_own=3,
    dataset_dir={str(labelled)!r}, **settings)
workflow.initialize()
assert workflow.check_properties() == [], workflow.check_properties()
"""
    result = subprocess.run([python(), "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "models" / "model.pt").exists()


def test_training_without_validation_cases_still_writes_a_model(labelled: Path, tmp_path: Path) -> None:
    case = {"image": str(labelled / "images" / "case_0.nii.gz"), "label": str(labelled / "labels" / "case_0.nii.gz")}
    arguments = [
        "--from_scratch",
        "true",
        "--ckpt_dir",
        tmp_path / "m",
        "--output_dir",
        tmp_path / "o",
        "--store_dir",
        tmp_path / "store",
    ]
    (tmp_path / "data.json").write_text(json.dumps({"lists": {"training": [case], "validation": []}}))
    line = command("mae_resenc_l", "train", *arguments, "--epochs", "1", "--iterations_per_epoch", "2")
    config = line[line.index("--config_file") + 1]
    line[line.index("--config_file") + 1] = f"['{config}','{tmp_path / 'data.json'}']"
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "m" / "model.pt").exists()


def test_a_training_shorter_than_its_validation_interval_writes_a_model(labelled: Path, tmp_path: Path) -> None:
    arguments = ["--from_scratch", "true", "--ckpt_dir", tmp_path / "m", "--output_dir", tmp_path / "o", "--seed", "1"]
    arguments += ["--store_dir", tmp_path / "store"]
    result = run(
        *("mae_resenc_l", "train", "--dataset_dir", labelled, "--labels", "['background','ball']", *arguments),
        *("--epochs", "1", "--iterations_per_epoch", "2", "--batch_size", "2", "--accumulation_steps", "2"),
    )
    assert "validation Dice" in result.stdout
    about = json.loads((tmp_path / "m" / "model.json").read_text())
    expected = {"labels": ["background", "ball"], "spacing_mm": 1.0, "reorient": True, "normalization": ["zscore"]}
    assert {name: about["settings"][name] for name in expected} == expected
    places = ("--dataset_dir", labelled, "--ckpt_dir", tmp_path / "m", "--output_dir", tmp_path / "p")
    wrong = run("mae_resenc_l", "inference", *places, "--labels", "['background','x']", check=False)
    assert "Stopped:" in wrong.stderr
    assert "--labels was ['background', 'ball'], here ['background', 'x']" in wrong.stderr


def test_runs_that_cannot_be_end_in_a_sentence(images: Path, labelled: Path, tmp_path: Path) -> None:
    bundle = "mae_resenc_l"

    def last_line(config: str, *arguments: str | Path) -> str:
        result = run(bundle, config, *arguments, check=False)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr, result.stderr[-2000:]
        return result.stderr[result.stderr.rindex("Stopped:") :]

    assert "there is no folder /nowhere" in last_line("pretrain", *pretraining(tmp_path, Path("/nowhere")))
    assert "must be less than epochs" in last_line("pretrain", *pretraining(tmp_path, images), "--warmup_epochs", "9")
    assert "multiple of 3" in last_line("pretrain", *pretraining(tmp_path, images), "--accumulation_steps", "3")
    assert "--from_scratch true" in last_line("train", "--dataset_dir", labelled, "--pretrained", tmp_path / "none.pt")
    assert "fine-tune with this bundle" in last_line("inference", "--dataset_dir", images, "--ckpt_dir", tmp_path)
    assert "run the inference config" in last_line("evaluate", "--dataset_dir", labelled, "--predictions", tmp_path)


def test_nothing_of_an_earlier_run_is_overwritten(images: Path, tmp_path: Path) -> None:
    bundle, arguments = "mae_resenc_l", pretraining(tmp_path, images, epochs=1)
    run(bundle, "pretrain", *arguments)
    before = digest(tmp_path)
    assert "is complete; nothing to do" in run(bundle, "pretrain", *arguments).stdout
    told = run(bundle, "pretrain", *arguments, "--lr", "0.5", check=False).stderr
    assert "lr 0.01 -> 0.5" in told
    assert "start again with --resume false, which keeps it aside" in told
    (tmp_path / "models" / "pretraining_state.pt").rename(tmp_path / "state.pt")
    assert "--resume false, which keeps that file aside" in run(bundle, "pretrain", *arguments, check=False).stderr
    (tmp_path / "models" / "pretraining_state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    assert "not a complete checkpoint" in run(bundle, "pretrain", *arguments, check=False).stderr
    (tmp_path / "state.pt").rename(tmp_path / "models" / "pretraining_state.pt")
    assert digest(tmp_path) == before
