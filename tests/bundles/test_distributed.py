# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Several processes on one machine and on two: lost ones, restarts, SLURM, full sharding, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import sentence
from common.weights import read_checkpoint

from ..conftest import (
    BUNDLES,
    ROOT,
    WITH_TEACHER,
    blobs,
    command,
    method_of,
    pretraining,
    small_settings,
    write_volume,
)
from .processes import Job, distance, run_here, run_in_processes, torchrun

pytestmark = pytest.mark.usefixtures("from_the_root")
RESENC, PRIMUS = "mae_resenc_l", "mae_primus_m"
STATE = "models/pretraining_state.pt"
SGD = {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.01, "momentum": 0.9}
PLAIN = ["--lr", "0.01", "--optimizer", json.dumps(SGD)]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes, with a class for each."""
    folder = tmp_path_factory.mktemp("scans") / "images"
    for index in range(4):
        write_volume(folder / f"case_{index}.nii.gz", blobs(index)[0])
    (folder.parent / "table.csv").write_text("case,kind\n" + "".join(f"case_{i},{'ab'[i % 2]}\n" for i in range(4)))
    return folder


def tiny(bundle: str, images: Path, folder: Path, **own: Any) -> dict[str, Any]:
    """Return the arguments of a pre-training for :func:`run_here`."""
    arguments = {
        "dataset_dir": str(images),
        "store_dir": str(images.parent / "store"),
        "output_dir": str(folder / "out"),
        "ckpt_dir": str(folder / "models"),
        "epochs": 3,
        "iterations_per_epoch": 3,
        "val_iterations": 1,
        "picture_interval": 0,
        "batch_size": 4,
        "device": "$torch.device('cpu')",
        "amp": False,
    }
    primus = {"drop_path": 0.0} if bundle.endswith("primus_m") else {}
    return {"bundle": bundle, "config": "pretrain"} | small_settings(bundle) | arguments | primus | own


def classification(images: Path, folder: Path) -> dict[str, Any]:
    """Return the arguments of a classification for :func:`run_here`."""
    own = {name: value for name, value in tiny(RESENC, images, folder).items() if "iterations" not in name}
    del own["patch_size"], own["block_size"]
    return own | {
        "config": "train_classification",
        "input_size": [16, 16, 16],
        "table": str(images.parent / "table.csv"),
        "target": "kind",
        "validation_share": 0.5,
        "from_scratch": True,
        "head_dropout": 0.0,
        "batch_size": 2,
        "accumulation_steps": 1,
        "optimizer": SGD,
        "lr": 0.01,
    }


@pytest.fixture(scope="module")
def alone(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training in one process, of which the others must not differ."""
    folder = tmp_path_factory.mktemp("alone")
    run_here(**tiny(RESENC, scans, folder, epochs=4, batch_size=2, optimizer=SGD, lr=0.01))
    return folder


# lost processes


def test_two_machines_lose_a_process_and_the_same_command_goes_on(alone: Path, scans: Path, tmp_path: Path) -> None:
    line = command(RESENC, "pretrain", *pretraining(tmp_path, scans, epochs=4), *PLAIN)
    job = torchrun(line, "multi_gpu", machines=2, started=True)
    victim = job.process(rank=1)
    job.wait_until((tmp_path / STATE).exists)
    victim.kill()
    statuses, _ = job.end()
    assert all(statuses), "both machines must give up"
    done = read_checkpoint(tmp_path / STATE)["epoch"]
    assert done < 4
    statuses, said = torchrun(line, "multi_gpu", machines=2).end()
    assert statuses == [0, 0], said[-3000:]
    assert said.count(f"{done} of 4 epochs are done, the run goes on") == 1, "told once"
    assert 0 < distance(alone / STATE, tmp_path / STATE, "method") <= 1e-6
    assert distance(alone / "models/pretrained_encoder.pt", tmp_path / "models/pretrained_encoder.pt") <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_a_restarted_run_goes_on_by_itself(machines: int, alone: Path, scans: Path, tmp_path: Path) -> None:
    line = command(RESENC, "pretrain", *pretraining(tmp_path, scans, epochs=4), *PLAIN)
    job = torchrun(
        *(line, "multi_gpu"),
        machines=machines,
        options=["--max_restarts", "3"],
        started=True,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    victim = job.process(rank=0)
    job.wait_until((tmp_path / STATE).exists)
    victim.kill()
    statuses, said = job.end()
    assert statuses == [0] * machines, said[-3000:]
    assert "the run goes on" in said
    assert distance(alone / STATE, tmp_path / STATE, "method") <= 1e-6


@pytest.mark.parametrize("overlay", ["multi_gpu", "multi_gpu_train", "fsdp"])
def test_restarts_that_would_hang_are_refused(
    overlay: str, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what torchrun tells its processes when it is given --max_restarts."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(
        SystemExit, match=r"Stopped: torchrun --max_restarts hangs .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    ):
        run_here(**tiny(RESENC, scans, tmp_path, overlay=overlay))
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_run(scans: Path, tmp_path: Path) -> None:
    line = command(RESENC, "pretrain", *pretraining(tmp_path, scans, epochs=1000), "--timeout_minutes", "0.1")
    job = torchrun(line, "multi_gpu", started=True)
    victim = job.process(rank=1)
    job.wait_until((tmp_path / STATE).exists)
    victim.suspend()
    statuses, said = job.end()
    assert statuses == [1]
    assert "Stopped: another process of this run ended or cannot be reached" in said
    assert "the same command goes on from there" in said


@pytest.mark.slow
def test_a_fine_tuning_that_lost_a_process_goes_on(labelled: Path, tmp_path: Path) -> None:
    own = ["--epochs", "6", "--decoder_epochs", "2", "--warmup_epochs", "0", "--iterations_per_epoch", "3"]
    own += ["--from_scratch", "true", "--schedule", "sawtooth", "--dataset_dir", str(labelled)]
    own += ["--labels", "['background','ball']", "--store_dir", str(tmp_path / "store")]

    def line(name: str) -> list[str]:
        places = ["--output_dir", str(tmp_path / name / "out"), "--ckpt_dir", str(tmp_path / name / "models")]
        return command(RESENC, "train", *own, *places)

    assert torchrun(line("whole"), "multi_gpu_train", machines=2).end()[0] == [0, 0]
    job = torchrun(line("cut"), "multi_gpu_train", machines=2, started=True)
    victim = job.process(rank=1)
    job.wait_until((tmp_path / "cut" / "models" / "finetuning_state.pt").exists)
    victim.kill()
    assert all(job.end()[0])
    statuses, said = torchrun(line("cut"), "multi_gpu_train", machines=2).end()
    assert statuses == [0, 0], said[-3000:]
    assert "of 6 epochs are done, the run goes on" in said
    for name in ("model_final.pt", "model.pt"):
        assert distance(tmp_path / "whole" / "models" / name, tmp_path / "cut" / "models" / name) == 0


# SLURM


class Cluster:
    """The batch script of docs/slurm, edited as a user would, and a SLURM of two machines that are both this one."""

    SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
echo $$ > "$HERE/srun.pid"
trap 'kill "${tasks[@]}"; wait; exit 143' TERM
for task in "${tasks[@]}"; do wait "$task" || { status=$?; kill "${tasks[@]}" 2>/dev/null; }; done
exit ${status:-0}
"""
    SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") echo 127.0.0.1; echo 127.0.0.1 ;;
  "requeue 4711") touch "$HERE/requeued"; kill "$(cat "$HERE/srun.pid")" ;;
esac
"""

    def __init__(self, folder: Path, scans: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("srun", self.SRUN), ("scontrol", self.SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        script = (ROOT / "docs/slurm/pretrain.sbatch").read_text()
        for old, new in (
            ("data=/shared/mri ", f"data={shlex.quote(str(scans))} "),
            ("work=/shared/openmind/$bundle ", f"work={shlex.quote(str(folder))} "),
            ("source .venv/bin/activate ", f"PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH "),
        ):
            assert script.count(old) == 1
            script = script.replace(old, new)
        (folder / "script").write_text(script)
        self.asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, re.MULTILINE))

    def submit(self, *settings: str) -> Job:
        """Run the script as sbatch would."""
        assert self.asked["ntasks-per-node"] == "1"
        job = {"JOB_ID": "4711", "NNODES": self.asked["nodes"], "JOB_NODELIST": "node[1-2]", "GPUS_ON_NODE": "1"}
        variables = {f"SLURM_{name}": value for name, value in job.items()} | {"SLURM_SUBMIT_DIR": str(ROOT)}
        variables |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HERE": str(self.folder)}
        return Job([["bash", str(self.folder / "script"), *settings]], variables)


@pytest.fixture
def cluster(tmp_path: Path, scans: Path) -> Cluster:
    return Cluster(tmp_path, scans)


@pytest.fixture(scope="module")
def settings() -> list[str]:
    """What is given to the batch script: the same run as that of ``alone``."""
    own = small_settings(RESENC) | {"epochs": 4, "iterations_per_epoch": 3, "val_iterations": 1, "batch_size": 2}
    return [*(part for name, value in own.items() for part in (f"--{name}", json.dumps(value))), *PLAIN]


def test_the_slurm_script_survives_the_loss_of_a_process(cluster: Cluster, settings: list[str], alone: Path) -> None:
    job = cluster.submit(*settings)
    victim = job.process(rank=1)
    job.wait_until((cluster.folder / STATE).exists)
    victim.kill()
    statuses, said = job.end()
    assert statuses == [0], said[-3000:]
    assert "the run goes on" in said, "started again by torchrun; one loss may count on both machines"
    assert distance(alone / STATE, cluster.folder / STATE, "method") <= 1e-6
    assert not (cluster.folder / "requeued").exists()


@pytest.mark.slow
def test_the_slurm_script_goes_on_after_the_end_of_its_time(cluster: Cluster, settings: list[str], alone: Path) -> None:
    job = cluster.submit(*settings)
    job.wait_until((cluster.folder / STATE).exists)
    name, seconds = cluster.asked["signal"].removeprefix("B:").split("@")
    assert int(seconds) >= 120
    job.parts[0].send_signal(signal.Signals[f"SIG{name}"])  # B: to the script alone
    statuses, said = job.end()
    assert "time is nearly up: queued again" in said
    assert (cluster.folder / "requeued").exists()
    assert statuses != [0]
    statuses, said = cluster.submit(*settings).end()
    assert statuses == [0], said[-3000:]
    assert "of 4 epochs are done, the run goes on" in said
    assert distance(alone / STATE, cluster.folder / STATE, "method") <= 1e-6
    statuses, said = cluster.submit(*settings).end()
    assert statuses == [0]
    assert "is complete; nothing to do" in said


# full sharding, and what is refused


@pytest.fixture(scope="module")
def pair(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str | None]]]:
    """Many runs in one pair of processes: the folder that each wrote to, by its name, and how it ended."""
    folder = tmp_path_factory.mktemp("pair")
    fewer = folder / "fewer"
    fewer.mkdir()
    for path in sorted(scans.iterdir())[1:]:
        (fewer / path.name).symlink_to(path)
    runs: list[tuple[str, dict[str, Any]]] = []

    def add(name: str, bundle: str, overlay: str, where: str | None = None, **own: Any) -> None:
        runs.append((name, tiny(bundle, scans, folder / (where or name), overlay=overlay, **own)))

    add("sharded", PRIMUS, "fsdp")
    add("sharded, chunks", "simclr_primus_m", "fsdp", accumulation_steps=2, checkpointing=True)
    add("copied, chunks", "simclr_primus_m", "multi_gpu", accumulation_steps=2)
    add("sharded, token", "simmim_primus_m", "fsdp", optimizer=SGD, lr=0.01)
    runs.append(("classified", classification(scans, folder / "classified") | {"overlay": "multi_gpu_train"}))
    for first, second in (("fsdp", "multi_gpu"), ("multi_gpu", "fsdp")):
        add(f"{first} cut", PRIMUS, first, where=f"{first} to {second}", stop_after=1)
        add(f"{first} to {second}", PRIMUS, second)
    add("fsdp to one", PRIMUS, "fsdp", stop_after=1)
    add("teacher", "voco_primus_m", "fsdp", teacher_momentum=0.9)
    add("no blocks", RESENC, "fsdp")
    add("volumes", RESENC, "multi_gpu", dataset_dir=(str(scans), str(fewer)))
    add("rates", RESENC, "multi_gpu", lr=(0.01, 0.1))
    add("lengths", RESENC, "multi_gpu", epochs=(3, 4))
    folders = tuple(str(folder / name / "models") for name in ("multi_gpu to fsdp", "not seen"))
    add("folders", PRIMUS, "multi_gpu", ckpt_dir=folders)
    add("batch", RESENC, "multi_gpu", batch_size=3)
    add("nothing", RESENC, "multi_gpu", dataset_dir=(str(scans), str(folder / "nowhere")))
    ended = run_in_processes([run for _, run in runs], folder)
    return folder, dict(zip((name for name, _ in runs), ended, strict=True))


def test_sharded_processes_equal_one(pair: tuple[Path, dict[str, list[str | None]]], scans: Path) -> None:
    folder, ended = pair
    for name, bundle, most in (
        ("sharded", PRIMUS, 1e-5),  # AdamW
        ("sharded, chunks", "simclr_primus_m", 1e-5),
        ("copied, chunks", "simclr_primus_m", 1e-5),
        ("sharded, token", "simmim_primus_m", 1e-6),  # SGD
    ):
        assert ended[name] == [None, None]
        own = {"optimizer": SGD, "lr": 0.01} if name == "sharded, token" else {}
        run_here(**tiny(bundle, scans, folder / f"{name}, one", **own))
        assert 0 < distance(folder / f"{name}, one" / STATE, folder / name / STATE, "method") <= most, name
        mine, theirs = (
            json.loads((folder / f"{name}{one}" / "out" / "history.json").read_text()) for one in (", one", "")
        )
        for one, other in zip(mine, theirs, strict=True):
            for key in ("train_loss", "val_loss", "gradient_norm"):
                assert other[key] == pytest.approx(one[key], rel=1e-3), (name, key)


@pytest.mark.slow
def test_every_method_can_be_sharded(scans: Path, tmp_path: Path) -> None:
    """Against copied weights in two processes, since SwinUNETR depends on which crops a process has."""
    cells = [bundle for bundle in BUNDLES if bundle.endswith("primus_m") and method_of(bundle) not in WITH_TEACHER]
    assert len(cells) == len(BUNDLES) / 2 - len(WITH_TEACHER)
    own = {"optimizer": SGD, "lr": 0.01, "accumulation_steps": 2, "checkpointing": True}
    runs = [
        tiny(bundle, scans, tmp_path / bundle / overlay, overlay=overlay, **own)
        for bundle in cells
        for overlay in ("fsdp", "multi_gpu")
    ]
    assert run_in_processes(runs, tmp_path) == [[None, None]] * len(runs)
    for bundle in cells:
        sharded, copied = (tmp_path / bundle / overlay / STATE for overlay in ("fsdp", "multi_gpu"))
        assert distance(sharded, copied, "method") <= 1e-6, bundle


def test_classification_in_two_processes_equals_one(
    pair: tuple[Path, dict[str, list[str | None]]], scans: Path
) -> None:
    folder, ended = pair
    assert ended["classified"] == [None, None]
    run_here(**classification(scans, folder / "classified, one"))
    files = [folder / name / "models" / "classifier.pt" for name in ("classified", "classified, one")]
    assert 0 < distance(*files) <= 1e-6
    scores = [json.loads((file.parents[1] / "out" / "history.json").read_text()) for file in files]
    for mine, theirs in zip(*scores, strict=True):
        for key in ("train_loss", "val_loss", "val_auroc"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)


def test_sharded_and_other_runs_go_on_with_each_other(
    pair: tuple[Path, dict[str, list[str | None]]], scans: Path
) -> None:
    folder, ended = pair
    run_here(**tiny(PRIMUS, scans, folder / "fsdp to one"))
    whole = folder / "sharded" / STATE
    before = read_checkpoint(whole)
    assert {type(value) for own in before["optimizer"]["state"].values() for value in own.values()} == {torch.Tensor}
    for name in ("fsdp to multi_gpu", "multi_gpu to fsdp", "fsdp to one"):
        assert ended[name] == [None, None]
        assert distance(whole, folder / name / STATE, "method") <= 1e-5, name
        after = read_checkpoint(folder / name / STATE)
        assert after["epoch"] == 3
        assert after["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
        for index, own in before["optimizer"]["state"].items():
            for key, value in own.items():
                torch.testing.assert_close(after["optimizer"]["state"][index][key], value, rtol=1e-3, atol=1e-6)
        encoder = read_checkpoint(folder / name / "models" / "pretrained_encoder.pt")
        kept = {f"backbone.{key}": value for key, value in encoder.items()}
        assert kept == {key: pytest.approx(after["method"][key]) for key in kept}


def test_what_cannot_be_is_refused_in_a_sentence(pair: tuple[Path, dict[str, list[str | None]]]) -> None:
    _, ended = pair
    for name, sign in (
        ("teacher", "such as a teacher's; use multi_gpu"),
        ("no blocks", "this network has none; use multi_gpu"),
        ("volumes", "has other volumes (3) than process 0"),
        ("rates", "has other settings than process 0 (lr 0.01 -> 0.1)"),
        ("lengths", "has other settings than process 0 (epochs 3 -> 4)"),
        ("folders", "states of different epochs ([3, 0]); every machine must see one --ckpt_dir"),
        ("batch", "batch_size 3 does not split over 2 process(es)"),
    ):
        first, second = ended[name]
        assert first == second, name
        assert first is not None
        assert sign in first
    lost, reason = ended["nothing"]
    assert reason is not None
    assert "there is no folder" in reason
    assert lost is not None
    assert "another process of this run ended or cannot be reached" in lost


def test_the_end_of_another_process_is_told_in_a_sentence() -> None:
    for error in (
        torch.distributed.DistBackendError("NCCL error\nlong story"),
        RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
    ):
        assert "the same command goes on from there" in str(sentence(error))
        assert "long story" not in str(sentence(error))
    assert sentence(RuntimeError("shapes do not fit")) is None
