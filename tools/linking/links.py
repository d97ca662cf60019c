# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The links of the bundles: what they are, what is in their place, and how to put them or copies there."""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..commanding.environment import ROOT

__all__ = ["LEFT_ALONE", "expected", "place", "problems", "undo"]

LEFT_ALONE = "left alone"  # with which the line of a file begins that is not replaced
KINDS = ("train", "inference", "evaluate", "features", "train_classification", "inference_classification")


def expected(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Yield every link that the bundles below ``root`` have, and what it says.

    Which backbone a bundle has its pretrain.yaml says: its file comes before one of the method.

    Raises:
        SystemExit: if a pretrain.yaml names no backbone.
    """
    sources = root / "common" / "configs"
    for page in sorted((root / "bundles").glob("*/configs/pretrain.yaml")):
        bundle = page.parent.parent
        found = re.search(r"^shared: .*?\bpretraining_(\w+)\.yaml", page.read_text("utf-8"), re.M)
        if found is None:
            raise SystemExit(f"Stopped: {page} names no pretraining_<backbone>.yaml under shared")
        yield bundle / "common", "../../common"
        yield bundle / "LICENSE", "../../LICENSE"
        yield bundle / "configs" / "logging.conf", "../../../common/configs/logging.conf"
        for kind in KINDS:
            own = f"{kind}_{found[1]}.yaml"
            name = own if (sources / own).is_file() else f"{kind}.yaml"
            yield bundle / "configs" / f"{kind}.yaml", f"../../../common/configs/{name}"
        for kind in ("train", "inference"):  # which monai.bundle.load asks for its network
            yield bundle / "configs" / f"{kind}.json", f"../../../common/configs/load_{found[1]}.json"


def _same(one: Path, other: Path) -> bool:
    """Return whether two files, or all files of two folders but compiled ones, are the same."""
    if one.is_file() or other.is_file():
        return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
    files = [
        {file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}
        for folder in (one, other)
    ]
    return files[0] == files[1] and all(filecmp.cmp(one / file, other / file, shallow=False) for file in files[0])


def _state(path: Path, target: str) -> str:
    """Return what is in a link's place: link, copy, other (a file that is not the one linked to), text or nothing."""
    if path.is_symlink():
        return "link" if path.readlink().as_posix() == target else "other"
    if not path.exists():
        return "nothing"
    if path.is_file() and path.stat().st_size <= len(target) + 2 and path.read_text("utf-8").strip() == target:
        return "text"
    return "copy" if _same(path, path.parent / target) else "other"


def problems(root: Path = ROOT) -> list[str]:
    """Return a sentence for each link whose place holds anything but it or a copy."""
    told = {
        "nothing": "is missing; run python tools/links.py",
        "text": "is the text of a link; run python tools/links.py",
        "other": "is not what it links to in Git, {}; run python tools/links.py --refresh, or move your changes there",
    }
    states = [(path, target, _state(path, target)) for path, target in expected(root)]
    return [
        f"{path.relative_to(root).as_posix()} {told[state].format(target)}"
        for path, target, state in states
        if state in told
    ]


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _link(path: Path, target: str, *, copies: bool) -> str:
    """Put a link in place, or a copy, whole or not at all; return which."""
    beside = path.with_name(f".{path.name}.new")
    _remove(beside)
    source = path.parent / target
    made = "link"
    try:
        if copies:
            raise OSError("no links wanted")
        beside.symlink_to(target, target_is_directory=source.is_dir())
    except (OSError, NotImplementedError):
        made = "copy"
        if source.is_dir():
            shutil.copytree(source, beside, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, beside)
    _remove(path)
    beside.replace(path)
    return made


def place(root: Path = ROOT, *, refresh: bool = False, copies: bool = False) -> list[str]:
    """Put links, or copies, where there are none.

    Args:
        root: of the repository.
        refresh: also in the place of files that are not what is linked to.
        copies: make copies even where links can be made.

    Returns:
        a line for each that was made or left alone.
    """
    lines = []
    for path, target in expected(root):
        state, name = _state(path, target), path.relative_to(root).as_posix()
        if state in ("nothing", "text") or (state == "other" and refresh):
            lines.append(f"{_link(path, target, copies=copies)}: {name} -> {target}")
        elif state == "other":
            lines.append(f"{LEFT_ALONE}, since it is not what {target} is: {name}; --refresh replaces it")
    return lines


def undo(root: Path = ROOT) -> list[str]:
    """Put the text of the link where there is a copy; return a line for each."""
    lines = []
    for path, target in expected(root):
        if _state(path, target) == "copy":
            _remove(path)
            path.write_text(target, "utf-8")
            lines.append(f"text: {path.relative_to(root).as_posix()} -> {target}")
    return lines
