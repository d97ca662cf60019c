# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The task that encoders are probed and chosen on."""

from __future__ import annotations

from pathlib import Path

import pytest

from .encoders import write_task


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight labelled volumes of textures."""
    return write_task(tmp_path_factory.mktemp("textures"), 8)
