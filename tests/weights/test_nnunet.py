# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Models of nnU-Net, out and in, against what nnU-Net itself said of them (tests/weights/nnunet/recording.json)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import SettingsError, WeightsError
from common.files import sha256, write_json, write_record
from common.networks import ResEncUNet, mark_untrained
from common.weights import export_model_folder, read_checkpoint, read_model_folder, trained_settings, write_checkpoint
from tools.checkpoints.exporting import export_checkpoint as export_tool
from tools.checkpoints.importing import import_checkpoint as import_tool
from tools.checkpoints.settings import ExportCheckpoint, ImportCheckpoint
from tools.commanding.settings import filled

from .nnunet import record, samples

NETWORK = {"features_per_stage": [4, 8, 8, 12], "blocks_per_stage": [1, 2, 1, 1]}
SETTINGS: dict[str, Any] = {
    "labels": ["background", "edema", "core"],
    "regions": None,
    "regions_class_order": None,
    "ignore_label": None,
    "spacing_mm": 1.0,
    "normalization": ["zscore"],
    "channels": 1,
    "reorient": True,
    **NETWORK,
    "bundle": "mae_resenc_l",
    "patch_size": [16, 24, 32],
    "mirror_axes": [0, 2],
}


def model(folder: Path, **changed: Any) -> Path:
    """Write a narrow model as fine-tuning does."""
    settings = SETTINGS | changed
    outputs = len(settings["regions"] or settings["labels"])
    path = folder / "model.pt"
    torch.manual_seed(0)
    write_checkpoint(ResEncUNet(settings["channels"], outputs, **NETWORK).state_dict(), path)
    write_record({"sha256": sha256(path), "settings": settings}, path.with_suffix(".json"))
    return path


def exported(folder: Path, **changed: Any) -> Path:
    export_model_folder(model(folder, **changed), output=folder / "nnunet")
    return folder / "nnunet"


def change(file: Path, **changed: Any) -> None:
    write_json(json.loads(file.read_text()) | changed, file)


def change_configuration(folder: Path, **changed: Any) -> None:
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"] |= changed
    write_json(plans, folder / "plans.json")


def taken(source: Path, output: Path) -> None:
    import_tool(filled(ImportCheckpoint, "mae_resenc_l", source=str(source), output=str(output)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("witness")
    samples.write_samples(folder)
    return folder


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return record.read_recording()


def test_the_recording_is_of_these_programs_and_good(recorded: dict[str, Any]) -> None:
    pins = (Path(record.__file__).with_name("packages.txt")).read_text()
    for name in ("nnunetv2", "dynamic-network-architectures", "timm"):
        assert f"{name}=={recorded['versions'][name]}\n" in pins
    assert recorded["encoders"].keys() == samples.ENCODERS.keys()
    assert recorded["segmentations"].keys() == samples.SEGMENTATIONS.keys()
    assert record.problems(recorded) == []
    wrong = json.loads(json.dumps(recorded))
    wrong["encoders"]["mae_resenc_l"]["largest_difference"] = float("nan")
    wrong["segmentations"]["primus"]["agreement_float16"] = 0.99
    assert record.problems(wrong) == ["mae_resenc_l: features differ by nan", "primus: 99.0000% of the voxels agree"]


@pytest.mark.parametrize("bundle", samples.ENCODERS)
def test_an_encoder_gives_the_features_of_nnunet(bundle: str, recorded: dict[str, Any]) -> None:
    theirs = recorded["encoders"][bundle]["features"]
    ours = [record.thinned(stage.numpy()) for stage in samples.encoder_features(bundle)]
    assert [len(stage) for stage in ours] == [len(stage) for stage in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=record.CLOSE)
    assert max(np.std(stage) for stage in ours) > 0.1


@pytest.mark.parametrize("name", samples.SEGMENTATIONS)
def test_a_segmentation_is_that_of_nnunet(name: str, written: Path, recorded: dict[str, Any], tmp_path: Path) -> None:
    own = samples.predict(name, samples.model_of(name, written), written, tmp_path)
    thin = own[(slice(None, None, record.STEP),) * 3]
    assert min(np.bincount(own.reshape(-1), minlength=3)) > 0.02 * own.size
    told = recorded["segmentations"][name]
    for sums, least in (("float32", 0.9995), ("float16", 0.998)):  # of every third voxel; of all, the recording tells
        theirs = record.unpacked(told[f"labels_{sums}"])
        assert theirs.shape == thin.shape
        assert float((theirs == thin).mean()) >= least, sums


def test_what_goes_out_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = model(tmp_path, spacing_mm=[2, 1, 1])
    options = {"source": str(ours), "output": str(tmp_path / "nnunet"), "format": "nnunet"}
    export_tool(filled(ExportCheckpoint, "mae_resenc_l", **options))
    assert "nnUNetv2_predict_from_modelfolder -m" in (told := capsys.readouterr().out)
    assert "--disable_tta" in told
    taken(tmp_path / "nnunet", tmp_path / "back" / "model.pt")
    assert "--mirror_axes '[0,2]'" in capsys.readouterr().out
    before, after = read_checkpoint(ours), read_checkpoint(tmp_path / "back" / "model.pt")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    told = trained_settings(str(tmp_path / "back" / "model.pt"))
    assert told | {"spacing_mm": [2, 1, 1]} == {name: SETTINGS[name] for name in told} | {"spacing_mm": [2, 1, 1]}
    assert told["spacing_mm"] == [2.0, 1.0, 1.0]
    assert told.keys() == SETTINGS.keys()


def test_every_fold_is_taken_but_all_of_them_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path)
    for name in ("fold_3", "fold_all"):
        (folder / name).mkdir()
        (folder / name / "checkpoint_final.pth").write_bytes((folder / "fold_0" / "checkpoint_final.pth").read_bytes())
    taken(folder, tmp_path / "in" / "model.pt")
    assert sorted(path.name for path in (tmp_path / "in").glob("*.pt")) == ["model_fold_0.pt", "model_fold_3.pt"]
    assert "model_fold_*.pt" in capsys.readouterr().out
    taken(folder / "fold_all", tmp_path / "one" / "model.pt")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["model.json", "model.pt"]
    (folder / "fold_all" / "checkpoint_final.pth").unlink()
    with pytest.raises(WeightsError, match=r"fold_all has no checkpoint_final\.pth"):
        taken(folder / "fold_all", tmp_path / "none" / "model.pt")


def test_its_checkpoint_alone_is_an_encoder(tmp_path: Path) -> None:
    file = exported(tmp_path) / "fold_0" / "checkpoint_final.pth"
    output = tmp_path / "encoder.pt"
    import_tool(filled(ImportCheckpoint, "mae_resenc_l", source=str(file), output=str(output), **NETWORK))
    model, encoder = read_checkpoint(tmp_path / "model.pt"), read_checkpoint(output)
    assert all(torch.equal(encoder[name], value) for name, value in model.items() if name.startswith("encoder."))


def test_tasks_mean_the_same_to_nnunet(tmp_path: Path) -> None:
    regions = {"whole": [1, 2, 5], "core": [2]}
    labels = {"background": 0, "a": 1, "b": 2, "c": 5}
    folder = exported(tmp_path / "regions", labels=labels, regions=regions, regions_class_order=[1, 2], ignore_label=6)
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "whole": [1, 2, 5], "core": [2], "ignore": 6}
    assert dataset["regions_class_order"] == [1, 2]
    atlas = model(tmp_path / "atlas", labels={"background": 0, "pons": 7, "ignore": 354}, ignore_label=9)
    (note, _) = export_model_folder(atlas, output=tmp_path / "atlas" / "nnunet")
    assert "pons 1, ignore_class 2" in note
    dataset = json.loads((tmp_path / "atlas" / "nnunet" / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "pons": 1, "ignore_class": 2}
    with pytest.raises(SettingsError, match="regions of one label value each"):
        exported(tmp_path / "single", regions={"edema": [1], "core": [2]})


def test_preprocessing_means_the_same_to_nnunet(tmp_path: Path) -> None:
    schemes = ["zscore_nonzero", {"ct": [-100.0, 300.0, 50.0, 80.0]}, "none"]
    folder = exported(tmp_path, channels=3, normalization=schemes, reorient=False, mirror_axes=[])
    plans = json.loads((folder / "plans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["ZScoreNormalization", "CTNormalization", "NoNormalization"]
    assert configuration["use_mask_for_norm"] == [True, False, False]
    assert plans["image_reader_writer"] == "NibabelIO"
    assert plans["foreground_intensity_properties_per_channel"]["1"]["percentile_99_5"] == 300
    found = read_model_folder(folder)
    assert found.data == {"spacing_mm": [1.0] * 3, "normalization": schemes, "channels": 3, "reorient": False}
    assert found.mirror_axes == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spacing_mm": None}, "each file's own spacing"),
        ({"embed_dim": 48, "depth": 3, "num_heads": 4}, "nnU-Net builds Primus S, B, M and L only"),
        ({"embed_dim": 396, "depth": 12, "num_heads": 3}, "396 channels, 12 blocks, 3 heads"),
        ({"bundle": "voco_resenc_l"}, "is of voco_resenc_l, not of mae_resenc_l"),
    ],
)
def test_what_nnunet_cannot_do_does_not_go_out(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = model(tmp_path, **changed)
    with pytest.raises((SettingsError, WeightsError), match=words):
        export_model_folder(path, output=tmp_path / "nnunet", bundle="mae_resenc_l")
    assert not (tmp_path / "nnunet").exists()


def test_a_model_that_says_too_little_does_not_go_out(tmp_path: Path) -> None:
    path = model(tmp_path)
    write_checkpoint(mark_untrained(read_checkpoint(path)), path)
    write_record({"settings": SETTINGS}, path.with_suffix(".json"))
    with pytest.raises(WeightsError, match="has not been trained to segment"):
        export_model_folder(path, output=tmp_path / "nnunet")
    path.with_suffix(".json").unlink()
    with pytest.raises(WeightsError, match=r"restore model\.json"):
        export_model_folder(path, output=tmp_path / "nnunet")
    with pytest.raises(SettingsError, match=r"model\.json tells"):
        export_tool(filled(ExportCheckpoint, "mae_resenc_l", source=str(path), format="nnunet", dropout=0.1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"patch_size": [16, 16]}, "is of slices"),
        ({"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ({"normalization_schemes": ["RescaleTo01Normalization"]}, "normalises a channel by RescaleTo01Normalization"),
        ({"inherits_from": "3d_lowres"}, "have no configuration 3d_lowres"),
        ({"architecture": {"network_class_name": "x.PlainConvUNet", "arch_kwargs": {}}}, "is of a PlainConvUNet"),
    ],
)
def test_what_is_not_here_does_not_come_in(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    change_configuration(folder, **changed)
    with pytest.raises(WeightsError, match=words):
        taken(folder, tmp_path / "in" / "model.pt")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strides", [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]),
        ("kernel_sizes", [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]),
        ("n_conv_per_stage_decoder", [2, 2, 2]),
        ("norm_op", "torch.nn.BatchNorm3d"),
        ("stem_channels", 16),
    ],
)
def test_another_residual_unet_does_not_come_in(name: str, value: Any, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][name] = value
    write_json(plans, folder / "plans.json")
    with pytest.raises(WeightsError, match=f"another residual U-Net than this collection's \\({name} is "):
        taken(folder, tmp_path / "in" / "model.pt")


def test_files_that_do_not_belong_together_do_not_come_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the tools set it
    folder = exported(tmp_path)
    change_configuration(folder, resampling_fn_data="resample_torch_fornnunet", inherits_from="3d_parent")
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_parent"] = {"batch_dice": True}
    write_json(plans, folder / "plans.json")
    taken(folder, tmp_path / "in" / "model.pt")
    assert "note: nnU-Net resamples data by resample_torch_fornnunet" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="name a bundle of ResEnc-L, not mae_primus_m"):
        import_tool(filled(ImportCheckpoint, "mae_primus_m", source=str(folder)))
    change(folder / "dataset.json", labels={"background": 0, "edema": 1})
    with pytest.raises(WeightsError, match=r"another network than plans\.json and dataset\.json"):
        taken(folder, tmp_path / "in" / "model.pt")
    change(folder / "plans.json", image_reader_writer="Tiff3DIO")
    with pytest.raises(WeightsError, match="reads images with Tiff3DIO"):
        taken(folder, tmp_path / "in" / "model.pt")
    (folder / "plans.json").write_text("{")
    with pytest.raises(WeightsError, match=r"plans\.json cannot be read"):
        taken(folder, tmp_path / "in" / "model.pt")


def test_exchanged_axes_are_those_of_the_image(tmp_path: Path) -> None:
    """A network for axes in another order, given the image in that order, is the imported one given the image."""
    order = (2, 0, 1)
    before = ResEncUNet(1, 3, **NETWORK)
    before.load_state_dict(read_checkpoint(model(tmp_path)))
    folder = exported(tmp_path)
    change(folder / "plans.json", transpose_forward=list(order))
    change_configuration(folder, spacing=[3.0, 1.0, 2.0])
    taken(folder, tmp_path / "in" / "model.pt")
    told = trained_settings(str(tmp_path / "in" / "model.pt"))
    assert told["spacing_mm"] == [1.0, 2.0, 3.0]
    assert told["patch_size"] == [24, 32, 16]
    assert told["mirror_axes"] == [1, 2]
    after = ResEncUNet(1, 3, **NETWORK)
    after.load_state_dict(read_checkpoint(tmp_path / "in" / "model.pt"))
    image = torch.randn(1, 1, 24, 32, 16)
    turned = [0, 1, *(2 + axis for axis in order)]
    with torch.no_grad():
        torch.testing.assert_close(after(image).permute(turned), before(image.permute(turned)), rtol=1e-4, atol=1e-5)
