# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Recomputation: the same gradients bit by bit, with fewer tensors kept."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.networks import Primus, ResEncUNet
from common.networks.blocks.recompute import MODES, Again, in_chunks, mode_of, recalled
from common.weights.tuning import prepare_tuning

NETS: dict[str, Callable[..., nn.Module]] = {
    "resenc": lambda **kwargs: ResEncUNet(1, 2, features_per_stage=[4, 8, 8], blocks_per_stage=[1, 2, 1], **kwargs),
    "primus": lambda **kwargs: Primus(1, 2, input_size=16, embed_dim=24, depth=2, num_heads=2, **kwargs),
}
SEEN = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 1, 0, 1]]).view(2, 2, 2, 2).bool()
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # network, its settings, how it encodes
    "plain U-Net": ("resenc", {}, {}),
    "dropout": ("resenc", {"dropout": 0.4}, {}),
    "sparse": ("resenc", {}, {"visible": SEEN, "sparse": True}),
    "mask token": ("resenc", {}, {"visible": SEEN, "mask_token": torch.full((1, 4, 1, 1, 1), 0.3)}),
    "plain transformer": ("primus", {}, {}),
    "stochastic depth": ("primus", {"drop_path": 0.5, "dropout": 0.2}, {}),
    "dropped tokens": ("primus", {}, {"visible": SEEN}),
    "replaced tokens": ("primus", {}, {"visible": SEEN, "mask_token": torch.full((1, 24, 1, 1, 1), 0.3)}),
}


def gradients(net: nn.Module, image: Tensor, amp: bool = False, **how: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = net.decode(net.encode(image, **how))  # type: ignore[operator]
    out.float().square().mean().backward()
    return {"out": out.detach(), **{name: p.grad for name, p in net.named_parameters() if p.grad is not None}}


def built(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return NETS[kind](**settings).train()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_whatever_is_computed_again(way: str, amp: bool) -> None:
    kind, settings, how = WAYS[way]
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted, *others = (gradients(built(kind, checkpointing=mode, **settings), image, amp, **how) for mode in MODES)
    assert wanted["out"].abs().sum() > 0
    for other in others:
        assert other.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("mode", ["frozen", "norm"])
@pytest.mark.parametrize("kind", NETS)
def test_what_is_not_trained_gets_no_gradient(kind: str, mode: str) -> None:
    image = torch.randn(2, 1, 16, 16, 16)
    wanted, other = (
        gradients(prepare_tuning(built(kind, checkpointing=checkpointing), mode), image)
        for checkpointing in ("none", "selective")
    )
    assert other.keys() == wanted.keys()
    assert all(torch.equal(other[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", NETS)
def test_a_graph_can_be_walked_twice_and_gradients_add_up(kind: str) -> None:
    net, image = built(kind, checkpointing="selective"), torch.randn(1, 1, 16, 16, 16)
    loss = net(image).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    loss.backward()
    twice = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(torch.allclose(2 * a, b, rtol=1e-5) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("kind", NETS)
def test_a_tensor_computed_again_is_let_go_of_after_its_last_use(kind: str) -> None:
    made: list[weakref.ref[Any]] = []
    before = Again.__call__

    def call(self: Again) -> Tensor:
        value = before(self)
        made.append(weakref.ref(value.untyped_storage()))
        return value

    net = built(kind, checkpointing="selective")
    loss = net(torch.randn(1, 1, 16, 16, 16)).square().mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Again, "__call__", call)
        loss.backward(retain_graph=True)
    assert len(made) > 10
    # the graph, which is kept, holds none of them but the maps that are pooled, which convolutions keep in any case
    assert sum(reference() is not None for reference in made) == (2 if kind == "resenc" else 0)


def test_a_tensor_is_computed_once_for_all_its_users() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    x = torch.arange(3.0, requires_grad=True)
    doubled, again = recalled(double, x)
    squared, later = recalled(torch.square, doubled, source=again)
    with later.instead_of(squared):
        (squared * squared).sum().backward()  # 16 x^4
    assert torch.equal(x.grad, 64 * torch.arange(3.0) ** 3)
    assert len(calls) == 2, "once forward, once backward"


def test_a_layout_that_came_out_otherwise_is_put_right() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    turned = x.mT.contiguous().mT * 1.0
    with Again(lambda: turned.detach().contiguous(), x.device).instead_of(turned):
        out = (turned.mT * turned.mT).sum()
    out.backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(kind: str, amp: bool) -> None:
    """Both ways of computing parts again, whose dropout and stochastic depth are drawn as in the first pass."""
    image = torch.randn(4, 1, 16, 16, 16)
    settings = {"dropout": 0.3, "drop_path": 0.4} if kind == "primus" else {"dropout": 0.3}
    found = []
    for mode, told in (("none", False), ("selective", False), ("selective", True)):
        net = built(kind, checkpointing=mode, **settings)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            parameters = net.parameters() if told else ()
            (out,) = in_chunks(lambda x, net=net: (net(x),), image, 2, parameters)
        out.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    most = 2e-2 if amp else 1e-6  # whether the gradients of parts are added up in bfloat16 or in float32
    assert all((other - found[0]).norm() <= most * found[0].norm() for other in found[1:])


def test_parts_leave_frozen_weights_and_random_numbers_alone() -> None:
    net, image = built("resenc", checkpointing="selective"), torch.randn(4, 1, 16, 16, 16)
    net.get_submodule("encoder").requires_grad_(False)
    (out,) = in_chunks(lambda x: (net(x),), image, 4, net.parameters())
    before = torch.get_rng_state()
    out.square().mean().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None} == {"decoder", "head"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NETS)
def test_files_and_exported_networks_do_not_know_of_it(kind: str) -> None:
    net, image = built(kind, checkpointing="selective"), torch.randn(1, 1, 16, 16, 16)
    assert list(net.state_dict()) == list(built(kind).state_dict())
    for module in (net, net.eval()):
        torch.testing.assert_close(torch.jit.script(module)(image), module(image), rtol=1e-5, atol=1e-5)
    files = [io.BytesIO() for _ in MODES]
    for mode, file in zip(MODES, files, strict=True):
        torch.onnx.export(built(kind, checkpointing=mode).eval(), (image,), file, dynamo=False)
    assert files[0].getvalue() == files[1].getvalue() == files[2].getvalue()


def test_modes() -> None:
    assert [mode_of(value) for value in (True, False, None, *MODES)] == ["full", "none", "none", *MODES]
    with pytest.raises(ValueError, match="checkpointing is 'half'; it must be none, selective or full"):
        ResEncUNet(checkpointing="half")
    with pytest.raises(ValueError, match="checkpointing is 'half'"):
        Primus(checkpointing="half")
