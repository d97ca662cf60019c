# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Rounds of a federation with MONAI's own client, ``monai.fl.client.MonaiAlgo``, on an exported bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pytest
from ignite.engine import Events
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject
from monai.networks.utils import get_state_dict

from common.optimizers import FineTuningSchedule, Poly
from common.weights import read_checkpoint, sha256

from ..conftest import blobs, small_settings, write_volume
from .conftest import code_of

BUNDLE = "mae_resenc_l"
WORKFLOWS = ["pretrain", "train"]
SITES = {"north": 5, "south": 3}  # volumes of each
STEPS = 6
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Path]) -> Iterator[Path]:
    with code_of(exported(BUNDLE)) as folder:
        yield folder


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of images and labels for each site, and one with those of all."""
    folder, count = tmp_path_factory.mktemp("sites"), 0
    for site, volumes in SITES.items():
        for _ in range(volumes):
            for place in (folder / site, folder / "all"):
                for kind, values in zip(("images", "labels"), blobs(count), strict=True):
                    write_volume(place / kind / f"case_{count}.nii.gz", values)
            count += 1
    return folder


def settings_of(workflow: str, data: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """Return what a client is told of its config: the whole length, where its data are, where it may write."""
    places = {"dataset_dir": data, "output_dir": folder / "out", "ckpt_dir": folder / "models"}
    settings: dict[str, Any] = {name: str(path) for name, path in {**places, "store_dir": folder / "store"}.items()}
    settings |= {"epochs": epochs, "iterations_per_epoch": STEPS, "val_iterations": 4, "batch_size": 2}
    settings |= small_settings(BUNDLE) | {"lr": 0.05, "momentum": 0.9, "resume": "rounds"}
    if workflow == "train":
        settings |= {"labels": ["background", "ball"], "from_scratch": True, "schedule": "sawtooth"}
        settings |= {"warmup_epochs": 1, "decoder_epochs": 1}
    return settings


class Client(MonaiAlgo):
    """MONAI's client, which notes the weights that each of its epochs starts with."""

    def __init__(self, bundle: Path, workflow: str, settings: dict[str, Any], **more: Any) -> None:
        config = f"configs/{workflow}.json"
        names = {"config_train_filename": config, "config_evaluate_filename": config}
        super().__init__(str(bundle), train_kwargs=dict(settings), eval_kwargs=dict(settings), **names, **more)
        self.initialize(extra={ExtraItems.CLIENT_NAME: Path(settings["dataset_dir"]).name})
        self.starts: list[Weights] = []
        self.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.starts.append(weights_of(engine)))

    def round(self, weights: Weights) -> Weights:
        """Train from the server's weights; return what is sent back."""
        self.train(ExchangeObject(weights=dict(weights)))
        sent = self.get_weights()
        assert sent.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == STEPS * self.local_epochs
        return {name: value.numpy() for name, value in sent.weights.items()}

    @property
    def lr(self) -> float:
        return self.trainer.optimizer.param_groups[0]["lr"]


def weights_of(engine: Any) -> Weights:
    return {name: value.numpy().copy() for name, value in get_state_dict(engine.network).items()}


def equal(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


def mean(weights: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """Return the average of FedAvg."""
    total = sum(shares)
    return {
        name: sum(one[name] * np.float32(share / total) for share, one in zip(shares, weights, strict=True))
        for name in weights[0]
    }


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_two_sites_learn_together(workflow: str, bundle: Path, sites: Path, tmp_path: Path) -> None:
    """FedAvg over two sites; one of them is stopped after the second round and started again."""
    rounds, metric = 4, {"pretrain": "val_loss", "train": "val_dice"}[workflow]
    settings = {site: settings_of(workflow, sites / site, tmp_path / site, rounds) for site in SITES}
    clients = {site: Client(bundle, workflow, settings[site], send_weight_diff=False) for site in SITES}
    volumes = list(SITES.values())
    weights = weights_of(clients["north"].trainer)
    rates: list[float] = []
    held_out: list[float] = []

    def evaluate() -> None:
        scores = [one.evaluate(ExchangeObject(weights=dict(weights))).metrics[metric] for one in clients.values()]
        held_out.append(float(np.average(scores, weights=volumes)))
        assert all(equal(weights_of(one.evaluator), weights) for one in clients.values())

    for number in range(rounds):
        evaluate()
        if number == 2:
            clients["south"] = Client(bundle, workflow, settings["south"], send_weight_diff=False)
        sent = [one.round(weights) for one in clients.values()]
        assert all(equal(one.starts[-1], weights) for one in clients.values()), "a client began with weights of its own"
        assert not equal(*sent)
        assert clients["north"].lr == clients["south"].lr
        rates.append(clients["north"].lr)
        weights = mean(sent, volumes)
        assert not any(equal(weights, one) for one in sent)
    evaluate()

    schedule = (
        Poly(0.05, epochs=rounds)
        if workflow == "pretrain"
        else FineTuningSchedule("sawtooth", lr=0.05, epochs=rounds, warmup_epochs=1, decoder_epochs=1)
    )
    assert rates == [schedule(epoch) for epoch in range(rounds)]
    for site in SITES:
        history = json.loads((tmp_path / site / "out" / "history.json").read_text())
        assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    if workflow == "pretrain":
        assert held_out[-1] < 0.9 * held_out[0], held_out
        file = tmp_path / "south" / "models" / "pretrained_encoder.pt"
        assert read_checkpoint(file).keys() == {
            name.removeprefix("backbone.") for name in weights if "backbone." in name
        }
        assert json.loads(file.with_suffix(".json").read_text())["sha256"] == sha256(file)
    else:
        assert held_out[-1] > held_out[0] + 0.1, held_out
        assert read_checkpoint(tmp_path / "south" / "models" / "model.pt").keys() == weights.keys()
        assert not list((tmp_path / "north" / "models").glob("*_previous*"))


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_rounds_of_one_site_are_a_plain_run(workflow: str, bundle: Path, sites: Path, tmp_path: Path) -> None:
    """No optimizer state, schedule, random stream or phase is lost between rounds, nor where a client starts again."""
    epochs = 4
    plain = settings_of(workflow, sites / "all", tmp_path / "plain", epochs) | {"resume": True}
    monai.bundle.run(config_file=str(bundle / "configs" / f"{workflow}.json"), logging_file=False, **plain)
    settings = settings_of(workflow, sites / "all", tmp_path / "rounds", epochs)
    one = Client(bundle, workflow, settings)
    weights = weights_of(one.trainer)
    for number in range(epochs):
        if number == 3:
            one = Client(bundle, workflow, settings)
        change = one.round(weights)
        weights = {name: value + change[name] for name, value in weights.items()}
    folder = tmp_path / "plain" / "models"
    expected = (
        read_checkpoint(folder / "pretraining_state.pt")["method"]
        if workflow == "pretrain"
        else read_checkpoint(folder / "model_final.pt")
    )
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value.numpy(), rtol=0, atol=1e-6, err_msg=name)
    curves = [json.loads((tmp_path / run / "out" / "history.json").read_text()) for run in ("plain", "rounds")]
    for name in ("train_loss", "lr"):
        np.testing.assert_allclose(*[[record[name] for record in curve] for curve in curves], rtol=1e-5, err_msg=name)


@contextmanager
def stops(sentence: str) -> Iterator[None]:
    """Expect an error that says ``sentence``; MONAI wraps those of a config."""
    with pytest.raises(Exception, match=r".") as told:
        yield
    assert sentence in f"{told.value} {told.value.__cause__}"


def test_mistakes_end_in_a_sentence(bundle: Path, sites: Path, tmp_path: Path) -> None:
    settings = settings_of("pretrain", sites / "south", tmp_path / "run", 1)
    one = Client(bundle, "pretrain", settings)
    weights = weights_of(one.trainer)
    one.round(weights)
    with stops("the schedule ends with epoch 1, but epoch 2 starts; set epochs to"):
        one.round(weights)
    with stops("has all 1 epochs already; rounds go on where a federation asks for more"):
        monai.bundle.run(config_file=str(bundle / "configs" / "pretrain.json"), logging_file=False, **settings)
    with stops("other settings (lr 0.05 -> 0.1)"):
        Client(bundle, "pretrain", settings | {"lr": 0.1})
    (tmp_path / "run" / "models" / "pretraining_state.pt").unlink()
    with stops("is not from a run that could be resumed here"):
        Client(bundle, "pretrain", settings)
