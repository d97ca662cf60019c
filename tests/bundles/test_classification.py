# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Classification of whole volumes, run from the bundles' own configs: does it learn, resume, and say what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle

from common.bundles import read_config
from common.data import CaseSampler, EpochSampler
from common.errors import SettingsError
from common.handlers import FineTuningCheckpoint
from common.weights import read_checkpoint, write_checkpoint

from ..conftest import blobs, run, write_volume
from .conftest import PAIR, SIZES, Killed

pytestmark = pytest.mark.usefixtures("from_the_root")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two scans of sixteen patients, half of them with a bright ball, and every second with a bright slab."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["case,diagnosis,kind,ball,slab,rare,patient"]
    for index in range(32):
        image, mask = blobs(index, (20, 20, 20))
        ball, slab = (index // 2) % 2, index % 2
        image = image - 80 * mask * (1 - ball)
        image[:5] += 40 * slab
        write_volume(folder / "scans" / f"c{index:02d}.nii.gz", image.astype(np.float32))
        second = (image**2 / 100).astype(np.float32)
        for channel, values in enumerate((image.astype(np.float32), second)):
            write_volume(folder / "pairs" / f"c{index:02d}_000{channel}.nii.gz", values)
        kind = ["none", "ball", "slab", "both"][ball + 2 * slab]
        lines.append(f"c{index:02d},{['well', 'ill'][ball]},{kind},{ball},{slab},{int(index == 3)},p{index // 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def settings(bundle: str, cohort: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        **SIZES[bundle],
        "dataset_dir": str(cohort / "scans"),
        "table": str(cohort / "table.csv"),
        "target": "diagnosis",
        "store_dir": str(cohort / "store"),
        "output_dir": str(out / "out"),
        "ckpt_dir": str(out / "models"),
        "input_size": [16, 16, 16],
        "from_scratch": True,
        "batch_size": 4,
        "accumulation_steps": 1,
        "num_workers": 0,
        "epochs": 2,
        "picture_interval": 0,
        **more,
    }


def train(bundle: str, cohort: Path, out: Path, **more: Any) -> list[dict[str, float]]:
    """Train in this process and return the history."""
    root = f"bundles/{bundle}"
    everything = settings(bundle, cohort, out, **more)
    run_bundle(
        config_file=f"{root}/configs/train_classification.yaml", bundle_root=root, logging_file=None, **everything
    )
    return json.loads((out / "out" / "history.json").read_text())  # type: ignore[no-any-return]


def predict(bundle: str, cohort: Path, out: Path, **more: Any) -> list[dict[str, str]]:
    """Predict in this process and return the rows."""
    root = f"bundles/{bundle}"
    everything = {
        "dataset_dir": str(cohort / "scans"),
        "store_dir": str(cohort / "store"),
        "output_dir": str(out / "pred"),
        "ckpt_dir": str(out / "models"),
        "num_workers": 0,
        **more,
    }
    run_bundle(
        config_file=f"{root}/configs/inference_classification.yaml", bundle_root=root, logging_file=None, **everything
    )
    with open(out / "pred" / "predictions.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module", params=PAIR)
def learnt(request: pytest.FixtureRequest, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    history = train(request.param, cohort, out, epochs=8, lr=3e-3, patient="patient", fold=1, folds=4)
    assert history[-1]["val_auroc"] > 0.9, history[-1]
    return request.param, out


def test_it_learns_and_predicts_with_nothing_repeated(learnt: tuple[str, Path], cohort: Path) -> None:
    bundle, out = learnt
    assert {path.name for path in (out / "models").iterdir() if path.name[0] != "."} == {
        f"classifier{name}.{kind}" for name in ("", "_best") for kind in ("pt", "json")
    }
    with open(out / "out" / "validation_predictions.csv", newline="") as stream:
        validation = {row["case"]: row for row in csv.DictReader(stream)}
    assert len(validation) == 8
    rows = predict(
        bundle, cohort, out, table=str(cohort / "table.csv"), group="slab,rare", patient="patient", resamples=50
    )
    assert [row["case"] for row in rows] == [f"c{index:02d}" for index in range(32)]
    for row in rows:
        shares = [float(row["probability_ill"]), float(row["probability_well"])]
        assert sum(shares) == pytest.approx(1, abs=2e-6)
        assert row["predicted"] == ("ill" if shares[0] > shares[1] else "well")
        if row["case"] in validation:
            assert row == validation[row["case"]], "the written model is the last epoch's"
    scores = json.loads((out / "pred" / "scores.json").read_text())
    assert scores["scores"]["auroc"]["value"] > 0.9
    assert scores["trained_on"] == 24
    assert scores["groups"] == 16
    found = scores["by_group"]
    assert {name: (each["cases"], each["patients"]) for name, each in found["slab"]["groups"].items()} == {
        "0": (16, 16),
        "1": (16, 16),
    }
    assert all(each["score"] > 0.9 for each in found["slab"]["groups"].values())
    assert found["rare"]["groups"]["1"] == {"cases": 1, "patients": 1, "score": None, "interval": None, "few": True}
    assert (out / "pred" / "groups.png").stat().st_size > 5000
    assert (out / "pred" / "scores.png").stat().st_size > 5000


def test_a_bad_case_is_told_and_the_others_are_predicted(
    learnt: tuple[str, Path], cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = learnt
    for name in ("a", "b"):
        write_volume(tmp_path / "new" / f"{name}.nii.gz", blobs(50, (20, 20, 20))[0])
    (tmp_path / "new" / "b.nii.gz").write_bytes(b"no volume")
    options = {"dataset_dir": str(tmp_path / "new"), "output_dir": str(tmp_path), "store_dir": str(tmp_path / "s")}
    run_predict = {**options, "ckpt_dir": str(out / "models"), "num_workers": 0}
    root = f"bundles/{bundle}"
    where = {"config_file": f"{root}/configs/inference_classification.yaml", "bundle_root": root, "logging_file": None}
    run_bundle(**where, **run_predict)
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "case,probability_ill,probability_well,predicted"
    assert [line.split(",")[0] for line in lines[1:]] == ["a"]
    assert "b.nii.gz" in json.loads((tmp_path / "skipped.json").read_text())[0]
    assert not (tmp_path / "scores.json").exists()
    with pytest.raises(SettingsError, match=r"predictions\.csv exists"):
        run_bundle(**where, **run_predict)


@pytest.mark.parametrize("bundle", PAIR)
def test_a_cut_run_goes_on_to_the_same_bits(bundle: str, cohort: Path, tmp_path: Path, killed: Killed) -> None:
    options = {"epochs": 4, "accumulation_steps": 2, "tuning": "full", "warmup_epochs": 1}
    whole = train(bundle, cohort, tmp_path / "whole", **options)
    with killed(FineTuningCheckpoint, 2):
        train(bundle, cohort, tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / "models" / "classifier.pt").exists()
    resumed = train(bundle, cohort, tmp_path / "cut", **options)
    assert [record["epoch"] for record in resumed] == [1, 2, 3, 4]
    one, other = (read_checkpoint(tmp_path / name / "models" / "classifier.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [record["val_loss"] for record in whole] == [record["val_loss"] for record in resumed]
    # rates as published, in a run of four epochs: lr 1/2, then half a cosine over three
    assert [record["lr"] for record in whole] == pytest.approx([5e-5, 1e-4, 7.5e-5, 2.5e-5])
    assert not (tmp_path / "cut" / "models" / "classification_state.pt").exists()


def test_workers_do_not_change_a_run(cohort: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train("mae_primus_m", cohort, tmp_path / str(workers), num_workers=workers)
    one, other = (read_checkpoint(tmp_path / name / "models" / "classifier.pt") for name in ("0", "2"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders as pre-training writes them, of both backbones."""
    folder = tmp_path_factory.mktemp("pretrained")
    for bundle in PAIR:
        parser = ConfigParser(read_config(f"bundles/{bundle}/configs/pretrain.yaml"))
        parser.update({**SIZES[bundle], "patch_size": [32, 32, 32]})
        torch.manual_seed(7)
        weights = parser.get_parsed_content("backbone").state_dict()
        write_checkpoint({k: v for k, v in weights.items() if k.startswith("encoder.")}, folder / f"{bundle}.pt")
    return folder


@pytest.mark.parametrize(
    ("bundle", "tuning"),
    [(b, t) for b in PAIR for t in ("full", "norm", "linear_probe", "sawtooth", "lora") if (b, t) != (PAIR[1], "lora")],
)
def test_each_tuning_moves_what_it_should(
    bundle: str, tuning: str, cohort: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"from_scratch": False, "pretrained": str(pretrained / f"{bundle}.pt"), "tuning": tuning, "lr": 1e-2}
    if tuning == "sawtooth":
        options |= {"epochs": 3, "head_epochs": 2, "warmup_epochs": 0, "picture_interval": 1}
    train(bundle, cohort, tmp_path, **options)
    receipt = json.loads((tmp_path / "out" / "weights_receipt.json").read_text())
    assert receipt["encoder_share"] == 1.0
    printed = capsys.readouterr().out
    if tuning not in ("full",):
        assert "parameters train" in printed
    before = read_checkpoint(pretrained / f"{bundle}.pt")
    after = read_checkpoint(tmp_path / "models" / "classifier.pt")
    encoder = {name for name in after if name.startswith("encoder.")}
    moved = {
        name
        for name in encoder
        if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    } - {"encoder.transformer.position_embedding"}
    everything = encoder - {"encoder.transformer.position_embedding"}
    expected = {
        "full": everything,
        "sawtooth": everything,
        "linear_probe": set(),
        "norm": {name for name in everything if ".norm" in name},
        "lora": {
            name for name in everything if ".attention." in name and name.endswith("weight") and ".norm." not in name
        },
    }[tuning]
    dead = {name for name in expected - moved if name.endswith("conv.bias")}  # a norm behind it takes it out again
    assert moved == expected - dead
    if tuning == "sawtooth":
        best = "the encoder is frozen until epoch 2 of 3", "from here on the encoder learns too"
        assert all(text in printed for text in best)
    # inference builds the plain network, whatever was tuned
    rows = predict(bundle, cohort, tmp_path)
    assert len(rows) == 32


def test_adapters_are_refused_where_there_is_no_attention(cohort: Path, pretrained: Path, tmp_path: Path) -> None:
    options = {"from_scratch": False, "pretrained": str(pretrained / "mae_resenc_l.pt"), "tuning": "lora"}
    with pytest.raises(SettingsError, match="--tuning norm"):
        train("mae_resenc_l", cohort, tmp_path, **options)


@pytest.mark.parametrize("bundle", PAIR)
def test_several_classes_and_several_labels(bundle: str, cohort: Path, tmp_path: Path) -> None:
    options = {"epochs": 3, "lr": 3e-3, "balance": True, "label_smoothing": 0.1}
    history = train(bundle, cohort, tmp_path / "kinds", target="kind", **options)
    record = history[-1]
    assert {
        "val_ap",
        "val_f1",
        "val_auroc",
        "val_balanced_accuracy",
        "val_balanced_accuracy_reference",
    } <= record.keys()
    rows = predict(bundle, cohort, tmp_path / "kinds")
    names = ["ball", "both", "none", "slab"]
    for row in rows:
        shares = [float(row[f"probability_{name}"]) for name in names]
        assert sum(shares) == pytest.approx(1, abs=4e-6)
        assert row["predicted"] == names[int(np.argmax(shares))]
    train(bundle, cohort, tmp_path / "labels", target=["ball", "slab"], **options)
    rows = predict(bundle, cohort, tmp_path / "labels", table=str(cohort / "table.csv"), resamples=20)
    assert list(rows[0]) == [
        *("case", "probability_ball", "probability_slab", "predicted_ball", "predicted_slab", "true_ball", "true_slab")
    ]
    assert all(row["predicted_slab"] == str(int(float(row["probability_slab"]) > 0.5)) for row in rows)
    assert all(row["true_ball"] == str(index // 2 % 2) for index, row in enumerate(rows))


def test_a_class_that_no_validation_case_has_is_no_crash(cohort: Path, tmp_path: Path) -> None:
    split = [{"train": [f"c{i:02d}" for i in range(24)], "val": [f"c{i:02d}" for i in range(24, 32)]}]
    (tmp_path / "splits.json").write_text(json.dumps(split))
    history = train(
        "mae_primus_m", cohort, tmp_path, target=["rare", "ball"], splits=str(tmp_path / "splits.json"), lr=3e-3
    )
    assert np.isfinite(history[-1]["val_auroc"]), "the mean is over the label that can be scored"
    assert (tmp_path / "models" / "classifier.pt").exists()


@pytest.mark.parametrize("bundle", PAIR)
def test_two_channels(bundle: str, cohort: Path, pretrained: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": str(cohort / "pairs"), "channels": 2, "fit": "crop", "spacing_mm": 1.0}
    options |= {"from_scratch": False, "pretrained": str(pretrained / f"{bundle}.pt")}
    train(bundle, cohort, tmp_path, **options)
    receipt = json.loads((tmp_path / "out" / "weights_receipt.json").read_text())
    assert receipt["encoder_share"] == 1.0
    assert any("repeated to 2" in how for how in receipt["adapted"].values())
    rows = predict(bundle, cohort, tmp_path, dataset_dir=str(cohort / "pairs"))
    assert [row["case"] for row in rows] == [f"c{index:02d}" for index in range(32)]


def test_earlier_classifiers_are_kept(cohort: Path, tmp_path: Path) -> None:
    train("mae_primus_m", cohort, tmp_path, epochs=1)
    first = (tmp_path / "models" / "classifier.pt").read_bytes()
    train("mae_primus_m", cohort, tmp_path, epochs=1, seed=1)
    assert (tmp_path / "models" / "classifier_previous.pt").read_bytes() == first
    assert (tmp_path / "models" / "classifier.pt").read_bytes() != first


def test_a_changed_table_is_another_run(
    cohort: Path, tmp_path: Path, killed: Killed, capsys: pytest.CaptureFixture[str]
) -> None:
    with killed(FineTuningCheckpoint):
        train("mae_primus_m", cohort, tmp_path, fold=0)
    text = (cohort / "table.csv").read_text().replace("c02,ill", "c02,well")
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(SettingsError, match=r"other settings \(another cases"):
        train("mae_primus_m", cohort, tmp_path, table=str(tmp_path / "table.csv"), fold=0)
    train("mae_primus_m", cohort, tmp_path, table=str(tmp_path / "table.csv"), fold=0, resume=False)
    assert "is of another run" in capsys.readouterr().out
    assert (tmp_path / "models" / "classification_state_previous.pt").exists()


@pytest.mark.parametrize(("batch_size", "steps"), [(96, 48), (2, 1), (1, 1), (5, 5), (6, 3)])
def test_a_batch_size_alone_is_enough(batch_size: int, steps: int) -> None:
    """Two cases are computed at a time, as published, or one; the batch is split evenly, whatever its size."""
    for bundle in ("mae_primus_m", "mae_resenc_l"):
        parser = ConfigParser(read_config(f"bundles/{bundle}/configs/train_classification.yaml"))
        parser["batch_size"] = batch_size
        assert parser.get_parsed_content("accumulation_steps") == steps


def test_a_batch_that_does_not_split_names_both_settings() -> None:
    for sampler in (
        lambda: CaseSampler(range(5), batch_size=2, accumulation_steps=48),
        lambda: EpochSampler(steps=1, batch_size=2, accumulation_steps=48),
    ):
        with pytest.raises(SettingsError, match=r"batch_size 2 does not split .*48.*set --accumulation_steps with it"):
            sampler()


def test_the_command_line(cohort: Path, tmp_path: Path) -> None:
    given: list[str | Path] = ["--dataset_dir", cohort / "scans", "--table", cohort / "table.csv"]
    given += ["--store_dir", cohort / "store", "--output_dir", tmp_path / "out", "--ckpt_dir", tmp_path / "models"]
    given += ["--from_scratch", "true", "--epochs", "1", "--batch_size", "4", "--accumulation_steps", "2"]
    run("mae_primus_m", "train_classification", *given, "--target", "['ball','slab']", "--balance", "false")
    rows = (tmp_path / "out" / "validation_predictions.csv").read_text().splitlines()
    assert rows[0].startswith("case,probability_ball,probability_slab,predicted_ball")
    wrong = run("mae_primus_m", "train_classification", *given, "--target", "['ball','slap']", check=False)
    assert wrong.returncode != 0
    assert "Stopped: " in wrong.stderr
    assert "did you mean slab" in wrong.stderr
    assert "Traceback" not in wrong.stderr
