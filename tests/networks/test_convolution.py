# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What only predicts takes other operations than what learns, and gives the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.networks import ResEncUNet
from common.networks.blocks.convolution import InstanceNorm, Upsampling, predicting


class _Operations(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def _network() -> ResEncUNet:
    torch.manual_seed(0)
    network = ResEncUNet(2, 3, features_per_stage=[4, 8, 8], blocks_per_stage=[1, 2, 1]).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize("size", [(1, 2, 16, 24, 8), (2, 2, 8, 8, 8), (1, 2, 4, 4, 4)])
def test_predicting_gives_what_learning_sees(size: tuple[int, ...]) -> None:
    network, image = _network(), torch.randn(size)
    learned = network(image).detach()
    with torch.no_grad(), predicting(), _Operations() as seen:
        predicted = network(image)
        strided = network(image.transpose(2, 4).contiguous().transpose(2, 4))
    torch.testing.assert_close(predicted, learned, rtol=1e-5, atol=1e-5 * float(learned.abs().max()))
    torch.testing.assert_close(strided, predicted, rtol=1e-5, atol=1e-5 * float(learned.abs().max()))
    assert "mkldnn_convolution" in seen.names, "a single small map is left to PyTorch's slow routine"
    assert "native_group_norm" in seen.names
    assert not {name for name in seen.names if name.startswith("slow_conv3d")}
    assert any("batch_norm" in name for name in seen.names) == (size[2] == 4), "of a single voxel only"


def test_only_where_nobody_learns_and_it_is_asked_for() -> None:
    """TorchScript and ONNX have PyTorch's own operations."""
    network, image = _network(), torch.randn(1, 2, 8, 8, 8)
    with _Operations() as seen, torch.no_grad():
        plain = network(image)
    with predicting(), _Operations() as learning:
        network(image).sum().backward()
    with predicting(), torch.no_grad():
        exported = str(torch.export.export(network, (image,)).graph)
    assert "mkldnn_convolution" not in seen.names | learning.names
    assert "aten.conv3d" in exported
    assert "mkldnn" not in exported
    assert "group_norm" not in exported
    with torch.no_grad():
        traced = str(torch.jit.trace(network, image).inlined_graph)
        scripted = torch.jit.script(network)(image)
    assert "aten::instance_norm" in traced
    assert "group_norm" not in traced
    torch.testing.assert_close(scripted, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("sides", [(1, 1, 1), (4, 4, 4), (8, 12, 10)])
@pytest.mark.parametrize("flat", [False, True])
def test_a_norm_and_its_gradients_are_those_of_instances(sides: tuple[int, ...], flat: bool) -> None:
    """On a CPU it is computed as groups of one channel; against the definition in float64."""
    torch.manual_seed(0)
    norm = InstanceNorm(3)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, outer = (torch.randn(2, 3, *sides) * 3 + 5).requires_grad_(), torch.randn(2, 3, *sides)
    with _Operations() as seen:
        found = (norm.flat if flat else norm)(x).view(x.shape)
        gradients = torch.autograd.grad(found, [x, norm.weight, norm.bias], outer)
    assert ("native_group_norm_backward" in seen.names) == (sides != (1, 1, 1))

    y, weight, bias = (t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias))
    centred = y - y.mean((2, 3, 4), keepdim=True)
    scaled = centred / (centred.square().mean((2, 3, 4), keepdim=True) + norm.eps).sqrt()
    wanted = scaled * weight.view(3, 1, 1, 1) + bias.view(3, 1, 1, 1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    for one, other in zip(gradients, torch.autograd.grad(wanted, [y, weight, bias], outer.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("only_predicts", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_upsampling_is_a_transposed_convolution(samples: int, only_predicts: bool) -> None:
    torch.manual_seed(0)
    layer, x = Upsampling(5, 3), torch.randn(samples, 5, 4, 3, 6).requires_grad_()
    y, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    wanted = torch.nn.functional.conv_transpose3d(y, weight, bias, 2)
    outer = torch.randn_like(wanted)
    asked = predicting() if only_predicts else nullcontext()
    with _Operations() as seen, asked, torch.set_grad_enabled(not only_predicts):
        found = layer(x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    if only_predicts:
        assert "mkldnn_convolution" in seen.names
        return
    gradients = torch.autograd.grad(found, [x, layer.weight, layer.bias], outer.float())
    for one, other in zip(gradients, torch.autograd.grad(wanted, [y, weight, bias], outer), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_float64_and_bfloat16_are_left_alone() -> None:
    network, image = _network(), torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad(), predicting():
        found = network(image)
        double = _network().double()(image.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert network(image).dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(found.double(), double, rtol=1e-4, atol=1e-4 * float(double.abs().max()))
