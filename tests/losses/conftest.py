# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from .processes import contrast, distilling, foretelling, gathering, ignoring, in_processes, overlapping


@pytest.fixture(scope="package")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two processes computed, started once for all tests."""
    compute = [contrast, ignoring, gathering, distilling, foretelling, overlapping]
    results = in_processes(compute, tmp_path_factory.mktemp("processes"))
    return dict(zip((one.__name__ for one in compute), results, strict=True))
