# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The distributed form of a bundle: complete, the same every time, and running where there is no repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from common.errors import SettingsError, WeightsError
from common.files import sha256, write_json
from common.networks import Primus, ResEncUNet
from common.weights import transfer_weights, write_checkpoint
from tools.commanding.settings import filled
from tools.exporting import distribution
from tools.exporting import new_task as task_tool
from tools.exporting.bundles import export_bundle
from tools.exporting.new_task import new_task
from tools.exporting.settings import ExportBundle, NewTask

from ..conftest import BUNDLES, NETWORK, ROOT, WHOLE_CHAIN, blobs, small_settings, write_volume
from ..starts import python

WORKFLOWS = ["pretrain", "train", "inference", "evaluate", "train_classification", "inference_classification"]
WORKFLOWS += ["features"]


def network_settings(bundle: str) -> dict[str, Any]:
    names = [name.removeprefix("--") for name in NETWORK[bundle][::2]]
    return dict(zip(names, map(json.loads, NETWORK[bundle][1::2]), strict=True))


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow pre-trained encoder of each of the two bundles whose whole chain is run."""
    folder, files = tmp_path_factory.mktemp("encoders"), {}
    for bundle in WHOLE_CHAIN:
        sizes = network_settings(bundle)
        network = ResEncUNet(**sizes) if "resenc" in bundle else Primus(input_size=16, **sizes)
        files[bundle] = folder / f"{bundle}.pt"
        write_checkpoint(network.state_dict(), files[bundle])
        settings = {"bundle": bundle, "spacing_mm": 1.0, "patch_size": [16] * 3, **sizes}
        about = {"sha256": sha256(files[bundle]), "settings": settings, "licence": "CC-BY-4.0, Wald et al."}
        write_json(about, files[bundle].with_suffix(".json"))
    return files


def export(bundle: str, encoders: dict[str, Path], output: Path, **more: Any) -> Path:
    sizes = network_settings(bundle) | {"patch_size": [16, 16, 16]}
    export_bundle(filled(ExportBundle, bundle, output=str(output), pretrained=str(encoders[bundle]), **sizes, **more))
    return output / bundle


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_config_is_complete(bundle: str, tmp_path: Path) -> None:
    folder = distribution.write_bundle(bundle, tmp_path / bundle, settings={})
    found = {path.name for path in (folder / "configs").iterdir()}
    overlays = {"multi_gpu_pretrain.json", "multi_gpu_train.json"}
    assert found >= {f"{name}.json" for name in WORKFLOWS} | overlays | {"metadata.json", "logging.conf"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    for file in (folder / "configs").glob("*.json"):
        text = file.read_text()
        assert "%" not in re.sub(r"[^\"]%|\s%", "", text), "a macro is left"
        assert "common." not in text
        assert str(ROOT) not in text
        for target in re.findall(r'"_target_": "scripts\.([\w.]+)"', text):
            assert locate(f"common.{target}") is not None, target
        if file.stem in WORKFLOWS:
            parser = ConfigParser(json.loads(text))
            settings = parser.get("feature_settings" if file.stem == "features" else "run_settings")
            assert settings is None or settings["bundle"] == bundle, "whatever its folder is called"
            for reference in re.findall(r"@([\w#:]+)", " ".join(strings(json.loads(text)))):
                assert reference.replace("#", "::") in parser, f"{file.name}: @{reference}"
    package = {path.relative_to(folder / "scripts") for path in (folder / "scripts").rglob("*.py")}
    assert package == {path.relative_to(ROOT / "common") for path in (ROOT / "common").rglob("*.py")}


def strings(value: Any) -> list[str]:
    """Return the references and expressions of a config."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) and value[:1] in "@$" else []


def test_pages_hold_outside_the_repository(encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = export("mae_resenc_l", encoders, tmp_path)
    for page in ("docs/README.md", "README.md", "docs/settings.md"):
        text = (folder / page).read_text()
        assert "bundles/mae" not in text
        assert "../" not in text
        for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert ((folder / page).parent / link).is_file(), f"{page}: {link}"
    settings = (folder / "docs" / "settings.md").read_text()
    assert "| batch_size | `8` | of one optimizer step, over all GPUs and accumulation steps |" in settings
    assert "| features_per_stage | `[4, 8, 8]` |" in settings
    assert "license: cc-by-4.0" in (folder / "README.md").read_text().split("---")[1]


def test_switches_are_written_as_what_they_mean(tmp_path: Path) -> None:
    """The command line hands on false as a text, which a config would take for true."""
    export_bundle(
        filled(ExportBundle, "mae_resenc_l", output=str(tmp_path), weights="false", reorient="false", amp="true")
    )
    config = json.loads((tmp_path / "mae_resenc_l" / "configs" / "pretrain.json").read_text())
    assert (config["reorient"], config["amp"]) == (False, True)


def test_equal_inputs_give_equal_bytes(encoders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        export("mae_resenc_l", encoders, tmp_path / name)
    zips = [tmp_path / name / "mae_resenc_l_v0.1.0.zip" for name in ("one", "two")]
    assert zips[0].read_bytes() == zips[1].read_bytes()
    names = zipfile.ZipFile(zips[0]).namelist()
    assert {name.split("/")[0] for name in names} == {"mae_resenc_l"}
    assert {"mae_resenc_l/models/model.pt", "mae_resenc_l/LICENSE", "mae_resenc_l/scripts/__init__.py"} <= {*names}
    import hashlib

    info = json.loads((tmp_path / "one" / "model_info.json").read_text())
    assert info == {"mae_resenc_l_v0.1.0": {"checksum": hashlib.sha1(zips[0].read_bytes()).hexdigest(), "source": ""}}


RUN = """
import json, sys
from pathlib import Path
import monai.bundle
for root, runs in json.loads(Path(sys.argv[1]).read_text()):
    for config, settings in runs:
        monai.bundle.run(config_file=f"{root}/configs/{config}.json", bundle_root=root, logging_file=False, **settings)
assert "common" not in sys.modules
print("code", sys.modules["scripts"].__file__)
"""


def runs(bundle: str, data: Path, out: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return every workflow of a bundle with the settings of a tiny run."""
    lengths = {"epochs": 1, "iterations_per_epoch": 2, "val_iterations": 1, "batch_size": 2}
    lengths |= {"ckpt_dir": str(out / "models"), "num_workers": 0}
    images = {"dataset_dir": str(data / "images")}
    table = images | {"table": str(data / "table.csv"), "target": "ill", "epochs": 1, "batch_size": 2}
    table |= {"accumulation_steps": 1, "input_size": [16, 16, 16], "num_workers": 0, "fold": 0, "folds": 2}
    table |= {"ckpt_dir": str(out / "classifier")}
    settings: dict[str, dict[str, Any]] = {
        "pretrain": images | lengths | small_settings(bundle) | {"ckpt_dir": str(out / "pretraining")},
        "train": {"dataset_dir": str(data)} | lengths,
        "inference": images | {"model": str(out / "models" / "model.pt"), "num_workers": 0},
        "evaluate": {"dataset_dir": str(data), "predictions": str(out / "inference"), "num_workers": 0},
        "train_classification": table,
        "inference_classification": images | {"ckpt_dir": str(out / "classifier"), "num_workers": 0},
        "features": images | {"num_workers": 0, "patch_size": [16, 16, 16]},
    }
    stores = {
        name: {"store_dir": str(out / f"store_{name}")} for name in settings if name not in ("evaluate", "inference")
    }
    return [(name, settings[name] | {"output_dir": str(out / name)} | stores.get(name, {})) for name in WORKFLOWS]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = ["case,ill"]
    for index in range(6):
        image, mask = blobs(index)
        write_volume(folder / "images" / f"case_{index}.nii.gz", image)
        write_volume(folder / "labels" / f"case_{index}.nii.gz", mask)
        lines.append(f"case_{index},{index % 2}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def away(**more: str) -> dict[str, str]:
    """Return an environment that does not know of the repository."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PWD", "OLDPWD")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"} | more


def test_every_workflow_runs_unzipped_and_beside_another_bundle(
    encoders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """All workflows of both backbones, in one process, from zips, with nothing of the repository in reach."""
    plan = []
    for bundle in WHOLE_CHAIN:
        export(bundle, encoders, tmp_path / "dist")
        zipfile.ZipFile(tmp_path / "dist" / f"{bundle}_v0.1.0.zip").extractall(tmp_path / "elsewhere")
        plan.append((str(tmp_path / "elsewhere" / bundle), runs(bundle, data, tmp_path / bundle)))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "here").mkdir()
    command = [python(), "-c", RUN, str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=tmp_path / "here", env=away(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"code {tmp_path / 'elsewhere' / WHOLE_CHAIN[0]}" in done.stdout
    for bundle in WHOLE_CHAIN:
        out = tmp_path / bundle
        for file in ("pretraining/pretrained_encoder.pt", "models/model.pt", "inference/case_0.nii.gz"):
            assert (out / file).is_file(), file
        assert (out / "evaluate" / "scores.csv").is_file()
        assert len((out / "inference_classification" / "predictions.csv").read_text().splitlines()) == 7
        assert any((out / "features").iterdir())


def bundle_run(folder: Path, config: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [python(), "-m", "monai.bundle", "run", "--config_file", config, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=away(), capture_output=True, text=True, timeout=600)


def test_the_command_line_inside_and_elsewhere(encoders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    folder = export("mae_resenc_l", encoders, tmp_path / "dist")
    untrained = bundle_run(folder, "configs/inference.json", "--dataset_dir", data / "images", cwd=folder)
    assert untrained.returncode != 0
    assert untrained.stderr.strip().splitlines()[-1].startswith("Stopped: models/model.pt has not been trained")
    assert not list((folder / "output").glob("**/*.nii.gz")), "no random mask"
    given: list[str | Path] = ["--dataset_dir", data, "--num_workers", "0", "--epochs", "1"]
    given += ["--iterations_per_epoch", "2", "--val_iterations", "1"]
    trained = bundle_run(folder, str(folder / "configs" / "train.json"), *given, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert sorted(path.name for path in (folder / "models").glob("*.pt")) == [
        "model.pt",
        "model_final.pt",
        "pretrained_encoder.pt",
    ]
    assert not (tmp_path / "models").exists(), "it is the bundle's folder, from wherever it is run"
    mistyped = bundle_run(folder, "configs/train.json", "--lrr", "1", cwd=folder)
    assert mistyped.returncode != 0
    assert "did you mean --lr" in mistyped.stderr


def test_other_code_in_the_same_process_is_refused(encoders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    plan = []
    for bundle in WHOLE_CHAIN:
        folder = export(bundle, encoders, tmp_path / "dist")
        (name, settings), *_ = [run for run in runs(bundle, data, tmp_path / bundle) if run[0] == "features"]
        plan.append((str(folder), [(name, settings)]))
    with open(folder / "scripts" / "errors.py", "a") as stream:
        stream.write("# changed\n")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [python(), "-c", RUN, str(tmp_path / "plan.json")]
    done = subprocess.run(command, cwd=tmp_path, env=away(), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert f"has loaded the code of {tmp_path / 'dist' / WHOLE_CHAIN[0]}" in done.stderr
    assert any((tmp_path / WHOLE_CHAIN[0] / "features").iterdir()), "the first one ran"


def test_weights_are_left_out_or_fetched_on_request(encoders: dict[str, Path], tmp_path: Path) -> None:
    export_bundle(filled(ExportBundle, "mae_resenc_l", output=str(tmp_path / "bare"), weights=False))
    assert not (tmp_path / "bare" / "mae_resenc_l" / "models").exists()
    folder = export("mae_resenc_l", encoders, tmp_path / "hosted", weights_url="https://host.example/weights/")
    assert not list(folder.rglob("*.pt"))
    listed = ConfigParser.load_config_file(str(folder / "large_files.yml"))["large_files"]
    beside = tmp_path / "hosted" / "mae_resenc_l_weights"
    for entry in listed:
        file = beside / Path(entry["path"]).name
        assert entry["url"] == f"https://host.example/weights/{file.name}"
        assert (entry["hash_type"], entry["hash_val"]) == ("sha256", sha256(file))
    assert {entry["path"] for entry in listed} == {"models/model.pt", "models/pretrained_encoder.pt"}


def test_what_cannot_be_exported_is_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = export("mae_resenc_l", encoders, tmp_path)
    (folder / "models" / "mine.pt").write_text("what a user trained")
    with pytest.raises((SettingsError, WeightsError), match=r"mae_resenc_l exists.*--overwrite true"):
        export("mae_resenc_l", encoders, tmp_path)
    export("mae_resenc_l", encoders, tmp_path, overwrite="true")
    assert not (folder / "models" / "mine.pt").exists()
    assert not list(tmp_path.glob(".mae*")), "nothing half written is left"
    with pytest.raises((SettingsError, WeightsError), match="no bundle 'mea_resenc_l'"):
        export_bundle(filled(ExportBundle, "mea_resenc_l", output=str(tmp_path / "x")))
    with pytest.raises((SettingsError, WeightsError), match=r"--lrr \(did you mean --lr"):
        export_bundle(filled(ExportBundle, "mae_resenc_l", output=str(tmp_path / "x"), lrr=1))
    with pytest.raises((SettingsError, WeightsError), match="new_task"):
        export_bundle(filled(ExportBundle, "mae_resenc_l", output=str(tmp_path / "x"), labels=["a"]))
    for wrong, told in (
        ({"features_per_stage": "foo"}, "features_per_stage is 'foo'"),
        ({"lr": "fast"}, "lr is 'fast'"),
    ):
        with pytest.raises((SettingsError, WeightsError), match=told):
            export_bundle(
                filled(
                    ExportBundle,
                    "mae_primus_m" if "lr" in wrong else "mae_resenc_l",
                    output=str(tmp_path / "x"),
                    **wrong,
                )
            )
    with pytest.raises((SettingsError, WeightsError), match="--pretrained is True; it must be a path"):
        export_bundle(filled(ExportBundle, "mae_resenc_l", output=str(tmp_path / "x"), pretrained=True))
    with pytest.raises(WeightsError, match="there is no encoder"):
        export_bundle(
            filled(ExportBundle, "mae_resenc_l", output=str(tmp_path / "x"), pretrained=str(tmp_path / "none.pt"))
        )
    with pytest.raises((SettingsError, WeightsError), match="for one bundle"):
        export_bundle(
            filled(ExportBundle, "mae_resenc_l,mae_primus_m", output=str(tmp_path / "x"), pretrained="encoder.pt")
        )
    with pytest.raises((SettingsError, WeightsError), match="--weights_url is for one bundle"):
        export_bundle(filled(ExportBundle, "all", output=str(tmp_path / "x"), weights_url="https://host.example"))
    assert not (tmp_path / "x").exists()


def test_several_bundles_are_checked_before_any_is_written(tmp_path: Path) -> None:
    (tmp_path / "voco_primus_m").mkdir()
    with pytest.raises((SettingsError, WeightsError), match="voco_primus_m exists"):
        export_bundle(filled(ExportBundle, "mae_resenc_l,voco_primus_m", output=str(tmp_path), weights=False))
    with pytest.raises(WeightsError, match="there is no encoder"):
        export_bundle(filled(ExportBundle, "mae_resenc_l,spark3d_primus_m", output=str(tmp_path), weights=True))
    assert [path.name for path in tmp_path.iterdir()] == ["voco_primus_m"]


def values_of(folder: Path, name: str) -> dict[str, Any]:
    """Return the default of a setting in each workflow that has it, where no model was trained yet."""
    found = {}
    for workflow in WORKFLOWS:
        config = json.loads((folder / "configs" / f"{workflow}.json").read_text())
        if name in config:
            found[workflow] = ConfigParser(config | {"trained": {}}).get_parsed_content(name)
    return found


def test_settings_reach_each_workflow_in_which_they_mean_the_same(tmp_path: Path) -> None:
    patch, published = [96, 96, 96], [160, 160, 160]
    given: dict[str, Any] = {
        "weights": False,
        "spacing_mm": 0.7,
        "normalization": "zscore_nonzero",
        "patch_size": patch,
    }
    export_bundle(filled(ExportBundle, "mae_primus_m,simclr_primus_m", output=str(tmp_path), **given))
    everywhere = {"pretrain": patch, "train": patch, "inference": patch, "features": patch}
    assert values_of(tmp_path / "mae_primus_m", "patch_size") == everywhere
    # there it is the region that the crops are cut from
    assert values_of(tmp_path / "simclr_primus_m", "patch_size") == everywhere | {"pretrain": [192, 192, 64]}
    assert values_of(tmp_path / "mae_primus_m", "spacing_mm") == dict.fromkeys(
        [*everywhere, "train_classification"], 0.7
    )
    schemes = values_of(tmp_path / "mae_primus_m", "normalization")
    assert schemes == dict.fromkeys(["train", "inference", "train_classification", "features"], "zscore_nonzero")
    export_bundle(
        filled(
            ExportBundle, "mae_resenc_l", output=str(tmp_path), weights=False, spacing_mm="median", normalization="ct"
        )
    )
    rules = [values_of(tmp_path / "mae_resenc_l", name) for name in ("spacing_mm", "normalization")]
    assert [rule.pop("train") for rule in rules] == ["median", "ct"]
    assert [{*rule.values()} for rule in rules] == [{1.0}, {"zscore"}], "only fine-tuning works them out"
    del given["weights"]
    new_task(
        filled(
            NewTask,
            "mae_primus_m",
            str(tmp_path / "task"),
            labels="a",
            from_scratch=True,
            embed_dim=24,
            num_heads=2,
            **given,
        )
    )
    assert values_of(tmp_path / "task", "patch_size") == everywhere | {"pretrain": published}
    of_task = {name: values_of(tmp_path / "task", name) for name in ("spacing_mm", "normalization")}
    assert of_task["spacing_mm"] == {"train": 0.7, "inference": 0.7} | dict.fromkeys(
        ["pretrain", "features", "train_classification"], 1.0
    )
    assert of_task["normalization"]["features"] == "zscore"


def test_a_new_task_for_a_gpu_has_what_fits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend(content: dict[str, Any], gib: float) -> dict[str, Any] | None:
        assert (content["labels"], content["channels"]) == (["background", "a"], 2)
        text = "this training needs 9 GiB; add --accumulation_steps 2"
        return None if gib > 9 else {"text": text, "sure": True, "changes": {"accumulation_steps": 2}}

    monkeypatch.setattr(task_tool, "memory_problem", pretend)
    told = {"labels": "a", "channels": "2", "from_scratch": True}
    for gib, parts in ((8, 2), (12, 1)):
        folder = tmp_path / f"task{gib}"
        new_task(filled(NewTask, "mae_resenc_l", str(folder), gpu_gib=gib, **told))
        assert json.loads((folder / "configs" / "train.json").read_text())["accumulation_steps"] == parts
    text = capsys.readouterr().out
    assert "needs 9 GiB; its defaults become --accumulation_steps 2" in text
    assert "training fits a GPU of 12 GiB" in text


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_a_new_task_agrees_with_itself(bundle: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "gliomas"
    sizes = network_settings(bundle) | {"patch_size": [16, 24, 16]}
    new_task(
        filled(
            NewTask,
            *(bundle, str(folder)),
            labels="edema, core",
            channels="T1,FLAIR",
            pretrained=str(encoders[bundle]),
            **sizes,
        )
    )
    metadata, train, inference, evaluate = (
        json.loads((folder / "configs" / f"{name}.json").read_text())
        for name in ("metadata", "train", "inference", "evaluate")
    )
    labels = ["background", "edema", "core"]
    formats = metadata["network_data_format"]
    assert list(formats["outputs"]["pred"]["channel_def"].values()) == labels
    assert formats["outputs"]["pred"]["num_channels"] == 3
    assert formats["inputs"]["image"]["channel_def"] == {"0": "T1", "1": "FLAIR"}
    assert formats["inputs"]["image"]["spatial_shape"] == [16, 24, 16]
    assert train["run_settings"]["bundle"] == bundle, "whose encoder and network it has"
    assert train["labels"] == evaluate["labels"] == labels
    assert train["channels"] == 2
    parser = ConfigParser(inference | {"trained": {}})
    assert [parser.get_parsed_content(name) for name in ("labels", "channels")] == [labels, 2]
    assert parser.get_parsed_content("patch_size") == [16, 24, 16]
    encoder = torch.load(folder / "models" / "pretrained_encoder.pt", weights_only=True)
    model = torch.load(folder / "models" / "model.pt", weights_only=True)
    original = torch.load(encoders[bundle], weights_only=True)
    assert model["untrained"]
    first = next(key for key in ("encoder.patch_embedding.weight", "encoder.stem.conv.weight") if key in encoder)
    torch.testing.assert_close(encoder[first], original[first].repeat(1, 2, 1, 1, 1) / 2)
    for key, value in encoder.items():
        if key.startswith("encoder."):
            torch.testing.assert_close(model[key], value, rtol=0, atol=0)
    assert not [key for key in encoder if key.startswith("head.")], (
        "MONAI Label loads it into a network of other classes"
    )
    receipt = json.loads((folder / "models" / "pretrained_encoder.json").read_text())
    assert receipt["sha256"] == sha256(folder / "models" / "pretrained_encoder.pt")
    assert receipt["derived_from"]["sha256"] == sha256(encoders[bundle])
    assert first in receipt["adapted"]
    network = distribution_network(folder)
    taken = transfer_weights(network, folder / "models" / "pretrained_encoder.pt")
    assert not taken.adapted, "it fits as it is"
    fitted = "; since fitted to 16 x 24 x 16\n" if "primus" in bundle else "\n"
    assert f"trained at    1 x 1 x 1 mm, input of 16 x 16 x 16 voxels{fitted}" in taken.summary()
    page = (folder / "docs" / "README.md").read_text()
    assert "| 2 | core |" in page


def distribution_network(folder: Path) -> torch.nn.Module:
    """Return the network of an exported bundle's training, by the code of this process."""
    text = (folder / "configs" / "train.json").read_text().replace('"scripts.', '"common.')
    network: torch.nn.Module = ConfigParser(json.loads(text)).get_parsed_content("network_def")
    return network


def test_names_of_a_new_task_are_no_commands(encoders: dict[str, Path], tmp_path: Path) -> None:
    names = ["background", "lesion #1", "common.bile duct", "import", "a's \\"]
    options = network_settings("mae_resenc_l") | {"patch_size": [16, 16, 16]}
    given = {"pretrained": str(encoders["mae_resenc_l"]), **options}
    new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "task"), labels=names, **given))
    configs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "task" / "configs").glob("*.json")}
    for config in ("train", "evaluate", "inference"):
        parser = ConfigParser(configs[config] | ({"trained": {}} if config == "inference" else {}))
        assert parser.get_parsed_content("labels") == names, config
    assert list(configs["metadata"]["network_data_format"]["outputs"]["pred"]["channel_def"].values()) == names
    mark = tmp_path / "mark"
    for name in (f"$__import__('pathlib').Path('{mark}').touch()", "@home", "%id"):
        model = write_model(tmp_path, ["background", name])
        with pytest.raises(SettingsError, match="takes what starts with"):
            new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "other"), model=str(model), **options))
    settings = json.loads(model.with_suffix(".json").read_text())
    settings["settings"] |= {
        "labels": ["background", "a"],
        "normalization": f"$__import__('pathlib').Path('{mark}').touch()",
    }
    write_json(settings, model.with_suffix(".json"))
    new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "other"), model=str(model), **options))
    for config in ("train", "inference"):
        parser = ConfigParser(
            json.loads((tmp_path / "other" / "configs" / f"{config}.json").read_text()) | {"trained": {}}
        )
        assert parser.get_parsed_content("normalization") == settings["settings"]["normalization"]
    assert not mark.exists()


def test_spacing_of_a_new_task(encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spacings(name: str, spacing: Any) -> list[Any]:
        sizes = network_settings("mae_resenc_l") | {"patch_size": [16, 16, 16]}
        new_task(
            filled(
                NewTask,
                "mae_resenc_l",
                str(tmp_path / name),
                labels="a",
                spacing=spacing,
                pretrained=str(encoders["mae_resenc_l"]),
                **sizes,
            )
        )
        read = {
            config: json.loads((tmp_path / name / "configs" / f"{config}.json").read_text())
            for config in ("train", "inference", "pretrain")
        }
        parser = ConfigParser(read["inference"] | {"trained": {}})
        return [read["train"]["spacing_mm"], parser.get_parsed_content("spacing_mm"), read["pretrain"]["spacing_mm"]]

    assert spacings("fine", 0.5) == [0.5, 0.5, 1.0]
    assert spacings("thick", (3, 1, 1)) == [[3, 1, 1], [3, 1, 1], 1.0]
    assert "voxels of 3 x 1 x 1 mm (slice, row, column)\n" in capsys.readouterr().out
    assert spacings("own", "null") == [None, None, 1.0]
    # a rule is for training to work out; inference reads the numbers beside the trained model
    assert spacings("rule", "median") == ["median", 1.0, 1.0]


def test_a_trained_model_becomes_a_bundle(encoders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    sizes = network_settings("mae_resenc_l") | {"patch_size": [16, 16, 16]}
    network = ResEncUNet(1, 2, **network_settings("mae_resenc_l"))
    write_checkpoint(network.state_dict(), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"model\.json is missing"):
        new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "ready"), model=str(tmp_path / "model.pt"), **sizes))
    settings = {"labels": ["background", "lesion"], "channels": 1, "patch_size": [16, 16, 16], "spacing_mm": 1.0}
    write_json({"settings": settings | network_settings("mae_resenc_l")}, tmp_path / "model.json")
    with pytest.raises((SettingsError, WeightsError), match=r"trained for labels \['background', 'lesion'\].*new_task"):
        export_bundle(
            filled(ExportBundle, "mae_resenc_l", output=str(tmp_path / "x"), model=str(tmp_path / "model.pt"), **sizes)
        )
    new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "ready"), model=str(tmp_path / "model.pt"), **sizes))
    assert (tmp_path / "ready" / "models" / "model.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()
    metadata = json.loads((tmp_path / "ready" / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "lesion"}
    shutil.rmtree(tmp_path / "ready")


def write_model(folder: Path, labels: list[str], *, channels: int = 1, **more: Any) -> Path:
    sizes = network_settings("mae_resenc_l")
    write_checkpoint(ResEncUNet(channels, len(labels), **sizes).state_dict(), folder / "model.pt")
    settings = {"labels": labels, "channels": channels, "patch_size": [16] * 3, "spacing_mm": [1.0] * 3}
    write_json({"settings": settings | {"normalization": ["zscore"]} | sizes | more}, folder / "model.json")
    return folder / "model.pt"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"labels": "tumour,edema"}, "for the classes lesion, edema, and --labels names tumour, edema"),
        ({"labels": "edema,lesion"}, "for the classes lesion, edema, and --labels names edema, lesion"),
        ({"labels": "lesion"}, "and --labels names lesion; leave --labels out"),
        ({"channels": 1}, r"for 2 channel\(s\), and --channels names 1"),
        ({"channels": "T1,T2,FLAIR"}, "and --channels names 3"),
        ({"features_per_stage": [8, 16, 16]}, r"features_per_stage \[4, 8, 8\], and here it is \[8, 16, 16\]"),
        ({"patch_size": 32}, "patch_size .* and here it is 32"),
        ({"spacing": 0.5}, "spacing_mm .* and here it is 0.5"),
        ({"regions": {"whole": [1, 2]}}, "regions overlap"),
        ({"pretrained": "nowhere.pt"}, "there is no encoder nowhere.pt"),
    ],
)
def test_a_trained_model_is_not_contradicted(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, ["background", "lesion", "edema"], channels=2)
    with pytest.raises((SettingsError, WeightsError), match=told):
        new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "ready"), model=str(model), **arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt"]


def test_a_trained_model_may_be_described_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values in another spelling are no contradiction, nor are names of the images or rules for training."""
    write_model(tmp_path, ["nothing", "lesion"], channels=2, normalization=[{"ct": [0, 1, 2, 3]}, "zscore"])
    monkeypatch.setenv("HOME", str(tmp_path))
    given: dict[str, Any] = {"labels": ("lesion",), "channels": "T1,FLAIR", "patch_size": 16, "spacing": "median"}
    new_task(
        filled(
            NewTask, "mae_resenc_l", str(tmp_path / "ready"), model="~/model.pt", features_per_stage=(4, 8, 8), **given
        )
    )
    formats = json.loads((tmp_path / "ready" / "configs" / "metadata.json").read_text())["network_data_format"]
    assert formats["inputs"]["image"]["channel_def"] == {"0": "T1", "1": "FLAIR"}
    assert formats["outputs"]["pred"]["channel_def"] == {"0": "nothing", "1": "lesion"}
    assert values_of(tmp_path / "ready", "normalization")["train"] == ["ct", "zscore"], "figures are for inference"
    assert values_of(tmp_path / "ready", "features_per_stage").keys() >= {"pretrain", "train", "features"}


def test_an_exported_model_is_not_contradicted_either(tmp_path: Path) -> None:
    model = write_model(tmp_path, ["background", "foreground"])
    with pytest.raises(
        (SettingsError, WeightsError), match=r"features_per_stage \[4, 8, 8\], and here it is \[8, 8, 8\]"
    ):
        export_bundle(
            filled(
                ExportBundle, "mae_resenc_l", output=str(tmp_path / "x"), model=str(model), features_per_stage=[8, 8, 8]
            )
        )


def test_a_trained_model_takes_along_the_encoder_that_fits(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path, ["background", "lesion"])
    own = tmp_path / "bundles" / "mae_resenc_l" / "models" / "pretrained_encoder.pt"
    own.parent.mkdir(parents=True)
    monkeypatch.setattr(task_tool, "encoder_at_hand", lambda bundle: own)

    def made(name: str, **more: Any) -> tuple[list[str], str]:
        new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / name), model=str(model), **more))
        return sorted(path.name for path in (tmp_path / name / "models").glob("*.pt")), capsys.readouterr().out

    files, out = made("without")
    assert files == ["model.pt"]
    assert "configs/inference.json --dataset_dir IMAGES" in out
    assert "can be trained" not in out
    other = ResEncUNet(features_per_stage=[8, 8], blocks_per_stage=[1, 1])
    write_checkpoint(other.state_dict(), own)
    files, out = made("misfit")
    assert files == ["model.pt"]
    assert f"left out: the encoder {own}" in out
    assert "can be trained" not in out
    with pytest.raises(WeightsError, match="is of another network"):
        made("named", pretrained=str(own))
    shutil.copy(encoders["mae_resenc_l"], own)
    files, out = made("fits")
    assert files == ["model.pt", "pretrained_encoder.pt"]
    assert "configs/inference.json --dataset_dir IMAGES" in out.splitlines()[-1]
    assert "it can be trained further: cd " in out
    assert (tmp_path / "fits" / "models" / "model.pt").read_bytes() == model.read_bytes()


def test_an_encoder_of_other_heads_is_refused(encoders: dict[str, Path], tmp_path: Path) -> None:
    """No tensor shows their number."""
    sizes = network_settings("mae_primus_m") | {"num_heads": 4, "patch_size": [16] * 3}
    with pytest.raises(SettingsError, match="made with num_heads 2, and here it is 4; leave it out"):
        new_task(
            filled(
                NewTask,
                "mae_primus_m",
                str(tmp_path / "task"),
                labels="a",
                pretrained=str(encoders["mae_primus_m"]),
                **sizes,
            )
        )


def test_a_task_from_scratch_claims_no_encoder(tmp_path: Path) -> None:
    sizes = network_settings("mae_resenc_l")
    new_task(filled(NewTask, "mae_resenc_l", str(tmp_path / "task"), labels="a", from_scratch="true", **sizes))
    metadata = json.loads((tmp_path / "task" / "configs" / "metadata.json").read_text())
    assert "to be trained from scratch with the network of mae_resenc_l" in metadata["description"]
    assert "A segmentation, to be trained from scratch with the network of" in (tmp_path / "task/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"output": "mae_vit_segmentation"}, "takes what follows _v"),
        ({"output": "my task"}, "cannot be the name"),
        ({"output": "scripts"}, "Python package"),
        ({"labels": None}, "name the classes"),
        ({"labels": "edema,,core"}, "name the classes"),
        ({"labels": "edema,Edema"}, "the same name to MONAI Label"),
        ({"labels": "edema,background"}, "background is the class 0"),
        ({"channels": 0}, "channels is 0"),
        ({"channels": "T1,T1"}, "channels is 'T1,T1'"),
        ({"labels": 1}, "labels is 1; give names"),
        ({"labels": True}, "labels is True; give names"),
        ({"labels": {"edema": 1}}, "labels is {'edema': 1}; give names"),
        ({"labels": [["edema"]]}, "give names"),
        ({"labels": "edema,$print"}, r"labels '\$print': in a bundle MONAI takes"),
        ({"labels": "@device"}, "labels '@device': in a bundle MONAI takes"),
        ({"labels": ("edema", "%a::b")}, "labels '%a::b': in a bundle MONAI takes"),
        ({"channels": 2.5}, "channels is 2.5"),
        ({"channels": -1}, "channels is -1"),
        ({"channels": True}, "channels is True"),
        ({"channels": "$T1"}, "in a bundle MONAI takes"),
        ({"model": True}, "--model is True; it must be a path"),
        ({"output": "task", "features_per_stage": "foo"}, "features_per_stage is 'foo'; it must be like"),
        ({"bundle": "mae_vnet"}, "no bundle 'mae_vnet'"),
        ({"bundle": "all"}, "no bundle 'all'"),
        ({"pretrained": "nowhere.pt"}, "there is no encoder nowhere.pt"),
        ({"epoch": 3}, "did you mean --epochs"),
    ],
)
def test_what_makes_no_task_is_refused(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    given = {"bundle": "mae_resenc_l", "output": "task", "labels": "edema,core"} | arguments
    given["output"] = str(tmp_path / given["output"])
    with pytest.raises((SettingsError, WeightsError), match=told):
        new_task(filled(NewTask, **given))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spacing", ["fine", 0, -1.0, [1, 1], [1, 1, 0], True, {"a": 1}, float("inf")])
def test_a_spacing_that_training_would_refuse_is_refused(spacing: Any, tmp_path: Path) -> None:
    for option in ("spacing", "spacing_mm"):
        with pytest.raises(SettingsError, match=r"it must be a number.* median, pretrained or null"):
            new_task(
                filled(
                    NewTask, "mae_resenc_l", str(tmp_path / "task"), labels="a", from_scratch=True, **{option: spacing}
                )
            )
    assert not list(tmp_path.iterdir())
