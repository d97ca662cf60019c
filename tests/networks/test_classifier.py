# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The classifier's features are those that pre-training learned, all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.losses import ClassificationLoss
from common.networks import ClassificationNet, Primus, ResEncUNet
from common.weights import fine_tuning_network, transfer_weights, write_checkpoint

BACKBONES = ["resenc", "primus"]


def backbone(name: str, *, with_decoder: bool = False, in_channels: int = 1) -> ResEncUNet | Primus:
    if name == "resenc":
        sizes = {"features_per_stage": [4, 8], "blocks_per_stage": [1, 1]}
        return ResEncUNet(in_channels, with_decoder=with_decoder, **sizes)  # type: ignore[arg-type]
    return Primus(in_channels, input_size=16, embed_dim=24, depth=2, num_heads=2, with_decoder=with_decoder)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_pre_trained_encoder_is_taken_whole_and_gives_the_same_features(name: str, tmp_path: Path) -> None:
    """Every tensor is taken, also layer scale and attention norms; the mean is over all places, the first too."""
    pretrained = backbone(name, with_decoder=True).eval()
    with torch.no_grad():
        for parameter in pretrained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_checkpoint(pretrained.state_dict(), tmp_path / "e.pt")
    network = ClassificationNet(backbone(name), outputs=3).eval()
    receipt = transfer_weights(network, tmp_path / "e.pt")
    assert receipt.encoder_share == 1.0
    assert set(receipt.missing) == {"head.weight", "head.bias"}
    assert not any(key.startswith("encoder.") for key in receipt.skipped)
    for size in ((16, 16, 16), (8, 16, 24)):
        image = torch.randn(2, 1, *size)
        features = pretrained.encode(image)[-1].mean((2, 3, 4))
        torch.testing.assert_close(network.features(image), features)
        torch.testing.assert_close(network(image), network.head(features))


@pytest.mark.parametrize("name", BACKBONES)
def test_from_scratch_the_backbone_keeps_its_own_start(name: str) -> None:
    torch.manual_seed(0)
    own = backbone(name)
    before = {key: value.clone() for key, value in own.encoder.state_dict().items()}
    network = fine_tuning_network(ClassificationNet(own, outputs=2), pretrained="", settings={}, from_scratch=True)
    assert all(torch.equal(value, before[key]) for key, value in network.encoder.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_sides_that_do_not_fit_end_in_a_sentence(name: str) -> None:
    side = 9 if name == "resenc" else 12
    with pytest.raises(ValueError, match=f"the next one of {side} is"):
        ClassificationNet(backbone(name), outputs=2, input_size=[16, 16, side])
    with pytest.raises(ValueError, match="must be multiples"):
        ClassificationNet(backbone(name), outputs=2)(torch.zeros(1, 1, 16, side, 16))


@pytest.mark.parametrize("name", BACKBONES)
def test_dropout_acts_on_the_features_in_training_only(name: str) -> None:
    network = ClassificationNet(backbone(name), outputs=2, dropout=0.5)
    image = torch.randn(2, 1, 16, 16, 16)
    assert not torch.equal(network.train()(image), network(image))
    assert torch.equal(network.eval()(image), network(image))


@pytest.mark.parametrize("name", BACKBONES)
def test_it_scripts(name: str) -> None:
    network = ClassificationNet(backbone(name), outputs=2).eval()
    image = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    label = torch.tensor([0, 1])
    plain = torch.tensor([(-torch.log_softmax(row, 0))[at] for row, at in zip(logits, label, strict=True)])
    assert float(ClassificationLoss()(logits, label)) == pytest.approx(float(plain.mean()))
    weighted = ClassificationLoss(weights=[3.0, 1.0])(logits, label)
    assert float(weighted) == pytest.approx(float((3 * plain[0] + plain[1]) / 4))
    smooth = ClassificationLoss(label_smoothing=0.2)(logits, label)
    uniform = -torch.log_softmax(logits, 1).mean(1)
    assert float(smooth) == pytest.approx(float((0.8 * plain + 0.2 * uniform).mean()))
    several = ClassificationLoss(multilabel=True)(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    zero = float(torch.log(torch.tensor(2.0)))
    assert float(several) == pytest.approx((float(torch.log1p(torch.exp(torch.tensor(-2.0)))) + 3 * zero) / 4)
    positive = ClassificationLoss(multilabel=True, weights=[1.0, 5.0])(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert float(positive) == pytest.approx(float(several) + 4 * zero / 4)
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        ClassificationLoss(label_smoothing=1.0)
