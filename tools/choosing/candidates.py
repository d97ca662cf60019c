# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The encoders that are asked: those of the bundles, and files that are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import SettingsError, WeightsError
from common.weights import Receipt
from common.weights.origins import licence_terms

from ..checkpoints.catalogue import checkpoints
from ..commanding.ending import tool
from ..commanding.environment import ROOT
from ..commanding.weights import encoder_at_hand
from ..studies.definition import cell_of, plain_name
from .probes import Encoder

__all__ = ["backbone_of", "find_candidates", "not_at_hand", "origin"]


def backbone_of(bundle: str) -> str:
    """Return resenc_l or primus_m."""
    return cell_of(bundle)[1]


def find_candidates(bundles: Sequence[str] = (), weights: Sequence[str] = ()) -> dict[str, Encoder]:
    """Return the encoders to ask, by name.

    Args:
        bundles: whose own weights are asked; those of all that have some unless given, none for none.
        weights: NAME=PATH of each further one.

    Raises:
        SettingsError: if a bundle is unknown, or a name is given twice.
        WeightsError: if a bundle that was named has no weights, a file is missing, or there is nothing to ask.
    """
    own = {
        path.parent.parent.name: encoder_at_hand(path.parent.parent.name)
        for path in sorted(ROOT.glob("bundles/*/configs/features.yaml"))
    }
    found: dict[str, Encoder] = {}
    for bundle in own if not bundles else [name for name in bundles if name != "none"]:
        if bundle not in own:
            raise SettingsError(f"--bundles names {bundle!r}; choose from {', '.join(own)}")
        if own[bundle].is_file():
            found[bundle] = Encoder(bundle, str(own[bundle]))
        elif bundles:
            raise WeightsError(
                f"{bundle} has no weights {own[bundle]}; fetch or translate them with {tool('import_checkpoint')}, "
                f"pre-train with its pretrain config, or name a file: --weights {bundle}=FILE"
            )
    files: dict[str, Encoder] = {}
    for entry in weights:
        name, equals, path = entry.partition("=")
        bundle = name.split("/")[0]
        if not equals or bundle not in own:
            raise SettingsError(
                f"--weights has {entry!r}; write NAME=PATH with commas, where NAME is a bundle, or one with a name of "
                f"yours as in mae_resenc_l/mine=encoder.pt; bundles are {', '.join(own)}"
            )
        file = Path(path).expanduser().absolute()
        if not file.is_file():
            raise WeightsError(f"--weights names {file} for {name}, which does not exist; correct the path")
        if twice := next((other for other in files if plain_name(other) == plain_name(name)), None):
            raise SettingsError(
                f"--weights names {name} twice; write {bundle}/other={path} for one of them"
                if twice == name
                else f"--weights names {twice} and {name}, which would share a folder; rename one"
            )
        files[name] = Encoder(bundle, str(file))
    found |= files
    if not found:
        raise WeightsError(
            "there are no pre-trained encoders to choose from: no bundle has models/pretrained_encoder.pt; fetch the "
            f"published ones with {tool('import_checkpoint')} (--list names others too), or name a file: "
            "--weights mae_resenc_l=FILE"
        )
    return found


def origin(receipt: Receipt) -> dict[str, Any]:
    """Return what an encoder is, by its receipt: not what the bundle is called that it is tried in."""
    terms = [term.removeprefix(f"licence {receipt.licence} ") for term in licence_terms(receipt.licence)]
    return {"what": receipt.origin, "name": receipt.name, "licence": receipt.licence, "terms": terms}


def not_at_hand(receipts: Iterable[Receipt], bundles: Sequence[str]) -> int:
    """Return how many public checkpoints of the backbones of these bundles are known and none of these encoders."""
    sources = [str(receipt.provenance.get("source", "")) for receipt in receipts]
    backbones = {backbone_of(bundle) for bundle in bundles}
    return sum(
        known.backbone in backbones
        and "*" not in (known.file or "")
        and not any(name and name in source for name in (known.repository, known.former) for source in sources)
        for known in checkpoints()
    )
