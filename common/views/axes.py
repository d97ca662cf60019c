# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Which axes may be mirrored, by number or in words, and a word on classes that a mirror exchanges.

======  ===========  ====================================================================
number  of an array  in space, once axes are canonical (``reorient: true``)
======  ===========  ====================================================================
0       slice        inferior-superior
1       row          posterior-anterior
2       column       left-right
======  ===========  ====================================================================

With ``reorient: false`` an array has its file's own axes in reversed order, and which of them runs left-right depends
on the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tqdm import tqdm

from ..errors import SettingsError

__all__ = ["axis_numbers", "names_of_sides", "tell_mirroring"]

_WORDS = {
    "slice": 0,
    "row": 1,
    "column": 2,
    "inferior-superior": 0,
    "posterior-anterior": 1,
    "left-right": 2,
    "superior-inferior": 0,
    "anterior-posterior": 1,
    "right-left": 2,
}
_LEFT_RIGHT = 2
_LETTERS = {"l": "r", "r": "l"}


def axis_numbers(axes: Sequence[int | str] | int | str) -> tuple[int, ...]:
    """Return the numbers of axes that are given by number or in words, each once and in order.

    Raises:
        SettingsError: if there is no such axis.

    Example:
        >>> axis_numbers([1, "inferior-superior"]), axis_numbers("left-right"), axis_numbers([])
        ((0, 1), (2,), ())
    """
    given = [axes] if isinstance(axes, (int, str)) else list(axes)
    found = [_WORDS.get(axis.lower(), axis) if isinstance(axis, str) else axis for axis in given]
    if any(isinstance(axis, bool) or axis not in (0, 1, 2) for axis in found):
        raise SettingsError(
            f"mirror_axes is {axes!r}; list axes of the array, 0 (slice, inferior-superior), 1 (row, "
            "posterior-anterior) and 2 (column, left-right), by number or in these words"
        )
    return tuple(sorted({int(axis) for axis in found}))


def names_of_sides(names: Iterable[str]) -> list[str]:
    """Return the names that say left or right: in words, as ``lh`` or ``rh``, or by a letter that another name answers.

    Example:
        >>> names_of_sides(["Left-Thalamus", "ctx_rh_insula", "cleft", "bright", "S", "M", "L"])
        ['Left-Thalamus', 'ctx_rh_insula']
        >>> names_of_sides(["Parotid_L", "Parotid_R", "Chiasm", "opticNerveR", "opticNerveL", "L hippocampus"])
        ['Parotid_L', 'Parotid_R', 'opticNerveR', 'opticNerveL']
    """
    parts = {name: _parts(name) for name in map(str, names)}
    others = [tuple(each) for each in parts.values()]

    def sided(own: list[str]) -> bool:
        if {"left", "right", "lh", "rh"} & set(own):
            return True
        ends = [place for place in {0, len(own) - 1} if len(own) > 1 and own[place] in _LETTERS]
        return any((*own[:place], _LETTERS[own[place]], *own[place + 1 :]) in others for place in ends)

    return [name for name, own in parts.items() if sided(own)]


def _parts(name: str) -> list[str]:
    """Return the words of a name, which capitals, digits and signs set apart, in small letters."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def tell_mirroring(
    names: Iterable[str],
    *,
    axes: Sequence[int | str],
    reorient: bool = True,
    trained: Sequence[int] | None = None,
) -> None:
    """Say so if mirrors exchange left and right while classes are told apart by side, or go beyond those of training.

    Args:
        names: of the classes.
        axes: that are mirrored.
        reorient: canonical axes, or each file's own.
        trained: axes along which the model was mirrored in training; None if that is not known, or this is training.
    """
    mirrored, sided = axis_numbers(axes), names_of_sides(names)
    if sided and (_LEFT_RIGHT in mirrored or (mirrored and not reorient)):
        named = ", ".join(sided[:4]) + (", ..." if len(sided) > 4 else "")
        kept = [axis for axis in mirrored if axis != _LEFT_RIGHT] if reorient else []
        which = (
            "along left-right"
            if reorient
            else "along the files' own axes, of which one runs left-right (canonical ones, --reorient true, tell which)"
        )
        tqdm.write(
            f"note: {len(sided)} class(es) are told apart by side ({named}), but images are mirrored {which}, which "
            f'makes one side look like the other; --mirror_axes "{str(kept).replace(" ", "")}" leaves that axis out'
        )
    beyond = [axis for axis in mirrored if trained is not None and axis not in trained]
    if beyond:
        tqdm.write(
            f"note: mirror_axes is {list(mirrored)}, but the model saw no mirrors along {beyond} in training; its "
            "predictions of such copies may be worse than none"
        )
