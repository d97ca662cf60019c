# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What each mode of tuning trains, and that adapters end up in plain weights."""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import SettingsError
from common.networks import Primus, ResEncUNet
from common.networks.blocks.recompute import MODES
from common.weights.transfer import fine_tuning_network
from common.weights.tuning import TUNINGS, memory_note, merged_state_dict, prepare_tuning

BACKBONES = ["resenc", "primus"]


def build(backbone: str, *, in_channels: int = 1, **options: object) -> nn.Module:
    torch.manual_seed(0)
    if backbone == "resenc":
        return ResEncUNet(in_channels, 2, features_per_stage=[4, 8], blocks_per_stage=[1, 1], **options)  # type: ignore[arg-type]
    return Primus(in_channels, 2, input_size=16, embed_dim=24, depth=2, num_heads=2, **options)  # type: ignore[arg-type]


def train(network: nn.Module, *, steps: int = 3, in_channels: int = 1) -> None:
    """Take a few steps with every parameter in the optimizer, and weight decay, which must not touch frozen ones."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    network.train()
    for _ in range(steps):
        loss = network(torch.randn(2, in_channels, 16, 16, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained_names(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def expected(name: str, mode: str, in_channels: int) -> bool:
    """Say by its name alone whether a parameter of the plain or adapted network trains."""
    if not name.startswith("encoder.") or mode in ("full", "sawtooth"):
        return True
    first = re.match(r"encoder\.(stem\.conv|patch_embedding)\.", name) is not None and in_channels > 1
    if mode == "norm":
        return first or re.search(r"\bnorm\d?\.", name) is not None
    if mode == "lora":
        return first or ".lora_" in name
    return False


@pytest.mark.parametrize("in_channels", [1, 2])
@pytest.mark.parametrize("mode", TUNINGS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_mode_trains_what_it_should_and_nothing_else(backbone: str, mode: str, in_channels: int) -> None:
    network = build(backbone, in_channels=in_channels)
    if backbone == "resenc" and mode == "lora":
        with pytest.raises(SettingsError, match="--tuning norm"):
            prepare_tuning(network, mode)
        return
    assert prepare_tuning(network, mode) is network
    names = {name for name, _ in network.named_parameters()}
    assert trained_names(network) == {name for name in names if expected(name, mode, in_channels)}
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train(network, in_channels=in_channels)
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_adapters_are_small_start_at_nothing_and_sit_on_four_projections_of_every_block() -> None:
    plain = build("primus").eval()
    image = torch.randn(1, 1, 16, 16, 16)
    output = plain(image)
    network = prepare_tuning(copy.deepcopy(plain), "lora", rank=3).eval()
    assert torch.allclose(network(image), output, atol=1e-6)
    adapters = {name: p for name, p in network.named_parameters() if ".lora_" in name}
    owners = {name.split(".lora_")[0] for name in adapters}
    assert owners == {
        f"encoder.transformer.blocks.{block}.attention.{projection}"
        for block in (0, 1)
        for projection in ("query", "key", "value", "output")
    }
    assert sum(p.numel() for p in adapters.values()) == 2 * 4 * 2 * 3 * 24


def test_the_merged_weights_are_the_adapted_network() -> None:
    network = prepare_tuning(build("primus"), "lora", rank=4, alpha=16)
    train(network)
    network.eval()
    image = torch.randn(2, 1, 16, 16, 16)
    weights = merged_state_dict(network)
    plain = build("primus").eval()
    assert list(weights) == list(plain.state_dict())
    plain.load_state_dict(weights)
    adapted = network(image)
    assert float((plain(image) - adapted).detach().abs().max()) < 1e-5
    assert float((build("primus").eval()(image) - adapted).detach().abs().max()) > 1e-3, "training changed something"
    again = merged_state_dict(network)  # merging leaves the network as it is
    assert all(torch.equal(value, again[key]) for key, value in weights.items())


def test_without_adapters_the_state_is_the_plain_one() -> None:
    network = build("resenc")
    merged = merged_state_dict(prepare_tuning(network, "norm"))
    assert all(torch.equal(value, merged[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("mode", ["frozen", "linear_probe"])
def test_a_frozen_encoder_draws_nothing_and_keeps_no_activations(mode: str) -> None:
    network = prepare_tuning(build("primus", drop_path=0.9, dropout=0.5), mode).train()
    image = torch.randn(4, 1, 16, 16, 16)
    first, second = (network.encode(image)[-1] for _ in range(2))  # type: ignore[operator]
    assert torch.equal(first, second)
    assert first.grad_fn is None
    assert network(image).grad_fn is not None


def test_a_frozen_encoder_of_several_channels_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    prepare_tuning(build("primus", in_channels=2), "frozen")
    assert "sees only their mean" in capsys.readouterr().out


def test_a_random_encoder_is_frozen_on_purpose_only(capsys: pytest.CaptureFixture[str]) -> None:
    network = build("resenc", in_channels=2)
    drawn = {name: value.clone() for name, value in network.encoder.state_dict().items()}
    told: dict[str, Any] = {"pretrained": "", "settings": {}}
    assert fine_tuning_network(network, from_scratch=True, tuning="frozen_random", **told) is network
    train(network, in_channels=2)
    assert all(torch.equal(value, drawn[name]) for name, value in network.encoder.state_dict().items())
    assert "sees only their mean" not in capsys.readouterr().out, "no pre-training had one channel"
    with pytest.raises(SettingsError, match="--from_scratch true, or --tuning frozen for the pre-trained"):
        fine_tuning_network(network, tuning="frozen_random", **told)
    with pytest.raises(SettingsError, match="mean nothing yet; add --tuning full, or as a control frozen_random"):
        fine_tuning_network(network, from_scratch=True, tuning="frozen", **told)


def test_the_note_counts_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    network = build("primus")
    count = sum(p.numel() for p in network.parameters())
    note = memory_note(network, 2)
    assert f"{16 * count / 1e6:.0f} MB, against {16 * count / 1e6:.0f} MB" in note
    assert f"{count:,} of {count:,} parameters train (100 %)" in note
    prepare_tuning(network, "lora", optimizer_states=2)
    printed = capsys.readouterr().out
    assert "tuning lora" in printed
    assert f"against {16 * count / 1e6:.0f} MB" in printed, "adapters are no part of full tuning"


def test_unknown_modes_and_a_missing_package_end_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="full, sawtooth"):
        prepare_tuning(build("primus"), "lore")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match="pip install peft==0"):
        prepare_tuning(build("primus"), "lora")


def test_adapters_train_under_recomputation_as_without() -> None:
    gradients = []
    for checkpointing in MODES:
        network = prepare_tuning(build("primus", checkpointing=checkpointing), "lora", dropout=0.0).train()
        torch.manual_seed(1)
        network(torch.randn(1, 1, 16, 16, 16)).square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    plain, *others = gradients
    for other in others:
        assert other.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(other[name], gradient)
