# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Volumes inside a page that can be looked through: three linked planes, label maps over them, no server, no network.

The voxels are in the page itself, one byte each, deflated, which browsers inflate themselves; ``viewer.js`` beside this
file draws them on canvases. So a page works from a mounted folder, offline, without WebGL and without any library.
A scan that is too large for its share of the page gets fewer grey levels first and then fewer voxels, which it says;
label maps are exact on the voxels that are shown.

| | of a 256^3 scan with noise and two label maps |
|---|---|
| this | 6 MB, 4 s, maps switched on and off |
| nilearn's ``view_img`` | 20 MB, 10 s, one map, cannot be switched off |
| NiiVue | 3 MB of program and 18 MB of voxels, needs WebGL 2 |
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing import busiest, canonical_voxels, colour

__all__ = ["MEGABYTES", "SCRIPT", "STYLE", "Scene", "read_scene", "scene_html"]

MEGABYTES = 15.0  # of a page with two cases
_HERE = Path(__file__).parent
SCRIPT = (_HERE / "viewer.js").read_text("utf-8")
STYLE = (_HERE / "viewer.css").read_text("utf-8")
_LEVELS = (256, 128, 64, 32, 20)  # of grey, the most that fits
_SAMPLED = 16  # one slice of so many is looked at first, to see whether the whole can fit
_MOST_VOXELS = 2**25  # that a browser is given
_MOST_VALUES = 254


@dataclass(frozen=True)
class Scene:
    """A scan and label maps on it, with axes that lead right, forward and up.

    Attributes:
        title: above it.
        image: ``(X, Y, Z)``; None shows the maps alone.
        maps: whole numbers ``(X, Y, Z)`` by name; the first is drawn as outlines, the others as areas.
        sides_mm: of a voxel.
        labels: names of the values 0, 1, 2, ..., or of any by value.
    """

    title: str
    image: np.ndarray | None
    maps: Mapping[str, np.ndarray]
    sides_mm: Sequence[float]
    labels: Sequence[str] | Mapping[int, str]


def read_scene(
    image: str | Path | None,
    maps: Mapping[str, str | Path],
    *,
    labels: Sequence[str] | Mapping[int, str],
    title: str,
) -> Scene:
    """Read a scan and label maps on its grid.

    Args:
        image: volume, of several channels the first is shown; None shows the maps alone.
        maps: files by name, at least one without an image.
        labels: names of the values 0, 1, 2, ..., or of any by value.
        title: above it.

    Raises:
        DataError: if a map is on another grid, or is none.
    """
    grid = next(iter(maps.values())) if image is None else image
    voxels, marks, sides = canonical_voxels(grid, maps)
    return Scene(title, None if image is None else voxels, marks, [float(side) for side in sides], labels)


def scene_html(scene: Scene, *, megabytes: float = MEGABYTES / 2) -> str:
    """Return the part of a page that shows a scene; the page needs :data:`STYLE` and :data:`SCRIPT` once.

    Args:
        scene: what to show.
        megabytes: that its voxels may take.
    """
    shape = next(iter(scene.maps.values())).shape if scene.image is None else scene.image.shape
    marked = np.zeros(shape, bool)
    for marks in scene.maps.values():
        marked |= marks != 0
    values = np.unique(np.concatenate([[], *(np.unique(marks[marks != 0]) for marks in scene.maps.values())]))
    values = values[:_MOST_VALUES].astype(np.int64)
    step = 1
    while np.prod([-(-side // step) for side in shape]) > _MOST_VOXELS:
        step += 1
    while True:
        maps = [_packed(_indices(marks[::step, ::step, ::step], values)) for marks in scene.maps.values()]
        left = 1e6 * megabytes - sum(map(len, maps))
        images, levels = [], 0
        if scene.image is not None:
            text, levels = _image(scene.image[::step, ::step, ::step], left)
            images, left = [text], left - len(text)
        if left >= 0 or min(shape) <= 4 * step:
            break
        step += 1
    names = scene.labels if isinstance(scene.labels, Mapping) else dict(enumerate(scene.labels))
    about = {
        "title": scene.title,
        "shape": [-(-side // step) for side in shape],
        "sides_mm": [side * step for side in scene.sides_mm],
        "levels": levels,
        "maps": list(scene.maps),
        "values": [{"name": names.get(value, f"value {value}"), "colour": colour(value)} for value in values.tolist()],
        "step": step,
        "at": [busiest(marked, axis) // step for axis in range(3)],
        "image": scene.image is not None,
    }
    return (
        f'<figure class="viewer" aria-label="{html.escape(scene.title)}"><figcaption>{html.escape(scene.title)}'
        f'</figcaption><script type="application/json">{_script(about)}</script>'
        + "".join(f'<script type="text/plain">{part}</script>' for part in [*images, *maps])
        + f'<p class="note">{html.escape(_told(scene, step, levels))}</p></figure>'
    )


def _script(content: Any) -> str:
    """Return JSON that cannot end the element that it is in."""
    return json.dumps(content).replace("<", "\\u003c")


def _packed(voxels: np.ndarray, *, level: int = 6) -> str:
    """Return bytes ``(X, Y, Z)`` as text, the first axis fastest."""
    return base64.b64encode(zlib.compress(voxels.tobytes(order="F"), level)).decode()


def _indices(marks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the place of each value in the list, from 1; 0 for no mark, 255 for one that is not listed."""
    found = np.zeros(marks.shape, np.uint8)
    inside = marks != 0
    place = np.searchsorted(values, marks[inside])
    listed = np.append(values, 0)[place] == marks[inside]
    found[inside] = np.where(listed, place + 1, 255)
    return found


def _image(voxels: np.ndarray, most: float) -> tuple[str, int]:
    """Return a scan as text of at most so many letters, if it can be, and its number of grey levels."""
    known = voxels[np.isfinite(voxels)]
    low, high = np.percentile(known[:: max(1, known.size // 2**20)], [0.5, 99.5]) if known.size else (0.0, 1.0)
    share = np.clip((np.nan_to_num(voxels, nan=low) - low) / max(float(high - low), 1e-6), 0, 1)
    for levels in _LEVELS:
        grey, last = (share * (levels - 1) + 0.5).astype(np.uint8), levels == _LEVELS[-1]
        sample = grey[..., ::_SAMPLED]
        if not last and len(_packed(sample, level=1)) * grey.size / sample.size > 1.1 * most:
            continue
        text = _packed(grey, level=6 if levels < 64 else 1)
        if len(text) <= most:
            break
    return text, levels


def _told(scene: Scene, step: int, levels: int) -> str:
    """Say how the scene can be looked through, and what of it is shown."""
    names = list(scene.maps)
    drawn = [f"{names[0]}: outlines"] if names else []
    drawn += [f"{', '.join(names[1:])}: areas"] if names[1:] else []
    reduced = [f"one voxel in {step} along each axis"] if step > 1 else []
    reduced += [f"{levels} grey levels"] if scene.image is not None and levels < _LEVELS[0] else []
    return (
        ". ".join(
            [
                "Click or drag in a plane, or use its slider; on the keyboard arrows move the crosshair, "
                "Page Up and Page Down the slice",
                *(["; ".join(drawn)] if drawn else []),
                *([f"To keep the page small it shows {' and '.join(reduced)}"] if reduced else []),
            ]
        )
        + "."
    )
