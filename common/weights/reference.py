# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the reference and of those who use its networks, read without trust.

A checkpoint of the reference is a dictionary of ``network_weights`` (a state dict), ``nnssl_adaptation_plan`` (how to
build and fill the downstream network; also in ``adaptation_plan.json`` beside the file), ``trainer_name``, and, in
files of a training, much that is not needed here, among it an index of all volumes of some 80 MB, which is dropped at
once. Others keep less, wrap the network, or save an encoder alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from ..paths import as_path
from .cells import Recognised, recognise
from .files import read_checkpoint
from .published import network_name
from .wrappers import network_of, unwrapped

__all__ = ["PLAN_FILE", "ReferenceCheckpoint", "read_reference"]

PLAN_FILE = "adaptation_plan.json"


@dataclass
class ReferenceCheckpoint:
    """What is needed of a checkpoint of the reference.

    Attributes:
        path: the file.
        weights: state dict under the reference's names, without wrappers; Spark3D's second dictionary is joined.
        plan: adaptation plan, empty if there is none.
        trainer: name of the trainer, if the file or plan gives one.
        epoch: epochs that a training checkpoint had done.
        citations: that the file carries, as text.
        notes: what is odd about the file.
    """

    path: Path
    weights: dict[str, Tensor]
    plan: dict[str, Any] = field(default_factory=dict)
    trainer: str | None = None
    epoch: int = 0
    citations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def recognise(self) -> Recognised:
        """Say which backbone the file is of, and what it says of its method."""
        return recognise(self.weights, self.trainer)

    def tensor(self, ending: str) -> Tensor | None:
        """Return the tensor whose name here ends so, None if there is none."""
        return next((value for key, value in self.weights.items() if network_name(key)[1].endswith(ending)), None)

    @property
    def configuration(self) -> dict[str, Any]:
        """The one configuration of the pre-training plan, empty if there is none."""
        pretraining = self.plan.get("pretrain_plan")
        configurations = pretraining.get("configurations") if isinstance(pretraining, dict) else None
        if not isinstance(configurations, dict) or not configurations:
            return {}
        first = configurations.get("onemmiso", next(iter(configurations.values())))
        return first if isinstance(first, dict) else {}

    @property
    def patch(self) -> list[int] | None:
        """What the plan says that the network saw in pre-training, in voxels."""
        patch = self.plan.get("pretrain_patch_size") or self.configuration.get("patch_size")
        if not isinstance(patch, (list, tuple)) or len(patch) != 3 or not all(isinstance(side, int) for side in patch):
            return None
        return list(patch)

    @property
    def grid(self) -> list[int] | None:
        """Tokens along each axis, if the patch of the plan gives as many as the position table has; else a cube."""
        table, tokens = self.tensor("position_embedding"), self._tokens
        return tokens if table is not None and tokens and math.prod(tokens) == table.shape[1] else None

    @property
    def _tokens(self) -> list[int] | None:
        """Tokens along each axis of the patch of the plan."""
        table, embedding = self.tensor("position_embedding"), self.tensor("patch_embedding.weight")
        if table is None or embedding is None or self.patch is None or table.dim() != 3 or embedding.dim() != 5:
            return None
        return [side // token for side, token in zip(self.patch, embedding.shape[2:], strict=True)]

    def note_patch(self) -> None:
        """Note if the patch of the plan is not what was trained."""
        table = self.tensor("position_embedding")
        if table is not None and self._tokens and self.grid is None:
            self.notes.append(
                f"patch_size {self.patch} of the adaptation plan is not what was trained: the position table has "
                f"{table.shape[1]} places"
            )


def read_reference(path: str | Path, *, plan_file: str | Path | None = None) -> ReferenceCheckpoint:
    """Read a checkpoint of the reference, leaving its tensors in the file until they are needed.

    Args:
        path: what ``torch.save`` wrote, or safetensors.
        plan_file: adaptation plan; that inside the file, or ``adaptation_plan.json`` beside it, unless given.

    Raises:
        WeightsError: if the file is missing, damaged, holds anything but tensors and plain values, no network or two.
    """
    path = as_path(path)
    content = read_checkpoint(path, mmap=True)
    content.pop("init_args", None)  # some 80 MB of file names in the published files
    weights = network_of(content, path)
    if any(
        key.startswith(("encoder.stem.conv.", "encoder.transformer.", "encoder.patch_embedding.")) for key in weights
    ):
        raise WeightsError(
            f"{path} is an encoder of this collection already; give it to fine-tuning with --pretrained {path}"
        )
    weights, notes = unwrapped(weights, path)
    plan = content.get("nnssl_adaptation_plan")
    trainer = content.get("trainer_name")
    if plan_file is not None or not isinstance(plan, dict) or trainer is None:
        beside = _plan_beside(as_path(plan_file or path.with_name(PLAN_FILE)), required=plan_file is not None)
        if not isinstance(plan, dict):
            plan = beside
            notes.append("the adaptation plan was beside the file" if beside else "the file has no adaptation plan")
        trainer = trainer or plan.get("trainer_name", beside.get("trainer_name"))
    citations = content.get("citations") or []
    found = ReferenceCheckpoint(
        path=path,
        weights=weights,
        plan=plan,
        trainer=trainer if isinstance(trainer, str) else None,
        epoch=content["current_epoch"] if isinstance(content.get("current_epoch"), int) else 0,
        citations=[text for entry in citations for text in _texts(entry)] if isinstance(citations, list) else [],
        notes=notes,
    )
    found.note_patch()
    return found


def _plan_beside(file: Path, *, required: bool) -> dict[str, Any]:
    if not file.is_file():
        if required:
            raise WeightsError(f"there is no adaptation plan {file}; check the path")
        return {}
    try:
        plan = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not a JSON file: {error}; fetch it again or move it away") from error
    return plan if isinstance(plan, dict) else {}


def _texts(citation: Any) -> list[str]:
    """Return what to cite of an entry of ``citations``."""
    if not isinstance(citation, dict):
        return [str(citation)]
    texts = citation.get("apa_citations") or citation.get("bibtex_citations") or [citation.get("name", "")]
    return [str(text) for text in (texts if isinstance(texts, list) else [texts]) if text]
