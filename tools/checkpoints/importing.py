# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Turn a published OpenMind checkpoint, or one that nnssl made, into a bundle's pre-trained encoder, with a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..commanding.commands import truth
from ..commanding.environment import ROOT
from .cells import bundle_cell, published_file, record_digest

__all__ = ["import_checkpoint"]


def import_checkpoint(
    bundle: str,
    source: str | None = None,
    output: str | None = None,
    plan: str | None = None,
    token_order: str = "auto",
    allow_partial: bool = False,
    resume: bool = False,
    allow_http: bool = False,
    **settings: Any,
) -> None:
    """Import a checkpoint.

    Args:
        bundle: what to import for.
        source: file, folder, address, or repository of the hub; the bundle's published one unless given.
        output: file to write; default models/pretrained_encoder.pt of the bundle.
        plan: adaptation plan, if it is neither in the checkpoint nor beside it.
        token_order: auto; or swapped or straight, if the plan and the published cell are wrong about the file; or keep,
            which converts nothing, for comparison.
        allow_partial: accept a file that does not cover the encoder.
        resume: also write pretraining_state.pt, from which the pretrain config goes on.
        allow_http: fetch from an address without encryption too.
        settings: of the pretrain config, for a network of another size (--embed_dim, --features_per_stage, ...).
    """
    from common.errors import end_in_a_sentence
    from common.weights import fetch, write_imported_state
    from common.weights import import_checkpoint as import_file
    from common.weights.receipt import CAVEAT

    end_in_a_sentence()
    cell, method = bundle_cell(bundle, settings, with_method=truth(resume))
    models = ROOT / "bundles" / bundle / "models"
    published = published_file(bundle)
    if source is None and published is None:
        raise SystemExit(f"Stopped: {bundle} has no published weights; give a checkpoint with --source")
    place = published[1] if published and source in (None, published[0]) else None
    wanted = source or published[0]  # type: ignore[index]
    found = fetch(wanted, folder=models / "openmind", local=place, allow_http=truth(allow_http))
    # the published file, however it is named; another revision is another file
    theirs = published and found.repository and f"/{found.repository}/" in published[0] and "@" not in wanted
    target = Path(output) if output else models / "pretrained_encoder.pt"
    receipt, imported = import_file(
        found.path,
        cell,
        output=target,
        source=found.source,
        revision=found.revision,
        plan_file=plan or found.plan_file,
        token_order=token_order,
        allow_partial=truth(allow_partial),
        licence="CC-BY-4.0, Wald et al."
        if "OpenMind" in found.repository
        else "that of its source (published OpenMind weights: CC-BY-4.0)",
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
