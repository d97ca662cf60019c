# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What bundles do for a labelling server, without one; tests/ecosystem starts a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from monai.transforms import Invertd
from torch import nn

from common.data import segmentation_task
from common.engines import GaussianSlidingWindow, ModelPreprocessing
from common.transforms import KeepLargestComponentd, RestoreSegmentationd, SaveProbabilitiesd, volume_preprocessing

from ..conftest import ROOT, blobs, write_volume
from ..starts import python


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monailabel", ModuleType("monailabel"))


def train(model: Path, **settings: object) -> None:
    model.with_suffix(".json").write_text(json.dumps({"settings": settings}), "utf-8")


def shape_of(preprocessing: ModelPreprocessing, file: Path) -> list[int]:
    return list(preprocessing({"image": str(file)})["image"].shape[1:])


@pytest.mark.usefixtures("served")
def test_a_server_preprocesses_as_the_latest_model_was_trained(tmp_path: Path) -> None:
    file, model = write_volume(tmp_path / "image.nii.gz", blobs(0, (20, 24, 28))[0]), tmp_path / "model.pt"
    preprocessing = ModelPreprocessing(str(model), keys="image", spacing_mm=1.0, normalization="zscore")
    first = preprocessing.transforms
    assert shape_of(preprocessing, file) == [28, 24, 20]
    assert preprocessing.transforms is first  # the trace of an image is undone by the objects that made it
    train(model, spacing_mm=[2.0, 1.0, 1.0], normalization=[{"ct": [-100.0, 300.0, 50.0, 80.0]}])
    assert shape_of(preprocessing, file) == [14, 24, 20]
    same = volume_preprocessing(
        "image", spacing_mm=[2.0, 1.0, 1.0], normalization=[{"ct": [-100.0, 300.0, 50.0, 80.0]}]
    )
    torch.testing.assert_close(preprocessing({"image": str(file)})["image"], same({"image": str(file)})["image"])
    train(model, spacing_mm=1.0)
    assert shape_of(preprocessing, file) == [28, 24, 20]


def test_a_run_keeps_the_settings_that_it_began_with(tmp_path: Path) -> None:
    file, model = write_volume(tmp_path / "image.nii.gz", blobs(0, (20, 24, 28))[0]), tmp_path / "model.pt"
    preprocessing = ModelPreprocessing(str(model), keys="image", spacing_mm=1.0)
    train(model, spacing_mm=2.0)
    assert shape_of(preprocessing, file) == [28, 24, 20]


class Doubtful(nn.Module):
    """Logits that are the image and its negative."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([image, -image], 1)


def test_a_sampled_network_gives_probabilities_a_network_in_use_logits() -> None:
    image, network = torch.randn(1, 1, 6, 5, 7), Doubtful()
    classes = segmentation_task(["background", "lesion"])
    regions = segmentation_task(["background", "edema", "core"], regions={"whole": [1, 2], "core": [2]})
    logits = network(image)
    network.eval()
    torch.testing.assert_close(GaussianSlidingWindow(4, task=classes)(image, network), logits)
    network.train()
    torch.testing.assert_close(GaussianSlidingWindow(4, task=classes)(image, network), logits.softmax(1))
    torch.testing.assert_close(GaussianSlidingWindow(4, task=regions)(image, network), logits.sigmoid())
    torch.testing.assert_close(GaussianSlidingWindow(4)(image, network), logits)


def test_scoring_leaves_out_what_makes_label_maps() -> None:
    chain = volume_preprocessing("image")
    task = segmentation_task(["background", "lesion"])
    steps = [
        SaveProbabilitiesd("pred", transform=chain, task=task, output_dir="out"),
        RestoreSegmentationd("pred", transform=chain, task=task),
        KeepLargestComponentd("pred", task=task),
    ]
    assert [isinstance(step, Invertd) for step in steps] == [False, True, True]


def test_predictions_are_restored_though_the_code_was_imported_anew_in_between(tmp_path: Path) -> None:
    file = write_volume(tmp_path / "image.nii.gz", blobs(0)[0])
    program = """
import sys, torch
from common.transforms import volume_preprocessing
chain = volume_preprocessing("image")
data = chain({"image": sys.argv[1]})
data["pred"] = torch.cat([-data["image"], data["image"]])
for name in [name for name in sys.modules if name.split(".")[0] == "common"]:
    del sys.modules[name]
from common.data import segmentation_task
from common.transforms import RestoreSegmentationd
task = segmentation_task(["background", "bright"])
print(tuple(RestoreSegmentationd("pred", transform=chain, task=task)(data)["pred"].shape))
"""
    done = subprocess.run([python(), "-c", program, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["(1, 24, 28, 26)"], done.stderr[-2000:]
