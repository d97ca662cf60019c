# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Where weights come from, as far as anyone says: the file, the catalogue of known checkpoints, their card, the user.

A file is of a known method only if one of them says so. What its tensors look like says nothing of that: an encoder of
any method fits every bundle of its backbone, and so do many decoders. What nobody says stays unknown, in words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SettingsError, WeightsError
from ..files import read_record
from ..paths import as_path
from .cells import BACKBONES, METHODS, STUDY, Recognised, backbone_of, describe

__all__ = [
    "UNKNOWN",
    "Card",
    "Known",
    "Origin",
    "Told",
    "licence_terms",
    "method_of_weights",
    "origin_of",
    "read_card",
    "same_method",
]

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Known:
    """A public checkpoint of the catalogue; its fields are explained there.

    Attributes:
        repository: ``owner/name`` on the hub.
        file: in it; ``*`` stands for any part of a name; None if not known.
        backbone: ``resenc_l``, ``primus_m``, or ``other``.
        method: in the authors' words.
        bundle: the key of :data:`METHODS` that this is, if any.
        former: an earlier ``owner/name``.
        data: that it was trained on, in words.
        data_set: the same on the hub.
        licence: as its card has it.
        citation: the same.
        seen: ``page``, ``reported`` or ``pattern``.
        inferred: fields that nobody states.
        token_order: of Primus, if it is known.
        spacing_mm: of its pre-training, if it is known.
        sha256: of the file, as others reported it.
        bytes: its size, as they did.
        note: what else there is to say.
    """

    repository: str
    file: str | None
    backbone: str
    method: str
    bundle: str | None = None
    former: str | None = None
    data: str = UNKNOWN
    data_set: str | None = None
    licence: str = UNKNOWN
    citation: tuple[str, ...] = ()
    seen: str = "page"
    inferred: tuple[str, ...] = ()
    token_order: str | None = None
    spacing_mm: float | None = None
    sha256: str | None = None
    bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Card:
    """What the README.md beside a checkpoint says.

    Attributes:
        name: its heading.
        licence: of its front matter.
        citation: its BibTeX entries, else the arXiv numbers that it names.
        data: data sets of its front matter.
    """

    name: str | None = None
    licence: str | None = None
    citation: tuple[str, ...] = ()
    data: str | None = None


@dataclass(frozen=True)
class Told:
    """What is known of a checkpoint besides what it holds.

    Attributes:
        source: what to name as the source; the path unless given.
        revision: commit of the repository it was fetched from.
        known: its entry in the catalogue.
        by: by what it was found there.
        card: the README.md beside it.
        method: what the user says that it was trained by.
        licence: what the user says of it.
        citation: what the user says is to be cited.
        expected_sha256: refuse another file.
    """

    source: str | None = None
    revision: str | None = None
    known: Known | None = None
    by: str = "its repository"
    card: Path | None = None
    method: str | None = None
    licence: str | None = None
    citation: str | None = None
    expected_sha256: str | None = None


@dataclass
class Origin:
    """Who made weights, by which method, and what to observe.

    Attributes:
        key: of :data:`METHODS`, if it is one of them.
        method: in words, ``unknown`` if nobody says.
        name: what its source calls it.
        data: that it was trained on.
        licence: ``unknown`` if nobody says.
        citation: what to cite.
        notes: how that is known, and what is not.
    """

    key: str | None
    method: str = UNKNOWN
    name: str | None = None
    data: str = UNKNOWN
    licence: str = UNKNOWN
    citation: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def origin_of(found: Recognised, told: Told, *, cited: list[str], licence: str | None = None) -> Origin:
    """Put together what the file, the catalogue, its card and the user say.

    Args:
        found: what the file says of itself.
        told: what others say.
        cited: citations that the file carries.
        licence: what the JSON beside it says, if there is one.

    Raises:
        SettingsError: if the user says what the file contradicts.
    """
    known, card = told.known, read_card(told.card)
    key, method, notes = _method(found, told)
    origin = Origin(key, method, notes=notes)
    origin.name = card.name or (known.repository if known else None)
    origin.data = known.data if known else card.data or UNKNOWN
    stated = known.licence if known and known.licence != UNKNOWN else card.licence
    stated = stated or (licence if licence != UNKNOWN else None)
    origin.licence = told.licence or stated or UNKNOWN
    if told.licence and stated and told.licence != stated:
        origin.notes.append(f"licence {told.licence} as you say; its source states {stated}")
    papers = [METHODS[key].citation] if key else []
    openmind = [STUDY] if known and STUDY in known.citation else []
    if told.citation:
        origin.citation = [told.citation]
    elif cited:
        origin.citation = list(cited)
    elif known and not openmind:
        origin.citation = [*known.citation, *papers, BACKBONES[found.backbone].citation]
    elif card.citation:
        origin.citation = list(card.citation)
    elif key:
        origin.citation = [*openmind, *papers, BACKBONES[found.backbone].citation]
    if origin.licence == UNKNOWN:
        origin.notes.append(
            "licence unknown: neither the file nor a card says it; ask its authors before you pass it on"
        )
    if not origin.citation:
        origin.notes.append("whom to cite is unknown: neither the file nor a card says it")
    origin.notes += licence_terms(origin.licence)
    if known and known.inferred:
        origin.notes.append(f"of what the catalogue says of it, this is inferred: {', '.join(known.inferred)}")
    return origin


def same_method(said: str) -> str | None:
    """Return the method of this collection that is called so, if any.

    Example:
        >>> same_method("Models Genesis"), same_method("mae_resenc_l"), same_method("MoCo")
        ('models_genesis', 'mae', None)
    """
    plain = said.lower()
    for backbone in BACKBONES:
        plain = plain.removesuffix(f"_{backbone}")
    return next((key for key, paper in METHODS.items() if plain in (key, paper.title.lower())), None)


def method_of_weights(bundle: str, weights: str | Path) -> str:
    """Return the method that an encoder was pre-trained by: its bundle's, unless the JSON beside it says another.

    Returns:
        a key of :data:`METHODS`, or words, ``unknown`` for one of which nobody knows.
    """
    own = bundle.removesuffix(f"_{backbone_of(bundle)}")
    beside = as_path(weights).with_suffix(".json")
    stated = read_record(beside, error=WeightsError).get("method") if beside.is_file() else None
    if not isinstance(stated, str) or stated == describe(bundle)[0]:
        return own
    return same_method(stated) or stated


def _method(found: Recognised, told: Told) -> tuple[str | None, str, list[str]]:
    """Return the method as a key and in words, and how it is known."""
    known = told.known
    if told.method:
        key = same_method(told.method)
        if found.method is not None and key != found.method:
            raise SettingsError(f"--method is {told.method!r}, but {found.said}; leave it out")
        if key and f"{key}_{found.backbone}" not in found.bundles:
            raise SettingsError(f"--method is {told.method!r}, which does not go with {found.why}; leave it out")
        return key, METHODS[key].title if key else told.method, [f"method: {told.method}, as you say"]
    if found.method is not None:
        return found.method, METHODS[found.method].title, []
    told_too = [found.said] if found.said else []
    if known is not None:
        how = f"method: {known.method}, as the catalogue says of {known.repository}, by {told.by}"
        if known.bundle and f"{known.bundle}_{found.backbone}" in found.bundles:
            return known.bundle, METHODS[known.bundle].title, [how, *told_too]
        if known.bundle:
            return None, UNKNOWN, [f"{how}, which does not go with {found.why}", *told_too]
        return None, known.method, [how, *told_too]
    return (
        None,
        UNKNOWN,
        [
            *told_too,
            "how it was pre-trained is unknown: its trainer_name, the catalogue and you do not say it (if you know, "
            f"--method {' or '.join(METHODS)}, or words of yours)",
        ],
    )


def licence_terms(licence: str) -> list[str]:
    """Return sentences on what a licence forbids or demands of those who use the weights, as far as its name says.

    Example:
        >>> [term[:58] for term in licence_terms("CC-BY-NC-SA-4.0")]
        ['licence CC-BY-NC-SA-4.0 forbids commercial use', 'licence CC-BY-NC-SA-4.0 demands share-alike: what you make']
        >>> licence_terms("CC-BY-4.0")
        []
    """
    told = []
    if re.search(r"\bnc\b|non[- ]?commercial|research[- ]only|academic", licence, re.I):
        told.append(f"licence {licence} forbids commercial use")
    if re.search(r"\bsa\b|share[- ]?alike|\b[al]?gpl", licence, re.I):
        told.append(
            f"licence {licence} demands share-alike: what you make from the weights and pass on, fine-tuned models "
            "too, goes under the same licence"
        )
    if re.search(r"\bnd\b|no[- ]?derivatives?", licence, re.I):
        told.append(f"licence {licence} forbids to pass on what you make from the weights")
    return told


def read_card(path: Path | None) -> Card:
    """Return what a model card says, nothing where there is none: it begins with front matter."""
    if path is None or not path.is_file():
        return Card()
    match = re.match(r"---\s*\n(.*?)\n---\s*(.*)", path.read_text("utf-8", errors="replace"), re.DOTALL)
    if match is None:
        return Card()  # some other README
    front, body = match[1], match[2]
    heading = re.search(r"^#\s+(.+?)\s*#*\s*$", body, re.M)
    licence = _front(front, "license")
    if licence and licence[0].lower() == "other":
        licence = _front(front, "license_name") or licence
    entries = [_entry(found) for found in re.findall(r"@\w+\{(.*?)\n\}", body, re.DOTALL)]
    papers = entries or [f"arXiv:{number}" for number in dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", body))]
    return Card(
        name=heading[1] if heading else None,
        licence=re.sub(r"^cc-.*", lambda name: name[0].upper(), licence[0]) if licence else None,
        citation=tuple(paper for paper in papers if paper),
        data=", ".join(_front(front, "datasets")) or None,
    )


def _front(front: str, name: str) -> list[str]:
    """Return the value or values of a key of YAML front matter."""
    match = re.search(rf"^{name}:[ \t]*(.*)\n?((?:[ \t]*-[ \t]+.*\n?)*)", front, re.M)
    if match is None:
        return []
    several = re.findall(r"^[ \t]*-[ \t]+(.*?)[ \t]*$", match[2], re.M)
    one = match[1].strip().strip("[]")
    return [value.strip().strip("'\"") for value in several or one.split(",") if value.strip()]


def _entry(entry: str) -> str:
    """Return a BibTeX entry as a line: authors, title, year."""
    values: Mapping[str, Any] = {
        name.lower(): re.sub(r"[{}\s]+", " ", value).strip()
        for name, value in re.findall(r"(\w+)\s*=\s*[{\"](.*?)[}\"]\s*(?:,\s*\n|$)", entry, re.DOTALL)
    }
    return ". ".join(values[name] for name in ("author", "title", "journal", "booktitle", "year") if values.get(name))
