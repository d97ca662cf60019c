# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The plain rows: what is so cheap that any pre-trained or larger network has to beat it.

=================  ==================================================================================================
frozen random      the same network as drawn, its encoder frozen: the decoder or head alone is trained
plain CNN          a U-Net of less than a million parameters, from scratch (``common/configs/plain.yaml``)
mean of training   of a number, the mean of the cases to train on; nothing is trained
=================  ==================================================================================================

They are arms as any other, with the same cases, steps, seeds and evaluation, and take the settings of the arm from
scratch that they stand beside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from common.errors import SettingsError

from .definition import FROZEN_RANDOM, MEAN, PLAIN, PLAIN_ROWS, SCRATCH, Arm

__all__ = ["NAMES", "plain_arms", "wanted_rows"]

NAMES = {FROZEN_RANDOM: "frozen random", PLAIN: "plain CNN", MEAN: "mean of training"}
_CNN = "resenc_l"  # whose recipe suits another CNN
# of a pre-trained arm, what is its recipe's alone
_PRETRAINED = (
    *("lr", "schedule", "warmup_epochs", "decoder_epochs", "head_epochs", "tuning", "lora_rank", "transfer"),
    "allow_partial",
)


def wanted_rows(value: Any) -> tuple[str, ...]:
    """Return which plain rows ``plain_rows`` of a study's file asks for: true, false, or a list.

    Raises:
        SettingsError: if it is something else.

    Example:
        >>> wanted_rows(True), wanted_rows(["plain"]), wanted_rows(False)
        (('frozen_random', 'plain', 'mean'), ('plain',), ())
    """
    if isinstance(value, bool):
        return PLAIN_ROWS if value else ()
    if isinstance(value, list) and all(each in PLAIN_ROWS for each in value):
        return tuple(each for each in PLAIN_ROWS if each in value)
    raise SettingsError(f"plain_rows is {value!r}; it must be true, false or a list of {', '.join(PLAIN_ROWS)}")


def plain_arms(arms: Mapping[str, Arm], wanted: Sequence[str], tasks: Collection[str]) -> dict[str, Arm]:
    """Return the plain rows that a study gets beside its arms; one of a kind that it has already is not added.

    Lengths and spacings are those of the arms: there is one row for each combination.

    Args:
        arms: of the study's file.
        wanted: of :data:`PLAIN_ROWS`.
        tasks: of its data sets; the mean is of numbers only.

    Raises:
        SettingsError: if an arm is called as a row would be.
    """
    own = [arm for arm in arms.values() if arm.weights not in PLAIN_ROWS]
    there = {arm.weights if arm.weights != FROZEN_RANDOM else (arm.weights, arm.backbone) for arm in arms.values()}
    found: dict[str, Arm] = {}
    for backbone in dict.fromkeys(arm.backbone for arm in own) if FROZEN_RANDOM in wanted else ():
        if (FROZEN_RANDOM, backbone) not in there:
            members = [arm for arm in own if arm.backbone == backbone]
            found |= _rows(f"{NAMES[FROZEN_RANDOM]} {backbone}", FROZEN_RANDOM, members)
    if own and PLAIN in wanted and PLAIN not in there:
        found |= _rows(NAMES[PLAIN], PLAIN, own)
    if own and MEAN in wanted and MEAN not in there and "regression" in tasks:
        found[NAMES[MEAN]] = Arm(NAMES[MEAN], own[0].bundle, MEAN)
    if taken := next((name for name in found if name in arms), None):
        raise SettingsError(f"the arm {taken} is called as a plain row is; rename it, or say plain_rows: false")
    return found


def _rows(name: str, weights: str, arms: Sequence[Arm]) -> Iterator[tuple[str, Arm]]:
    """Yield a row for each length and spacing of these arms, with the settings of the nearest arm from scratch."""
    lengths = dict.fromkeys((arm.epochs, arm.spacing) for arm in arms)
    for epochs, spacing in lengths:
        alike = [arm for arm in arms if (arm.epochs, arm.spacing) == (epochs, spacing)]
        like = max(alike, key=lambda arm: (weights != PLAIN or arm.backbone == _CNN, arm.weights == SCRATCH))
        scratch = like.weights == SCRATCH
        told = [
            name,
            *([f"{epochs} epochs"] if epochs is not None and len({one for one, _ in lengths}) > 1 else []),
            *([f"spacing {spacing}"] if spacing is not None and len({one for _, one in lengths}) > 1 else []),
        ]
        row = replace(
            like,
            name=", ".join(told),
            weights=weights,
            schedule=like.schedule if scratch else None,
            settings={key: value for key, value in like.settings.items() if scratch or key not in _PRETRAINED},
            pretraining={},
        )
        yield row.name, row
