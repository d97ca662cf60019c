# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Turn a published OpenMind checkpoint, or one that nnssl made, into a bundle's pre-trained encoder, with a receipt."""

from __future__ import annotations

from common.errors import SettingsError
from common.weights import fetch, write_imported_state
from common.weights import import_checkpoint as import_file
from common.weights.receipt import CAVEAT

from ..commanding.environment import ROOT
from .cells import bundle_cell, published_file, record_digest
from .settings import ImportCheckpoint

__all__ = ["import_checkpoint"]

_PUBLISHED = "CC-BY-4.0, Wald et al."
_OTHER = "that of its source (published OpenMind weights: CC-BY-4.0)"


def import_checkpoint(settings: ImportCheckpoint) -> None:
    """Import a checkpoint."""
    bundle = settings.bundle
    cell, method = bundle_cell(bundle, settings.settings, with_method=settings.resume)
    models = ROOT / "bundles" / bundle / "models"
    published = published_file(bundle)
    if settings.source is None and published is None:
        raise SettingsError(f"{bundle} has no published weights; give a checkpoint with --source")
    place = published[1] if published and settings.source in (None, published[0]) else None
    wanted = settings.source or published[0]  # type: ignore[index]
    found = fetch(wanted, folder=models / "openmind", local=place, allow_http=settings.allow_http)
    # the published file, however it is named; another revision is another file
    theirs = published and found.repository and f"/{found.repository}/" in published[0] and "@" not in wanted
    target = settings.output or models / "pretrained_encoder.pt"
    receipt, imported = import_file(
        found.path,
        cell,
        output=target,
        source=found.source,
        revision=found.revision,
        plan_file=settings.plan or found.plan_file,
        token_order=settings.token_order,
        allow_partial=settings.allow_partial,
        licence=_PUBLISHED if "OpenMind" in found.repository else _OTHER,
        expected_sha256=published[2] if published and theirs else None,
        repository=found.repository,
    )
    print(f"{receipt.summary()}\n{CAVEAT}")
    print(f"written: {target} and {target.with_suffix('.json').name}")
    if published and theirs and published[2] is None:
        print(record_digest(bundle, receipt.sha256))
    if method is not None:
        state = target.with_name("pretraining_state.pt")
        for line in write_imported_state(method, imported, state, cell=cell, path=found.path):
            print(line)
