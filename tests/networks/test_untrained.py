# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A model that comes with a bundle and was never fine-tuned must not be taken for one that was."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from common.engines import GaussianSlidingWindow
from common.errors import WeightsError
from common.networks import Ensemble, Primus, ResEncUNet, mark_untrained
from common.weights import keep_previous, trained_network, write_checkpoint


def build(kind: str) -> nn.Module:
    if kind == "primus":
        return Primus(1, 2, input_size=16, embed_dim=24, depth=1, num_heads=2)
    return ResEncUNet(1, 2, features_per_stage=[4, 8], blocks_per_stage=[1, 1])


@pytest.fixture(params=["resenc", "primus"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


IMAGE = torch.zeros(1, 1, 16, 16, 16)
PREDICT = GaussianSlidingWindow(16)


def test_marked_weights_refuse_to_predict_and_complete_ones_lift_it(kind: str) -> None:
    network = build(kind)
    PREDICT(IMAGE, network)  # nothing was loaded, so nothing is claimed
    weights = network.state_dict()
    network.load_state_dict(mark_untrained(weights))  # strict: the mark is no surprise
    assert "untrained" not in network.state_dict()
    with pytest.raises(WeightsError, match=r"not been trained to segment yet.*Fine-tune it first") as stopped:
        PREDICT(IMAGE, network)
    assert "pre-trained" not in str(stopped.value), "a network to be trained from scratch holds no such encoder"
    network.load_state_dict(weights)
    PREDICT(IMAGE, network)


def test_an_encoder_alone_counts_as_untrained(kind: str) -> None:
    """MONAI Label loads whatever file is chosen, ``strict=False``."""
    network = build(kind)
    encoder = {key: value for key, value in network.state_dict().items() if key.startswith("encoder.")}
    network.load_state_dict(encoder, strict=False)
    with pytest.raises(WeightsError, match="not been trained"):
        PREDICT(IMAGE, network)


def test_copies_wrappers_and_scripts_keep_it(kind: str) -> None:
    network = build(kind)
    marked = mark_untrained(network.state_dict())
    twin = copy.deepcopy(network)
    twin.load_state_dict(marked)
    assert twin.untrained
    assert not network.untrained, "a copy's loading is its own"
    scripted = torch.jit.script(twin)
    stream = io.BytesIO()
    torch.jit.save(scripted, stream)
    stream.seek(0)
    with pytest.raises(WeightsError, match="not been trained"):
        PREDICT(IMAGE, torch.jit.load(stream))
    wrapper = Ensemble([network])
    wrapper.load_state_dict({f"members.0.{key}": value for key, value in marked.items()})
    assert network.untrained


def test_the_inference_config_names_the_file(kind: str, tmp_path: Path) -> None:
    network = build(kind)
    write_checkpoint(mark_untrained(network.state_dict()), tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"model\.pt has not been trained"):
        trained_network(build(kind), str(tmp_path / "model.pt"), settings={})


def test_training_does_not_keep_what_was_never_trained(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    write_checkpoint(mark_untrained(build(kind).state_dict()), model)
    keep_previous(str(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    write_checkpoint(build(kind).state_dict(), model)
    keep_previous(str(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "model_previous.pt"]
