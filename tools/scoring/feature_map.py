# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A two-dimensional map of features, coloured by a target."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from common.figures import subplots

__all__ = ["draw_map"]

# Okabe and Ito's colours without black and yellow, told apart by all; markers tell classes in print
_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7a7a"]
_MARKERS = ["o", "^", "s", "D", "v", "P", "x"]
_FEW = 30  # cases; a t-SNE of fewer shows mostly itself
_COMPONENTS = 50


def draw_map(path: Path, features: np.ndarray, target: Any, *, seed: int = 0) -> str:
    """Draw the first two principal components, and beside them a t-SNE if there are at least 30 cases.

    Args:
        path: of the PNG.
        features: ``(cases, E)`` of the target's cases.
        target: a :class:`common.engines.probing.Target`.
        seed: of the t-SNE.

    Returns:
        the methods, in words.
    """
    from common.files import replace_file

    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    count = len(scaled)
    pca = PCA(n_components=min(_COMPONENTS, *scaled.shape), random_state=seed)
    components = pca.fit_transform(scaled)
    if components.shape[1] < 2:
        components = np.column_stack([components, np.zeros(count)])
    share = np.nan_to_num(pca.explained_variance_ratio_)
    second = f"{share[1]:.0%}" if len(share) > 1 else "0%"
    maps = [("PCA", components[:, :2], f"component 1 ({share[0]:.0%} of the variance)", f"component 2 ({second})")]
    note = "Features standardised."
    if count >= _FEW:
        perplexity = min(30.0, (count - 1) / 3)
        placed = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(components)
        title = f"t-SNE of {components.shape[1]} components (perplexity {perplexity:.0f}, seed {seed})"
        maps.append((title, placed, "", ""))
        note += " In a t-SNE, distances between clusters and their sizes mean little."
    else:
        note += f" No t-SNE with fewer than {_FEW} cases."
    figure, axes = subplots(1, len(maps), figsize=(5.2 * len(maps), 5.2), squeeze=False)
    points: Any = None
    for axis, (title, places, first_label, second_label) in zip(axes[0], maps, strict=True):
        points = _scatter(axis, places, target)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(first_label)
        axis.set_ylabel(second_label)
        if not first_label:
            axis.set_xticks([])
            axis.set_yticks([])
        axis.spines[["top", "right"]].set_visible(False)
    if target.classes:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, title=target.name, loc="outside right upper", frameon=False)
    else:
        figure.colorbar(points, ax=axes, label=target.name, shrink=0.8)
    figure.suptitle(f"Frozen features of {count} cases by {target.name}", fontsize=12)
    figure.supxlabel(note, fontsize=8.5, color="#57606a")
    replace_file(path, partial(figure.savefig, format="png", dpi=130))
    return " and ".join(title for title, *_ in maps)


def _scatter(axis: Any, places: np.ndarray, target: Any) -> Any:
    """Draw the cases; of many classes, the rarer ones together."""
    style = {"s": 34, "alpha": 0.85, "linewidths": 0.8}
    if not target.classes:
        order = np.random.default_rng(0).permutation(len(places))
        return axis.scatter(*places[order].T, c=target.values[order], cmap="viridis", edgecolors="white", **style)
    common = [index for index, _ in Counter(target.values.tolist()).most_common()]
    shown = common if len(common) <= len(_COLOURS) else common[: len(_COLOURS) - 1]
    for place, index in enumerate(sorted(shown)):
        _class(axis, places[target.values == index], target.classes[index], place, style)
    rest = ~np.isin(target.values, shown)
    if rest.any():
        _class(axis, places[rest], f"{len(common) - len(shown)} others", len(_COLOURS) - 1, style)
    return None


def _class(axis: Any, places: np.ndarray, name: str, index: int, style: dict[str, Any]) -> None:
    edge = {} if _MARKERS[index] == "x" else {"edgecolors": "white"}
    label = f"{name} ({len(places)})"
    axis.scatter(*places.T, color=_COLOURS[index], marker=_MARKERS[index], label=label, **edge, **style)
