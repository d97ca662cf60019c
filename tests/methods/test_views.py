# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the views of all methods have in common: they follow from a sample's key and volumes alone."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import common.methods
from common.methods.dino import DINOViews
from common.methods.jepa import JEPAViews
from common.methods.models_genesis import GenesisViews
from common.methods.simclr import SimCLRViews
from common.methods.swinunetr import SwinUNETRViews
from common.methods.voco import VoCoViews
from common.methods.volumefusion import FusionViews
from common.views import CropAugmentation, MaskedViews, SpatialCrop

from .samples import read

# turned, zoomed and mirrored crops, so that regions differ in size
CROP = SpatialCrop(16, rotation_probability=0.5, zoom_probability=0.5)
AUGMENTATION = CropAugmentation(noise_probability=0.5, gamma_probability=0.5)

VIEWS: dict[str, Callable[[], Any]] = {
    "MaskedViews": lambda: MaskedViews(CROP, block_size=4, hidden_ratio=0.75),
    "MaskedViews, drawn ratio": lambda: MaskedViews(CROP, block_size=4, hidden_ratio=[0.6, 0.9], batch_size=8),
    "GenesisViews": lambda: GenesisViews(CROP, shuffle_boxes=50),
    "FusionViews": lambda: FusionViews(CROP, box_sides=(2, 10), augmentation=AUGMENTATION),
    "SwinUNETRViews": lambda: SwinUNETRViews(CROP),
    "VoCoViews": lambda: VoCoViews(CROP, grid=(2, 2, 2), crop_size=8, targets=3, augmentation=AUGMENTATION),
    "DINOViews": lambda: DINOViews(
        CROP,
        crop_size=8,
        local_size=4,
        multiple=4,
        block_size=4,
        zoom=(1.0, 2.0),
        hidden_ratio=(0.2, 0.8),
        batch_size=8,
        augmentation=AUGMENTATION,
    ),
    "JEPAViews": lambda: JEPAViews(CROP, block_size=4, batch_size=8),
    "SimCLRViews": lambda: SimCLRViews(CROP, crop_size=8, pairs=2, augmentation=AUGMENTATION),
}


def of_sample(name: str, seen: dict[str, Any], index: int, count: int) -> list[Tensor]:
    """Return what one sample of a batch of ``count`` has in its views."""
    rows: dict[str, list[int]] = {}
    if name == "SwinUNETRViews":
        rows = {"target": [index, count + index], "rotation": [index, count + index]}  # its images copy from others
    elif name == "VoCoViews":
        targets = range(8 * count + 3 * index, 8 * count + 3 * index + 3)
        rows = {"crops": [*range(8 * index, 8 * index + 8), *targets], "overlap": [index]}
    elif name == "SimCLRViews":
        references = [2 * index, 2 * index + 1]
        rows = {"crops": [*references, *(2 * count + row for row in references)]}
        own = seen["overlap"][references][:, references]
        assert float(seen["overlap"][references].sum()) == float(own.sum())  # nothing is shared with other volumes
        return [seen["crops"][rows["crops"]], own]
    else:
        rows = {key: [index] for key, value in seen.items() if isinstance(value, Tensor)}
    return [seen[key][where] for key, where in rows.items()]


def batch_of(name: str, indices: list[int], epoch: int = 1) -> dict[str, Any]:
    return read(CROP, indices, each=2 if name == "FusionViews" else 1, epoch=epoch)


def test_all_views_are_here() -> None:
    found = {"MaskedViews"}
    for module in pkgutil.iter_modules(common.methods.__path__):
        content = importlib.import_module(f"common.methods.{module.name}")
        found |= {n for n, value in vars(content).items() if inspect.isclass(value) and n.endswith("Views")}
    assert {name.split(",")[0] for name in VIEWS} == found
    assert len(found) >= 7


@pytest.mark.parametrize("name", VIEWS)
def test_views_repeat_for_a_key_and_differ_between_keys(name: str) -> None:
    views, indices = VIEWS[name](), [0, 1, 2, 3]
    first, again = views(batch_of(name, indices)), VIEWS[name]()(batch_of(name, indices))
    assert first.keys() == again.keys()
    for key, value in first.items():
        assert torch.equal(value, again[key]) if isinstance(value, Tensor) else value == again[key]
    other = views(batch_of(name, indices, epoch=2))
    for index in indices:
        mine, next_epoch = of_sample(name, first, index, 4), of_sample(name, other, index, 4)
        assert not torch.equal(mine[0], next_epoch[0])


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_sample_do_not_depend_on_those_beside_it(name: str) -> None:
    views = VIEWS[name]()
    together = views(batch_of(name, [0, 1, 2, 3]))
    for index in range(4):
        alone = of_sample(name, views(batch_of(name, [index])), 0, 1)
        after_another = of_sample(name, views(batch_of(name, [3 - index, index])), 1, 2)
        for whole, one, second in zip(of_sample(name, together, index, 4), alone, after_another, strict=True):
            assert torch.allclose(whole, one, atol=1e-5) if whole.is_floating_point() else torch.equal(whole, one)
            assert torch.allclose(one, second, atol=1e-5) if one.is_floating_point() else torch.equal(one, second)


@pytest.mark.parametrize("name", VIEWS)
def test_volumes_are_left_as_they_are(name: str) -> None:
    views, batch = VIEWS[name](), batch_of(name, [0, 1, 2, 3])
    whole = SpatialCrop(16, rotation_probability=0, zoom_probability=0, flip_probability=0)
    for cut, settings in (
        (CROP, batch),
        (whole, read(whole, range(4), shape=(16,) * 3, each=len(batch["region"]) // 4)),
    ):
        views.spatial = cut
        before = [region.clone() for region in settings["region"]]
        seen = views(settings)
        assert all(torch.equal(a, b) for a, b in zip(settings["region"], before, strict=True))
        for value in seen.values():  # nor can a later change of a view reach them
            if isinstance(value, Tensor) and value.is_floating_point():
                value.fill_(9.0)
        assert all(torch.equal(a, b) for a, b in zip(settings["region"], before, strict=True))


@pytest.mark.parametrize("name", VIEWS)
def test_views_do_not_touch_the_global_stream(name: str) -> None:
    """What a network draws in a step does not depend on what its views drew."""
    torch.manual_seed(0)
    VIEWS[name]()(batch_of(name, [0, 1]))
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
