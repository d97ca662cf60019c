# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.networks import Primus, ResEncUNet, primus_b, primus_l, primus_m, primus_s, resenc_l

NARROW: dict[str, Callable[..., torch.nn.Module]] = {
    "resenc": lambda **k: ResEncUNet(features_per_stage=[4, 8, 8], blocks_per_stage=[1, 2, 1], **k),
    "primus": lambda **k: Primus(input_size=16, embed_dim=24, depth=2, num_heads=2, **k),
}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_resenc_l_has_the_published_parameters() -> None:
    net = resenc_l()
    unused_heads = 321 + 257 + 129 + 65  # deep supervision, never used by the published runs
    assert count(net) == 102_348_965 - unused_heads
    assert count(net.encoder) == 90_296_576


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(primus_s, 26_268_285), (primus_b, 97_958_065), (primus_m, 151_786_529), (primus_l, 331_823_761)],
)
def test_primus_sizes_have_the_published_parameters(build: Callable[..., Primus], parameters: int) -> None:
    with torch.device("meta"):
        assert count(build()) == parameters


@pytest.mark.parametrize("name", NARROW)
def test_state_dict_names_each_tensor_once(name: str) -> None:
    state = NARROW[name]().state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)


@pytest.mark.parametrize("name", NARROW)
def test_encode_then_decode_is_forward(name: str) -> None:
    net = NARROW[name]().eval()
    image = torch.randn(2, 1, 16, 16, 16)
    assert torch.equal(net(image), net.decode(net.encode(image)))
    features = net.encode(image)
    net.decode(features)
    sizes = [f.shape[2] for f in features]
    assert sizes == sorted(sizes, reverse=True), "they are all there still"


def test_a_map_is_let_go_of_when_it_is_merged() -> None:
    net, maps, alive = NARROW["resenc"]().eval(), [], []
    net.encoder.register_forward_hook(lambda *call: maps.extend(map(weakref.ref, call[-1])))
    net.decoder.stages[-1].register_forward_pre_hook(lambda *_: alive.extend(each() is not None for each in maps))
    with torch.no_grad():
        net(torch.randn(1, 1, 16, 16, 16))
    assert alive == [False, False, False]


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.filterwarnings("ignore")
def test_scripts_and_runs_at_other_sizes(name: str, tmp_path) -> None:
    net = NARROW[name](in_channels=2, out_channels=3, dropout=0.1).eval()
    torch.jit.script(net).save(tmp_path / "net.ts")
    scripted = torch.jit.load(tmp_path / "net.ts")
    for shape in ((1, 2, 16, 16, 16), (2, 2, 24, 8, 32)):
        image = torch.randn(shape)
        out = net(image)
        assert out.shape == (shape[0], 3, *shape[2:])
        assert torch.allclose(scripted(image), out, atol=1e-6)


@pytest.mark.parametrize(("name", "side"), [("resenc", 18), ("primus", 20)])
def test_a_size_that_does_not_fit_is_refused(name: str, side: int) -> None:
    with pytest.raises(ValueError, match=rf"\[16, {side}, 16\] must be multiples of"):
        NARROW[name]()(torch.zeros(1, 1, 16, side, 16))


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same length"):
        ResEncUNet(features_per_stage=[4, 8], blocks_per_stage=[1])
    with pytest.raises(ValueError, match="multiple of 6"):
        Primus(embed_dim=32, num_heads=4, depth=1, input_size=16)
    with pytest.raises(ValueError, match="multiples of patch_size 8"):
        Primus(input_size=20)
    with pytest.raises(ValueError, match="initialization"):
        ResEncUNet(initialization="random")


def deep(**settings: Any) -> ResEncUNet:
    torch.manual_seed(0)
    how: dict[str, Any] = {"features_per_stage": [4, 6, 8, 8, 8], "blocks_per_stage": [1] * 5, "deep_supervision": True}
    return ResEncUNet(1, 2, **{**how, **settings})


def test_deep_supervision_gives_outputs_of_falling_resolution_in_training_alone() -> None:
    image = torch.randn(2, 1, 32, 32, 16)
    kept, again = (deep(checkpointing=mode) for mode in ("none", "selective"))
    found = []
    for net in (kept, again):
        outputs = net(image)
        assert [tuple(output.shape) for output in outputs] == [
            (2, 2, 32 >> level, 32 >> level, 16 >> level) for level in range(3)
        ]
        sum((output**2).mean() for output in outputs).backward()
        found.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, gradient in found[0].items():
        assert float(gradient.abs().sum()) > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)
    whole = kept(image)[0]
    plain = deep(deep_supervision=False)
    state = {name: value for name, value in kept.state_dict().items() if not name.startswith("deep_heads.")}
    plain.load_state_dict(state)
    assert torch.equal(kept.eval()(image), whole)
    assert torch.equal(plain(image), whole)
    with pytest.raises(ValueError, match="at least 4 stages"):
        deep(features_per_stage=[4, 8, 8], blocks_per_stage=[1, 1, 1])


def test_residual_blocks_of_nnunet_begin_as_their_shortcuts() -> None:
    image = torch.randn(1, 1, 32, 32, 32)
    net, other = deep(initialization="nnunet"), deep(initialization="he")
    with torch.no_grad():
        x = net.encoder.stem(image)
        for found, stage in zip(net.encode(image), net.encoder.stages, strict=True):
            (block,) = stage
            through = block.pool(x) if block.shortcut is None else block.shortcut(block.pool(x))
            x = torch.nn.functional.leaky_relu(through, 0.01)
            torch.testing.assert_close(found, x)
    assert not torch.allclose(other.encode(image)[0], net.encode(image)[0])
    assert torch.equal(net.encoder.stages[0][0].conv2.conv.weight, other.encoder.stages[0][0].conv2.conv.weight)


def test_unet_does_not_see_hidden_blocks() -> None:
    net = NARROW["resenc"]().eval()
    visible = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 1, 0] = False
    image = torch.randn(1, 1, 16, 16, 16)
    other = image.clone()
    other[0, 0, :8, 8:, :8] = 100
    for a, b in zip(net.encode(image, visible), net.encode(other, visible), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(net.encode(image)[0], net.encode(other)[0])


def test_transformer_drops_hidden_tokens() -> None:
    net = NARROW["primus"]().eval()
    visible = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    visible[0, 0, 1, 0] = visible[1, 1, 1, 1] = False
    image = torch.randn(2, 1, 16, 16, 16)
    other = image.clone()
    other[0, 0, :8, 8:, :8] = 100
    features = net.encode(image, visible)[0]
    assert torch.equal(features, net.encode(other, visible)[0])
    assert torch.equal(features.abs().sum(1) > 0, visible)
    uneven = visible.clone()
    uneven[0] = True
    with pytest.raises(ValueError, match="same number of tokens"):
        net.encode(image, uneven)


def test_all_tokens_visible_is_no_masking() -> None:
    net = NARROW["primus"]().eval()
    image = torch.randn(1, 1, 16, 24, 16)
    visible = torch.ones(1, 2, 3, 2, dtype=torch.bool)
    assert torch.allclose(net.encode(image, visible)[0], net.encode(image)[0], atol=1e-5)


def test_attention_depends_on_relative_position_only() -> None:
    """Rotary positions: with the learned table zeroed, moving the content moves the answer with it."""
    net = Primus(input_size=32, embed_dim=24, depth=1, num_heads=2).eval()
    torch.nn.init.zeros_(net.encoder.transformer.position_embedding)
    visible = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    visible[:, :2, :2, :2] = True
    moved = visible.roll((2, 1, 2), dims=(1, 2, 3))
    image = torch.randn(1, 1, 32, 32, 32)
    there = image.roll((16, 8, 16), dims=(2, 3, 4))
    a = net.encode(image, visible)[0].roll((2, 1, 2), dims=(2, 3, 4))
    assert torch.allclose(a, net.encode(there, moved)[0], atol=1e-5)
