# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Experiment tracking by MONAI's flag, ``--tracking mlflow``; mlflow itself need not be there."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import monai.bundle
import pytest
from monai.handlers import mlflow_handler

from ..conftest import ROOT, blobs, pretraining, run, small_settings, write_volume
from .conftest import PATCH, code_of

BUNDLE = "mae_resenc_l"
Series = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Path]) -> Iterator[Path]:
    with code_of(exported(BUNDLE)) as folder:
        yield folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = ["case,ill"]
    for index in range(4):
        for kind, values in zip(("images", "labels"), blobs(index), strict=True):
            write_volume(folder / kind / f"case_{index}.nii.gz", values)
        lines.append(f"case_{index},{'yes' if index % 2 else 'no'}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def track(workflow: str, bundle: Path, data: Path, folder: Path, **more: Any) -> None:
    """Run two epochs of a workflow, or an inference, with MONAI's tracking switched on."""
    steps = {"iterations_per_epoch": 3, "val_iterations": 2, "batch_size": 2, "epochs": 2, "num_workers": 0}
    images = {"dataset_dir": str(data / "images")}
    table = {"table": str(data / "table.csv"), "target": "ill", "epochs": 2, "batch_size": 2, "accumulation_steps": 1}
    settings: dict[str, dict[str, Any]] = {
        "pretrain": images | steps | small_settings(BUNDLE),
        "train": {"dataset_dir": str(data), "labels": ["background", "ball"], "warmup_epochs": 0} | steps,
        "inference": images | {"num_workers": 0, "model": str(folder / "models" / "model.pt")},
        "train_classification": images
        | table
        | {"input_size": [PATCH] * 3, "num_workers": 0, "fold": 0, "folds": 2, "warmup_epochs": 0},
    }
    places = {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / workflow)}
    if workflow != "inference":
        places["store_dir"] = str(folder / f"store_{workflow}")
    file = max((bundle / "configs").glob(f"{workflow}.*"))  # the YAML, where there are two
    monai.bundle.run(
        config_file=str(file),
        bundle_root=str(bundle),
        logging_file=False,
        tracking="mlflow",
        **settings[workflow] | places | more,
    )


def expect(workflow: str, series: Series) -> None:
    """Check what a run of two epochs has to leave: a loss of each step, and of each epoch means, rate and scores."""
    scores = {"pretrain": "val_loss", "train": "val_dice_ball", "train_classification": "val_balanced_accuracy"}
    steps = 2 if workflow == "train_classification" else 6
    assert [step for step, _ in series["train_loss"]] == list(range(1, steps + 1))
    for name in ("train_loss_epoch", "lr", scores[workflow]):
        assert [step for step, _ in series[name]] == [1, 2], name
    losses = [value for _, value in series["train_loss"]]
    first = sum(losses[: steps // 2]) / (steps // 2)
    assert series["train_loss_epoch"][0][1] == pytest.approx(first, rel=1e-5)
    assert series["lr"][0][1] > series["lr"][1][1] > 0


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Client:
    """As much of mlflow's client as MONAI's handler calls."""

    series: ClassVar[Series] = defaultdict(list)
    parameters: ClassVar[dict[str, str]] = {}
    artifacts: ClassVar[list[str]] = []

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def search_runs(self, _: str) -> list[SimpleNamespace]:
        return []

    def get_run(self, run_id: str) -> SimpleNamespace:
        return SimpleNamespace(data=SimpleNamespace(params=self.parameters), info=SimpleNamespace(run_id=run_id))

    def create_run(self, **_: str) -> SimpleNamespace:
        return self.get_run("run")

    def log_batch(self, run_id: str, metrics: list[Metric], params: list[tuple[str, str]], tags: list[Any]) -> None:
        self.parameters.update(params)
        for metric in metrics:
            self.series[metric.key].append((metric.step, float(metric.value)))

    def log_artifact(self, _: str, file: str) -> None:
        self.artifacts.append(file)

    def set_terminated(self, *_: str) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    status = SimpleNamespace(FINISHED=3, to_string=lambda status: "FINISHED")
    entities = SimpleNamespace(
        RunStatus=status,
        Param=lambda key, value: (key, value),
        Metric=Metric,
        LifecycleStage=SimpleNamespace(ACTIVE="active"),
    )
    monkeypatch.setattr(mlflow_handler, "mlflow", SimpleNamespace(MlflowClient=Client, entities=entities))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for held in (Client.series, Client.parameters, Client.artifacts):
        held.clear()
    return Client


@pytest.mark.parametrize("workflow", ["pretrain", "train", "train_classification"])
def test_every_training_can_be_tracked(
    workflow: str, bundle: Path, data: Path, recorded: type[Client], tmp_path: Path
) -> None:
    track(workflow, bundle, data, tmp_path)
    expect(workflow, recorded.series)
    assert recorded.parameters["max_epochs"] == "2"


def test_a_training_of_the_repository_can_be_tracked(data: Path, recorded: type[Client], tmp_path: Path) -> None:
    small = {name: value for name, value in small_settings(BUNDLE).items() if name != "block_size"}
    track(
        "train", ROOT / "bundles" / BUNDLE, data, tmp_path, from_scratch=True, output_dir=f"${str(tmp_path)!r}", **small
    )
    expect("train", recorded.series)
    config = json.loads(Path(recorded.artifacts[0]).read_text())
    assert config["train"]["trainer"]["max_epochs"] == "@epochs"
    assert config["epochs"] == 2


def test_an_inference_can_be_tracked(bundle: Path, data: Path, recorded: type[Client], tmp_path: Path) -> None:
    track("train", bundle, data, tmp_path)
    recorded.parameters.clear()
    track("inference", bundle, data, tmp_path, labels=["background", "ball"])
    assert recorded.parameters == {"max_epochs": "1", "epoch_length": "4"}
    assert len(list((tmp_path / "inference").glob("*.nii.gz"))) == 4


@pytest.mark.parametrize("workflow", ["pretrain", "train", "train_classification"])
def test_what_mlflow_keeps(workflow: str, bundle: Path, data: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path / 'runs.db'}"
    track(workflow, bundle, data, tmp_path, tracking_uri=address, run_name="one", experiment_name="tests")
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs(client.get_experiment_by_name("tests").experiment_id)
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    history = {
        name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    expect(workflow, history)


def test_tracking_half_a_config_is_an_error(data: Path, tmp_path: Path) -> None:
    """MONAI keeps the config as it is before what it shares is taken in, and says nothing."""
    arguments = pretraining(tmp_path, data / "images", epochs=1)
    result = run(BUNDLE, "pretrain", *arguments, "--tracking", "mlflow", check=False)
    assert result.returncode == 1
    assert "Stopped: --tracking would keep half a config" in result.stderr
