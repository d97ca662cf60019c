# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The inference config as a user runs it, with a network that reads the label off the image's intensity."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle
from torch import Tensor, nn

from common.bundles import read_config
from common.engines import evaluate_predictions
from common.errors import DataError, SettingsError, WeightsError, sentence
from common.files import write_json
from common.networks import Ensemble, ResEncUNet
from common.weights import trained_network, trained_settings, write_checkpoint

from ..conftest import BUNDLES, ROOT, run
from ..starts import python

LABELS = ["background", "a", "b"]
SMALL = {"features_per_stage": [4, 8], "blocks_per_stage": [1, 1], "patch_size": [8, 8, 8]}


class Oracle(nn.Module):
    """Logits that are highest for the class whose number, plus 1, the first channel shows."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, image: Tensor) -> Tensor:
        wanted = torch.arange(1.0, self.outputs + 1).view(1, -1, 1, 1, 1)
        return -((image[:, :1] - wanted) ** 2)


def predict(dataset: Path, output: Path, *, bundle: str = "mae_resenc_l", **settings: Any) -> Path:
    """Run the config in this process; without a model, with the oracle."""
    if "model" not in settings:
        settings = {"network": Oracle(), "labels": LABELS, "normalization": "none", "model": "none.pt"} | settings
    base = {"patch_size": [8, 8, 8], "num_workers": 0, "device": torch.device("cpu"), "pictures": 0}
    places = {"dataset_dir": str(dataset), "output_dir": str(output), "bundle_root": f"bundles/{bundle}"}
    settings = {name: "$None" if value is None else value for name, value in settings.items()}  # MONAI drops None
    run_bundle(config_file=f"bundles/{bundle}/configs/inference.yaml", **(base | places | settings))
    return output


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def labels_in(shape: tuple[int, int, int]) -> np.ndarray:
    """A smooth map of three classes without any symmetry, and a part outside that the image does not show."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    values = np.zeros(shape, np.int16)
    values[(grid**2).sum(0) < 0.5] = 1
    values[((grid - np.array([0.1, -0.3, 0.2])[:, None, None, None]) ** 2).sum(0) < 0.15] = 2
    return values


def turned(codes: str, shape: tuple[int, ...], spacing: tuple[float, ...], *, degrees: float = 0.0) -> np.ndarray:
    """Return the affine of a file with axes ``codes``, turned about the third axis."""
    turn, angle = np.eye(4), np.deg2rad(degrees)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape)
    affine = turn @ np.linalg.inv(axes) @ np.diag([*spacing, 1])
    affine[:3, 3] = [-31.25, 12.5, 7.125]
    return affine


def write(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine, code=1)
    nib.save(image, path)
    return path


def scan(path: Path, labels: np.ndarray, affine: np.ndarray) -> Path:
    """Write the image off which the oracle reads ``labels``: their value plus 1, and a margin of 0 that is cropped."""
    values = labels.astype(np.float32) + 1
    values[:2], values[:, -1:] = 0, 0
    return write(path, values, affine)


GRIDS = [
    *((codes, (1.0, 1.0, 1.0), 0.0) for codes in ("LPS", "RAS", "LIA")),
    *(("LPS", (1.0, 1.0, 1.0), 25.0), ("SRA", (0.8, 1.5, 1.1), -40.0), ("RAS", (1.0, 1.0, 6.0), 0.0)),
]


@pytest.mark.parametrize("spacing_mm", [None, 1.0, [2.0, 0.9, 1.2]])
def test_predictions_lie_where_the_labels_are(tmp_path: Path, spacing_mm: Any) -> None:
    """Any orientation, oblique, anisotropic: exactly without resampling, within a voxel of the border with it."""
    truth = labels_in((22, 19, 14))
    for index, (codes, spacing, degrees) in enumerate(GRIDS):
        affine = turned(codes, truth.shape, spacing, degrees=degrees)
        scan(tmp_path / "images" / f"case_{index}.nii.gz", truth, affine)
    predict(tmp_path, tmp_path / "out", spacing_mm=spacing_mm)
    for index, (codes, spacing, degrees) in enumerate(GRIDS):
        source = nib.load(tmp_path / "images" / f"case_{index}.nii.gz")
        found = nib.load(tmp_path / "out" / f"case_{index}.nii.gz")
        assert found.get_data_dtype() == np.uint8
        assert found.shape == source.shape
        assert np.array_equal(found.affine, source.affine), "to the last bit"
        for code in ("sform_code", "qform_code", "xyzt_units"):
            assert found.header[code] == source.header[code]
        shown = np.asarray(source.dataobj) > 0
        expected, values = np.where(shown, truth, 0), np.asarray(found.dataobj)
        if spacing_mm is None or (spacing_mm == 1.0 and spacing == (1.0, 1.0, 1.0)):
            assert np.array_equal(values, expected)
        assert (values == expected).mean() > 0.9, (codes, spacing, degrees)
        for value in (1, 2):
            overlap = 2 * ((values == value) & (expected == value)).sum()
            assert overlap / ((values == value).sum() + (expected == value).sum()) > 0.85, (codes, spacing, value)


def test_a_case_smaller_than_the_patch(tmp_path: Path) -> None:
    truth = labels_in((9, 7, 5))
    scan(tmp_path / "images" / "small.nii.gz", truth, np.eye(4))
    predict(tmp_path, tmp_path / "out", patch_size=[16, 24, 8])
    shown = np.asarray(nib.load(tmp_path / "images" / "small.nii.gz").dataobj) > 0
    found = np.asarray(nib.load(tmp_path / "out" / "small.nii.gz").dataobj)
    assert np.array_equal(found, np.where(shown, truth, 0))


@pytest.mark.parametrize("four_dimensional", [False, True])
def test_two_channels(tmp_path: Path, four_dimensional: bool) -> None:
    truth, rng = labels_in((14, 12, 10)), np.random.default_rng(0)
    affine = turned("LIA", truth.shape, (1, 1, 1), degrees=10)
    channels = [truth.astype(np.float32) + 1, rng.random(truth.shape).astype(np.float32)]
    if four_dimensional:
        write(tmp_path / "imagesTs" / "x.nii.gz", np.stack(channels, -1), affine)
    else:
        for index, values in enumerate(channels):
            write(tmp_path / "imagesTs" / f"x_{index:04d}.nii.gz", values, affine)
    predict(tmp_path, tmp_path / "out", channels=2)
    found = nib.load(tmp_path / "out" / "x.nii.gz")
    assert found.shape == truth.shape
    assert np.allclose(found.affine, affine)
    assert np.array_equal(np.asarray(found.dataobj), truth)


class RegionOracle(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([image[:, :1] - 1.5, image[:, :1] - 2.5], dim=1)


def test_regions(tmp_path: Path) -> None:
    truth = labels_in((14, 12, 10))
    scan(tmp_path / "images" / "x.nii.gz", truth, np.eye(4))
    regions = {"whole": [1, 2], "core": [2]}
    predict(tmp_path, tmp_path / "out", network=RegionOracle(), regions=regions, probabilities=True)
    shown = np.asarray(nib.load(tmp_path / "images" / "x.nii.gz").dataobj) > 0
    found = np.asarray(nib.load(tmp_path / "out" / "x.nii.gz").dataobj)
    assert np.array_equal(found, np.where(shown, truth, 0))
    shares = np.asarray(nib.load(tmp_path / "out" / "probabilities" / "x_probabilities.nii.gz").dataobj)
    assert np.array_equal(shares[..., 0] > 0.5, found > 0)
    assert np.array_equal(shares[..., 1] > 0.5, found == 2)


def test_everything_on_request_and_pictures(tmp_path: Path) -> None:
    truth = labels_in((14, 12, 10))
    truth[0:2, 0, 0] = 0
    truth[-1, 0, 0] = 2  # a speck
    for name in ("x", "y"):
        write(tmp_path / "images" / f"{name}.nii.gz", truth.astype(np.float32) + 1, np.diag([1, 1, 3.0, 1]))
    options = {"mirror_axes": [0, 1, 2], "tiles_per_step": 3, "overlap": 0.25}
    predict(tmp_path, tmp_path / "out", largest_component=["b"], probabilities=True, pictures=1, **options)
    found = np.asarray(nib.load(tmp_path / "out" / "x.nii.gz").dataobj)
    assert found[-1, 0, 0] == 0
    assert (found == 2).sum() > 10
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    shares = [f"probabilities/{name}_probabilities.nii.gz" for name in ("x", "y")]
    assert files == ["made_of.jsonl", "pictures/x.png", *shares, "report.html", "x.nii.gz", "y.nii.gz"]
    assert (tmp_path / "out" / "pictures" / "x.png").stat().st_size > 5000


def bad_cases(folder: Path) -> None:
    """Beside two good ones: cut short in the voxels, NaN, a 4-D file, constant where it is not 0."""
    truth = labels_in((14, 12, 10))
    for name in ("good_1", "good_2", "cut", "nan", "box", "four"):
        scan(folder / "images" / f"{name}.nii.gz", truth, np.eye(4))
    cut = folder / "images" / "cut.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-200])
    values = truth.astype(np.float32)
    values[3, 4, 5] = np.nan
    write(folder / "images" / "nan.nii.gz", values, np.eye(4))
    write(folder / "images" / "box.nii.gz", np.pad(np.ones((8, 8, 8), np.float32), 3), np.eye(4))
    write(folder / "images" / "four.nii.gz", np.stack([values, values], -1), np.eye(4))


def test_bad_cases_are_reported_and_the_rest_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad_cases(tmp_path)
    predict(tmp_path, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["good_1.nii.gz", "good_2.nii.gz"]
    told = capsys.readouterr().out
    *_, before, result, look, following = told.rstrip().splitlines()
    assert before == f"2 of 6 cases predicted, 4 failed; see {tmp_path / 'out' / 'failed.json'}"
    assert (result, look) == (f"result:  {tmp_path / 'out'}", f"look at: {tmp_path / 'out'}")
    assert following.startswith("next:    python -m monai.bundle run --config_file bundles/mae_resenc_l/configs/eval")
    assert told.index("four.nii.gz has 4 dimensions") < told.index("Failed:"), "headers are looked at first"
    failed = {entry["case"]: entry["problem"] for entry in json.loads((tmp_path / "out" / "failed.json").read_text())}
    for case, words in (
        ("cut", "cut short or damaged"),
        ("nan", "1 voxels that are NaN"),
        ("box", "constant where it is not zero"),
        ("four", "has 4 dimensions"),
    ):
        assert words in failed[case]
        assert failed[case] in told
    with pytest.raises((DataError, SettingsError, RuntimeError)) as error:
        predict(tmp_path, tmp_path / "out")
    assert "2 of 6 predictions are in" in capsys.readouterr().out
    assert "nothing could be predicted" in str(sentence(error.value))
    for case in failed:
        scan(tmp_path / "images" / f"{case}.nii.gz", labels_in((14, 12, 10)), np.eye(4))
    predict(tmp_path, tmp_path / "out")
    assert "6 of 6 cases predicted (2 of them before)" in capsys.readouterr().out
    assert not (tmp_path / "out" / "failed.json").exists()


def test_strict_stops_at_the_first(tmp_path: Path) -> None:
    bad_cases(tmp_path)
    with pytest.raises((DataError, SettingsError, RuntimeError)) as error:
        predict(tmp_path, tmp_path / "out", strict=True)
    assert "four.nii.gz" in str(sentence(error.value)), "which its header tells"
    (tmp_path / "images" / "four.nii.gz").unlink()
    with pytest.raises((DataError, SettingsError, RuntimeError)) as error:
        predict(tmp_path, tmp_path / "out", strict=True)
    assert "cut.nii.gz" in str(sentence(error.value)), "whose packed stream ends too early"
    (tmp_path / "images" / "cut.nii.gz").unlink()
    with pytest.raises((DataError, SettingsError, RuntimeError)) as error:
        predict(tmp_path, tmp_path / "out", strict=True)
    assert "constant where it is not zero" in str(sentence(error.value)), "the first in the order of names"


class Failing(Oracle):
    """Fails for the second and third volume: as a full GPU does, and as a mistake does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, image: Tensor) -> Tensor:
        call = next(self.calls)
        if call == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        if call == 2:
            raise KeyError("what")
        return super().forward(image)


def test_a_case_that_fails_in_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(4):
        scan(tmp_path / "images" / f"case_{index}.nii.gz", labels_in((8, 9, 8)), np.eye(4))
    predict(tmp_path, tmp_path / "out", network=Failing(), patch_size=[16, 16, 16])
    told = capsys.readouterr().out
    assert "2 of 4 cases predicted, 2 failed" in told
    assert "case_1 does not fit into the GPU's memory; add --accumulate_on cpu" in told
    assert "case_2 failed with KeyError" in told
    entries = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert "in forward" in entries[1]["details"]


class Killed(Oracle):
    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, image: Tensor) -> Tensor:
        if next(self.calls) == 2:
            raise KeyboardInterrupt
        return super().forward(image)


def test_an_interrupted_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = labels_in((8, 9, 8))
    for index in range(4):
        scan(tmp_path / "images" / f"case_{index}.nii.gz", truth, np.eye(4))
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path, tmp_path / "out", network=Killed(), patch_size=[16, 16, 16])
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.nii.gz")}
    assert len(there) == 2
    assert not list((tmp_path / "out").rglob("*.part*"))
    predict(tmp_path, tmp_path / "out", patch_size=[16, 16, 16])
    assert "4 of 4 cases predicted (2 of them before)" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 4
    predict(tmp_path, tmp_path / "out", probabilities=True)
    assert len(list((tmp_path / "out" / "probabilities").iterdir())) == 4, "what is asked for in addition is made"


def test_predictions_are_not_mixed_and_images_not_replaced(tmp_path: Path) -> None:
    scan(tmp_path / "data" / "x.nii.gz", labels_in((8, 9, 8)), np.eye(4))
    predict(tmp_path / "data", tmp_path / "data" / "out")
    before = (tmp_path / "data" / "x.nii.gz").read_bytes()

    def refused(output: Path, **settings: Any) -> str:
        with pytest.raises((DataError, SettingsError, RuntimeError)) as error:
            predict(tmp_path / "data", output, **settings)
        return str(sentence(error.value))

    assert "mirror_axes [] -> [0]" in refused(tmp_path / "data" / "out", mirror_axes=[0])
    predict(tmp_path / "data", tmp_path / "data" / "out", mirror_axes=[0], overwrite=True)
    scan(tmp_path / "data" / "y.nii.gz", labels_in((8, 9, 8)), np.eye(4))
    predict(tmp_path / "data", tmp_path / "data" / "out", mirror_axes=[0])
    names = sorted(p.name for p in (tmp_path / "data" / "out").glob("*.nii.gz"))
    assert names == ["x.nii.gz", "y.nii.gz"], "earlier predictions below the data are no cases"
    assert "another --output_dir" in refused(tmp_path / "data", overwrite=True)
    assert (tmp_path / "data" / "x.nii.gz").read_bytes() == before


def test_folders_in_names_are_kept_and_each_image_gets_its_own_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sites whose scans are called alike; then one is replaced, one is moved, and one is of a third site."""
    sites = {f"site{letter}/scan": np.roll(labels_in((14, 12, 10)), step, 0) for letter, step in (("A", 0), ("B", 3))}
    entries = []
    for name, truth in sites.items():
        truth[:2], truth[:, -1:] = 0, 0  # which the image does not show
        scan(tmp_path / "in" / f"{name}.nii.gz", truth, np.eye(4))
        write(tmp_path / "labels" / f"{name}.nii.gz", truth, np.eye(4))
        entries.append({"image": f"in/{name}.nii.gz", "label": f"labels/{name}.nii.gz", "name": name})
    file, out = tmp_path / "list.json", tmp_path / "out"
    file.write_text(json.dumps({"test": entries, "validation": entries}))

    def predicted(**options: Any) -> list[np.ndarray]:
        predict(tmp_path, out, datalist=str(file), **options)
        return [np.asarray(nib.load(out / f"{name}.nii.gz").dataobj) for name in sites]

    for found, truth in zip(predicted(probabilities=True, pictures=2), sites.values(), strict=True):
        assert np.array_equal(found, truth)
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == [
        "made_of.jsonl",
        *(f"pictures/{name}.png" for name in sites),
        *(f"probabilities/{name}_probabilities.nii.gz" for name in sites),
        "report.html",
        *(f"{name}.nii.gz" for name in sites),
    ]
    truth = sites["siteA/scan"].copy()
    truth[4:6] = 2
    truth[:, -1:] = 0
    scan(tmp_path / "in" / "siteA" / "scan.nii.gz", truth, np.eye(4))
    (tmp_path / "in" / "siteB").rename(tmp_path / "in" / "moved")
    entries[1]["image"] = "in/moved/scan.nii.gz"
    file.write_text(json.dumps({"test": entries, "validation": entries}))
    settings: dict[str, Any] = {"predictions": str(out), "dataset_dir": "", "datalist": str(file), "labels": LABELS}
    evaluate_predictions(**settings, split="validation", output_dir=str(tmp_path / "scores"), resamples=0)
    skipped = json.loads((tmp_path / "scores" / "scores.json").read_text())["skipped"]
    assert set(skipped) == {"siteA/scan"}
    assert "was made of another image than" in skipped["siteA/scan"]
    capsys.readouterr()
    first, second = predicted()
    told = capsys.readouterr().out
    assert "1 prediction(s) in" in told
    assert "2 of 2 cases predicted (1 of them before)" in told, "what was moved is the same image"
    assert np.array_equal(first, truth)
    assert np.array_equal(second, sites["siteB/scan"])
    left = sorted(
        path.name for folder in ("pictures/siteA", "probabilities/siteA") for path in (out / folder).iterdir()
    )
    assert left == [], "nothing is left of the image before"
    assert evaluate_predictions(**settings, output_dir=str(tmp_path / "scores"), resamples=0)["mean"] is not None
    (out / "made_of.jsonl").unlink()
    with pytest.raises(Exception, match=r".") as error:
        predicted()
    assert "nothing tells which image" in str(sentence(error.value))
    evaluate_predictions(**settings, output_dir=str(tmp_path / "scores"), resamples=0)
    assert "nothing tells of which images 2 of 2 prediction(s) were made" in capsys.readouterr().out


def model(path: Path, *, seed: int = 0, outputs: int = 3, **settings: Any) -> Path:
    """Write a model and its JSON as training does."""
    torch.manual_seed(seed)
    network = ResEncUNet(1, outputs, features_per_stage=[4, 8], blocks_per_stage=[1, 1])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_checkpoint(network.state_dict(), path)
    write_json({"settings": {"labels": LABELS, **SMALL, "spacing_mm": 1.0, **settings}}, path.with_suffix(".json"))
    return path


def test_settings_come_from_the_model(tmp_path: Path) -> None:
    scan(tmp_path / "images" / "x.nii.gz", labels_in((14, 12, 10)), np.eye(4))
    path = model(tmp_path / "models" / "model.pt", normalization=["none"], spacing_mm=[2.0, 1.0, 1.0])
    parser = ConfigParser(read_config("bundles/mae_resenc_l/configs/inference.yaml"))
    parser["model"] = str(path)
    told = {name: parser.get_parsed_content(name) for name in ("labels", "spacing_mm", "normalization", *SMALL)}
    assert told == {"labels": LABELS, "spacing_mm": [2.0, 1.0, 1.0], "normalization": ["none"], **SMALL}
    assert parser.get_parsed_content("channels") == 1, "what it does not say is as published"
    line = [python(), "-m", "monai.bundle", "run", "--config_file", "bundles/mae_resenc_l/configs/inference.yaml"]
    places = ["--bundle_root", "bundles/mae_resenc_l", "--dataset_dir", tmp_path, "--output_dir", tmp_path / "out"]
    result = subprocess.run(
        [*line, *map(str, places), "--model", str(path), "--num_workers", "0", "--pictures", "true"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"1 of 1 cases predicted; they are in {tmp_path / 'out'}" in result.stdout
    assert (tmp_path / "out" / "x.nii.gz").exists()


def test_a_setting_that_is_not_the_models_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(model(tmp_path / "model.pt", regions={"whole": [1, 2], "core": [2]}, num_heads=2))
    network = ResEncUNet(1, 3, features_per_stage=[4, 8], blocks_per_stage=[1, 1])
    for name, value in (
        ("labels", ["background", "x", "y"]),
        ("spacing_mm", 2.0),
        ("regions", {"core": [2], "whole": [1, 2]}),
    ):
        with pytest.raises(WeightsError, match=f"--{name} was"):
            trained_network(network, path, settings={name: value})
    other = {"patch_size": [16, 16, 16], "spacing_mm": 2.0}
    with pytest.raises(WeightsError, match=r"was \[8, 8, 8\], here .* or insist with --override_input true"):
        trained_network(network, path, settings=other)
    capsys.readouterr()
    trained_network(network, path, settings=other, override_input=True)
    assert (
        "note: patch_size of training was [8, 8, 8], here [16, 16, 16], by --override_input" in capsys.readouterr().out
    )
    with pytest.raises(WeightsError, match="--labels was") as error:
        trained_network(network, path, settings=other | {"labels": ["background", "x"]}, override_input=True)
    assert "override" not in str(error.value), "which would not help"
    trained_network(network, path, settings={"spacing_mm": [1.0, 1.0, 1.0], "channels": 4})  # the same; not recorded
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(WeightsError, match=r"model\.json is not the JSON that was written"):
        trained_settings(path)
    assert trained_settings(str(tmp_path / "none.pt")) == {}
    with pytest.raises(WeightsError, match="names no file"):
        trained_network(network, str(tmp_path / "fold_*" / "model.pt"), settings={})


def test_several_models_are_averaged(tmp_path: Path) -> None:
    truth = labels_in((14, 12, 10))
    scan(tmp_path / "images" / "x.nii.gz", truth, np.eye(4))
    paths = [model(tmp_path / f"fold_{n}" / "model.pt", seed=n) for n in range(3)]
    together = predict(tmp_path, tmp_path / "a", model=[str(path) for path in paths], probabilities=True)
    pattern = predict(tmp_path, tmp_path / "b", model=str(tmp_path / "fold_*" / "model.pt"))
    alone = predict(tmp_path, tmp_path / "c", model=str(paths[0]), probabilities=True)
    found, again, other = (np.asarray(nib.load(p / "x.nii.gz").dataobj) for p in (together, pattern, alone))
    assert np.array_equal(found, again)
    assert not np.array_equal(found, other)
    networks = []
    for path in paths:
        network = ResEncUNet(1, 3, features_per_stage=[4, 8], blocks_per_stage=[1, 1])
        networks.append(trained_network(network, str(path), settings={}).eval())
    image = torch.randn(1, 1, 8, 8, 8)
    ensemble = trained_network(network, [str(path) for path in paths], settings={}).eval()
    assert isinstance(ensemble, Ensemble)
    with torch.no_grad():
        expected = torch.stack([network(image) for network in networks]).mean(0)
        torch.testing.assert_close(ensemble(image), expected)
    write_json({"settings": {"labels": ["background", "x", "y"]}}, paths[2].with_suffix(".json"))
    with pytest.raises(WeightsError, match="fold_2"):
        trained_network(network, [str(path) for path in paths], settings={"labels": LABELS})


def test_primus_predicts_with_tiles_of_its_own_size(tmp_path: Path) -> None:
    scan(tmp_path / "images" / "x.nii.gz", labels_in((14, 12, 10)), np.eye(4))
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": [16, 16, 16], "labels": LABELS}
    parser = ConfigParser(read_config("bundles/mae_primus_m/configs/inference.yaml"))
    parser.update(small)
    write_checkpoint(parser.get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    write_json({"settings": small}, tmp_path / "model.json")
    for patch in ([16, 16, 16], [16, 24, 16]):
        where = tmp_path / f"out_{patch[1]}"
        other = {"patch_size": patch, "override_input": patch[1] > 16}
        predict(tmp_path, where, bundle="mae_primus_m", model=str(tmp_path / "model.pt"), **other)
        assert (where / "x.nii.gz").exists()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_tools_that_serve_bundles_find_what_they_need(bundle: str, tmp_path: Path) -> None:
    """MONAI Label runs the parts one by one on a dictionary, without dataset, and drops what saves."""
    if not bundle.startswith("mae_"):
        parser = ConfigParser(read_config(f"bundles/{bundle}/configs/inference.yaml"))
        assert parser.get_parsed_content("inferer").roi_size == [160, 160, 160]
        return
    truth = labels_in((14, 12, 10))
    path = scan(tmp_path / "x.nii.gz", truth, turned("LIA", truth.shape, (1, 1, 1)))
    parser = ConfigParser(read_config(f"bundles/{bundle}/configs/inference.yaml"))
    parser.update({"labels": LABELS, "patch_size": [8, 8, 8], "normalization": "none", "bundle_root": str(tmp_path)})
    data = {"image": str(path)}
    for step in parser.get_parsed_content("preprocessing").transforms:
        data = step(data)
    data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], Oracle())[0]
    for step in parser.get_parsed_content("postprocessing").transforms:
        if type(step).__name__ != "SaveImaged":
            data = step(data)
    shown = np.asarray(nib.load(path).dataobj) > 0
    assert data["pred"].shape == (1, *truth.shape)
    assert np.array_equal(data["pred"][0].numpy(), np.where(shown, truth, 0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.nii.gz"], "nothing is written"


def test_the_command_line_ends_in_sentences(images: Path, tmp_path: Path) -> None:
    path = model(tmp_path / "model.pt")
    result = run(
        *("mae_resenc_l", "inference", "--dataset_dir", images, "--model", path, "--patch_size", "[8,8,8]"),
        *("--features_per_stage", "[4,8]", "--blocks_per_stage", "[1,1]", "--output_dir", tmp_path / "out"),
        *(
            "--largest_component",
            "['nothing']",
        ),
        check=False,
    )
    assert result.returncode == 1
    assert "largest_component names 'nothing'" in result.stderr[result.stderr.rindex("Stopped:") :]
