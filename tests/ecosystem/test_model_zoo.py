# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Exported bundles and the Model Zoo: its rules for files, keys and metadata, and MONAI's own commands on every one.

Bundles have narrow networks here; ``test_at_the_published_size`` does the same with those that users have.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    download_large_files,
    load,
    onnx_export,
    verify_metadata,
)
from monai.bundle import verify_net_in_out as monai_verify_net_in_out
from monai.data import MetaTensor, load_net_with_metadata
from monai.transforms import MapTransform
from torch import Tensor, nn

from common.bundles import read_config
from common.engines import GaussianSlidingWindow
from common.errors import SettingsError, WeightsError
from common.files import write_json
from common.weights import read_checkpoint, write_checkpoint
from tools.exporting.distribution import Carried, write_bundle

from ..conftest import BUNDLES, ROOT, WHOLE_CHAIN, blobs, write_volume
from ..starts import python
from .conftest import PATCH, code_of, narrow_settings, write_encoder

Export = Callable[[str], Path]
SCHEMA = ROOT / "tests" / "bundles" / "meta_schema_20240725.json"
# how a package is imported, where that is not its name
IMPORTED_AS = {"pytorch-ignite": "ignite", "scikit-image": "skimage", "scikit-learn": "sklearn", "pynrrd": "nrrd"}
# imported inside functions, which say what to install: --tuning lora, and fetching published weights with tools/
# ... and inside a MONAI Label server, which brings it
# ... DICOM series, BIDS names, Dask; the configs of the repository
ON_REQUEST = {"peft", "huggingface_hub", "filelock", "starlette"} | {
    "pydicom",
    "highdicom",
    "bids_validator",
    "dask",
    "yaml",
}
# what MONAI itself asks for: its command line, and the handler that configs name without its module
OF_MONAI = {"fire", "tensorboard"}
TWO_SIZES = ((1, 1, 2 * PATCH, PATCH, 3 * PATCH // 2), (2, 1, PATCH, PATCH, PATCH))
DYNAMIC = {
    "input_names": ["image"],
    "output_names": ["pred"],
    "dynamic_axes": {"image": {0: "batch", 2: "d", 3: "h", 4: "w"}},
}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(bundle: str, exported: Export) -> Iterator[Path]:
    """The folder of a bundle, whose code this process finds while the test runs."""
    with code_of(exported(bundle)) as folder:
        yield folder


def config_of(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "configs" / f"{name}.json").read_text())
    return content


# rules for files, keys and metadata


def test_names_are_taken_whole(bundle: str) -> None:
    assert not re.search("._v", bundle), "what follows _v would be a version"


def test_files_are_those_of_the_zoo(bundle: str, exported: Export, tmp_path: Path) -> None:
    folder = exported(bundle)
    required = ["LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt"]
    expected = ["docs/README.md", "docs/data_license.txt", "configs/train.json", "configs/evaluate.json"]
    expected += ["configs/multi_gpu_train.json", "configs/logging.conf", "scripts/__init__.py"]
    for name in required + expected:
        assert (folder / name).is_file(), name
    shortest = min((path.name for path in (folder / "models").glob("*.pt")), key=len)
    assert shortest == "model.pt"
    # weights are fetched from elsewhere, and the rest is of the same size whatever the network
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.suffix != ".pt") < 25e6
    for path in folder.rglob("*"):
        if path.suffix == ".py":
            assert "Apache-2.0" in path.read_text().splitlines()[0], path
        if path.is_file() and path.suffix not in (".pt", ".png", ".pyc"):
            found = re.search(r"(?:/home|/root|/Users|/mnt|/tmp)\b|\b[A-Z]:\\\\", path.read_text())
            assert not found, f"{path} holds {found and found[0]}"


def test_weights_stay_out_of_git_on_request(exported: Export, tmp_path: Path) -> None:
    """The zoo takes no file above 25 MB; MONAI's own download puts the weights back."""
    encoder = exported("mae_resenc_l") / "models" / "pretrained_encoder.pt"
    folder = write_bundle(
        "mae_resenc_l",
        tmp_path / "mae_resenc_l",
        settings=narrow_settings("mae_resenc_l"),
        carried=Carried(encoder=encoder, address=(tmp_path / "mae_resenc_l_weights").as_uri()),
    )
    assert not list(folder.rglob("*.pt"))
    download_large_files(bundle_path=str(folder))
    for name in ("model.pt", "pretrained_encoder.pt"):
        served = tmp_path / "mae_resenc_l_weights" / name
        assert (folder / "models" / name).read_bytes() == served.read_bytes()


def test_the_page_has_the_sections_of_the_template(bundle: str, exported: Export) -> None:
    page = (exported(bundle) / "docs" / "README.md").read_text()
    sections = ["### Authors", "### Tags", "## Model Description", "## Data", "### Preprocessing", "## Performance"]
    sections += ["## Additional Usage Steps", "## System Configuration", "## Limitations", "## Citation Info"]
    sections += ["## References"]
    places = [page.find(f"\n{section}\n") for section in sections]
    assert page.startswith(f"# {bundle}")
    assert -1 not in places, sections[places.index(-1)]
    assert places == sorted(places)
    assert "TorchScript" in page
    assert "TensorRT" in page


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the packages that a file imports from elsewhere, and whether at once."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            package = name.split(".")[0]
            if package not in sys.stdlib_module_names:
                yield package, node in tree.body


def test_the_required_packages_are_released_and_are_those_that_the_code_needs(bundle: str, exported: Export) -> None:
    folder = exported(bundle)
    metadata = config_of(folder, "metadata")
    required = metadata["required_packages_version"] | {
        name: metadata[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"), ("numpy", "numpy"))
    }
    for name, version in required.items():
        assert re.fullmatch(r"\d+(\.\d+)+", version), f"{name} {version} is not one released version"
        assert importlib.metadata.version(name).split("+")[0] == version
    available = {IMPORTED_AS.get(name, name) for name in required}
    needed = set()
    for path in (folder / "scripts").rglob("*.py"):
        for package, at_once in imports(path):
            needed.add(package)
            assert package in available | (set() if at_once else ON_REQUEST), f"{path} imports {package}"
    for path in (folder / "configs").glob("*.json"):
        for package in re.findall(r"\$(?:import|from) (\w+)", path.read_text()):
            assert package in available | sys.stdlib_module_names, f"{path} imports {package}"
        for package in re.findall(r'"_target_": "(\w+)\.', path.read_text()):
            assert package in available | {"scripts"}, f"{path} names a class of {package}"
    assert available == needed - ON_REQUEST | OF_MONAI, "nothing is asked for in vain"


def test_versions_and_names_in_the_metadata(bundle: str, exported: Export) -> None:
    metadata = config_of(exported(bundle), "metadata")
    assert metadata["version"] in metadata["changelog"]
    assert re.fullmatch(r"\d\.\d\.\d", metadata["version"]), "versions are sorted as text"
    assert metadata["schema"].endswith(SCHEMA.name)
    assert metadata["supported_apps"] == {}, "a name here makes the zoo look for that app's own rules"
    assert metadata["name"]
    formats = metadata["network_data_format"]
    assert (next(iter(formats["inputs"])), next(iter(formats["outputs"]))) == ("image", "pred")


def test_keys_that_the_zoo_asks_for(bundle: str, exported: Export) -> None:
    inference = config_of(exported(bundle), "inference")
    assert {"bundle_root", "device", "network_def", "inferer", "output_dir", "dataset_dir"} <= inference.keys()
    for name in ("train", "pretrain"):
        config = config_of(exported(bundle), name)
        assert {"bundle_root", "device", "dataset_dir", "output_dir", "val_interval"} <= config.keys()
        train, validate = config["train"], config["validate"]
        assert {"trainer", "dataset", "handlers", "inferer"} <= train.keys()
        assert "max_epochs" in train["trainer"]
        assert {"evaluator", "handlers", "dataset", "inferer", "key_metric"} <= validate.keys()
        assert "data" in train["dataset"]
        assert "data" in validate["dataset"]
        handlers = {handler["_target_"]: handler for handler in train["handlers"]}
        assert "@val_interval" in handlers["ValidationHandler"]["interval"]


def test_all_bundles_carry_the_same_code_and_a_backbone_of_one_kind(exported: Export) -> None:
    """So that what is tested with one bundle of a backbone here holds for the other seven."""
    code, networks = set(), {}
    for name in BUNDLES:
        folder = exported(name)
        files = sorted(path for path in (folder / "scripts").rglob("*") if path.suffix != ".pyc" and path.is_file())
        code.add(tuple((path.relative_to(folder).as_posix(), path.read_bytes()) for path in files))
        networks.setdefault(name.split("_", 1)[-1].endswith("primus_m"), set()).add(
            json.dumps(config_of(folder, "inference")["network_def"])
        )
    assert len(code) == 1
    assert {primus: len(definitions) for primus, definitions in networks.items()} == {True: 1, False: 1}


# MONAI's commands, called as Python functions; the command lines are below


def command_arguments(folder: Path) -> dict[str, Any]:
    """Return what the commands are given, as the zoo's verification does."""
    return {
        "net_id": "network_def",
        "meta_file": str(folder / "configs" / "metadata.json"),
        "config_file": str(folder / "configs" / "inference.json"),
        "bundle_root": str(folder),
    }


def test_verify_metadata(bundle: str, exported: Export, tmp_path: Path) -> None:
    shutil.copyfile(SCHEMA, tmp_path / "schema.json")  # a file that is there is not fetched
    verify_metadata(
        meta_file=str(exported(bundle) / "configs" / "metadata.json"), filepath=str(tmp_path / "schema.json")
    )


def test_verify_net_in_out(loaded: Path) -> None:
    monai_verify_net_in_out(**command_arguments(loaded), device="cpu")
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 3}
    with pytest.raises(ValueError, match="output channel number"):
        monai_verify_net_in_out(**command_arguments(loaded), device="cpu", **wrong)


@pytest.mark.parametrize("workflow", ["train", "inference"])
def test_load_returns_the_network_with_the_pre_trained_encoder(bundle: str, loaded: Path, workflow: str) -> None:
    network = load(bundle, bundle_dir=str(loaded.parent), workflow_type=workflow, device="cpu")
    assert type(network).__name__ == ("Primus" if bundle.endswith("primus_m") else "ResEncUNet")
    assert type(network).__module__.startswith("scripts.networks.")
    found = {key: value for key, value in network.state_dict().items() if key.startswith("encoder.")}
    encoder = read_checkpoint(loaded / "models" / "pretrained_encoder.pt")
    assert found.keys() == {key for key in encoder if key.startswith("encoder.")}
    for key, value in found.items():
        torch.testing.assert_close(value, encoder[key], rtol=0, atol=0)


def network_of(folder: Path) -> nn.Module:
    network: nn.Module = load(folder.name, bundle_dir=str(folder.parent), workflow_type="inference", device="cpu")
    return network.eval()


def expected(network: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = network(image)
    assert float(output.std()) > 0.1, "a network that answers nothing agrees with anything"
    return output


def test_torchscript_gives_the_same_output(bundle: str, loaded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loaded, tmp_path / bundle))
    ckpt_export(**command_arguments(folder))
    network = network_of(loaded)
    module, metadata, extra = load(bundle, bundle_dir=str(tmp_path), load_ts_module=True, device="cpu")
    for size in TWO_SIZES:
        image = torch.randn(size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(module(image), expected(network, image), rtol=1e-5, atol=1e-5)
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "foreground"}
    module, metadata, extra = load_net_with_metadata(
        str(folder / "models" / "model.ts"), more_extra_files=["inference.json"]
    )
    assert json.loads(extra["inference.json"]) == config_of(loaded, "inference")
    assert metadata["version"] == "0.1.0"
    with pytest.raises(WeightsError, match="not been trained to segment"):
        GaussianSlidingWindow(PATCH)(torch.zeros(1, 1, PATCH, PATCH, PATCH), module)


def assert_onnx_agrees(
    file: Path, network: nn.Module, sizes: tuple[tuple[int, ...], ...], *, tolerance: float = 1e-5
) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in sizes:
        image = torch.randn(size, generator=torch.Generator().manual_seed(0))
        (output,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), expected(network, image), rtol=tolerance, atol=tolerance)


@pytest.fixture
def _no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch writes weights beside the temporary file that MONAI gives it, and MONAI removes only that file."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.usefixtures("_no_litter")
def test_onnx_gives_the_same_output(loaded: Path, tmp_path: Path) -> None:
    ckpt = str(loaded / "models" / "model.pt")
    onnx_export(**command_arguments(loaded), ckpt_file=ckpt, filepath=str(tmp_path / "model.onnx"))
    assert_onnx_agrees(tmp_path / "model.onnx", network_of(loaded), ((1, 1, PATCH, PATCH, PATCH),))


@pytest.mark.usefixtures("_no_litter")
@pytest.mark.parametrize(
    "bundle", [name if name in WHOLE_CHAIN else pytest.param(name, marks=pytest.mark.slow) for name in BUNDLES]
)
@pytest.mark.parametrize("traced", [(1, 1, PATCH, PATCH, PATCH)])
def test_onnx_of_any_size_traced_at_the_size_of_training(
    bundle: str, exported: Export, traced: tuple[int, ...], tmp_path: Path
) -> None:
    """An ``if`` about the size would be burnt in, and every other size fail at run time."""
    with code_of(exported(bundle)) as folder:
        onnx_export(
            **command_arguments(folder),
            ckpt_file=str(folder / "models" / "model.pt"),
            filepath=str(tmp_path / "model.onnx"),
            input_shape=traced,
            converter_kwargs=dict(DYNAMIC),
        )
        assert_onnx_agrees(tmp_path / "model.onnx", network_of(folder), TWO_SIZES)


# properties, and the zoo's unit test: initialize, check, run, finalize


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index in range(4):
        image, mask = blobs(index)
        write_volume(folder / "images" / f"case_{index}.nii.gz", image)
        write_volume(folder / "labels" / f"case_{index}.nii.gz", mask)
    return folder


def workflow_of(folder: Path, configs: list[str], kind: str, **settings: Any) -> ConfigWorkflow:
    workflow = ConfigWorkflow(
        workflow_type=kind,
        config_file=[str(folder / "configs" / f"{name}.json") for name in configs],
        meta_file=str(folder / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(folder),
        **settings,
    )
    workflow.initialize()
    return workflow


def as_if_trained(folder: Path) -> None:
    weights = read_checkpoint(folder / "models" / "model.pt")
    write_checkpoint({key: value for key, value in weights.items() if key != "untrained"}, folder / "models/model.pt")


def test_properties_are_those_that_monai_asks_for(
    bundle: str, loaded: Path, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(loaded, tmp_path / bundle))
    store = {"store_dir": str(data / "store")}
    for configs in (["train"], ["train", "evaluate"]):
        assert workflow_of(folder, configs, "train", dataset_dir=str(data), **store).check_properties() == []
    pretrain = workflow_of(folder, ["pretrain"], "train", dataset_dir=str(data / "images"), **store)
    assert pretrain.check_properties() == []
    as_if_trained(folder)
    assert workflow_of(folder, ["inference"], "infer", dataset_dir=str(data)).check_properties() == []


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_the_unit_test_that_the_zoo_asks_for(bundle: str, exported: Export, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported(bundle), tmp_path / bundle))
    few = {"epochs": 1, "iterations_per_epoch": 2, "val_iterations": 1}
    with code_of(folder):
        for configs, kind, settings in (
            (["train"], "train", few),
            (["inference"], "infer", {"dataset_dir": str(data / "images")}),
            (["train", "evaluate"], "train", few),
        ):
            workflow = workflow_of(folder, configs, kind, **{"dataset_dir": str(data)} | settings)
            assert workflow.check_properties() == []
            workflow.run()
            workflow.finalize()
    assert "untrained" not in read_checkpoint(folder / "models" / "model.pt"), "training wrote the model"
    assert len(list((folder / "output" / "predictions").glob("*.nii.gz"))) == 4
    assert (folder / "output" / "evaluation" / "scores.csv").is_file()


# MONAI Deploy, whose package cannot be installed beside these: what its MonaiBundleInferenceOperator does, step by step


def trained_bundle(bundle: str, folder: Path, told: dict[str, Any]) -> Path:
    """Export a bundle with a model as training writes it, made with other settings than the defaults."""
    settings = narrow_settings(bundle)
    del settings["num_workers"]
    parser = ConfigParser(read_config(ROOT / "bundles" / bundle / "configs" / "inference.yaml"))
    parser.update(settings | {"ckpt_dir": str(folder / "nothing")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = parser.get_parsed_content("network_def")
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(network.state_dict(), folder / "model.pt")
    about = {"bundle": bundle, "labels": ["background", "foreground"], "channels": 1, "regions": None}
    write_json({"settings": settings | about | told}, folder / "model.json")
    return write_bundle(bundle, folder / bundle, settings={}, carried=Carried(model=folder / "model.pt"))


def deployed(script: Path, image: np.ndarray, affine: np.ndarray) -> Tensor:
    """Return the label map that the operator makes with a TorchScript file, of a volume that was read from DICOM."""
    with zipfile.ZipFile(script) as archive:
        metadata, config = (json.loads(archive.read(f"model/extra/{name}.json")) for name in ("metadata", "inference"))
    parser = ConfigParser(config)
    parser.read_meta(metadata)
    parser.parse()
    inferer, before, after = map(parser.get_parsed_content, ("inferer", "preprocessing", "postprocessing"))
    for chain in (before, after):
        kept = [step for step in chain.transforms if not type(step).__name__.startswith(("LoadImage", "SaveImage"))]
        chain.transforms = tuple(kept)
        assert isinstance(kept[0], MapTransform)
    meta = {"spacing": np.abs(np.diag(affine)[:3]), "original_affine": affine, "affine": affine.copy(), "space": "LPS"}
    meta |= {"spatial_shape": np.asarray(image.shape), "original_channel_dim": "no_channel"}
    read = MetaTensor.ensure_torch_and_prune_meta(torch.from_numpy(image), meta)
    with torch.no_grad():
        prepared = before({"image": read})["image"]
        logits = inferer(inputs=prepared[None], network=torch.jit.load(script).eval())
        output: Tensor = after({"pred": logits[0], "image": prepared})["pred"]
    return output.squeeze(0)


@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_monai_deploy_answers_as_the_bundle_does(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With only the TorchScript file and the code at hand, and other spacing and normalisation than the defaults."""
    told = {"spacing_mm": [1.5, 1.2, 1.2], "normalization": "zscore_nonzero"}
    folder = trained_bundle(bundle, tmp_path / "made", told)
    image, affine = blobs(7)[0], np.diag([-1.1, -1.2, 0.9, 1.0])  # a DICOM series runs to the left and back
    image[:, :5] = 0
    (tmp_path / "images").mkdir()
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "images" / "case.nii.gz")
    with code_of(folder):
        workflow = workflow_of(folder, ["inference"], "infer", dataset_dir=str(tmp_path / "images"), pictures=0)
        workflow.run()
        predicted = np.asarray(nib.load(folder / "output" / "predictions" / "case.nii.gz").dataobj)
        ckpt_export(**command_arguments(folder))
        (folder / "models" / "model.ts").rename(tmp_path / "model.ts")
        shutil.rmtree(folder / "models")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        found = deployed(tmp_path / "model.ts", image, affine)
    assert 0.01 < predicted.mean() < 0.99
    np.testing.assert_array_equal(found.numpy(), predicted)


def test_a_model_of_another_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="was trained with simclr_resenc_l, not with mae_resenc_l"):
        trained_bundle("mae_resenc_l", tmp_path, {"bundle": "simclr_resenc_l"})
    assert not (tmp_path / "mae_resenc_l").exists()


# the command lines of docs/model_zoo.md


def monai_bundle(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TMPDIR": str(cwd)}
    environment = kept | ({"PYTHONPATH": str(path)} if path else {})
    command = [python(), "-W", "ignore", "-m", "monai.bundle", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


FILES = ("--net_id", "network_def", "--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json")


def test_command_lines(exported: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("mae_resenc_l"), tmp_path / "mae_resenc_l"))
    inside = monai_bundle("ckpt_export", "--config_file", "configs/inference.json", cwd=folder)
    assert inside.returncode == 0, inside.stderr[-2000:]
    weights = ("--ckpt_file", "models/model.pt", "--filepath", "models/model.onnx")
    onnx = monai_bundle("onnx_export", *FILES, *weights, "--converter_kwargs", str(DYNAMIC), cwd=folder)
    assert onnx.returncode == 0, onnx.stderr[-2000:]
    (tmp_path / "elsewhere").mkdir()
    absolute = [str(folder / name) if name.startswith("configs") else name for name in FILES]
    elsewhere = monai_bundle("verify_net_in_out", *absolute, cwd=tmp_path / "elsewhere", path=folder)
    assert elsewhere.returncode == 0, elsewhere.stderr[-2000:]
    with code_of(folder):
        network = network_of(folder)
        assert_onnx_agrees(folder / "models" / "model.onnx", network, TWO_SIZES)
        image = torch.randn(TWO_SIZES[0])
        script = torch.jit.load(folder / "models" / "model.ts")
        torch.testing.assert_close(script(image), expected(network, image), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_litter")
@pytest.mark.parametrize("bundle", WHOLE_CHAIN)
def test_at_the_published_size(bundle: str, tmp_path: Path) -> None:
    """The network, the 160^3 crops and the metadata that users have; 12 GB of memory.

    The instance norms of onnxruntime lose digits over so many voxels: six times PyTorch's error, against float64.
    """
    encoder = write_encoder(bundle, tmp_path / "encoder.pt", {})
    folder = write_bundle(bundle, tmp_path / bundle, settings={}, carried=Carried(encoder=encoder))
    with code_of(folder):
        monai_verify_net_in_out(**command_arguments(folder), device="cpu")
        network = network_of(folder)
        image = torch.randn(1, 1, 160, 160, 160, generator=torch.Generator().manual_seed(0))
        answer = expected(network, image)
        ckpt_export(**command_arguments(folder))
        module, *_ = load(bundle, bundle_dir=str(tmp_path), load_ts_module=True, device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(module(image), answer, rtol=1e-5, atol=1e-5)
        del module
        file = folder / "models" / "model.onnx"
        ckpt = str(folder / "models" / "model.pt")
        onnx_export(**command_arguments(folder), ckpt_file=ckpt, filepath=str(file), converter_kwargs=dict(DYNAMIC))
        tolerance = 1e-5 if bundle.endswith("primus_m") else 1e-3
        assert_onnx_agrees(file, network, ((1, 1, 160, 160, 160), (1, 1, 96, 64, 96)), tolerance=tolerance)


def test_what_verify_metadata_needs_besides_is_named() -> None:
    """MONAI imports it only there, and its message without it is about something else."""
    page, pins = (ROOT / "docs" / "model_zoo.md").read_text("utf-8"), (ROOT / "requirements-dev.txt").read_text("utf-8")
    (named,) = re.findall(r"pip install (jsonschema==\S+)`", page)
    assert f"{named}\n" in pins
