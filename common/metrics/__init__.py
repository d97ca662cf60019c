# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""How well a prediction agrees with a reference, how sure that is, and how it is written down."""

from typing import TYPE_CHECKING

from ..lazy import on_demand

if TYPE_CHECKING:
    from .classification import (
        SCORES,
        classification_scores,
        draw_classification,
        format_classification,
        summarise_classification,
    )
    from .groups import (
        draw_groups,
        format_groups,
        gap_between,
        group_scores,
        group_sentences,
        group_table_rows,
        group_title,
        ordered_groups,
    )
    from .regression import (
        REGRESSION_SCORES,
        draw_regression,
        format_regression,
        regression_scores,
        summarise_regression,
    )
    from .reports import draw_scores, format_summary, summarise, write_scores
    from .segmentation import METRICS, score_maps, score_masks
    from .statistics import bootstrap_interval, crossed_interval, equal_units, known_mean

__all__ = [
    "METRICS",
    "REGRESSION_SCORES",
    "SCORES",
    "bootstrap_interval",
    "classification_scores",
    "crossed_interval",
    "draw_classification",
    "draw_groups",
    "draw_regression",
    "draw_scores",
    "equal_units",
    "format_classification",
    "format_groups",
    "format_regression",
    "format_summary",
    "gap_between",
    "group_scores",
    "group_sentences",
    "group_table_rows",
    "group_title",
    "known_mean",
    "ordered_groups",
    "regression_scores",
    "score_maps",
    "score_masks",
    "summarise",
    "summarise_classification",
    "summarise_regression",
    "write_scores",
]

__getattr__ = on_demand(globals())
