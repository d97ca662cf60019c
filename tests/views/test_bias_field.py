# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from common.views import BiasField


def crops(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 10, 12, 14, generator=torch.Generator().manual_seed(0))


def streams(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def test_a_field_is_the_exponential_of_a_polynomial_without_a_constant() -> None:
    bias = BiasField(probability=1.0, strength=0.4, order=2)
    drawn = bias.draw(streams(1)[0])
    assert drawn is not None
    powers = [tuple(place) for place in drawn.nonzero().tolist()]
    assert powers == [(i, j, k) for i in range(3) for j in range(3) for k in range(3) if 0 < i + j + k <= 2]
    assert float(drawn.abs().max()) <= 0.4
    field = bias.field(drawn, [3, 5, 2])
    for a, z in enumerate((-1.0, 0.0, 1.0)):
        for b, y in enumerate((-1.0, -0.5, 0.0, 0.5, 1.0)):
            for c, x in enumerate((-1.0, 1.0)):
                value = sum(float(drawn[i, j, k]) * z**i * y**j * x**k for i, j, k in powers)
                assert float(field[a, b, c].log()) == pytest.approx(value, abs=1e-5)


def test_a_crop_is_brightened_smoothly_and_keeps_its_mean_and_deviation() -> None:
    bias, images = BiasField(probability=1.0, strength=0.5), crops()
    before = images.clone()
    made = bias(images, streams(3))
    assert torch.equal(images, before), "left as they are"
    torch.testing.assert_close(made.mean((1, 2, 3, 4)), images.mean((1, 2, 3, 4)), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std((1, 2, 3, 4)), images.std((1, 2, 3, 4)), atol=1e-5, rtol=1e-5)
    assert (made - images).abs().amax((1, 2, 3, 4)).min() > 0.1
    # what the field did is an affine function of (crop - darkest) x field: undone, the field is left
    drawn = bias.draw(streams(1)[0])
    assert drawn is not None
    lifted = (images[0, 0] - images[0, 0].min()) * bias.field(drawn, images.shape[2:])
    both = torch.stack([lifted.flatten(), made[0, 0].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(1, abs=1e-5)


def test_how_often_and_how_strongly() -> None:
    fired = [BiasField(probability=0.3).draw(one) is not None for one in streams(400)]
    assert 85 <= sum(fired) <= 155, "120 expected, within four standard deviations"
    images = crops()
    assert torch.equal(BiasField(probability=0.0)(images, streams(3)), images)
    torch.testing.assert_close(BiasField(probability=1.0, strength=0.0)(images, streams(3)), images)
    constant = torch.full((1, 1, 4, 4, 4), 2.5)
    torch.testing.assert_close(BiasField(probability=1.0)(constant, streams(1)), constant)


def test_what_is_drawn_next_does_not_depend_on_whether_a_field_is() -> None:
    left = []
    for probability in (0.0, 1.0):
        stream = streams(1)[0]
        BiasField(probability=probability).draw(stream)
        left.append(float(torch.rand((), generator=stream)))
    assert left[0] == left[1]


@pytest.mark.parametrize("wrong", [{"probability": 1.5}, {"strength": -1.0}, {"order": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
        BiasField(**wrong)  # type: ignore[arg-type]
