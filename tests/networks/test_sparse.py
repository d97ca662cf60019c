# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Hiding places from a backbone: sparse computation, mask tokens, and computing a batch in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.networks import Primus, ResEncUNet, in_chunks, mask_at, masked_instance_norm


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def unet(**settings: Any) -> ResEncUNet:
    torch.manual_seed(0)
    net = ResEncUNet(features_per_stage=[4, 8, 8], blocks_per_stage=[1, 2, 1], **settings)
    for name, parameter in net.named_parameters():  # norms start as the identity, which would hide a forgotten bias
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def transformer(**settings: Any) -> Primus:
    torch.manual_seed(0)
    return Primus(input_size=16, embed_dim=24, depth=2, num_heads=2, **settings)


def some_visible(side: int = 2, count: int = 3, samples: int = 2) -> Tensor:
    """Show ``count`` blocks of a grid in the first sample, one more in each that follows."""
    visible = torch.zeros(samples, side**3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(side)
    for index, row in enumerate(visible):
        row[torch.randperm(side**3, generator=generator)[: count + index]] = True
    return visible.view(samples, side, side, side)


def spread(grid: Tensor, block: int) -> Tensor:
    """Repeat each block of ``(B, d, h, w)`` for its voxels: ``(B, 1, D, H, W)``."""
    for axis in (1, 2, 3):
        grid = grid.repeat_interleave(block, axis)
    return grid[:, None]


# norm


def gathered_norm(x: Tensor, visible: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gather the visible voxels of each sample, normalise them by PyTorch's own norm, scatter them back."""
    samples = []
    for sample, seen in zip(x, visible[:, 0], strict=True):
        normal = F.instance_norm(sample[:, seen][None], weight=weight, bias=bias)[0]  # (C, L)
        samples.append(torch.zeros_like(sample).masked_scatter(seen.expand_as(sample), normal))
    return torch.stack(samples)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_the_masked_norm_equals_gather_norm_scatter(affine: bool, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(3, 1, 5, 6, 7, generator=generator) < torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1, 1)
    upstream = torch.randn(3, 4, 5, 6, 7, generator=generator)
    start = 3 * torch.randn(3, 4, 5, 6, 7, generator=generator) + 5
    results = []
    for norm in (gathered_norm, masked_instance_norm):
        leaves = [start.clone()]
        if affine:
            leaves += [torch.linspace(0.5, 2, 4), torch.linspace(-1, 1, 4)]
        for leaf in leaves:
            leaf.requires_grad_()
        seen = visible if norm is gathered_norm else visible.to(kind)
        out = norm(leaves[0], seen, *(leaves[1:] or (None, None)))
        gradients = torch.autograd.grad((out * upstream).sum(), leaves)
        results.append([out.detach(), *gradients])
    for expected, actual in zip(*results, strict=True):
        assert torch.allclose(expected, actual, rtol=1e-5, atol=1e-5)
    gradient = results[1][1]
    assert float(gradient.abs().max()) > 0.1
    assert (gradient * ~visible == 0).all()


def test_a_gradient_of_hidden_voxels_changes_nothing() -> None:
    """Hidden voxels are constants 0: what a later layer asks of them reaches neither voxels nor weights."""
    x = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    visible = torch.rand(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    out = masked_instance_norm(x, visible, weight, bias)
    gradients = torch.autograd.grad((out * ~visible * 100).sum(), [x, weight, bias])
    assert [float(gradient.abs().max()) for gradient in gradients] == [0, 0, 0]


def test_what_hidden_voxels_hold_has_no_influence_on_the_norm() -> None:
    x, weight, bias = torch.randn(2, 3, 4, 4, 4), torch.rand(3), torch.rand(3)
    visible = torch.rand(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    other = torch.where(visible, x, torch.full_like(x, 1e4))
    out = masked_instance_norm(x, visible, weight, bias)
    assert torch.equal(out, masked_instance_norm(other, visible, weight, bias))
    assert (out * ~visible == 0).all()


def test_limits_of_the_norm() -> None:
    x, bias = torch.randn(2, 3, 4, 4, 4), torch.tensor([1.0, 2.0, 3.0])
    one = torch.zeros(2, 1, 4, 4, 4)
    one[:, :, 1, 2, 3] = 1
    out = masked_instance_norm(x, one, torch.ones(3), bias)  # a single voxel is its own mean
    assert torch.equal(out[:, :, 1, 2, 3], bias.expand(2, 3))
    assert out.sum() == 2 * bias.sum()
    assert torch.equal(masked_instance_norm(x, torch.zeros_like(one), None, bias), torch.zeros_like(x))
    everything = masked_instance_norm(x, torch.ones_like(one))
    assert torch.allclose(everything, F.instance_norm(x), atol=1e-6)


def test_the_norm_is_computed_in_float32() -> None:
    x = 300 + 10 * torch.randn(1, 2, 8, 8, 8)  # squares and sums are more than a float16 holds
    visible = torch.ones(1, 1, 8, 8, 8)
    half = x.half().requires_grad_()
    out = masked_instance_norm(half, visible)
    out.square().sum().backward()
    assert out.dtype == half.grad.dtype == torch.float16
    assert torch.allclose(out.float(), F.instance_norm(half.detach().float()), atol=2e-3)


# masks of maps


def test_a_grid_of_blocks_spreads_over_every_map_that_is_not_coarser() -> None:
    visible = some_visible(4, count=20)
    for stride in (1, 2, 4):
        expected = spread(visible, 16 // stride // 4).float()
        assert torch.equal(mask_at(visible, [16, 16, 16], stride), expected)
    assert mask_at(visible, [16, 16, 16], 8) is None
    assert mask_at(None, [16, 16, 16], 1) is None


# sparse encoder


def encode_by_hand(net: ResEncUNet, image: Tensor, visible: Tensor) -> list[Tensor]:
    """Compute the sparse encoder as SparK is written: after each convolution and each norm, hidden voxels become 0."""

    def layer(block: Any, x: Tensor, stride: int, seen: Tensor) -> Tensor:
        conv = block.conv
        y = F.conv3d(x, conv.weight, conv.bias, stride=stride, padding=conv.kernel_size[0] // 2) * seen
        return gathered_norm(y, seen, block.norm.weight, block.norm.bias)

    side, features = image.shape[2], []

    def seen_at(stride: int) -> Tensor:
        if side // stride < visible.shape[1]:
            return torch.ones(len(image), 1, *[side // stride] * 3, dtype=torch.bool)
        return spread(visible, side // stride // visible.shape[1])

    x = F.leaky_relu(layer(net.encoder.stem, image * seen_at(1), 1, seen_at(1)), 0.01)
    for index, stage in enumerate(net.encoder.stages):
        seen = seen_at(2**index)
        for position, block in enumerate(stage):
            stride = 2 if index > 0 and position == 0 else 1
            shortcut = F.avg_pool3d(x, stride) * seen if stride > 1 else x
            if block.shortcut is not None:
                shortcut = layer(block.shortcut, shortcut, 1, seen)
            x = F.leaky_relu(layer(block.conv1, x, stride, seen), 0.01)
            x = F.leaky_relu(layer(block.conv2, x, 1, seen) + shortcut, 0.01)
        features.append(x)
    return features


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_the_sparse_encoder_equals_masking_by_hand(blocks: int) -> None:
    """8 blocks along a side leave the coarsest map, of 4 voxels, dense."""
    net, image, visible = unet(), torch.randn(2, 1, 16, 16, 16), some_visible(blocks, count=blocks**3 // 3)
    results = []
    for encode in (lambda: net.encode(image, visible, sparse=True), lambda: encode_by_hand(net, image, visible)):
        features = encode()
        net.zero_grad()
        sum((f * torch.linspace(-1, 1, f.numel()).view_as(f)).sum() for f in features).backward()
        gradients = [p.grad for n, p in net.encoder.named_parameters() if not n.endswith("conv.bias")]
        results.append([f.detach() for f in features] + gradients)
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-3, atol=2e-5 * max(5.0, float(expected.abs().max())))


def test_hidden_places_are_zero_on_every_map_that_is_not_coarser_than_the_grid() -> None:
    net, image = unet(), torch.randn(2, 1, 16, 16, 16)
    visible = some_visible(4, count=20)
    for feature, seen in zip(
        net.encode(image, visible, sparse=True), map(spread, [visible] * 3, [4, 2, 1]), strict=True
    ):
        assert torch.equal(feature.abs().sum(1, keepdim=True) > 0, seen)
    coarser = net.encode(image, some_visible(8, count=300), sparse=True)[-1]  # 4 voxels a side, each of 8 blocks
    assert (coarser.abs().sum(1) > 0).all()


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_nothing_leaks_out_of_hidden_blocks(blocks: int) -> None:
    net, visible = unet(), some_visible(blocks, count=blocks**3 // 2)
    hidden = ~spread(visible, 16 // blocks)
    image = torch.randn(2, 1, 16, 16, 16, requires_grad=True)
    features = net.encode(image, visible, sparse=True)
    other = torch.where(hidden, torch.full_like(image, 50.0), image)
    for a, b in zip(features, net.encode(other, visible, sparse=True), strict=True):
        assert torch.equal(a, b)
    sum(f.square().sum() for f in features).backward()
    assert (image.grad[hidden] == 0).all()
    assert (image.grad[~hidden] != 0).float().mean() > 0.99


def test_sparse_is_dense_when_all_is_visible() -> None:
    net, image = unet(), torch.randn(2, 1, 16, 16, 16)
    everything = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    for a, b in zip(net.encode(image, everything, sparse=True), net.encode(image), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_samples_may_show_different_counts_and_do_not_influence_each_other() -> None:
    net, image, visible = unet(), torch.randn(3, 1, 16, 16, 16), some_visible(2, count=2, samples=3)
    assert visible.flatten(1).sum(1).tolist() == [2, 3, 4]
    together = net.encode(image, visible, sparse=True)
    for index in range(3):
        one = slice(index, index + 1)
        for a, b in zip(together, net.encode(image[one], visible[one], sparse=True), strict=True):
            assert torch.allclose(a[one], b, atol=1e-5)


# mask tokens


def test_a_mask_token_takes_the_place_of_the_stem_s_features() -> None:
    net, image, visible = unet(), torch.randn(2, 1, 16, 16, 16), some_visible(4, count=20)
    token = torch.tensor([5.0, -6.0, 7.0, -8.0]).view(1, 4, 1, 1, 1)
    met: list[Tensor] = []
    net.encoder.stages[0].register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
    masked = net.encode(image, visible, mask_token=token)
    stem = net.encoder.stem(image * spread(visible, 4))
    assert torch.equal(met[0], torch.where(spread(visible, 4), stem, token))
    assert (masked[0].abs().sum(1) > 0).all()  # the encoder is dense
    everything = torch.ones_like(visible)
    assert torch.equal(net.encode(image, everything, mask_token=token)[-1], net.encode(image)[-1])


def test_a_transformer_s_mask_token_stands_for_a_patch_and_gets_its_position() -> None:
    """With the embedding of a patch for a token, hiding places is writing that patch there."""
    net, image, visible = transformer(), torch.randn(2, 1, 16, 16, 16), some_visible(2, count=3)
    patch = torch.randn(1, 1, 8, 8, 8)
    token = net.encoder.patch_embedding(patch)
    written = torch.where(spread(visible, 8), image, patch.repeat(1, 1, 2, 2, 2))
    features = net.encode(image, visible, mask_token=token)[0]
    assert torch.allclose(features, net.encode(written)[0], atol=1e-5)
    hidden = features.movedim(1, -1)[0][~visible[0]]  # (places, C)
    assert torch.cdist(hidden, hidden).triu(1).sum() > 0.1  # the same token everywhere, told apart by position


def test_a_transformer_drops_or_replaces_but_not_both() -> None:
    net, image, visible = transformer(), torch.randn(2, 1, 16, 16, 16), some_visible(2)
    with pytest.raises(ValueError, match="not both"):
        net.encode(image, visible, mask_token=torch.zeros(1, 24, 1, 1, 1), sparse=True)
    same = visible[:1].expand(2, -1, -1, -1)
    dropped = net.encode(image, same)[0]
    assert torch.equal(net.encode(image, same, sparse=True, visible_count=3)[0], dropped)
    assert torch.equal(dropped.abs().sum(1) > 0, same)


# parts of a batch


class Counted:
    """Two outputs of a backbone, and how often they were asked for."""

    def __init__(self) -> None:
        self.net, self.sizes = unet(with_decoder=False), []

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(x))
        features = self.net.encode(x)
        return features[-1].mean((2, 3, 4)), features[0].amax((2, 3, 4))

    def gradients(self, x: Tensor, chunks: int) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        outputs = in_chunks(self, x, chunks)
        joined = F.normalize(torch.cat(outputs, dim=1))
        (joined @ joined.T).square().sum().backward()  # no sum over samples: each meets each other
        # a bias in front of a norm has no true gradient, only rounding
        gradients = [p.grad for name, p in self.net.named_parameters() if not name.endswith("conv.bias")]
        return tuple(out.detach() for out in outputs), gradients


@pytest.mark.parametrize(("chunks", "sizes"), [(2, [3, 2]), (5, [1] * 5), (3, [2, 2, 1])])
def test_parts_of_a_batch_give_outputs_and_gradients_of_the_whole(chunks: int, sizes: list[int]) -> None:
    torch.manual_seed(1)
    x, whole, parts = torch.randn(5, 1, 8, 8, 8), Counted(), Counted()
    expected, actual = whole.gradients(x, 1), parts.gradients(x, chunks)
    for a, b in zip(expected[0] + tuple(expected[1]), actual[0] + tuple(actual[1]), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected[1]) > 0.1
    assert whole.sizes == [5]
    assert parts.sizes[: len(sizes)] == sizes
    assert sorted(parts.sizes[len(sizes) :]) == sorted(sizes)  # each once more, in the backward pass
    with torch.no_grad():
        in_chunks(parts, x, chunks)
    assert parts.sizes[2 * len(sizes) :] == sizes


def kept(run: Callable[[], Any]) -> int:
    """Count the numbers that autograd keeps for the backward pass of what ``run`` computes."""
    numbers = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal numbers
        if not isinstance(tensor, torch.nn.Parameter):
            numbers += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return numbers


def test_parts_of_a_batch_keep_their_input_only() -> None:
    x, function = torch.randn(4, 1, 16, 16, 16), Counted()
    whole, parts = kept(lambda: in_chunks(function, x, 1)), kept(lambda: in_chunks(function, x, 4))
    assert whole > 20 * x.numel()
    assert parts <= x.numel()


def test_what_a_network_draws_is_drawn_again_for_the_gradient() -> None:
    """Stochastic depth in the second pass of a part is that of the first: two calls with one seed agree."""
    net, x = transformer(drop_path=0.5, with_decoder=False).train(), torch.randn(6, 1, 16, 16, 16)
    parts: list[list[Tensor]] = []
    for chunks in (False, True):
        torch.manual_seed(3)
        if chunks:
            (out,) = in_chunks(lambda part: tuple(net.encode(part)), x, 3)
        else:
            out = torch.cat([net.encode(part)[0] for part in x.chunk(3)])
        out.square().sum().backward()
        parts.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
        net.zero_grad()
    for a, b in zip(*parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)
