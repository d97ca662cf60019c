# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from common.data import SegmentationTask
from common.handlers import PooledDice
from common.losses import DiceCrossEntropy

CLASSES = SegmentationTask(["background", "a", "b"])
REGIONS = SegmentationTask(["background", "a", "b"], regions={"both": [1, 2], "core": [2]})


def batch(outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, outputs, 5, 6, 7, generator=generator)
    return logits, torch.randint(0, 3, (2, 1, 5, 6, 7), generator=generator, dtype=torch.uint8)


def test_it_is_monais_loss_where_that_exists() -> None:
    logits, label = batch(3)
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)
    assert float(DiceCrossEntropy(CLASSES)(logits, label)) == pytest.approx(float(theirs(logits, label)), rel=1e-6)
    theirs = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5, batch=True
    )
    ours = DiceCrossEntropy(CLASSES, batch_dice=True)
    assert float(ours(logits, label)) == pytest.approx(float(theirs(logits, label)), rel=1e-6)
    assert float(ours.terms["cross_entropy"] + ours.terms["dice"]) == pytest.approx(float(ours(logits, label)))


def test_regions_count_every_value_they_hold() -> None:
    logits, label = batch(2)
    target = torch.cat([label > 0, label == 2], dim=1).float()
    p = logits.sigmoid()
    entropy = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    dice = [
        1 - (2 * (p[b, c] * target[b, c]).sum() + 1e-5) / (p[b, c].sum() + target[b, c].sum() + 1e-5)
        for b in range(2)
        for c in range(2)
    ]
    expected = float(entropy + torch.stack(dice).mean())
    assert float(DiceCrossEntropy(REGIONS)(logits, label)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("regions", [None, {"both": [1, 2], "core": [2]}])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_have_no_influence_at_all(regions: dict | None, batch_dice: bool) -> None:
    task = SegmentationTask(["background", "a", "b"], regions=regions, ignore_label=9)
    logits, label = batch(task.outputs)
    logits.requires_grad_()
    label[:, :, :2] = 9
    loss = DiceCrossEntropy(task, batch_dice=batch_dice)(logits, label)
    loss.backward()
    assert float(logits.grad[:, :, :2].abs().max()) == 0
    assert float(logits.grad[:, :, 2:].abs().min(dim=1).values.max()) > 0
    # as if the ignored part had been cut off
    plain = SegmentationTask(["background", "a", "b"], regions=regions)
    cut = DiceCrossEntropy(plain, batch_dice=batch_dice)(logits[:, :, 2:].detach(), label[:, :, 2:])
    assert float(loss) == pytest.approx(float(cut), rel=1e-5)


def test_limits() -> None:
    loss = DiceCrossEntropy(CLASSES)
    label = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8)
    label[..., :2] = 1
    sure = 50.0 * torch.stack([label[:, 0] == value for value in range(3)], dim=1)
    assert float(loss(sure, label)) == pytest.approx(0, abs=1e-4), "right, and the absent class rightly empty"
    wrong = sure.roll(1, dims=1)
    assert float(loss(wrong, label)) > 50
    everything = torch.full_like(label, 9)
    empty = DiceCrossEntropy(SegmentationTask(["background", "a", "b"], ignore_label=9))(sure, everything)
    assert torch.isfinite(empty)
    half = loss(sure.half(), label)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("regions", [None, {"both": [1, 2], "core": [2]}])
def test_the_values_of_labels_make_no_difference(regions: dict | None) -> None:
    """Classes as an atlas numbers them are those that count from 0, for the loss and for the pooled Dice."""
    values = torch.tensor([0, 354, 614_454_277, 9])
    own = None if regions is None else {name: values[each].tolist() for name, each in regions.items()}
    small = SegmentationTask(["background", "a", "b"], regions, ignore_label=3)
    large = SegmentationTask({"background": 0, "a": 354, "b": 614_454_277}, own, ignore_label=9)
    logits, label = batch(small.outputs)
    label[:, :, 0] = 3
    found = []
    for task, labels in ((small, label), (large, values[label.long()])):
        dice = PooledDice(task)
        dice.update((logits, labels))
        found.append((float(DiceCrossEntropy(task)(logits, labels)), dice.by_class()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "task", [{}, {"ignore_label": 3}, {"regions": {"whole": [1, 2], "core": [2]}, "ignore_label": 3}]
)
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_large_batch_sample_by_sample_is_the_same(
    task: dict, batch_dice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = DiceCrossEntropy(SegmentationTask(["background", "a", "b"], **task), batch_dice=batch_dice)
    label = torch.randint(4 if "ignore_label" in task else 3, (3, 1, 8, 8, 8))
    found = []
    for large in (2**22, 1):
        monkeypatch.setattr("common.losses.segmentation._LARGE", large)
        torch.manual_seed(0)
        pred = torch.randn(3, loss.task.outputs, 8, 8, 8, requires_grad=True)
        value = loss(pred, label)
        value.backward()
        found.append((value.detach(), pred.grad))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
