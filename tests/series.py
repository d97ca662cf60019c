# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at random moments and started again, and pairs of runs that start at once on one folder.

  python -m tests.series FOLDER [KILLS PAIRS]      # 100 and 40; goes on where it was cut

FOLDER/series.json has the figures.

A run is killed (SIGKILL, with all that it started) up to four times, at moments drawn from the time that it takes,
and started again in the same folder; then it is left to end. A pair is two commands that begin at the same time. In the
end there must be what an uninterrupted run leaves; of a pair one may be refused instead, in a sentence that says who
holds the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from common.files import write_json
from common.weights import read_checkpoint

from .conftest import NETWORK, ROOT, blobs, command, pretraining, write_volume
from .starts import python

__all__ = ["KINDS", "Series"]

_BUNDLE = "mae_resenc_l"
_CASES = 6
_PATIENCE = 900  # seconds for one run, on a machine that has other work too


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _store(folder: Path) -> dict[str, str]:
    return {file.name: _digest(file.read_bytes()) for file in sorted((folder / "store").glob("*.b2nd"))}


def _weights(name: str) -> Callable[[Path], dict[str, str]]:
    """Return what reads the weights of a file below the folder of a run, and the losses of its epochs."""

    def read(folder: Path) -> dict[str, str]:
        weights = read_checkpoint(folder / "models" / name)
        history = json.loads((folder / "out" / "history.json").read_text("utf-8"))
        losses = json.dumps([[epoch["epoch"], epoch["train_loss"]] for epoch in history])
        return {key: _digest(value.numpy().tobytes()) for key, value in weights.items()} | {"losses": losses}

    return read


def _predictions(folder: Path) -> dict[str, str]:
    files = sorted((folder / "out").glob("*.nii.gz"))
    return {file.name: _digest(np.ascontiguousarray(nib.load(file).dataobj).tobytes()) for file in files}


def _features(folder: Path) -> dict[str, str]:
    return {"table": _digest((folder / "out" / "features.csv").read_bytes())}


def _results(folder: Path) -> dict[str, str]:
    runs, found = folder / "study" / "runs", {}
    for file in sorted(runs.rglob("result.json")):
        cases = json.loads(file.read_text("utf-8"))["cases"]
        scores = {name: case["scores"] for name, case in sorted(cases.items())}
        found[file.parent.relative_to(runs).as_posix()] = json.dumps(scores)
    return found


def _training(folder: Path, *arguments: str) -> list[str]:
    return [
        *("--output_dir", str(folder / "out"), "--ckpt_dir", str(folder / "models"), "--val_iterations", "1"),
        *("--store_dir", str(folder / "store"), "--iterations_per_epoch", "3", "--batch_size", "2", *arguments),
    ]


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    Attributes:
        line: command of a run that writes into a folder, from the data, and from what other kinds have left.
        result: what counts of that folder.
        kills: of a hundred.
        pairs: of forty.
    """

    line: Callable[[Path, Path, Mapping[str, Path]], list[str]]
    result: Callable[[Path], dict[str, str]]
    kills: int
    pairs: int


def _prepare(folder: Path, data: Path, _: Mapping[str, Path]) -> list[str]:
    line = [python(), "-W", "ignore", str(ROOT / "tools" / "prepare_data.py"), "prepare", str(data / "images")]
    return [*line, "--store_dir", str(folder / "store"), "--num_workers", "1"]


def _pretrain(folder: Path, data: Path, _: Mapping[str, Path]) -> list[str]:
    return command(_BUNDLE, "pretrain", *pretraining(folder, data / "images", epochs=4))


def _train(folder: Path, data: Path, made: Mapping[str, Path]) -> list[str]:
    encoder = str(made["pretrain"] / "models" / "pretrained_encoder.pt")
    told = ["--dataset_dir", str(data), "--labels", "['background','ball']", "--pretrained", encoder, "--epochs", "4"]
    short = ["--warmup_epochs", "1", "--decoder_epochs", "1", "--picture_interval", "0"]
    return command(_BUNDLE, "train", *_training(folder, *told, *short))


def _inference(folder: Path, data: Path, made: Mapping[str, Path]) -> list[str]:
    told = ["--dataset_dir", str(data / "images"), "--labels", "['background','ball']", "--pictures", "0"]
    models = ["--ckpt_dir", str(made["train"] / "models")]
    return command(_BUNDLE, "inference", *told, *models, "--output_dir", str(folder / "out"))


def _embed(folder: Path, data: Path, made: Mapping[str, Path]) -> list[str]:
    encoder = str(made["pretrain"] / "models" / "pretrained_encoder.pt")
    places = ["--dataset_dir", str(data / "images"), "--pretrained", encoder, "--output_dir", str(folder / "out")]
    return command(_BUNDLE, "features", *places)


def _study(folder: Path, data: Path, _: Mapping[str, Path]) -> list[str]:
    names = [name.removeprefix("--") for name in NETWORK[_BUNDLE][::2]]
    network = dict(zip(names, map(json.loads, NETWORK[_BUNDLE][1::2]), strict=True))
    short = {"epochs": 1, "iterations_per_epoch": 2, "val_iterations": 1}
    content = {
        "arms": {"MAE": {"bundle": _BUNDLE, "weights": "pretraining"}},
        "data_sets": {"ball": {"card": str(data / "ball.yaml"), "folder": str(data)}},
        "settings": {"patch_size": [16, 16, 16], "num_workers": 0, **short},
        "pretraining": {"batch_size": 2, **short},
        "backbones": {"resenc_l": {"settings": network, "pretraining": {"block_size": 8}}},
    }
    file = folder / "study.yaml"
    if not file.exists():
        file.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return [python(), "-W", "ignore", str(ROOT / "tools" / "study.py"), "run", str(file)]


# in this order: some need what others have left
KINDS = {
    "prepare": Kind(_prepare, _store, 20, 10),
    "pretrain": Kind(_pretrain, _weights("pretrained_encoder.pt"), 28, 10),
    "train": Kind(_train, _weights("model_final.pt"), 20, 10),
    "inference": Kind(_inference, _predictions, 12, 4),
    "features": Kind(_embed, _features, 12, 4),
    "study": Kind(_study, _results, 8, 2),
}


class Series:
    """All runs below a folder, and what came of them.

    Args:
        folder: made if it is not there.
        seed: of the moments.
        in_a_row: how often a run is killed at most before it is left to end.
    """

    def __init__(self, folder: Path, *, seed: int = 0, in_a_row: int = 4) -> None:
        self.folder, self.seed, self.in_a_row = folder, seed, in_a_row
        self.file = folder / "series.json"
        self.done: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}
        self.made: dict[str, Path] = {}
        for index in range(_CASES):
            for part, values in zip(("images", "labels"), blobs(index), strict=True):
                if not (file := folder / "data" / part / f"case_{index}.nii.gz").exists():
                    write_volume(file, values)
        card = {"name": "Balls", "task": "segmentation", "labels": ["background", "ball"]}
        (folder / "data" / "ball.yaml").write_text(yaml.safe_dump(card), "utf-8")
        subprocess.run([python(), "-c", ""], check=True)  # from now on starts take no time

    def reference(self, name: str) -> dict[str, str]:
        """Return what an uninterrupted run leaves, and remember how long it took."""
        here = self.made[name] = self.folder / name / "whole"
        if name not in self.done:
            began = time.monotonic()
            assert self._started(name, here).wait(_PATIENCE) == 0, self._said(here)
            self._keep(name, {"result": KINDS[name].result(here), "seconds": time.monotonic() - began})
        found: dict[str, str] = self.done[name]["result"]
        assert found
        return found

    def kill(self, name: str, number: int) -> int:
        """Kill a run some times and let it end; return how often it was killed before it had ended by itself."""
        right, key = self.reference(name), f"{name}, killed {number}"
        if key not in self.done:
            here, killed = self.folder / name / f"killed_{number}", 0
            rng = np.random.default_rng([self.seed, list(KINDS).index(name), number])
            for _ in range(self.in_a_row):
                process = self._started(name, here)
                began = time.monotonic()
                try:
                    process.wait(rng.uniform(0.1, 0.95) * self.done[name]["seconds"])
                    self.done[name]["seconds"] = time.monotonic() - began  # it was faster than those before
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    killed += 1
                    process.wait()
            assert self._started(name, here).wait(_PATIENCE) == 0, self._said(here)
            assert KINDS[name].result(here) == right, f"{here} is not what an uninterrupted run leaves"
            self._keep(key, killed)
        return int(self.done[key])

    def pair(self, name: str, number: int) -> str:
        """Start two runs at once; return whether both were right or one was refused."""
        right, key = self.reference(name), f"{name}, pair {number}"
        if key not in self.done:
            here = self.folder / name / f"pair_{number}"
            both = [self._started(name, here, str(which)) for which in (1, 2)]
            ended = sorted(process.wait(_PATIENCE) for process in both)
            said = [self._said(here, str(which)) for which in (1, 2)]
            assert ended in ([0, 0], [0, 1]), said
            refused = [text for text in said if "is in use by another run (" in text]
            assert len(refused) == ended[1], said
            assert KINDS[name].result(here) == right, f"{here} is not what one run leaves"
            self._keep(key, "refused" if refused else "both")
        return str(self.done[key])

    def _started(self, name: str, here: Path, log: str = "") -> subprocess.Popen[bytes]:
        here.mkdir(parents=True, exist_ok=True)
        line = KINDS[name].line(here, self.folder / "data", self.made)
        with open(here / f"log{log}.txt", "ab") as stream:
            return subprocess.Popen(line, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)

    def _said(self, here: Path, log: str = "") -> str:
        return f"{here}: {(here / f'log{log}.txt').read_text('utf-8', 'replace')[-3000:]}"

    def _keep(self, key: str, value: Any) -> None:
        self.done[key] = value
        write_json(self.done, self.file)


def main(folder: Path, kills: int = 100, pairs: int = 40) -> None:
    """Do what is not done, all kinds in turn, and print one line for each."""
    series, killed, outcomes = Series(folder), dict.fromkeys(KINDS, 0), {name: list[str]() for name in KINDS}
    number = 0
    while waiting := [
        (name, killed[name] * 100 < kind.kills * kills, len(outcomes[name]) * 40 < kind.pairs * pairs)
        for name, kind in KINDS.items()
        if killed[name] * 100 < kind.kills * kills or len(outcomes[name]) * 40 < kind.pairs * pairs
    ]:
        for name, kill, pair in waiting:
            killed[name] += series.kill(name, number) if kill else 0
            outcomes[name] += [series.pair(name, number)] if pair else []
        number += 1
    for name, ended in outcomes.items():
        refused = ended.count("refused")
        print(f"{name}: {killed[name]} kills; {len(ended)} pairs, {refused} refused; all as uninterrupted")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *map(int, sys.argv[2:]))
