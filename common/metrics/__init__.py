# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How well a prediction agrees with a reference, how sure that is, and how it is written down."""

from .reports import draw_scores, format_summary, summarise, write_scores
from .segmentation import METRICS, score_maps, score_masks
from .statistics import bootstrap_interval, known_mean

__all__ = [
    "METRICS",
    "bootstrap_interval",
    "draw_scores",
    "format_summary",
    "known_mean",
    "score_maps",
    "score_masks",
    "summarise",
    "write_scores",
]
