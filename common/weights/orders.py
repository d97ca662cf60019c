# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""In which order a Primus network had its tokens in training: said by someone, evident in the file, or not known.

The published OpenMind networks, SimMIM's excepted, ran through the second axis of the image slowest (``swapped``);
those of other code, and of later code of the same authors, through the first (``straight``). Taken wrongly, the
positions of two axes are exchanged, and nothing fails.

Neighbours in the image have similar rows in a trained position table. Where the grid of tokens is longer along one of
the two axes than along the other, only one of the orders puts neighbours beside each other. On a cube both do, alike: a
table of one order is one of the other, transposed. So there a file cannot show it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import SettingsError, WeightsError
from .origins import Told
from .reference import ReferenceCheckpoint

__all__ = ["ORDERS", "evident_order", "known_order", "order_of", "roughness"]

ORDERS = ("auto", "keep", "swapped", "straight")
_CLEAR = 1.5  # how many times rougher the other order must be


def roughness(table: Tensor, grid: Sequence[int], order: str) -> float:
    """Return how far apart neighbours along the first two axes are in a position table, read in an order.

    Args:
        table: ``(1, N, C)``.
        grid: tokens along each axis of the image.
        order: ``straight`` or ``swapped``.

    Returns:
        mean squared difference over that of two random places: about 1 for a table without any order.
    """
    d, h, w = grid
    rows = table.reshape(-1, table.shape[-1]).double()
    places = rows.reshape(h, d, w, -1).transpose(0, 1) if order == "swapped" else rows.reshape(d, h, w, -1)
    steps = [places.diff(dim=axis).square().mean() for axis in (0, 1) if places.shape[axis] > 1]
    spread = 2 * rows.var(dim=0, unbiased=False).mean()
    return float(sum(steps) / max(len(steps), 1) / spread) if spread > 0 else 1.0


def evident_order(table: Tensor, grid: Sequence[int] | None) -> str | None:
    """Return the order in which a position table is smooth, None if it shows none.

    Args:
        table: ``(1, N, C)``.
        grid: tokens along each axis of the image, if they are known.
    """
    if grid is None or grid[0] == grid[1]:
        return None
    smooth, rough = sorted(("straight", "swapped"), key=lambda order: roughness(table, grid, order))
    clear = roughness(table, grid, rough) > _CLEAR * roughness(table, grid, smooth)
    return smooth if clear and roughness(table, grid, smooth) < 1 / _CLEAR else None


def order_of(asked: str, file: ReferenceCheckpoint, told: Told) -> tuple[str, str]:
    """Return how the tokens of a file were ordered in training, and by what that is known.

    Args:
        asked: ``auto``, or what the user says.
        file: of Primus.
        told: what is known of it.

    Raises:
        WeightsError: if nobody says it and the file does not show it.
        SettingsError: if ``asked`` is none of :data:`ORDERS`.
    """
    if asked not in ORDERS:
        raise SettingsError(f"token_order is {asked!r}; it must be one of {', '.join(ORDERS)}")
    if asked == "keep":
        return "straight", "kept as in the file, as asked"
    if asked != "auto":
        return asked, f"{asked}, as asked"
    stored = file.plan.get("token_order")
    if stored is not None and stored not in ("swapped", "straight"):
        raise WeightsError(f"token_order of the adaptation plan is {stored!r}; give --token_order swapped or straight")
    if found := known_order(file, told):
        return found
    raise WeightsError(
        f"{file.path} is of Primus, and the order of its tokens in training is not known: no plan says it, it is of no "
        "known repository, and the position table of a cube cannot show it. Say --token_order swapped if nnssl's "
        "EvaMAE trained it (all published OpenMind files but SimMIM's), --token_order straight if nnssl's EvaSimMIM or "
        "dynamic-network-architectures from June 2025 on did. If you cannot find out, import it both ways (--output "
        "swapped.pt, --output straight.pt) and let a short fine-tuning decide: python tools/choose.py --data FOLDER "
        "--labels ... --bundles none --weights mae_primus_m/swapped=swapped.pt,mae_primus_m/straight=straight.pt"
    )


def known_order(file: ReferenceCheckpoint, told: Told) -> tuple[str, str] | None:
    """Return the order that the plan, the catalogue or the position table say, and which of them; None if none does."""
    if (stored := file.plan.get("token_order")) in ("swapped", "straight"):
        return str(stored), f"{stored}, by the adaptation plan"
    if told.known is not None and told.known.token_order is not None:
        return told.known.token_order, f"{told.known.token_order}, as in {told.known.repository}, by {told.by}"
    table = file.tensor("position_embedding")
    evident = evident_order(table, file.grid) if table is not None and table.dim() == 3 else None
    return (evident, f"{evident}: only so are neighbours alike in its position table") if evident else None
