# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a segmentation task asks for: classes or overlapping regions, and a label that is not scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import SettingsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TARGET", "ClassificationTask", "SegmentationTask"]

TARGET = "target"  # key of a case: index of its class, or a list of 0 and 1


@dataclass(frozen=True)
class SegmentationTask:
    """Classes of a label map, one output of the network for each.

    Without regions the outputs exclude each other (softmax; background is one of them). With regions, sets of label
    values that may overlap, each output is a region of its own (sigmoid; there is no background).

    Args:
        labels: names of the label values 0, 1, 2, ...; background first.
        regions: name of each region and its label values, e.g. ``{"whole": [1, 2, 3], "core": [2, 3]}``; painted in
            this order, a later one over an earlier one.
        ignore_label: value of voxels without a verdict, which no loss and no score counts.

    Raises:
        SettingsError: saying how to write them.

    Example:
        >>> import torch
        >>> task = SegmentationTask(["background", "edema", "core"], regions={"whole": [1, 2], "core": [2]})
        >>> task.names, task.outputs, task.painted
        (['whole', 'core'], 2, [1, 2])
        >>> task.decode(torch.tensor([[2.0, 2.0, -1.0], [-1.0, 3.0, -1.0]]).view(1, 2, 3, 1, 1)).flatten()
        tensor([1, 2, 0], dtype=torch.uint8)
    """

    labels: Sequence[str]
    regions: Mapping[str, Sequence[int]] | None = None
    ignore_label: int | None = None

    def __post_init__(self) -> None:
        labels, ignored = self.labels, self.ignore_label
        if not isinstance(labels, (list, tuple)) or len(labels) < 2 or len({str(n) for n in labels}) != len(labels):
            raise SettingsError(
                f"labels is {labels!r}; list all classes, background first: --labels \"['background','lesion']\""
            )
        if ignored is not None and (isinstance(ignored, bool) or not isinstance(ignored, int) or ignored < len(labels)):
            raise SettingsError(
                f"ignore_label is {ignored!r}; it must be a whole number beyond the classes 0 to {len(labels) - 1}"
            )
        if self.regions is None:
            return
        if not isinstance(self.regions, Mapping) or not self.regions:
            raise SettingsError(f"regions is {self.regions!r}; write --regions \"{{'whole':[1,2],'core':[2]}}\"")
        for name, values in self.regions.items():
            known = isinstance(values, (list, tuple)) and values and all(v in range(1, len(labels)) for v in values)
            if not known:
                raise SettingsError(
                    f"region {name!r} is {values!r}; it must list label values from 1 to {len(labels) - 1}"
                )
        for index, (name, value) in enumerate(zip(self.names, self.painted, strict=True)):
            if value < 0:
                later = ", ".join(self.names[index + 1 :])
                raise SettingsError(
                    f"region {name!r} holds no label value of its own beside those of {later}; put larger regions first"
                )

    @property
    def names(self) -> list[str]:
        """Names of the foreground classes or regions, the ones that are scored."""
        return list(self.regions) if self.regions is not None else [str(name) for name in self.labels[1:]]

    @property
    def outputs(self) -> int:
        """Number of network outputs: classes with background, or regions."""
        return len(self.regions) if self.regions is not None else len(self.labels)

    @property
    def values(self) -> list[tuple[int, ...]]:
        """Label values of each of ``names``."""
        if self.regions is not None:
            return [tuple(sorted(set(values))) for values in self.regions.values()]
        return [(value,) for value in range(1, len(self.labels))]

    @property
    def painted(self) -> list[int]:
        """Value with which each of ``names`` is painted: the lowest that no later region holds, -1 if there is none."""
        values = self.values
        return [
            min(set(own).difference(*values[index + 1 :]), default=-1) for index, own in enumerate(values)
        ]  # of classes, their own

    @property
    def known(self) -> list[int]:
        """All values that a label map may hold."""
        return [*range(len(self.labels))] + ([] if self.ignore_label is None else [self.ignore_label])

    @property
    def _dtype(self) -> torch.dtype:
        """Type of a label map."""
        import torch  # not at the top: listing cases takes no tensors

        return torch.uint8 if len(self.labels) <= 256 else torch.int16

    def decode(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, outputs, ...)`` into a label map ``(B, 1, ...)``, uint8 or int16."""
        if self.regions is None:
            return logits.argmax(1, keepdim=True).to(self._dtype)
        out = logits.new_zeros((len(logits), 1, *logits.shape[2:]), dtype=self._dtype)
        for index, value in enumerate(self.painted):
            out[logits[:, index : index + 1] > 0] = value
        return out

    def decode_outputs(self, outputs: Iterable[Tensor]) -> Tensor:
        """Turn logits into the label map that :meth:`decode` gives, one output at a time.

        Args:
            outputs: each ``(1, ...)``, in the order of the network's.
        """
        labels: Tensor | None = None
        best: Tensor | None = None
        for index, output in enumerate(outputs):
            if labels is None or best is None:
                labels, best = output.new_zeros(output.shape, dtype=self._dtype), output.clone()
            if self.regions is not None:
                labels[output > 0] = self.painted[index]
            elif index:
                labels[output > best] = index  # of equal ones the first, as argmax
                best.clamp_(min=output)
        assert labels is not None, "a task has outputs"
        return labels


@dataclass(frozen=True)
class ClassificationTask:
    """Classes that exclude each other (softmax), or labels that may come together (sigmoid).

    Args:
        names: of the classes or labels, in the order of the network's outputs.
        multilabel: whether they are labels.

    Example:
        >>> import torch
        >>> task = ClassificationTask(("AD", "CN"))
        >>> task.probabilities(torch.tensor([[0.0, 0.0]])), task.decide(torch.tensor([[0.2, 0.8]]))
        (tensor([[0.5000, 0.5000]]), tensor([1]))
    """

    names: tuple[str, ...]
    multilabel: bool = False

    @property
    def outputs(self) -> int:
        """Number of network outputs."""
        return len(self.names)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, outputs)`` into probabilities, float32."""
        return logits.float().sigmoid() if self.multilabel else logits.float().softmax(1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return the index of the likeliest class ``(B,)``, or 0 and 1 of each label ``(B, outputs)``."""
        return (probabilities > 0.5).long() if self.multilabel else probabilities.argmax(1)

    def encode(self, targets: Sequence[Any]) -> Tensor:
        """Stack targets of cases: ``(B,)`` integers, or ``(B, outputs)`` float."""
        import torch  # not at the top: listing cases takes no tensors

        return torch.tensor(list(targets), dtype=torch.float32 if self.multilabel else torch.long)

    def stratum(self, case: Mapping[str, Any]) -> str:
        """Return what splits hold in equal shares: the class, or the combination of labels."""
        if not self.multilabel:
            return self.names[case[TARGET]]
        return "+".join(name for name, value in zip(self.names, case[TARGET], strict=True) if value) or "none"

    def counts(self, cases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Count the cases of each class or label."""
        if self.multilabel:
            return {name: sum(int(case[TARGET][index]) for case in cases) for index, name in enumerate(self.names)}
        found = Counter(case[TARGET] for case in cases)
        return {name: found[index] for index, name in enumerate(self.names)}
