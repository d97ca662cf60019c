# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How runs of bundles are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

__all__ = ["Killed", "killed"]

Killed = Callable[..., AbstractContextManager[None]]


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
