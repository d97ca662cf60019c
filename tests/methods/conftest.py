# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Crops of 16 voxels a side keep one core busy; a second one waits more than it helps."""
    torch.set_num_threads(1)
