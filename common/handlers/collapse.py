# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Watch whether embeddings stay different from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.metrics import EmbeddingCollapseMetric
from torch import Tensor
from tqdm import tqdm

__all__ = ["CollapseWatch"]

_MOST = 512  # embeddings looked at; more would cost a large decomposition in each validation


class CollapseWatch:
    """After an evaluator's run, measure how alike its embeddings are, and say so if they have collapsed.

    Adds two metrics: ``embedding_similarity``, the mean cosine between embeddings, 1 if all are the same; and
    ``embedding_collapse``, MONAI's score of the directions in use, 0 for all and 1 for one. A network that was not
    trained yet has both near 1, so the sentence comes only from the second epoch on.

    Args:
        keys: which predictions are embeddings ``(..., E)``.
        similarity: mean cosine from which on embeddings count as collapsed.
        collapse: score from which on they do.
    """

    def __init__(self, keys: Sequence[str], *, similarity: float = 0.98, collapse: float = 0.95) -> None:
        self.keys, self.similarity, self.collapse = list(keys), similarity, collapse
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
        scores = self.metric(embeddings)
        collapse = float(scores["effective_rank_score"])  # type: ignore[arg-type]
        engine.state.metrics.update(embedding_similarity=similarity, embedding_collapse=collapse)
        bad = similarity > self.similarity or collapse > self.collapse
        if bad and not self._told and engine.state.epoch > 1:
            tqdm.write(
                f"warning: the embeddings of different crops are nearly the same (mean cosine {similarity:.3f}, "
                f"collapse {collapse:.2f} of 1): the encoder may be learning nothing. If this lasts, lower --lr, raise "
                "--batch_size, or for VoCo add --teacher_momentum 0.9"
            )
        self._told = bad
