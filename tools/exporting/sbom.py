# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The list of what is in an exported bundle and what it runs with, as CycloneDX 1.6.

It names the packages that the bundle's metadata require, and all that these need, in the versions of
``locks/requirements.txt``; and the weights that the bundle carries, with their SHA-256 and licence. Equal bundles have
equal lists: the time is left out, unless ``SOURCE_DATE_EPOCH`` says which to name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..commanding.environment import ROOT, RUNTIME
from ..commanding.locks import Package, normal, read_lock

__all__ = ["SBOM", "required_packages", "write_sbom"]

SBOM = "docs/sbom.cdx.json"


def required_packages(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the packages that a bundle's metadata require, and their versions."""
    named = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
    return named | {"numpy": metadata["numpy_version"]} | metadata["required_packages_version"]


def _closure(direct: set[str]) -> list[Package]:
    """Return these packages and all that they need, by the lock."""
    locked = read_lock(ROOT / "locks" / RUNTIME)
    found = set(direct)
    while more := {one.name for one in locked if found & {*map(normal, one.needed_by)}} - found:
        found |= more
    return [one for one in locked if one.name in found]


def _reference(package: Package) -> str:
    return f"pkg:pypi/{package.name}@{package.version}"


def _package(package: Package) -> dict[str, Any]:
    about = {"type": "library", "bom-ref": _reference(package), "name": package.name, "version": package.version}
    about["purl"] = _reference(package)
    where = {"properties": [{"name": "python:marker", "value": package.marker}]} if package.marker else {}
    return about | where


def _weights(folder: Path, licence: str) -> list[dict[str, Any]]:
    """Return the files of weights in a bundle."""
    from common.files import read_record, sha256

    listed = []
    for file in sorted((folder / "models").glob("*.pt")):
        name = file.relative_to(folder).as_posix()
        about: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": name, "name": name}
        about["hashes"] = [{"alg": "SHA-256", "content": sha256(file)}]
        told = read_record(beside) if (beside := file.with_suffix(".json")).is_file() else {}
        words = str(told.get("licence", licence))
        known = re.match(r"CC-BY(-NC)?(-SA|-ND)?-4\.0\b", words)
        named = {"id": known[0]} if known else {"name": words}
        about |= {"licenses": [{"license": named}]} if words else {}
        if address := re.fullmatch(r"https://[^\s)]+", str(told.get("source"))):
            about["externalReferences"] = [{"type": "distribution", "url": address[0], "comment": "derived from"}]
        listed.append(about)
    return listed


def write_sbom(folder: Path, name: str, metadata: Mapping[str, Any], *, licence: str) -> None:
    """Write the list into a bundle that is otherwise complete.

    Args:
        folder: of the bundle.
        name: of the bundle.
        metadata: of the bundle.
        licence: of its weights in words, empty without any.
    """
    from common.files import write_json

    direct = {normal(package) for package in required_packages(metadata)}
    packages = _closure(direct)
    weights = _weights(folder, licence)
    bundle = {"type": "application", "bom-ref": name, "name": name, "version": metadata["version"]}
    bundle |= {"description": metadata["description"], "licenses": [{"license": {"id": "Apache-2.0"}}]}
    needs = {_reference(one): sorted(_needs(one, packages)) for one in packages}
    needs[name] = sorted(_reference(one) for one in packages if one.name in direct)
    needs[name] += [str(file["bom-ref"]) for file in weights]
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": bundle},
        "components": [*weights, *map(_package, packages)],
        "dependencies": [{"ref": one, "dependsOn": others} for one, others in sorted(needs.items())],
    }
    if moment := os.environ.get("SOURCE_DATE_EPOCH"):
        content["metadata"]["timestamp"] = datetime.fromtimestamp(int(moment), UTC).isoformat()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    content["serialNumber"] = f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}"
    write_json(content, folder / SBOM)


def _needs(package: Package, packages: list[Package]) -> set[str]:
    return {_reference(one) for one in packages if package.name in map(normal, one.needed_by)}
