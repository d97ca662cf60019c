# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Where runs of bundles start, how small, and how they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from ..conftest import ROOT

__all__ = ["PAIR", "SIZES", "Killed", "from_the_root", "killed"]

Killed = Callable[..., AbstractContextManager[None]]
PAIR = ["mae_primus_m", "mae_resenc_l"]
SIZES: dict[str, dict[str, Any]] = {  # of networks that are trained in seconds
    "mae_resenc_l": {"features_per_stage": [8, 16, 32], "blocks_per_stage": [1, 1, 1]},
    "mae_primus_m": {"embed_dim": 48, "depth": 2, "num_heads": 4},
}


@pytest.fixture(scope="module")
def from_the_root() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Killed:
    """Return a context, of a kind of checkpoint and an epoch, in which a run is killed when that has been saved."""

    @contextmanager
    def context(checkpoint: Any, epoch: int | None = None) -> Iterator[None]:
        save = checkpoint._save

        def save_and_stop(self: Any, engine: Any) -> None:
            save(self, engine)
            if epoch in (None, engine.state.epoch):
                raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_save", save_and_stop)
            with pytest.raises(RuntimeError, match="Failed to evaluate"):  # what MONAI makes of any error in a run
                yield

    return context
