# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Bundles for own tasks in a real MONAI Label server: its own app, and this collection's.

What a viewer does is done through the REST calls that a viewer makes. The scans have voxels of 1 x 1.2 x 2 mm, turned
by 17 degrees and with the x axis of DICOM.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from common.networks import Primus, ResEncUNet
from common.weights import write_checkpoint
from tools.commanding.label_environment import label_python
from tools.commanding.settings import filled
from tools.exporting.new_task import new_task
from tools.exporting.settings import NewTask

from ..conftest import NETWORK, ROOT, blobs
from .label_server import LabelServer, RefusedError

pytestmark = pytest.mark.label

UNET, TRANSFORMER = "ball_unet", "ball_transformer"
SOURCE = {UNET: "mae_resenc_l", TRANSFORMER: "mae_primus_m"}
# the U-Net's spacing and intensities come from the training data: a server that starts before cannot know them
OWN: dict[str, dict[str, Any]] = {
    UNET: {"spacing": "median", "normalization": "ct", "lr": 0.01},
    TRANSFORMER: {"spacing": 1.5, "lr": 0.003},
}
TRAIN = {"max_epochs": 4, "pretrained": True, "multi_gpu": False, "device": "cpu"}


@pytest.fixture(scope="module")
def python() -> Path:
    return label_python()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle for a task of one class from each backbone."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}
    for name, source in SOURCE.items():
        sizes = {k.removeprefix("--"): json.loads(v) for k, v in zip(*[iter(NETWORK[source])] * 2, strict=True)}
        torch.manual_seed(0)
        network = ResEncUNet(**sizes) if name == UNET else Primus(input_size=16, **sizes)
        encoder = folder / f"{name}.pt"
        write_checkpoint({k: v for k, v in network.state_dict().items() if k.startswith("encoder.")}, encoder)
        more: dict[str, Any] = sizes | OWN[name] | {"patch_size": [16, 16, 16], "num_workers": 0}
        more |= {"iterations_per_epoch": 25, "val_iterations": 4}
        made[name] = folder / name
        new_task(filled(NewTask, source, str(made[name]), labels="Ball", pretrained=str(encoder), **more))
    return made


def write_turned(path: Path, values: np.ndarray) -> Path:
    cosine, sine = math.cos(0.3), math.sin(0.3)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ np.diag([-1.0, -1.2, 2.0])
    affine[:3, 3] = [10, 20, -5]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Image and label of five cases."""
    folder, cases = tmp_path_factory.mktemp("scans"), {}
    for index in range(5):
        image, mask = blobs(index, (28, 26, 20))
        name = f"scan_{index}"
        files = (folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz")
        cases[name] = (write_turned(files[0], image), write_turned(files[1], mask))
    return cases


def download_app(python: Path, folder: Path) -> Path:
    """Copy MONAI Label's own app, as a user does."""
    command = [str(python), "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output"]
    subprocess.run([*command, str(folder)], check=True, capture_output=True)
    return folder / "monaibundle"


def dice(prediction: Path, truth: Path) -> float:
    found, there = (np.asarray(nib.load(file).dataobj) > 0 for file in (prediction, truth))
    return float(2 * (found & there).sum() / (found.sum() + there.sum()))


def history(server: LabelServer, bundle: str) -> list[dict[str, Any]]:
    file = server.app / "model" / bundle / "output" / "train" / "history.json"
    return list(json.loads(file.read_text("utf-8")))


def check_prediction(
    server: LabelServer, python: Path, bundle: str, scan: str, files: tuple[Path, Path], work: Path
) -> None:
    """Ask for a prediction: it is on the image's grid, finds the ball, and is that of the bundle's own workflow."""
    image, truth = files
    served = server.infer(bundle, scan, work / f"{bundle}.nii.gz")
    one, other = nib.load(served), nib.load(image)
    assert one.shape == other.shape
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-4)
    assert set(np.unique(np.asarray(one.dataobj))) == {0, 1}
    assert dice(served, truth) > 0.6
    folder = work / f"{bundle}_alone"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    shutil.copy(image, folder / "images")
    command = [str(python), "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(folder / "images"), "--output_dir", str(folder / "out"), "--pictures", "0"]
    done = subprocess.run(
        command,
        cwd=server.app / "model" / bundle,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    alone = nib.load(folder / "out" / image.name)
    np.testing.assert_array_equal(np.asarray(one.dataobj), np.asarray(alone.dataobj))


def test_two_bundles_in_one_server_from_nothing_to_a_second_round(
    python: Path, bundles: dict[str, Path], scans: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    conf = {"epistemic_model": f"{UNET},{TRANSFORMER}", "epistemic_simulation_size": "3"}
    app = download_app(python, tmp_path / "apps")
    images = [image for image, _ in scans.values()]
    with LabelServer(python, app, list(bundles.values()), images, tmp_path, conf) as server:
        info = server.info()
        assert {name: info["models"][name]["labels"] for name in bundles} == {name: {"ball": 1} for name in bundles}
        for name in bundles:
            assert info["models"][name]["dimension"] == 3
            assert info["models"][name]["type"] == "segmentation"
            assert info["trainers"][name]["config"]["model_filename"] == ["model.pt", "pretrained_encoder.pt"]
        assert server.next_sample("first")["id"] == "scan_0"

        # before any training there is no mask, only a sentence, whichever weights are asked for
        for name in bundles:
            for weights in ("model.pt", "pretrained_encoder.pt"):
                with pytest.raises(
                    RefusedError, match=r'^\{"detail":".* Fine-tune it first, .* Train in MONAI Label"\}$'
                ):
                    server.infer(name, "scan_0", tmp_path / "never.nii.gz", model_filename=weights)
        status, told = server.task("scoring", UNET, max_workers=1)
        assert status == "ERROR"
        assert "Fine-tune it first" in told.splitlines()[-1]
        assert "epistemic_entropy" not in server.image_info("scan_0")

        # nothing is labelled yet
        status, told = server.task("train", UNET, **TRAIN)
        assert status == "ERROR"
        assert told.splitlines()[-1].startswith("Stopped: "), told

        # one labelled scan, none to validate on: a model all the same, and it answers at once
        server.save_label("scan_0", scans["scan_0"][1])
        status, told = server.task("train", UNET, **TRAIN, val_split=0, model_filename="pretrained_encoder.pt")
        assert status == "DONE", told
        first = history(server, UNET)
        assert len(first) == 4
        assert [record["lr"] for record in first[:1]] == [0.01]  # the schedule has the length that was asked for
        check_prediction(server, python, UNET, "scan_4", scans["scan_4"], tmp_path)
        assert json.loads((server.models(UNET) / "model.json").read_text())["settings"]["bundle"] == SOURCE[UNET]
        with pytest.raises(RefusedError, match="Fine-tune it first"):
            server.infer(TRANSFORMER, "scan_4", tmp_path / "never.nii.gz")

        # the second bundle, with validation, from its own encoder
        for name in ("scan_1", "scan_2", "scan_3"):
            server.save_label(name, scans[name][1])
        status, told = server.task(
            "train", TRANSFORMER, **TRAIN, val_split=0.25, model_filename="pretrained_encoder.pt"
        )
        assert status == "DONE", told
        assert "val_dice" in history(server, TRANSFORMER)[-1]
        check_prediction(server, python, TRANSFORMER, "scan_4", scans["scan_4"], tmp_path)
        check_prediction(server, python, UNET, "scan_4", scans["scan_4"], tmp_path)  # not the other bundle's code

        # the second round goes on from the first, unless the encoder is chosen again
        status, told = server.task("train", UNET, **TRAIN, val_split=0.25, model_filename="model.pt")
        assert status == "DONE", told
        second = history(server, UNET)
        assert second[0]["train_loss"] < 0.6 * first[0]["train_loss"]
        assert (server.models(UNET) / "model_previous.pt").is_file()
        assert not (server.models(UNET) / "finetuning_state.pt").exists()
        check_prediction(server, python, UNET, "scan_4", scans["scan_4"], tmp_path)
        status, told = server.task("train", UNET, **TRAIN, val_split=0.25, model_filename="pretrained_encoder.pt")
        assert status == "DONE", told
        assert history(server, UNET)[0]["train_loss"] > 0.8 * first[0]["train_loss"]

        # how unsure the models are of the scan that has no label: an entropy of two classes
        for name in bundles:
            status, told = server.task("scoring", name, max_workers=1)
            assert status == "DONE", told
            assert 0.005 < server.image_info("scan_4")["epistemic_entropy"] <= math.log(2) + 1e-6


def test_the_app_of_this_collection_chooses_what_is_least_like_the_labelled(
    python: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    app = tmp_path / "apps" / "monai_label_app"
    shutil.copytree(
        ROOT / "tools" / "monai_label_app", app, ignore=shutil.ignore_patterns("__pycache__", "model", "embeddings")
    )
    image, mask = blobs(0, (28, 26, 20))
    noise = np.random.default_rng(0)
    files = [
        write_turned(tmp_path / "images" / f"alike_{index}.nii.gz", image + noise.normal(0, 1, image.shape))
        for index in range(3)
    ]
    stripes = np.broadcast_to(100.0 * (np.arange(20) % 4), image.shape) + noise.normal(0, 1, image.shape)
    files.append(write_turned(tmp_path / "images" / "outlier.nii.gz", stripes))
    files.append(write_turned(tmp_path / "images" / "constant.nii.gz", np.full(image.shape, 7.0)))
    label = write_turned(tmp_path / "label.nii.gz", mask)
    conf = {"embedding_model": UNET, "epistemic_model": UNET}
    with LabelServer(python, app, [bundles[UNET]], files, tmp_path, conf) as server:
        assert list(server.info()["strategies"]) == ["random", "first", "core_set", "epistemic"]
        start = server.next_sample("core_set")
        assert start["id"].startswith("alike_")
        assert list(start["left_out"]) == ["constant"]
        assert "constant" in start["left_out"]["constant"]
        server.save_label(start["id"], label)
        chosen = server.next_sample("core_set")
        assert chosen["id"] == "outlier"
        server.save_label("outlier", label)
        again = server.next_sample("core_set")
        assert again["id"].startswith("alike_")
        assert again["distance"] < chosen["distance"] / 5

        new = np.broadcast_to(50.0 * (np.arange(26) % 2)[:, None], image.shape) + noise.normal(0, 1, image.shape)
        write_turned(server.studies / "new.nii.gz", new)  # while the server runs
        server.wait_for_image("new")
        assert server.next_sample("core_set")["id"] == "new"
        assert len(list((app / "embeddings").glob(f"{UNET}-*/*.npy"))) == 5
        with pytest.raises(RefusedError, match="Fine-tune it first"):  # the rest is that of the monaibundle app
            server.infer(UNET, "new", tmp_path / "never.nii.gz")
        status, told = server.task("train", UNET, **TRAIN, val_split=0, model_filename="pretrained_encoder.pt")
        assert status == "DONE", told
        server.infer(UNET, "new", tmp_path / "new.nii.gz")

        # two scans at once, MONAI Label's default, would each unload the code that the other is importing
        (server.studies / "constant.nii.gz").unlink()
        server.wait_for_image("constant", there=False)
        status, told = server.task("scoring", UNET)
        assert status == "DONE", told
        unlabelled = [name for name in ("alike_0", "alike_1", "alike_2", "new") if name != start["id"]]
        scores = {name: server.image_info(name)["epistemic_entropy"] for name in unlabelled}
        assert server.next_sample("epistemic")["id"] == max(scores, key=lambda name: scores[name])


def test_one_command_serves_a_bundle(
    python: Path, bundles: dict[str, Path], scans: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    app = tmp_path / "app"
    server = LabelServer(python, app, [], [image for image, _ in scans.values()], tmp_path)
    words = ["serve", str(bundles[UNET]), str(server.studies), "--app", str(app), "--port", server.url.split(":")[-1]]
    # by an interpreter that has no MONAI Label, from an environment that is not active
    server.command = [sys.executable, str(ROOT / "tools" / "openmind.py"), *words]
    server.command += ["--monailabel", str(python.with_name("monailabel"))]
    with server:
        info = server.info()
        assert info["models"][UNET]["labels"] == {"ball": 1}
        assert {"core_set", "epistemic"} <= {*info["strategies"]}
        server.save_label("scan_0", scans["scan_0"][1])
        assert (server.studies / "labels" / "final" / "scan_0.nii.gz").is_file(), "where the command says"
        status, told = server.task("train", UNET, **TRAIN, val_split=0, model_filename="pretrained_encoder.pt")
        assert status == "DONE", told
        check_prediction(server, python, UNET, "scan_4", scans["scan_4"], tmp_path)
    assert f"copied {bundles[UNET]} to {app / 'model' / UNET}" in server.log.read_text("utf-8")
    assert not (bundles[UNET] / "models" / "model.json").exists(), "it is trained in the copy"
