# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Random streams, one pair per sample.

A sample is named by (seed, epoch, index), its index counting over the whole epoch and all processes. One stream is used
where the sample is read (which volume, where, spatial transform), a second one for its views (masks, intensities,
noise). So draws do not depend on the number of workers or processes, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["SampleKey", "progress_of", "reading_stream", "step_seed", "step_stream", "view_stream"]

SampleKey = tuple[int, int, int]
_READING, _VIEW, _STEP, _BATCH = 0, 1, 2, 3


def reading_stream(key: SampleKey) -> np.random.Generator:
    """Return the stream that places the sample ``key = (seed, epoch, index)``.

    Example:
        >>> reading_stream((0, 3, 7)).integers(1000) == reading_stream((0, 3, 7)).integers(1000)
        np.True_
    """
    return np.random.default_rng([*key, _READING])


def view_stream(key: SampleKey) -> torch.Generator:
    """Return the stream for the views of the sample ``key``; on the CPU, so that every device gets the same draws."""
    seed = int(np.random.SeedSequence([*key, _VIEW]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed & (2**63 - 1))


def step_stream(seed: int, epoch: int, step: int) -> np.random.Generator:
    """Return the stream for what all samples of one optimizer step share, in whatever process they are."""
    return np.random.default_rng([seed, epoch, step, _BATCH])


def progress_of(epoch: int, step: int, steps: Sequence[int] | None) -> float:
    """Return the share of the run that is done, for schedules.

    Args:
        epoch: which, from 1.
        step: of the epoch, from 0.
        steps: of the run, and of one of its epochs; None for what is always at the end, as validation.

    Example:
        >>> progress_of(2, 5, [40, 10]), progress_of(9, 0, [40, 10]), progress_of(1, 0, None)
        (0.375, 1.0, 1.0)
    """
    if steps is None:
        return 1.0
    whole, of_epoch = steps
    return min(((epoch - 1) * of_epoch + step) / whole, 1.0)


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """Return a seed for what a network draws itself (dropout, stochastic depth) in one iteration of one process."""
    return int(np.random.SeedSequence([seed, iteration, rank, _STEP]).generate_state(1, np.uint32)[0])
