# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The receipt: where weights come from, and what became of each tensor when they were loaded or translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CAVEAT", "SPACING_CAVEAT", "Receipt", "origin_words", "spacing_warning"]

CAVEAT = "Pre-trained encoders are made to be fine-tuned; their features are not recommended as they are."
SPACING_CAVEAT = (
    "Data whose spacing is far from the pre-training spacing (for example 0.5 mm angiography) does better from scratch "
    "at its own spacing."
)
FAR = 1.5  # factor between two spacings from which the warning is given
OUTCOMES = ("taken", "adapted", "skipped", "missing")


def _three(value: Any) -> list[float] | None:
    if isinstance(value, (int, float)):
        return [float(value)] * 3
    if isinstance(value, Sequence) and len(value) == 3 and all(isinstance(side, (int, float)) for side in value):
        return [float(side) for side in value]
    return None


def _by(value: Any) -> str:
    sides = _three(value)
    return " x ".join(f"{side:g}" for side in sides) if sides else "unknown"


def spacing_warning(pretraining: Any, run: Any) -> str | None:
    """Return a warning if the spacing of a run is far from that of the pre-training.

    Args:
        pretraining: one or three sides of a voxel in mm.
        run: the same of this run; None for each file's own, of which nothing can be said.

    Example:
        >>> spacing_warning(1.0, [0.5, 0.5, 0.5])[:68]
        'this run has 0.5 x 0.5 x 0.5 mm voxels, pre-training had 1 x 1 x 1 m'
        >>> spacing_warning(1.0, 1.2) is None
        True
    """
    theirs, ours = _three(pretraining), _three(run)
    if theirs is None or ours is None or all(max(a / b, b / a) <= FAR for a, b in zip(theirs, ours, strict=True)):
        return None
    return (
        f"this run has {_by(ours)} mm voxels, pre-training had {_by(theirs)} mm; that far apart, training from scratch "
        "at the data's own spacing usually does better: compare with --from_scratch true"
    )


def origin_words(method: str, backbone: str) -> str:
    """Return how an encoder was pre-trained in words, or that nobody says it."""
    if method == "unknown" and backbone != "unknown":
        return f"{backbone} encoder, method unknown"
    return f"{method} with {backbone}"


@dataclass
class Receipt:
    """What happened to each tensor when weights were loaded or translated, and where they come from.

    Attributes:
        source: file, repository or address the weights came from.
        sha256: of that file.
        revision: commit of the repository that was fetched.
        method: pre-training method.
        backbone: its network.
        name: what its source calls it.
        data: that it was trained on.
        licence: of the weights.
        citation: what to cite.
        spacing_mm: of the voxels in pre-training.
        patch_size: of the input in pre-training, in voxels.
        fitted_to: input that the file's position table was interpolated for since, in voxels.
        taken: tensors copied as they are, or only named and ordered otherwise.
        adapted: tensors changed to fit, with how.
        skipped: tensors of the file not used, with why.
        missing: tensors of the network that the file does not have; they keep their random start.
        parameters: how many numbers were ``taken``, ``adapted``, ``skipped`` and ``missing``.
        encoder_share: share of the encoder's parameters that were taken or adapted.
        notes: what else the user should know.
        provenance: what the JSON beside the file says.
    """

    source: str
    sha256: str
    revision: str | None = None
    method: str = "unknown"
    backbone: str = "unknown"
    name: str | None = None
    data: str = "unknown"
    licence: str = "unknown"
    citation: list[str] = field(default_factory=list)
    spacing_mm: Any = None
    patch_size: Any = None
    fitted_to: Any = None
    taken: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    encoder_share: float = 0.0
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Method and backbone in words.

        Example:
            >>> Receipt("a.pt", "0f" * 32, backbone="ResEnc-L").origin
            'ResEnc-L encoder, method unknown'
        """
        return origin_words(self.method, self.backbone)

    def summary(self) -> str:
        """Return the receipt as a short table.

        Example:
            >>> Receipt("a.pt", "0f" * 32, taken=["encoder.x"], encoder_share=1.0).summary().splitlines()[-1]
            'encoder covered 100.0 %'
        """
        rows = [("weights from", f"{self.source} (sha256 {self.sha256[:12]})")]
        rows += [("revision", self.revision)] if self.revision else []
        rows += [("called", self.name)] if self.name else []
        rows += [("method", self.origin), ("licence", self.licence)]
        rows += [("trained on", self.data)] if self.data != "unknown" else []
        rows += [("please cite", paper) for paper in self.citation]
        fitted = f"; since fitted to {_by(self.fitted_to)}" if self.fitted_to else ""
        rows += [("trained at", f"{_by(self.spacing_mm)} mm, input of {_by(self.patch_size)} voxels{fitted}")]
        for outcome in OUTCOMES:
            count = len(getattr(self, outcome))
            numbers = f"{self.parameters[outcome]:>13,} parameters" if outcome in self.parameters else ""
            rows += [(outcome, f"{count:>5} tensors {numbers}".rstrip())]
        lines = [f"{name:13} {value}" for name, value in rows]
        for how in dict.fromkeys(self.adapted.values()):
            names = [name for name, done in self.adapted.items() if done == how]
            lines.append(f"  adapted {names[0] if len(names) == 1 else f'{len(names)} tensors'}: {how}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, f"encoder covered {100 * self.encoder_share:.1f} %"])

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as plain values for a JSON file."""
        return asdict(self)
