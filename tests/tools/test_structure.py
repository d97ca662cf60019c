# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What a stranger finds in tools/: commands at the top, what they call in folders that import one way only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from ..conftest import ROOT

TOOLS = ROOT / "tools"
COMMANDS = {
    *(
        "benchmark",
        "beside_nnunet",
        "budget",
        "gpu_report",
        "check",
        "choose",
        "evaluate",
        "export_bundle",
        "export_checkpoint",
        "federated",
    ),
    *(
        "import_checkpoint",
        "inspect_weights",
        "label_curve",
        "label_environment",
        "links",
        "lock",
        "new_task",
        "prepare_data",
        "probe",
    ),
    *("openmind", "quickstart", "schedules", "sharding", "study"),
}
# what each folder may import besides itself and common/; the app is copied to a server and stands alone
FOLDERS: dict[str, set[str]] = {
    "commanding": set(),
    "linking": {"commanding"},
    "checking": {"commanding", "linking"},
    "checkpoints": {"commanding"},
    "preparing": {"commanding"},
    "exporting": {"commanding", "checkpoints"},
    "federating": {"commanding"},
    "benchmarking": {"commanding", "preparing"},
    "budgeting": {"commanding", "benchmarking"},
    "studies": {"commanding", "preparing"},
    "reporting": {"commanding", "studies"},
    "choosing": {"commanding", "checkpoints", "studies", "reporting"},
    "comparing": {"commanding", "benchmarking", "studies", "reporting"},
    "scoring": {"commanding"},
    "curves": {"commanding", "preparing", "studies", "reporting"},
    "starting": {"commanding", "preparing"},
    "packing": set(),
    "opening": {"commanding", "linking", "checkpoints", "preparing"},
    "monai_label_app": set(),
}


def modules() -> list[Path]:
    return [path for path in sorted(TOOLS.rglob("*.py")) if "__pycache__" not in path.parts]


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield what a file imports, as the parts of absolute names; imports inside functions count as well."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield tuple(name.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1],) if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            for name in node.names:
                yield (*module, name.name)


def test_at_the_top_are_commands_only() -> None:
    assert {path.stem for path in TOOLS.glob("*.py")} == {*COMMANDS, "__init__"}
    assert {path.name for path in TOOLS.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)


def test_folders_import_one_way_only() -> None:
    assert list(TopologicalSorter(FOLDERS).static_order()), "the table itself has no circle"
    wrong = []
    for path in modules():
        place = path.relative_to(TOOLS)
        folder = place.parts[0] if len(place.parts) > 1 else None
        allowed = set(FOLDERS) if folder is None else {folder, *FOLDERS[folder]}
        if place.stem == "openmind":  # whose verbs are the other commands
            allowed |= COMMANDS
        for name in imported(path):
            if name[0] == "tools" and (len(name) < 2 or name[1] not in allowed):
                wrong.append(f"{place} imports {'.'.join(name)}")
            if folder == "monai_label_app" and name[0] in ("tools", "common"):
                wrong.append(f"{place} imports {'.'.join(name)}")
    assert not wrong, wrong


def test_no_module_imports_itself_through_others() -> None:
    names = {path.relative_to(ROOT).with_suffix("").parts: path for path in modules() if path.stem != "__init__"}
    graph = {
        name: {name_part for full in imported(path) for name_part in (full, full[:-1]) if name_part in names}
        for name, path in names.items()
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def functions(paths: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """Yield the place of every function, its lines and its arguments."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                names += [each.arg for each in (given.vararg, given.kwarg) if each is not None]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                lines = node.end_lineno - node.lineno + 1 if node.end_lineno else 0
                yield f"{path.relative_to(ROOT)}:{node.name}", lines, count


def test_functions_are_short_and_take_few_arguments() -> None:
    known = list(functions(modules()))
    assert len(known) > 600
    assert [place for place, lines, _ in known if lines > 80] == []
    assert [place for place, _, count in known if count > 8] == []


def test_functions_of_common_are_short() -> None:
    known = list(functions(sorted((ROOT / "common").rglob("*.py"))))
    assert len(known) > 1000
    assert [place for place, lines, _ in known if lines > 80] == []


def test_commands_are_thin() -> None:
    for path in TOOLS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 15, f"{path.name}: {node.name}"


def test_common_does_not_know_the_tools() -> None:
    for path in (ROOT / "common").rglob("*.py"):
        assert not [name for name in imported(path) if name[0] == "tools"], path


def test_the_environment_is_made_with_the_standard_library_alone() -> None:
    alone = [TOOLS / "commanding" / f"{name}.py" for name in ("environment", "label_environment", "locks")]
    alone += [TOOLS / "links.py", TOOLS / "linking" / "links.py"]  # which mends a fresh clone
    for path in alone:
        for name in imported(path):
            ours = (*(("commanding", each) for each in ("ending", "environment", "locks")), ("linking", "links"))
            local = name[0] == "tools" and name[1:3] in ours
            assert local or name[0] in sys.stdlib_module_names, name
