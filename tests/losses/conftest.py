# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from .processes import contrast, gathering, ignoring, in_processes


@pytest.fixture(scope="package")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two processes computed, started once for all tests."""
    results = in_processes([contrast, ignoring, gathering], tmp_path_factory.mktemp("processes"))
    return dict(zip(["contrast", "ignoring", "gathering"], results, strict=True))
