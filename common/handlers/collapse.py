# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Watch whether embeddings stay different from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor

from ..terminal import warn

__all__ = ["CollapseWatch"]

_MOST = 512  # embeddings looked at; more would cost a large decomposition in each validation


class CollapseWatch:
    """After an evaluator's run, measure how alike its embeddings are, and say so if they have collapsed.

    Adds three metrics: ``embedding_similarity``, the mean cosine between embeddings, 1 if all are the same;
    ``embedding_collapse``, MONAI's score of the directions in use, 0 for all and 1 for none; and
    ``embedding_directions``, the same as a number of directions. Few validation crops can use few directions only, so
    the sentence comes when all embeddings are alike or lie on one line, and from the second epoch on: before training
    they may do both.

    Args:
        keys: which predictions are embeddings ``(..., E)``.
        similarity: mean cosine from which on embeddings count as collapsed.
        directions: number of directions below which they do.
    """

    def __init__(self, keys: Sequence[str], *, similarity: float = 0.98, directions: float = 1.5) -> None:
        self.keys, self.similarity, self.directions = list(keys), similarity, directions
        self.metric = EmbeddingCollapseMetric(include_indicators=["effective_rank"])
        self._seen: list[Tensor] = []
        self._told = False

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator, whose epoch is the trainer's."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.COMPLETED, self)

    def _start(self, _: Engine) -> None:
        self._seen = []

    def _collect(self, engine: Engine) -> None:
        if sum(len(part) for part in self._seen) < _MOST:
            self._seen += [engine.state.output["pred"][key].detach().float().flatten(0, -2) for key in self.keys]

    def __call__(self, engine: Engine) -> None:
        """Measure what was collected."""
        embeddings = F.normalize(torch.cat(self._seen)[:_MOST], dim=-1)  # (n, E)
        n = len(embeddings)
        if n < 2:
            return
        # the mean over all pairs, from the length of the sum
        similarity = float((embeddings.sum(0).square().sum() - n) / (n * (n - 1)))
        collapse = float(self.metric(embeddings)["effective_rank_score"])  # type: ignore[arg-type]
        directions = (1 - collapse) * min(n - 1, embeddings.shape[1])
        engine.state.metrics.update(
            embedding_similarity=similarity, embedding_collapse=collapse, embedding_directions=directions
        )
        if engine.state.epoch < 2:
            return
        bad = similarity > self.similarity or directions < self.directions
        if bad and not self._told:
            warn(
                f"warning: the embeddings of different crops are nearly the same (mean cosine {similarity:.3f}, "
                f"{directions:.1f} directions in use): the encoder may be learning nothing. If this lasts, try another "
                "--lr or a larger --batch_size, and look at the pictures"
            )
        self._told = bad
