# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from common.errors import SettingsError
from common.optimizers import FineTuningSchedule, Poly
from common.optimizers.schedules import SCHEDULES

# epochs, warm-up and decoder epochs of the published recipes
LENGTHS = [(150, 15, 15), (1000, 50, 50)]


def expected(kind: str, e: int, lr: float, epochs: int, w: int, d: int) -> tuple[float, bool]:
    """The published stages, written out one by one: rate, and whether the decoder learns alone."""

    def rise(width: int, start: int = 0) -> float:
        return lr / width * (e - start + 1)

    def decay(end: int, start: int = 0) -> float:
        return lr * (1 - (e - start) / (end - start)) ** 0.9

    if kind == "default":
        return decay(epochs), False
    if kind in ("warmup", "frozen"):
        return (rise(w) if e < w else decay(epochs, w)), kind == "frozen"
    if e < d:
        if kind == "valley":
            return decay(d), True
        return (rise(d // 2) if e < d // 2 else decay(d, d // 2)), True
    return (rise(w, d) if e < d + w else decay(epochs, d + w)), False


@pytest.mark.parametrize(("epochs", "w", "d"), LENGTHS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_epoch_of_every_schedule(kind: str, epochs: int, w: int, d: int) -> None:
    schedule = FineTuningSchedule(kind, lr=1e-3, epochs=epochs)
    alone = []
    for epoch in range(epochs):
        rate, decoder_only = expected(kind, epoch, 1e-3, epochs, w, d)
        assert schedule(epoch) == pytest.approx(rate, rel=1e-9), epoch
        assert schedule.decoder_only(epoch) == decoder_only
        assert 0 < schedule(epoch) <= 1e-3 * (1 + 1e-9)
        alone.append(decoder_only)
    turns = [epoch for epoch in range(epochs) if schedule.starts_anew(epoch)]
    assert turns == [epoch for epoch in range(1, epochs) if alone[epoch - 1] and not alone[epoch]]


def test_one_schedule_of_pre_training_is_a_fine_tuning_schedule_too() -> None:
    warmup, poly = FineTuningSchedule("warmup", lr=3e-4, epochs=1000), Poly(3e-4, epochs=1000, warmup_epochs=50)
    assert [warmup(epoch) for epoch in range(1000)] == pytest.approx([poly(epoch) for epoch in range(1000)])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("epochs", [1, 2, 5, 10, 20])
def test_short_runs_have_a_schedule(kind: str, epochs: int) -> None:
    schedule = FineTuningSchedule(kind, lr=0.1, epochs=epochs)
    assert all(0 < schedule(epoch) <= 0.1 for epoch in range(epochs))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "cosine"}, "must be one of default, warmup"),
        ({"kind": "sawtooth", "warmup_epochs": 5, "decoder_epochs": 5}, "must be less than epochs 10"),
        ({"kind": "warmup", "warmup_epochs": 10}, "must be less than epochs 10"),
        ({"kind": "valley", "decoder_epochs": -1}, "must be less"),
    ],
)
def test_schedules_that_do_not_fit(arguments: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        FineTuningSchedule(**{"lr": 0.1, "epochs": 10, **arguments})
