# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""In how many parts a batch is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["number_of_parts"]


def number_of_parts(content: Mapping[str, Any]) -> int:
    """Return in how many parts a config, not resolved, computes the batch of one optimizer step."""
    from monai.bundle import ConfigParser

    return int(ConfigParser(dict(content)).get_parsed_content("accumulation_steps"))
