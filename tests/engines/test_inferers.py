# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The sliding window against a reading of nnU-Net's rule that is as plain as it can be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import list_data_collate
from scipy.ndimage import gaussian_filter
from torch import Tensor

import common.engines.inferers
import common.memory
from common.data import SegmentationTask
from common.engines import DecideSlices, GaussianSlidingWindow
from common.engines.inferers import gaussian_weights, tile_starts
from common.errors import DataError, SettingsError
from common.memory import room
from common.transforms import RestoreSegmentationd, volume_preprocessing
from common.transforms.restoring import Decision

TILE = (8, 6, 7)


def by_the_book(image: np.ndarray, network: Callable[[np.ndarray], np.ndarray], tile: tuple[int, ...]) -> np.ndarray:
    """Predict ``(C, D, H, W)``: pad, spread tiles evenly, weight by a filtered delta, add, divide, undo the padding."""
    missing = [max(t - n, 0) for t, n in zip(tile, image.shape[1:], strict=True)]
    padded = np.pad(image, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
    starts = []
    for size, side in zip(padded.shape[1:], tile, strict=True):
        count = int(np.ceil((size - side) / (side / 2))) + 1
        step = (size - side) / (count - 1) if count > 1 else 0
        starts.append([int(np.round(step * i)) for i in range(count)])
    delta = np.zeros(tile)
    delta[tuple(side // 2 for side in tile)] = 1
    weight = gaussian_filter(delta, [side / 8 for side in tile], order=0, mode="constant", truncate=4)
    total: np.ndarray | None = None
    weights = np.zeros(padded.shape[1:])
    for corner in product(*starts):
        at = tuple(slice(c, c + t) for c, t in zip(corner, tile, strict=True))
        out = network(padded[(slice(None), *at)])
        total = np.zeros((len(out), *padded.shape[1:])) if total is None else total
        total[(slice(None), *at)] += out * weight
        weights[at] += weight
    assert total is not None
    inner = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape[1:], strict=True))
    return (total / weights)[(slice(None), *inner)]


def places(tile: Tensor) -> Tensor:
    """A network whose output tells the place in the tile beside the image, so that every seam shows."""
    axes = [torch.arange(float(n)) for n in tile.shape[2:]]
    ramp = axes[0][:, None, None] + 10 * axes[1][:, None] + 100 * axes[2]
    return torch.cat([tile + ramp, tile.mean((2, 3, 4), keepdim=True) - ramp], dim=1)


@pytest.mark.parametrize("shape", [(20, 17, 9), (8, 6, 7), (5, 4, 3), (3, 19, 7), (33, 6, 8), (12, 9, 5)])
@pytest.mark.parametrize("tiles", [1, 4])
def test_it_is_the_references_rule(shape: tuple[int, int, int], tiles: int) -> None:
    image = torch.randn(1, 1, *shape, dtype=torch.float64)
    expected = by_the_book(image[0].numpy(), lambda tile: places(torch.from_numpy(tile)[None])[0].numpy(), TILE)
    found = GaussianSlidingWindow(TILE, sw_batch_size=tiles)(image, places)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_a_network_that_returns_its_tile_returns_the_volume(overlap: float) -> None:
    image = torch.randn(2, 3, 21, 5, 17)
    found = GaussianSlidingWindow(TILE, overlap=overlap, mirror_axes=[0, 1, 2])(image, lambda tile: tile)
    torch.testing.assert_close(found, image, rtol=1e-5, atol=1e-5)


def test_tiles_lie_evenly_and_reach_both_ends() -> None:
    for size in range(16, 200):
        starts = tile_starts(size, 16)
        steps = np.diff(starts)
        assert starts[0] == 0
        assert starts[-1] == size - 16
        assert (steps <= 8).all()
        assert (steps >= 1).all()
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert tile_starts(21, 16) == [0, 5]
    assert tile_starts(37, 16) == [0, 7, 14, 21]
    assert tile_starts(29, 8, 0.5) == [0, 4, 7, 10, 14, 18, 21]  # 3.5, 10.5 and 17.5 go to the even side


def test_no_weight_is_lost() -> None:
    """In float16, as the reference sums them, the corners of its Gaussian are 0."""
    weights = gaussian_weights((160, 160, 160))
    assert weights.dtype == torch.float32
    assert weights.max() == 1
    assert weights.min() == pytest.approx(np.exp(-24), rel=0.05)  # an eighth of its side is four of its widths away
    assert torch.equal(weights[1:], weights[1:].flip(0))  # the peak is at the half, not between the halves
    large = torch.full((1, 1, 8, 8, 8), 60000.0)  # two of them overflow float16
    torch.testing.assert_close(GaussianSlidingWindow(8)(large, lambda tile: tile), large)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_mirroring_is_the_mean_of_all_copies(axes: tuple[int, ...]) -> None:
    image = torch.randn(1, 1, *TILE)
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    copies = []
    for chosen in product(*([False, True] for _ in axes)):
        dims = [axis + 2 for axis, flip in zip(axes, chosen, strict=True) if flip]
        copies.append(network(image.flip(dims)).flip(dims))
    assert len(copies) == 2 ** len(axes)
    found = GaussianSlidingWindow(TILE, mirror_axes=axes)(image, network)
    torch.testing.assert_close(found, torch.stack(copies).mean(0), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_into_memory_goes_to_a_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randn(1, 1, 40, 12, 14)
    expected = GaussianSlidingWindow(TILE)(image, places)
    inferer = GaussianSlidingWindow(TILE, memory_limit_gb=1e-6, scratch_dir=str(tmp_path / "scratch"))
    found = inferer(image, places)
    assert torch.equal(found, expected)
    small = GaussianSlidingWindow(TILE, memory_limit_gb=1e-6, scratch_dir=str(tmp_path / "scratch"))
    assert torch.equal(
        small(image[..., :3, :4, :5], places), GaussianSlidingWindow(TILE)(image[..., :3, :4, :5], places)
    )
    assert list((tmp_path / "scratch").iterdir()) == [], "the file has no name while it is used"
    monkeypatch.setattr(common.memory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="free some space"):
        room((100, 100), folder=tmp_path, limit_gb=1e-6)


@pytest.mark.parametrize("shape", [(40, 12, 14), (9, 7, 6), (4, 9, 5)])
def test_labels_are_decided_row_by_row(tmp_path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """They are those of all logits at once, of which no more than a row of tiles is ever there."""
    rng, task = np.random.default_rng(0), SegmentationTask(["background", "a"])
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(rng.uniform(1, 2, shape[::-1]).astype(np.float32), np.diag([1.3, 0.8, 1.6, 1])), path)
    chain = volume_preprocessing("image", spacing_mm=1.0, reorient=False)
    case = chain({"image": str(path)})
    batch = list_data_collate([case])["image"]

    def network(tile: Tensor) -> Tensor:
        return places(tile).sin()  # both win

    inferer = GaussianSlidingWindow(TILE)
    restore = RestoreSegmentationd("pred", transform=chain, task=task)
    logits = inferer(batch, network)
    expected = restore({"image": case["image"], "pred": logits[0]})["pred"].as_tensor()
    assert torch.equal(DecideSlices(inferer, transform=chain, task=task, logits=True)(batch, network), logits)
    taken, take = [], Decision.take
    monkeypatch.setattr(Decision, "take", lambda self, rows: (taken.append(rows.shape[1]), take(self, rows)))
    monkeypatch.setattr(common.engines.inferers, "room", None)  # a whole volume has none
    found = DecideSlices(inferer, transform=chain, task=task)(batch, network)
    assert found.dtype == torch.uint8
    assert sum(taken) == logits.shape[2]
    assert max(taken) <= TILE[0]
    labels = restore({"image": case["image"], "pred": found[0]})["pred"].as_tensor()
    assert torch.equal(labels, expected)
    assert len(labels.unique()) == 2


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="--amp false"):
        GaussianSlidingWindow(TILE)(torch.ones(1, 1, 9, 9, 9), lambda tile: tile / 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"mirror_axes": [3]}, "mirror_axes"),
        ({"sw_batch_size": 0}, "tiles_per_step"),
        ({"accumulate_on": "gpu"}, "accumulate_on"),
        ({"roi_size": [8, 8]}, "patch_size"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        GaussianSlidingWindow(**{"roi_size": 8, **settings})
