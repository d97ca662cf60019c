# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Turn a public checkpoint, or one that nnssl made, into a bundle's pre-trained encoder, with a receipt."""

from __future__ import annotations

from pathlib import Path

from common.errors import SettingsError, WeightsError
from common.files import sha256
from common.weights import Told, fetch, is_model_folder, write_imported_state
from common.weights import import_checkpoint as import_file
from common.weights.receipt import CAVEAT
from common.weights.sources import Fetched

from ..commanding.ending import config_command, end, tool
from ..commanding.environment import kept
from . import catalogue
from .announcing import announce
from .cells import bundle_cell, published_file, record_digest
from .models import import_models
from .settings import ImportCheckpoint

__all__ = ["import_checkpoint"]


def import_checkpoint(settings: ImportCheckpoint) -> None:
    """Import a checkpoint or the models of a folder of nnU-Net, or say which checkpoints are known."""
    if settings.list or settings.bundle is None:
        print("\n".join(catalogue.table(settings.bundle)))
        print(
            f"import one: {tool('import_checkpoint')} BUNDLE --source REPOSITORY (checkpoint_final.pth), or its "
            "address, https://huggingface.co/REPOSITORY/resolve/main/FILE"
        )
        return
    if settings.source is not None and is_model_folder(settings.source):
        import_models(settings, settings.bundle)
        return
    bundle, published = settings.bundle, published_file(settings.bundle)
    target = settings.output or _models(bundle) / "pretrained_encoder.pt"
    if settings.source is None and published is None:
        raise SettingsError(
            f"{bundle} has no published weights; give a checkpoint with --source (--list says which are known)"
        )
    cell, method = bundle_cell(bundle, settings.settings, with_method=settings.resume)
    if settings.source is None and published is not None:
        announce(published[0], brought=published[1], target=target)
    found = _fetched(settings, bundle, published)
    told, theirs = _told(settings, found, published)
    receipt, imported = import_file(
        found.path,
        cell,
        output=target,
        told=told,
        plan_file=settings.plan or found.plan_file,
        token_order=settings.token_order,
        allow_partial=settings.allow_partial,
    )
    print(f"{receipt.summary()}\n{CAVEAT}")
    print(f"written: {target} and {target.with_suffix('.json').name}")
    if theirs and told.expected_sha256 is None:
        print(record_digest(bundle, receipt.sha256))
    if method is not None:
        state = target.with_name("pretraining_state.pt")
        for line in write_imported_state(method, imported, state, cell=cell, path=found.path, receipt=receipt):
            print(line)
    given = () if target.parent == _models(bundle) else ("--pretrained", target)
    following = config_command(bundle, "train", "LABELLED_FOLDER", *given)
    end(target, look=target.with_suffix(".json"), following=following)


def _models(bundle: str) -> Path:
    return kept(bundle) / "models"


def _fetched(settings: ImportCheckpoint, bundle: str, published: tuple[str, Path, str | None] | None) -> Fetched:
    """Fetch what is asked for; of the published file, under its earlier address too."""
    wanted = settings.source or published[0]  # type: ignore[index]
    folder = _models(bundle) / "openmind"
    place = published[1] if published and settings.source in (None, published[0]) else None
    try:
        return fetch(wanted, folder=folder, local=place, allow_http=settings.allow_http)
    except WeightsError:
        known = next((known for known in catalogue.checkpoints() if f"/{known.repository}/" in wanted), None)
        if settings.source is not None or known is None or known.former is None:
            raise
        former = wanted.replace(f"/{known.repository}/", f"/{known.former}/")
        try:
            return fetch(former, folder=folder, allow_http=settings.allow_http)
        except WeightsError:
            pass
        raise


def _told(
    settings: ImportCheckpoint, found: Fetched, published: tuple[str, Path, str | None] | None
) -> tuple[Told, bool]:
    """Return what is known of a file besides what it holds, and whether it is the bundle's published one."""
    known = catalogue.by_repository(found.repository, found.name) if found.repository else None
    by = "its repository" if found.revision else "the place where it lies"
    if known is None:
        known, by = catalogue.by_digest(sha256(found.path)), "its digest"
    # the published file, however it is named; another revision is another file
    own = published is not None and known is not None and f"/{known.repository}/" in published[0]
    theirs = own and bool(found.repository) and "@" not in (settings.source or "")
    told = Told(
        source=found.source,
        revision=found.revision,
        known=known,
        by=by,
        card=found.card,
        method=settings.method,
        licence=settings.licence,
        citation=settings.citation,
        expected_sha256=published[2] if published and theirs else None,
    )
    return told, theirs
