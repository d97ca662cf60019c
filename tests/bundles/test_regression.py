# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A number of whole volumes, run from the bundles' own configs: how near it comes to what any reader could reach.

The number is the volume of a ball in noise, as it was measured: with an error of a known size that no image tells of.
Whoever saw the true volume would still be off by that error, so its size is the least RMSE there is.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import run as run_bundle

from common.errors import SettingsError
from common.handlers import FineTuningCheckpoint
from common.weights import read_checkpoint, write_checkpoint

from ..conftest import BUNDLES, NETWORK, write_volume
from .conftest import PAIR, SIZES, Killed

pytestmark = pytest.mark.usefixtures("from_the_root")
TRAIN, NEW, SIDE = 48, 24, 16
LIMIT = 40.0  # voxels, standard deviation of the error of measurement


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of a bright ball in noise, two of each patient, and new ones, with tables of its measured volume."""
    folder = tmp_path_factory.mktemp("balls")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"))
    for name, count in (("scans", TRAIN), ("new", NEW)):
        lines = ["case,volume,patient"]
        for index in range(count):
            radius = (rng.uniform(40, 900) * 3 / (4 * math.pi)) ** (1 / 3)
            centre = rng.uniform(6.5, SIDE - 7.5, 3)
            ball = np.linalg.norm(grid - centre[:, None, None, None], axis=0) < radius
            image = 100 + 10 * rng.standard_normal(ball.shape) + 80 * ball
            write_volume(folder / name / f"b{index:02d}.nii.gz", image.astype(np.float32))
            lines.append(f"b{index:02d},{ball.sum() + rng.normal(0, LIMIT):.2f},p{index // 2}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def train(bundle: str, cohort: Path, out: Path, **more: Any) -> list[dict[str, float]]:
    """Train in this process and return the history."""
    root = f"bundles/{bundle}"
    narrow = SIZES.get(bundle) or dict(
        zip(
            [name.removeprefix("--") for name in NETWORK[bundle][::2]],
            map(json.loads, NETWORK[bundle][1::2]),
            strict=True,
        )
    )
    run_bundle(
        config_file=f"{root}/configs/train_classification.yaml",
        bundle_root=root,
        logging_file=None,
        **{
            **narrow,
            "task": "regression",
            "target": "volume",
            "units": "voxels",
            "dataset_dir": str(cohort / "scans"),
            "table": str(cohort / "scans.csv"),
            "store_dir": str(cohort / "store"),
            "output_dir": str(out / "out"),
            "ckpt_dir": str(out / "models"),
            "input_size": [SIDE, SIDE, SIDE],
            "fit": "crop",
            "zoom_probability": 0.0,
            "from_scratch": True,
            "batch_size": 4,
            "accumulation_steps": 1,
            "num_workers": 0,
            "epochs": 1,
            "picture_interval": 0,
            **more,
        },
    )
    return json.loads((out / "out" / "history.json").read_text())  # type: ignore[no-any-return]


def predict(bundle: str, cohort: Path, out: Path, **more: Any) -> list[dict[str, str]]:
    """Predict in this process and return the rows."""
    root = f"bundles/{bundle}"
    run_bundle(
        config_file=f"{root}/configs/inference_classification.yaml",
        bundle_root=root,
        logging_file=None,
        **{
            "dataset_dir": str(cohort / "new"),
            "store_dir": str(cohort / "store"),
            "output_dir": str(out / "pred"),
            "ckpt_dir": str(out / "models"),
            "num_workers": 0,
            **more,
        },
    )
    return table(out / "pred" / "predictions.csv")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def settings_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "models" / "classifier.json").read_text())["settings"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=PAIR)
def learnt(request: pytest.FixtureRequest, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    train(request.param, cohort, out, epochs=24, lr=3e-3, group="patient", fold=1, folds=4)
    return request.param, out


def test_it_comes_near_the_limit_and_is_far_better_than_the_mean(
    learnt: tuple[str, Path], cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = learnt
    rows = predict(bundle, cohort, out, table=str(cohort / "new.csv"), resamples=200)
    truth = {row["case"]: float(row["volume"]) for row in table(cohort / "new.csv")}
    assert list(rows[0]) == ["case", "predicted", "true", "error", "units"]
    for row in rows:
        assert float(row["true"]) == truth[row["case"]]
        assert float(row["error"]) == pytest.approx(float(row["predicted"]) - truth[row["case"]], abs=1e-3)
        assert row["units"] == "voxels"
    errors = np.array([float(row["error"]) for row in rows])
    rmse = float(np.sqrt((errors**2).mean()))
    assert 0.6 * LIMIT < rmse < 2 * LIMIT, "the error of measurement is in no image"
    summary = json.loads((out / "pred" / "scores.json").read_text())
    scores, mean = summary["scores"], summary["mean_of_training"]
    assert scores["rmse"]["value"] == pytest.approx(rmse, rel=1e-4)
    assert scores["r2"]["value"] > 0.9
    assert scores["spearman"]["value"] > 0.9
    assert mean["mae_gain"]["interval"][0] > 100
    assert "the model is better by" in mean["sentence"]
    assert summary["units"] == "voxels"
    assert summary["trained_on"] == 0
    assert (out / "pred" / "scores.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "volume, voxels: 24 cases; in brackets 95 % intervals" in printed
    assert mean["sentence"] in printed


def test_mean_and_spread_are_kept_beside_the_model_and_are_of_the_training_cases(
    learnt: tuple[str, Path], cohort: Path
) -> None:
    _, out = learnt
    held_out = {row["case"]: row for row in table(out / "out" / "validation_predictions.csv")}
    everything = {row["case"]: float(row["volume"]) for row in table(cohort / "scans.csv")}
    training = [value for case, value in everything.items() if case not in held_out]
    assert len(held_out) == 12
    kept = settings_of(out)
    assert kept["regression"] == {
        "mean": pytest.approx(np.mean(training)),
        "std": pytest.approx(np.std(training)),
        "units": "voxels",
    }
    history = json.loads((out / "out" / "history.json").read_text())
    errors = [float(row["predicted"]) - everything[case] for case, row in held_out.items()]
    assert history[-1]["val_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-3)
    assert history[-1]["val_r2"] > 0.8
    best = json.loads((out / "models" / "classifier_best.json").read_text())
    assert best["val_r2_average"] == pytest.approx(max(record["val_r2"] for record in history))


def test_new_cases_need_no_table_and_nothing_repeated(learnt: tuple[str, Path], cohort: Path, tmp_path: Path) -> None:
    bundle, out = learnt
    rows = predict(bundle, cohort, out, output_dir=str(out / "pred"), overwrite=True)
    assert list(rows[0]) == ["case", "predicted", "units"]
    values = [float(row["predicted"]) for row in rows]
    assert np.std(values) > 100, "in the target's own units"
    assert not (out / "pred" / "scores.json").exists()


@pytest.mark.parametrize(
    ("bundle", "tuning"), [(PAIR[0], "linear_probe"), (PAIR[0], "lora"), (PAIR[1], "linear_probe"), (PAIR[1], "full")]
)
def test_each_tuning_predicts_in_the_units_of_the_target(
    bundle: str, tuning: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(bundle, cohort, tmp_path / "first")
    before = {
        k: v for k, v in read_checkpoint(tmp_path / "first" / "models" / "classifier.pt").items() if "head" not in k
    }
    write_checkpoint(before, tmp_path / "encoder.pt")
    options = {"from_scratch": False, "pretrained": str(tmp_path / "encoder.pt"), "tuning": tuning, "lr": 1e-2}
    train(bundle, cohort, tmp_path, regression_loss="l1", **options)
    after = read_checkpoint(tmp_path / "models" / "classifier.pt")
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert bool(moved) == (tuning != "linear_probe")
    assert after["head.weight"].shape[0] == 1
    values = np.array([float(row["predicted"]) for row in predict(bundle, cohort, tmp_path)])
    kept = settings_of(tmp_path)
    assert (np.abs(values - kept["regression"]["mean"]) < 4 * kept["regression"]["std"]).all()
    assert kept["regression_loss"] == "l1"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_bundle_learns_a_number(bundle: str, cohort: Path, tmp_path: Path) -> None:
    split = [{"train": ["b00", "b01", "b02", "b03"], "val": ["b04", "b05"]}]
    (tmp_path / "splits.json").write_text(json.dumps(split))
    history = train(bundle, cohort, tmp_path, splits=str(tmp_path / "splits.json"))
    assert len(history) == 1
    assert math.isfinite(history[0]["train_loss"])
    assert math.isfinite(history[0]["val_mae"])
    assert settings_of(tmp_path)["regression"]["std"] > 0


def test_a_cut_run_goes_on_and_a_changed_target_is_another_run(cohort: Path, tmp_path: Path, killed: Killed) -> None:
    whole = train(PAIR[0], cohort, tmp_path / "whole", epochs=2)
    with killed(FineTuningCheckpoint, 1):
        train(PAIR[0], cohort, tmp_path / "cut", epochs=2)
    with pytest.raises(SettingsError, match="other settings"):
        train(PAIR[0], cohort, tmp_path / "cut", epochs=2, regression_loss="mse")
    resumed = train(PAIR[0], cohort, tmp_path / "cut", epochs=2)
    assert [record["val_r2"] for record in whole] == [record["val_r2"] for record in resumed]
    one, other = (read_checkpoint(tmp_path / name / "models" / "classifier.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_number_that_may_depend_on_size_gets_a_note(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(PAIR[0], cohort, tmp_path, fit="resize", zoom_probability=0.2)
    told = capsys.readouterr().out
    assert "note: --fit resize shows every volume at one size and --zoom_probability 0.2 shows some larger" in told
    assert "--fit crop --zoom_probability 0" in told
