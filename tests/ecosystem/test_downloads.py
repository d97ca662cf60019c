# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Bundles uploaded and downloaded with MONAI's own commands, from a server on this machine, and run where they land."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import ContentTooShortError

import pytest
from huggingface_hub import constants
from monai.apps.utils import HashCheckError
from monai.bundle import download_large_files

from common.errors import SettingsError, WeightsError
from common.files import sha256, write_json
from common.networks import ResEncUNet
from common.weights import write_checkpoint
from tools.commanding.settings import filled
from tools.exporting.bundles import export_bundle
from tools.exporting.settings import ExportBundle

from ..conftest import ROOT, blobs, write_volume
from .hub import TOKEN, USER, Hub, Repository, running_hub

BUNDLE, VERSION = "mae_resenc_l", "0.1.0"
SIZES: dict[str, Any] = {"features_per_stage": [4, 8, 8], "blocks_per_stage": [1, 1, 1], "patch_size": [16, 16, 16]}

# what `python -m monai.bundle` does, with a record of every file that it opens
WATCHED = """
import atexit, json, os, runpy, sys
opened, place = set(), sys.argv.pop(1)
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        opened.add(os.path.abspath(arguments[0]))
sys.addaudithook(note)
atexit.register(lambda: print(json.dumps(sorted(opened)), file=open(place, "w")))
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index in range(5):
        image, mask = blobs(index)
        write_volume(folder / "images" / f"case_{index}.nii.gz", image)
        write_volume(folder / "labels" / f"case_{index}.nii.gz", mask)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow encoder with the receipt of published weights."""
    file = tmp_path_factory.mktemp("encoder") / "pretrained_encoder.pt"
    sizes = {name: SIZES[name] for name in ("features_per_stage", "blocks_per_stage")}
    write_checkpoint(ResEncUNet(**sizes).state_dict(), file)
    about = {"sha256": sha256(file), "settings": {"bundle": BUNDLE, "spacing_mm": 1.0, **sizes}}
    about |= {"source": "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE", "licence": "CC-BY-4.0, Wald et al."}
    write_json(about, file.with_suffix(".json"))
    return file


def away(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Return an environment that knows neither the repository nor the real Hub."""
    hidden = ("PYTHONPATH", "PWD", "OLDPWD", "HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    ours = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    return kept | ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"} | more


def monai(hub: Hub, cwd: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m monai.bundle`` in a folder, watched; the files that it opened are listed in opened.json."""
    cwd.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", WATCHED, str(cwd / "opened.json"), *map(str, arguments)]
    environment = away(hub, cwd / "home", **more)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


@pytest.fixture(scope="module")
def exported(hub: Hub, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was exported and uploaded with one command."""
    folder = tmp_path_factory.mktemp("exported")
    given = [part for name, value in SIZES.items() for part in (f"--{name}", json.dumps(value))]
    command = [sys.executable, str(ROOT / "tools" / "export_bundle.py"), BUNDLE, "--pretrained", str(encoder), *given]
    command += ["--output", str(folder), "--push", "lab/narrow"]
    environment = away(hub, folder / "home", HF_TOKEN=TOKEN)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert f"to {hub.address}/lab/narrow (new, private):" in done.stdout
    assert f"--source huggingface_hub --repo lab/narrow --version {VERSION}" in done.stdout
    return folder / BUNDLE


def run_where_it_landed(folder: Path, hub: Hub, data: Path, cwd: Path) -> None:
    """Fine-tune for two steps from the encoder that came along, with nothing of the repository read."""
    given: list[str | Path] = ["--bundle_root", folder, "--dataset_dir", data, "--num_workers", "0"]
    length = ["--epochs", "1", "--iterations_per_epoch", "2", "--val_iterations", "1"]
    done = monai(hub, cwd, "run", "--config_file", folder / "configs" / "train.json", *given, *length)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "encoder covered 100.0 %" in done.stdout + done.stderr
    assert (folder / "models" / "model_final.pt").is_file()
    opened = list(map(Path, json.loads((cwd / "opened.json").read_text())))
    assert any(path.is_relative_to(folder / "scripts") for path in opened)
    prefixes = (Path(sys.prefix), ROOT / ".venv")
    ours = [path for path in opened if path.is_relative_to(ROOT) and not any(map(path.is_relative_to, prefixes))]
    assert not ours, "the repository was read"


def test_an_upload_is_the_export(exported: Path, hub: Hub) -> None:
    """Byte for byte, our card included, under both tags; large files went through LFS; nothing is a link."""
    repository = hub.repositories["lab/narrow"]
    assert repository.private
    assert not any(path.is_symlink() for path in exported.rglob("*"))
    assert repository.tags == {VERSION: repository.head, "latest_version": repository.head}
    assert repository.commits[repository.head] == contents(exported)
    assert "base_model: MIC-DKFZ/ResEncL-OpenMind-MAE\n" in (exported / "README.md").read_text(), (
        "MONAI writes no such card"
    )
    models = {path: data for path, data in contents(exported).items() if path.endswith(".pt")}
    assert sorted(models) == ["models/model.pt", "models/pretrained_encoder.pt"]
    assert {hashlib.sha256(data).hexdigest() for data in models.values()} <= hub.objects.keys()


ROUTES = ["url", "huggingface_hub", "monaihosting"]


def route(name: str, hub: Hub, exported: Path) -> list[str]:
    """Publish for a route; return the arguments that download from it."""
    if name == "url":
        packed = exported.parent / f"{BUNDLE}_v{VERSION}.zip"
        hub.files[packed.name] = packed.read_bytes()
        return ["--url", f"{hub.address}/releases/{packed.name}"]
    if name == "huggingface_hub":
        return ["--source", name, "--repo", "lab/narrow"]
    hub.repositories[f"MONAI/{BUNDLE}"] = copy.deepcopy(hub.repositories["lab/narrow"])
    hub.repositories[f"MONAI/{BUNDLE}"].private = False
    hub.repositories[f"MONAI/{BUNDLE}"].commit({"README.md": b"main has moved on"})
    return ["--source", name, "--version", VERSION]


@pytest.mark.parametrize(
    ("name", "and_run"),
    [("url", False), ("huggingface_hub", True), ("monaihosting", False)]
    + [pytest.param(name, True, marks=pytest.mark.slow) for name in ("url", "monaihosting")],
)
def test_a_download_is_the_export_and_runs(
    name: str, and_run: bool, hub: Hub, exported: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ["download", "--name", BUNDLE, "--bundle_dir", tmp_path / "fetched", *route(name, hub, exported)]
    token = {"HF_TOKEN": TOKEN} if name == "huggingface_hub" else {}  # which alone is private
    done = monai(hub, tmp_path / "here", *arguments, **token)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "fetched" / BUNDLE) == contents(exported)
    if and_run:
        run_where_it_landed(tmp_path / "fetched" / BUNDLE, hub, data, tmp_path / "here")


@pytest.fixture(scope="module")
def hosted(hub: Hub, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose weights are fetched from elsewhere."""
    folder = tmp_path_factory.mktemp("hosted")
    address = f"{hub.address}/weights"
    export_bundle(
        filled(ExportBundle, BUNDLE, output=str(folder), pretrained=str(encoder), weights_url=address, **SIZES)
    )
    for file in (folder / f"{BUNDLE}_weights").iterdir():
        hub.files[file.name] = file.read_bytes()
    return folder / BUNDLE


def test_large_files_are_fetched_and_used(hosted: Path, hub: Hub, data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hosted, tmp_path / "elsewhere" / BUNDLE)
    assert not list(folder.rglob("*.pt"))
    for config in ("inference", "train", "features"):
        given: list[str | Path] = ["--config_file", f"configs/{config}.json", "--dataset_dir", data]
        stopped = monai(hub, folder, "run", *given, HF_HOME=str(tmp_path))
        assert stopped.returncode != 0
        last = stopped.stderr.strip().splitlines()[-1]
        assert "fetch it: python -m monai.bundle download_large_files --bundle_path ." in last
        assert "import_checkpoint" not in last
    done = monai(hub, tmp_path / "here", "download_large_files", "--bundle_path", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    receipt = json.loads((folder / "models" / "pretrained_encoder.json").read_text())
    assert sha256(folder / "models" / "pretrained_encoder.pt") == receipt["sha256"]
    assert sha256(folder / "models" / "model.pt") == sha256(hosted.parent / f"{BUNDLE}_weights" / "model.pt")
    run_where_it_landed(folder, hub, data, tmp_path / "here")


@pytest.mark.parametrize("how", ["changed", "cut"])
def test_a_large_file_that_is_not_what_was_exported_is_refused(
    how: str, hosted: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(hosted, tmp_path / BUNDLE)
    if how == "changed":
        monkeypatch.setitem(hub.files, "model.pt", hub.files["model.pt"][:-1] + b"!")
    else:
        monkeypatch.setattr(hub, "cut", {"model.pt"})
    with pytest.raises(HashCheckError if how == "changed" else ContentTooShortError):
        download_large_files(str(folder))
    assert not list(folder.rglob("*.pt")), "model.pt is the first of the list"


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the client of this process speak to the hub."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "repositories", {})


def push(folder: Path, to: Any, **more: Any) -> Path:
    """Upload a bundle without weights."""
    export_bundle(filled(ExportBundle, BUNDLE, output=str(folder), weights=False, push=to, **more))
    return folder / BUNDLE


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("xet", [False, True])
def test_a_later_version_takes_the_place_of_the_one_before(
    xet: bool, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through the upload of many commits that the client prefers where xet is installed."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr("tests.ecosystem.hub.LARGE", ())  # xet's own storage is not for this server
    folder = push(tmp_path, f"{USER}/narrow", private=False)
    repository = hub.repositories[f"{USER}/narrow"]
    assert not repository.private
    first = repository.head
    files = {**repository.commits[first], ".gitattributes": b"*.pt filter=lfs", "scripts/old.py": b"# no longer there"}
    repository.commit(files)
    repository.tags = {"0.0.9": repository.head, "latest_version": repository.head}
    capsys.readouterr()
    push(tmp_path, f"{USER}/narrow", private="false", overwrite=True)
    assert "and 1 file(s) of an earlier version deleted: scripts/old.py" in capsys.readouterr().out
    now = repository.commits[repository.head]
    assert now.pop(".gitattributes")
    assert now == contents(folder)
    assert repository.tags["latest_version"] == repository.tags[VERSION] == repository.head
    assert "scripts/old.py" in repository.commits[repository.tags["0.0.9"]]


@pytest.mark.usefixtures("logged_in")
def test_an_upload_that_fails_leaves_no_version_and_can_be_repeated(hub: Hub, tmp_path: Path) -> None:
    hub.broken = {f"/api/models/{USER}/narrow/commit": 400}
    with pytest.raises(
        SettingsError, match=f"uploading to {USER}/narrow failed .* run this again with --overwrite true"
    ):
        push(tmp_path, f"{USER}/narrow")
    hub.broken = {}
    assert hub.repositories[f"{USER}/narrow"].tags == {}
    card = (tmp_path / BUNDLE / "README.md").read_bytes()
    push(tmp_path, f"{USER}/narrow", overwrite=True)
    assert hub.repositories[f"{USER}/narrow"].tags.keys() == {VERSION, "latest_version"}
    assert (tmp_path / BUNDLE / "README.md").read_bytes() == card, "MONAI writes its own over it"


@pytest.mark.usefixtures("logged_in")
def test_what_cannot_be_uploaded_is_refused_before_anything_is_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(to: Any, **more: Any) -> str:
        with pytest.raises(SettingsError) as stopped:
            push(tmp_path / "out", to, **more)
        assert TOKEN not in str(stopped.value)
        assert "\n" not in str(stopped.value)
        return str(stopped.value)

    there = {"configs/metadata.json": b"{}"}
    for name, private, files, tags in (
        ("tagged", True, there, [VERSION]),
        ("public", False, there, []),
        ("other", True, {"config.json": b"{}"}, []),
    ):
        repository = hub.repositories[f"lab/{name}"] = Repository(private=private)
        repository.tags = dict.fromkeys(tags, repository.commit(files))
    assert "lab/tagged has version 0.1.0" in told("lab/tagged")
    assert "lab/public is public, and a private one is meant; add --private false" in told("lab/public")
    assert "lab/tagged is private, and a public one is meant" in told("lab/tagged", private=False, overwrite=True)
    assert "lab/other holds something else" in told("lab/other")
    assert "--push is 'narrow'; it must be owner/name" in told("narrow")
    assert "--push is True" in told(True)
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_expired")
        assert "Invalid user token" in (text := told("lab/narrow"))
        assert "by 'hf auth login' or HF_TOKEN" in text
        patch.delenv("HF_TOKEN")
        assert "there is no token" in told("lab/narrow")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "check the name and the network" in told("lab/narrow")
    assert not (tmp_path / "out").exists()
    assert "must be one that may write there" in told("nobody/narrow"), "known only when it is tried"


def test_weights_that_do_not_exist_cannot_be_hosted(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights of mae_resenc_l"):
        export_bundle(
            filled(ExportBundle, BUNDLE, output=str(tmp_path), weights=False, weights_url="https://host.example")
        )
