# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""An encoder that computes visible blocks only equals the one that computes everything and hides it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from common.losses import MaskedMSELoss
from common.methods.spark3d import Spark3D
from common.networks import ResEncUNet
from common.networks.blocks.block_sparse import BlockMap
from common.networks.nets import resenc_unet
from common.views import MaskedViews, SpatialCrop, VisibleBlocks

from ..methods.samples import read


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def spark(block: int = 16, stages: int = 6, **settings: Any) -> Spark3D:
    torch.manual_seed(0)
    features, blocks = [4, 8, 8, 16, 16, 16][:stages], [1, 2, 1, 2, 1, 1][:stages]
    net = ResEncUNet(features_per_stage=features, blocks_per_stage=blocks, **settings)
    for name, parameter in net.named_parameters():  # norms start as the identity, which would hide a forgotten bias
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return Spark3D(net, block_size=block).train()


def views(grid: tuple[int, int, int], block: int, counts: list[int]) -> dict[str, Any]:
    """Noise of which each sample shows so many blocks."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.ones(len(counts), grid[0] * grid[1] * grid[2], dtype=torch.bool)
    for row, count in zip(hidden, counts, strict=True):
        row[torch.randperm(len(row), generator=generator)[:count]] = False
    size = [cells * block for cells in grid]
    return {
        "image": torch.randn(len(counts), 1, *size, generator=generator),
        "hidden": hidden.view(-1, *grid),
    }


def step(method: Any, batch: dict[str, Any], *, amp: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return reconstruction, loss and gradients; biases in front of a norm have no gradient but rounding."""
    method.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = method(batch)
        loss = MaskedMSELoss()(out, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if not n.endswith("conv.bias")}
    return out["reconstruction"].detach().float(), loss.detach(), gradients


def both(method: Spark3D, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *, amp: bool = False) -> list[Any]:
    """Return the step by visible blocks and the step that computes everything."""
    results = []
    for most in (1.0, 0.0):
        monkeypatch.setattr(resenc_unet, "_MOST_VISIBLE", most)
        results.append(step(method, batch, amp=amp))
        found = method.backbone.encode_visible(batch["image"], ~batch["hidden"])
        assert isinstance(found[0], BlockMap) == (most > 0)
    return results


def encoder(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the decoder, whose narrow layers have weight gradients that differ from call to call in bfloat16."""
    return {name: gradient for name, gradient in gradients.items() if name.startswith("backbone.encoder")}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the length of the difference of two gradients as a share of the second."""
    lengths = [
        torch.stack([torch.linalg.vector_norm(t) for t in parts])
        for parts in ([a[name] - b[name] for name in b], list(b.values()))
    ]
    return float(torch.linalg.vector_norm(lengths[0]) / torch.linalg.vector_norm(lengths[1]))


@pytest.mark.parametrize(
    ("grid", "block", "stages", "counts"),
    [
        ((2, 2, 2), 16, 6, [2]),  # whole blocks in five stages, down to one voxel
        ((2, 4, 6), 16, 6, [12, 1, 7]),
        ((4, 4, 4), 4, 3, [20, 20]),
        ((8, 8, 8), 2, 3, [200, 31]),  # the coarsest map is coarser than the grid
        ((4, 4, 4), 12, 4, [20]),  # 12, 6, 3 voxels: the last stage does not divide a block
        ((2, 2, 2), 8, 3, [0, 3]),  # a sample of which nothing is seen
    ],
)
def test_visible_blocks_alone_give_outputs_loss_and_gradients_of_everything(
    grid: tuple[int, int, int], block: int, stages: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, dense = both(spark(block, stages), views(grid, block, counts), monkeypatch)
    assert float((ours[0] - dense[0]).abs().max()) <= 1e-5 * float(dense[0].abs().max())
    assert float((ours[1] - dense[1]).abs()) <= 1e-6 * float(dense[1])
    assert difference(ours[2], dense[2]) <= 1e-5
    largest = max(float(gradient.abs().max()) for gradient in dense[2].values())
    for name, expected in dense[2].items():
        assert torch.allclose(ours[2][name], expected, rtol=1e-3, atol=1e-5 * largest), name


def test_mixed_precision_differs_by_its_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = spark(), views((2, 4, 2), 16, [7, 9])  # norms of fewer voxels, one a block at last, spread rounding
    exact = step(method, batch)
    ours, dense = both(method, batch, monkeypatch, amp=True)
    assert float((ours[1] - exact[1]).abs()) < 0.01 * float(exact[1])
    found, wanted, expected = (encoder(results[2]) for results in (ours, dense, exact))
    assert difference(found, expected) < max(0.02, 1.5 * difference(wanted, expected))
    assert all(gradient.dtype == torch.float32 for gradient in ours[2].values())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("amp", [False, True])
def test_recomputation_changes_nothing(checkpointing: str, amp: bool) -> None:
    batch = views((2, 2, 2), 16, [2, 3])
    kept, again = (step(spark(checkpointing=how), batch, amp=amp) for how in ("none", checkpointing))
    assert torch.equal(kept[0], again[0])
    assert difference(encoder(again[2]), encoder(kept[2])) < 1e-6


def test_each_process_of_a_distributed_run_computes_the_same(tmp_path: Path) -> None:
    batch, method = views((2, 2, 2), 16, [2, 2]), spark()
    alone = step(method, batch)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(method)
        out = wrapped({**batch, "blocks": VisibleBlocks.of(~batch["hidden"])})
        method.zero_grad()
        MaskedMSELoss()(out, batch).backward()
    finally:
        dist.destroy_process_group()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    assert all(torch.equal(gradients[name], gradient) for name, gradient in alone[2].items())


def test_a_step_asks_for_no_value_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tables from the views every shape is known: the step runs on tensors that have no values."""
    real = views((2, 4, 2), 16, [3, 3])
    blocks = VisibleBlocks.of(~real["hidden"])
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # which reads what it has drawn
    with FakeTensorMode() as mode:
        method = spark()
        fake = {name: mode.from_tensor(value) for name, value in real.items()}
        where, neighbours = mode.from_tensor(blocks.where), mode.from_tensor(blocks.neighbours)
        fake["blocks"] = VisibleBlocks(blocks.grid, blocks.counts, where, neighbours, blocks.pairs)
        MaskedMSELoss()(method(fake), fake).backward()
        assert all(p.grad is not None for p in method.parameters())


# tables


def test_neighbours_are_those_of_the_grid() -> None:
    visible = torch.rand(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    blocks = VisibleBlocks.of(visible)
    assert blocks.counts == tuple(visible.flatten(1).sum(1).tolist())
    places = [tuple(place) for place in blocks.where.t().tolist()]
    assert places == [tuple(place) for place in visible.nonzero().tolist()]
    for (sample, z, y, x), row in zip(places, blocks.neighbours.tolist(), strict=True):
        for number, beside in enumerate(row):
            there = (sample, z + number // 9 - 1, y + number // 3 % 3 - 1, x + number % 3 - 1)
            assert beside == (places.index(there) if there in places else len(places))
    assert blocks.pairs == tuple(int((column < len(places)).sum()) for column in blocks.neighbours.t())


def test_the_views_of_a_sparse_encoder_bring_the_tables_of_their_mask() -> None:
    crop = SpatialCrop(16)
    for sparse in (False, True):
        found = MaskedViews(crop, block_size=4, hidden_ratio=0.75, sparse=sparse)(read(crop, range(2)))
        assert ("blocks" in found) == sparse
    expected = VisibleBlocks.of(~found["hidden"])
    assert found["blocks"].counts == (16, 16)
    assert torch.equal(found["blocks"].neighbours, expected.neighbours)


def test_a_map_of_blocks_is_dense_again_with_the_last_row_where_blocks_are_hidden() -> None:
    batch = views((2, 2, 3), 4, [3, 5])
    image = batch["image"].repeat(1, 2, 1, 1, 1)
    found = BlockMap.of(image, VisibleBlocks.of(~batch["hidden"]))
    seen = (~batch["hidden"]).repeat_interleave(4, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None]
    assert found.values.shape == (8 * 64 + 1, 2)
    assert torch.equal(found.dense(), image * seen)
