# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Masks of anonymised regions, from the datalist to the loss."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.data import CropDataset, StoreSettings, VolumeStore, prepare_pretraining_data
from common.errors import DataError
from common.losses import MaskedMSELoss
from common.views import MaskedViews, SpatialCrop

from ..conftest import blobs, run, small_settings, write_volume


def cases(folder: Path, *, masks: int = 2) -> Path:
    """Write three volumes, the first ``masks`` of them with a mask of their upper half along x; return a datalist."""
    entries = []
    for index in range(3):
        image = blobs(index)[0]
        mask = np.zeros(image.shape, np.uint8)
        mask[12:] = 1
        entry = {"image": str(write_volume(folder / f"case_{index}.nii.gz", image, spacing=2.0))}
        if index < masks:
            entry["anonymization_mask"] = str(write_volume(folder / f"mask_{index}.nii.gz", mask, spacing=2.0))
        entries.append(entry)
    path = folder / "list.json"
    path.write_text(json.dumps({"training": entries, "validation": entries[:1]}))
    return path


def prepared(folder: Path, datalist: Path) -> dict:
    return prepare_pretraining_data(
        "", datalist=str(datalist), store_dir=str(folder / "store"), output_dir=str(folder / "out")
    )


def test_a_mask_follows_its_image_through_store_crop_and_views(tmp_path: Path) -> None:
    volumes = prepared(tmp_path, cases(tmp_path))["training"]
    assert [volume.masks for volume in volumes] == [("anonymization_mask",)] * 2 + [()]
    first = volumes[0]
    mask = first.read((0, 0, 0), first.shape, mask="anonymization_mask")
    assert set(np.unique(mask)) == {0, 1}
    side = first.shape[2]  # canonical axes are (S, A, R), and the mask is the upper half along R
    assert (mask[..., : side // 2 - 1] == 0).all()
    assert (mask[..., side // 2 + 1 :] == 1).all()
    without = volumes[2].read((0, 0, 0), volumes[2].shape, mask="anonymization_mask")
    assert (without == 0).all()

    # image and mask are turned, zoomed and flipped together: make the image its own mask
    spatial = SpatialCrop(16, rotation_probability=1, zoom_probability=1)
    data = CropDataset(volumes[:2], spatial=spatial, seed=0, anonymised=True)
    items = [data[1, index] for index in range(4)]
    batch = {key: [value for item in items for value in item[key]] for key in items[0]}
    batch["region"] = [mask.float() for mask in batch["anonymised"]]
    views = MaskedViews(spatial, block_size=8)(batch)
    assert views["ignored"].any()
    assert not views["ignored"].all()
    assert ((views["image"] > 0.5) == views["ignored"]).float().mean() > 0.97, "only the rim is interpolated otherwise"
    assert all(item["path"][0].endswith(".nii.gz") for item in items)


def test_ignored_voxels_cost_nothing(tmp_path: Path) -> None:
    hidden = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    ignored = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    ignored[..., 4:] = True
    batch = {"image": torch.zeros(1, 1, 8, 8, 8), "hidden": hidden, "ignored": ignored}
    wrong = torch.where(ignored, 100.0, 2.0)
    assert float(MaskedMSELoss()({"reconstruction": wrong}, batch)) == pytest.approx(4.0)


@pytest.mark.parametrize("value", [2, 255])
def test_values_other_than_0_and_1_are_refused(value: int, tmp_path: Path) -> None:
    datalist = cases(tmp_path)
    mask = np.zeros(blobs(0)[0].shape, np.uint8)
    mask[3] = value
    write_volume(tmp_path / "mask_0.nii.gz", mask, spacing=2.0)
    with pytest.raises(DataError, match=rf"mask_0.nii.gz holds the values {value}; a mask is 1 inside and 0 outside"):
        prepare_pretraining_data(
            "", datalist=str(datalist), store_dir=str(tmp_path / "s"), output_dir=str(tmp_path), strict=True
        )


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    datalist = cases(tmp_path)
    write_volume(tmp_path / "mask_1.nii.gz", np.ones((5, 5, 5), np.uint8), spacing=2.0)
    with pytest.raises(DataError, match=r"mask_1.*do not share one grid"):
        prepare_pretraining_data(
            "", datalist=str(datalist), store_dir=str(tmp_path / "s"), output_dir=str(tmp_path), strict=True
        )


def test_a_changed_mask_is_prepared_again_and_a_lost_one_too(tmp_path: Path) -> None:
    datalist = cases(tmp_path)
    case = json.loads(datalist.read_text())["training"][0]
    store = VolumeStore(tmp_path / "store", StoreSettings())
    first = store.prepare_one(case)
    image_only = store.location({"image": case["image"]})
    assert image_only != Path(first.path), "the same image without its mask is another entry"
    mask_file = Path(first.path).with_suffix(".anonymization_mask.b2nd")
    mask_file.unlink()
    assert store.get(case) is None
    store.prepare_one(case)
    assert mask_file.exists()
    changed = np.ones(nib.load(case["image"]).shape, np.uint8)
    nib.save(nib.Nifti1Image(changed, nib.load(case["image"]).affine), case["anonymization_mask"])
    assert store.get(case) is None


def test_asking_for_masks_where_there_are_none_stops(tmp_path: Path) -> None:
    volumes = prepared(tmp_path, cases(tmp_path, masks=0))["training"]
    with pytest.raises(DataError, match="--ignore_anonymised true needs a mask"):
        CropDataset(volumes, spatial=SpatialCrop(16), seed=0, anonymised=True)


@pytest.mark.long
def test_the_setting_changes_the_run_and_other_methods_do_not_have_it(tmp_path: Path) -> None:
    arguments = [
        *("--datalist", cases(tmp_path), "--output_dir", tmp_path / "out", "--ckpt_dir", tmp_path / "models"),
        *("--store_dir", tmp_path / "store", "--epochs", "1", "--iterations_per_epoch", "2", "--val_iterations", "1"),
        *("--batch_size", "2", "--ignore_anonymised", "true"),
    ]
    assert small_settings("models_genesis_resenc_l")
    run("models_genesis_resenc_l", "pretrain", *arguments)
    about = json.loads((tmp_path / "models" / "pretrained_encoder.json").read_text())
    assert about["settings"]["ignore_anonymised"] is True
    refused = run("simclr_resenc_l", "pretrain", *arguments, check=False)
    assert "unknown setting --ignore_anonymised" in refused.stderr
