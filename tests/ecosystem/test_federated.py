# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Rounds of a federation with MONAI's own client, ``monai.fl.client.MonaiAlgo``, on an exported bundle."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import monai.bundle
import numpy as np
import pytest
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject
from monai.networks.utils import get_state_dict

from common.errors import DataError, SettingsError
from common.files import sha256
from common.optimizers import FineTuningSchedule, Poly
from common.weights import read_checkpoint
from tools.commanding.settings import filled
from tools.federating import federation as federated
from tools.federating.settings import Federated

from ..conftest import ROOT, blobs, small_settings, write_volume
from .conftest import code_of

BUNDLE = "mae_resenc_l"
WORKFLOWS = ["pretrain", "train"]
SITES = {"north": 5, "south": 3}  # volumes of each
STEPS = 6
PLACES = ("dataset_dir", "output_dir", "ckpt_dir", "store_dir")
METRICS = {"pretrain": "val_loss", "train": "val_dice"}
# what a federation leaves at a site, and the part of its weights that this file holds
FILES = {"pretrain": ("pretrained_encoder.pt", "backbone."), "train": ("model.pt", "")}
Weights = dict[str, np.ndarray]
# what the tool takes from nvflare
NVFLARE = {
    "nvflare": [],
    "nvflare.app_opt.pt.file_model_persistor": ["PTFileModelPersistor"],
    "nvflare.app_opt.pt.recipes.fedavg": ["FedAvgRecipe"],
    "nvflare.recipe": ["SimEnv", "add_final_global_evaluation", "set_per_site_config"],
}


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
    places = (data, folder / "out", folder / "models", folder / "store")
    settings: dict[str, Any] = {name: str(path) for name, path in zip(PLACES, places, strict=True)}
    settings |= {"epochs": epochs, "iterations_per_epoch": STEPS, "val_iterations": 4, "batch_size": 2}
    settings |= small_settings(BUNDLE) | {"lr": 0.05, "momentum": 0.9, "resume": "rounds"}
    if workflow == "train":
        del settings["block_size"]
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
    rounds, metric = 4, METRICS[workflow]
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


def arguments_of(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", json.dumps(value))]


def shared_settings(workflow: str) -> dict[str, Any]:
    """Return the settings that all sites have, without folders and what the tool itself sets."""
    settings = settings_of(workflow, Path(), Path(), 1)
    return {name: value for name, value in settings.items() if name not in PLACES and name not in ("epochs", "resume")}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_client_of_nvflare(
    workflow: str, bundle: Path, sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that runs at a site, with a server that sends two rounds and, in the end, its model.

    Letters that are commands in a config are nothing but letters in the names of its folders.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data #1, $HOME @x").symlink_to(sites)
    (tmp_path / "bundle#2").symlink_to(bundle)
    config = json.loads((bundle / "configs" / f"{workflow}.json").read_text())
    federated._write_start(bundle, config | settings_of(workflow, Path(), Path(), 4), federated.WORKFLOWS[workflow])
    start = {name: value.numpy() for name, value in read_checkpoint(federated.START).items()}
    end = {name: value + np.float32(0.01) for name, value in start.items()}
    told = {"workflow": workflow, "rounds": 2, "local_epochs": 2, "output": "$RESULTS", "data": "$DATA/north"}
    settings = shared_settings(workflow) | {"epochs": 4, "resume": "rounds"}
    (tmp_path / "north.json").write_text(
        json.dumps(told | {"bundle": str(tmp_path / "bundle#2"), "settings": settings})
    )
    (tmp_path / federated.CLIENT).write_text((ROOT / "tools" / "federating" / federated.CLIENT).read_text())
    for name, value in (("RESULTS", tmp_path / "run#3"), ("DATA", tmp_path / "data #1, $HOME @x")):
        monkeypatch.setenv(name, str(value))

    models, sent = [start, start, end], []
    server = ModuleType("nvflare.client")
    server.__dict__.update(
        init=lambda: None,
        get_site_name=lambda: "north",
        is_running=lambda: True,
        receive=lambda: SimpleNamespace(params=models[len(sent)]) if len(sent) < 3 else None,
        is_evaluate=lambda: len(sent) == 2,
        send=sent.append,
        FLModel=SimpleNamespace,
    )
    monkeypatch.setitem(sys.modules, "nvflare", ModuleType("nvflare"))
    monkeypatch.setitem(sys.modules, "nvflare.client", server)
    monkeypatch.setattr(sys.modules["nvflare"], "client", server, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path(str(tmp_path / federated.CLIENT), run_name="__main__")

    metric, (name, kept) = METRICS[workflow], FILES[workflow]
    assert [model.meta["NUM_STEPS_CURRENT_ROUND"] for model in sent[:2]] == [4, 4]  # one of five is held out
    assert all(model.params.keys() == start.keys() and metric in model.metrics for model in sent[:2])
    assert sent[2].metrics.keys() == sent[0].metrics.keys()
    file = tmp_path / "run#3" / "north" / "models" / name
    written = read_checkpoint(file)
    assert written.keys() == {key.removeprefix(kept) for key in end if key.startswith(kept)}
    assert all(np.array_equal(written[key].numpy(), end[kept + key]) for key in written)
    about = json.loads(file.with_suffix(".json").read_text())
    assert (about["sha256"], about["rounds"], about["settings"]["bundle"]) == (sha256(file), 2, BUNDLE)
    assert about["at_this_site"][metric] == sent[2].metrics[metric]


def test_settings_with_a_hash_stay_text() -> None:
    given = {"datalist": "run#2/list.json", "labels": ["a#b", "c"], "lr": "$1e-3#", "batch_size": 2, "splits": None}
    config = ConfigParser({"lr": 0.1, **federated._texts(given)})
    assert [config.get_parsed_content(name) for name in ("datalist", "labels")] == [given["datalist"], ["a#b", "c"]]
    assert {name: federated._texts(given)[name] for name in ("lr", "batch_size", "splits")} == {
        "lr": "$1e-3#",
        "batch_size": 2,
        "splits": None,
    }


def test_the_tool_says_what_is_wrong(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="name each once, with its folder"):
        Federated(str(bundle), "pretrain", sites="A=/data/a,A=/data/b")
    assert Federated(str(bundle), "pretrain", "A=/data/a, B=$DATA").sites == {"A": "/data/a", "B": "$DATA"}
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(SettingsError, match="pip install nvflare"):
        federated.federated(filled(Federated, str(bundle), "pretrain", sites="A=/data/a"))
    for module, names in NVFLARE.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names)))
    for told, workflow, more in (
        ("it must be pretrain or train", "evaluation", {}),
        ("unknown setting --epoch", "pretrain", {"epoch": 3}),
        ("a federation sets epochs itself", "pretrain", {"epochs": 3}),
        ("--rounds is 0; it must be a whole number from 1", "pretrain", {"rounds": 0}),
        ("add --site_bundle", "pretrain", {"job": "job"}),
        ("--tuning lora", "train", {"tuning": "lora"}),
    ):
        with pytest.raises((DataError, SettingsError), match=told):
            federated.federated(filled(Federated, str(bundle), workflow, sites="A=/data/a", **more))


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_federation_of_nvflare(workflow: str, bundle: Path, sites: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvflare")
    settings = shared_settings(workflow)
    command = [sys.executable, str(ROOT / "tools" / "federated.py"), str(bundle), workflow, "--rounds", "3"]
    places = ["--sites", ",".join(f"{site}={sites / site}" for site in SITES), "--output", str(tmp_path / "run")]
    done = subprocess.run([*command, *places, *arguments_of(settings)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    scores = re.findall(rf"after \d rounds: north {METRICS[workflow]} ([\d.]+)", done.stdout)
    assert len(scores) == 4
    better = float(scores[0]) - float(scores[3])
    assert better > 0 if workflow == "pretrain" else better < 0, scores
    files = [tmp_path / "run" / site / "models" / FILES[workflow][0] for site in SITES]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = subprocess.run([*command, *places, *arguments_of(settings)], capture_output=True, text=True, timeout=600)
    assert again.returncode == 1
    assert "hold another run already" in again.stderr
    places[1] = f"north={sites / 'north'},south={tmp_path / 'nowhere'}"
    places[3] = str(tmp_path / "other")
    wrong = subprocess.run([*command, *places, *arguments_of(settings)], capture_output=True, text=True, timeout=600)
    assert wrong.returncode == 1
    assert f"Stopped: south: there is no folder {tmp_path / 'nowhere'}" in wrong.stderr
