# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What may import what inside common/."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMON = ROOT / "common"
# each imports only what is before it
LAYERS = [
    "errors",
    "literals",
    "paths",
    "bundles",
    "lazy",
    "settings",
    "files",
    "ownership",
    "recipes",
    "tables",
    "figures",
    "charts",
    "terminal",
    "memory",
    "processes",
    "tasks",
    "transforms",
    "views",
    "networks",
    "optimizers",
    "sharding",
    "losses",
    "methods",
    "weights",
    "metrics",
    "drawing",
    "viewing",
    "document",
    "data",
    "handlers",
    "engines",
]
DATA = ["cases", "problems", "listing", "identity", "checking", "preparing", "storing", "cropping", "prediction"]


def module(path: Path) -> str:
    name = ".".join(path.relative_to(COMMON.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(text: str, importer: str, modules: set[str], *, package: bool) -> set[str]:
    """Return the modules that this one imports, at its top, inside functions, or for types only."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = importer.split(".")
            base = parts[: len(parts) - node.level + package]
            where = ".".join([*base, *([node.module] if node.module else [])])
            found |= {inner if (inner := f"{where}.{alias.name}") in modules else where for alias in node.names}
    return found


def graph() -> dict[str, set[str]]:
    files = {module(path): path for path in COMMON.rglob("*.py")}
    return {
        name: imports(path.read_text(), name, set(files), package=path.name == "__init__.py")
        for name, path in files.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(edges: dict[str, set[str]], package: str, order: list[str]) -> list[str]:
    """Return the imports inside a package that do not lead to an earlier member."""
    depth = package.count(".") + 1
    found = []
    for importer, imported in edges.items():
        for other in imported:
            if not (importer.startswith(f"{package}.") and other.startswith(f"{package}.")):
                continue
            mine, theirs = importer.split(".")[depth], other.split(".")[depth]
            if mine != theirs and order.index(theirs) >= order.index(mine):
                found.append(f"{importer} imports {other}")
    return sorted(found)


def test_no_modules_import_each_other() -> None:
    edges = graph()
    assert len(edges) > 100
    assert edges["common.data.storing.store"] >= {"common.data.storing.tables", "common.errors"}
    assert circle(edges) == []


def test_what_is_lower_imports_nothing_that_is_higher() -> None:
    edges = graph()
    assert {name.split(".")[1] for name in edges if "." in name} == set(LAYERS)
    assert upward(edges, "common", LAYERS) == []
    assert {name.split(".")[2] for name in edges if name.startswith("common.data.")} == set(DATA)
    assert upward(edges, "common.data", DATA) == []


def test_a_circle_is_found_wherever_its_imports_are() -> None:
    modules = {"common.a", "common.b", "common.c", "common.c.d"}
    texts = {
        "common.a": "from .b import x",
        "common.b": "def f():\n    from . import c",
        "common.c": "from .d import y",
        "common.c.d": "if TYPE_CHECKING:\n    from ..a import z",
    }
    edges = {name: imports(text, name, modules, package=name == "common.c") for name, text in texts.items()}
    assert set(circle(edges)) == modules
    assert upward(edges, "common", ["c", "b", "a"]) == ["common.c.d imports common.a"]
    assert circle(edges | {"common.b": set()}) == []


def test_the_package_can_be_renamed_and_methods_stand_alone() -> None:
    methods = "|".join(path.stem for path in (COMMON / "methods").glob("[a-z]*.py"))
    assert methods.count("|") >= 8
    for path in COMMON.rglob("*.py"):
        text = path.read_text()
        assert "Apache-2.0" in text.splitlines()[0], path
        assert not re.search(r"^\s*(from|import) common\b", text, re.M), path
        assert not re.search(r"^\s*(from|import) (timm|torchvision|nnssl|nnunetv2)\b", text, re.M), path
        if path.parent.name == "methods":
            assert not re.search(rf"^\s*(from|import) \.({methods})\b", text, re.M), path


HEAVY = ("torch", "monai", "ignite", "sklearn", "matplotlib", "pandas", "blosc2")


def test_looking_at_data_needs_neither_torch_nor_monai() -> None:
    """What lists, checks, splits and counts, and what reports errors, is imported in a Python that has neither."""
    light = [
        "errors",
        "bundles",
        "settings",
        "files",
        "tasks",
        "lazy",
        "data",
        "data.cases",
        "data.problems",
        "optimizers.schedules",
    ]
    light += [
        "data.listing." + name for name in ("folders", "datalists", "labelled", "classified", "splits", "sources")
    ]
    light += ["data.preparing.settings", "data.preparing.estimates"]
    light += ["data.storing.naming", "data.checking.survey", "data.checking.filters"]
    light += ["transforms", "weights", "weights.receipt", "weights.missing", "metrics", "metrics.statistics", "engines"]
    light += ["engines.features.folder"]
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))\n"
    code += "\n".join(f"import common.{name}" for name in light)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_imported_on_demand_is_there() -> None:
    lazy = [path for path in COMMON.rglob("__init__.py") if "on_demand" in path.read_text()]
    assert len(lazy) == 7
    for path in lazy:
        package = importlib.import_module(module(path))
        names = set(package.__all__)
        assert all(getattr(package, name) is not None for name in names)
        block = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
        assert names == {alias.name for each in block.body for alias in each.names}
        assert names.isdisjoint(other.stem for other in path.parent.iterdir()), "a name that is a module, too"
        with pytest.raises(AttributeError, match="no attribute 'Misspelt'"):
            package.Misspelt  # noqa: B018


# what importing MONAI imports
MONAI = ["ignite", "matplotlib", "monai", "nibabel", "numpy", "psutil", "scipy", "skimage", "sklearn", "torch", "tqdm"]


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from outside_functions(child)


def test_a_run_of_a_bundle_imports_little_that_monai_has_not_imported() -> None:
    """Anything else at the top of a module would be paid for by every start; formats' readers come with their files."""
    found: dict[str, Path] = {}
    for path in COMMON.rglob("*.py"):
        for node in outside_functions(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split(".")[0]: path for name in names}
    ours = {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in MONAI}
    assert sorted(ours) == ["blosc2", "starlette"], ours  # starlette only in a labelling server
