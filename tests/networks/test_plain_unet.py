# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The small plain U-Net is small, takes any sides, and is a U-Net whose every weight learns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import yaml

from common.networks import ClassificationNet, PlainUNet

from ..conftest import ROOT


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "key"), [("plain", "network_def"), ("plain_classification", "backbone")])
def test_it_has_less_than_a_million_parameters_in_the_shared_configs(name: str, key: str) -> None:
    told = yaml.safe_load((ROOT / "common" / "configs" / f"{name}.yaml").read_text("utf-8"))[key]
    assert told["_target_"] == "common.networks.PlainUNet"
    for channels, classes in ((1, 1), (4, 20)):
        assert count(PlainUNet(channels, classes, features=told["features"])) < 1_000_000
    features = told["features"]
    assert count(PlainUNet(1, 1)) == count(PlainUNet(1, 1, features=features)), "the defaults are those of the configs"


def test_its_parameters_are_those_of_two_convolutions_a_level() -> None:
    """Counted by hand: 3^3 kernels, biases, two numbers of each norm; 2^3 kernels upwards, 1^3 in the head."""
    features = (12, 24, 48, 96)

    def level(before: int, after: int) -> int:
        return (27 * before + 1 + 2) * after + (27 * after + 1 + 2) * after

    down = sum(level(before, after) for before, after in pairwise((1, *features)))
    up = sum(8 * below * skip + skip + level(2 * skip, skip) for skip, below in pairwise(features))
    assert count(PlainUNet(1, 1)) == down + up + features[0] + 1 == 789_109
    assert count(PlainUNet(1, 1).encoder) == down


@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 13, 8), (1, 5, 30)])
def test_any_sides_come_back_as_they_were(shape: tuple[int, int, int]) -> None:
    network = PlainUNet(2, 3, features=(4, 6, 8)).eval()
    image = torch.randn(2, 2, *shape)
    maps = network.encode(image)
    for index, each in enumerate(maps):
        assert each.shape == (2, network.feature_channels[index], *(-(-side // 2**index) for side in shape))
    assert network(image).shape == (2, 3, *shape)
    assert torch.equal(network(image), network.decode(maps))


def test_all_of_it_learns_and_the_skip_carries_what_the_coarse_map_cannot() -> None:
    torch.manual_seed(0)
    network = PlainUNet(1, 2, features=(4, 6, 8))
    network(torch.randn(1, 1, 8, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        network.eval()
        maps = network.encode(torch.randn(1, 1, 8, 8, 8))
        whole = network.decode(maps)
        coarse = network.decode([*(torch.zeros_like(each) for each in maps[:-1]), maps[-1]])
        fine = network.decode([*maps[:-1], torch.zeros_like(maps[-1])])
    assert not torch.allclose(whole, coarse)
    assert not torch.allclose(whole, fine)


def test_its_encoder_tells_of_whole_volumes_of_any_sides() -> None:
    network = ClassificationNet(PlainUNet(1, with_decoder=False), outputs=2, input_size=[9, 20, 16]).eval()
    image = torch.randn(2, 1, 9, 20, 16)
    expected = network.encoder(image)[-1].mean((2, 3, 4))
    torch.testing.assert_close(network.features(image), expected)
    assert count(network) < 1_000_000


def test_one_level_is_no_u_net() -> None:
    with pytest.raises(ValueError, match="at least two levels"):
        PlainUNet(features=(8,))
