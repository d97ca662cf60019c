# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Build the wheel: everything below one package, ``openmind``, with real files in the place of links.

``pip wheel . --no-deps`` writes it, ``pip install .`` installs it, ``pip install -e .`` installs the clone itself
(PEP 517 and 660). It needs nothing but Python, so that a build fetches nothing. In the wheel the code's packages
``common`` and ``tools`` are ``openmind.common`` and ``openmind.tools``, in imports and in configs alike.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["build_editable", "build_sdist", "build_wheel", "files", "renamed"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "openmind"
_INNER = ("common", "tools")
_IMPORT = re.compile(r"^(\s*(?:(?:>>>|\.\.\.) )?(?:from|import) )(common|tools)(?=[. ])", re.M)
_QUOTED = re.compile(r"""(?<=["'])common(?=\.[a-z])""")  # names of classes as configs have them
_TARGET = re.compile(r"\bcommon(?=\.[a-z])")
# what works in a clone alone: checks, locks, links, benchmarks, and this
_CLONE_ONLY = {
    *(
        "benchmark.py",
        "benchmarking",
        "beside_nnunet.py",
        "comparing",
        "budget.py",
        "budgeting",
        "gpu_report.py",
        "sharding.py",
    ),
    *("check.py", "checking", "lock.py", "label_environment.py", "links.py", "packing", "quickstart.py", "starting"),
}
_VERBS = {  # what commands are called where they are installed; others are modules
    **{name: name for name in ("choose", "evaluate", "probe", "study")},
    "import_checkpoint": "import",
    "inspect_weights": "inspect",
    "label_curve": "curve",
    "export_bundle": "export",
    "new_task": "new-task",
}
_COMMAND = re.compile(r"(?:python )?tools/(\w+)\.py")
_MADE = {"__pycache__", "models", "output", "store", "model", "embeddings", "logs"}  # by runs
_DATE = (2022, 5, 30, 0, 0, 0)  # of every entry, so that equal files give equal bytes
_INIT = '''# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Self-supervised pre-training for 3D medical images: the verbs of the command openmind as functions."""
{place}
from {tools}.opening.door import embed, example_data, finetune, predict, pretrain

__all__ = ["embed", "example_data", "finetune", "main", "predict", "pretrain"]
__version__ = "{version}"


def main() -> None:
    """Do what the command line says."""
    from {tools}.openmind import main as run

    run()
'''
_MAIN = '''# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The command openmind, as python -m openmind."""

from . import main

main()
'''


def renamed(name: str, text: str) -> str:
    """Return a file of the code with its packages below the one of the wheel, and commands as they are called there.

    Example:
        >>> renamed("a.py", "from common.data import Case"), renamed("a.yaml", "_target_: common.views.SpatialCrop")
        ('from openmind.common.data import Case', '_target_: openmind.common.views.SpatialCrop')
    """
    text = _COMMAND.sub(_called, text)
    if name.endswith(".py"):
        return _QUOTED.sub(f"{PACKAGE}.common", _IMPORT.sub(rf"\1{PACKAGE}.\2", text))
    return _TARGET.sub(f"{PACKAGE}.common", text) if name.endswith((".yaml", ".json")) else text


def _called(command: re.Match[str]) -> str:
    """Return how a command of a clone is called where it is installed."""
    name = command[1]
    if f"{name}.py" in _CLONE_ONLY or name == "openmind":
        return command[0] if name != "openmind" else PACKAGE
    return f"{PACKAGE} {_VERBS[name]}" if name in _VERBS else f"python -m {PACKAGE}.tools.{name}"


def _below(folder: Path, *, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files of a folder; those of folders that are links too, since the caller leaves such links out."""
    for path in sorted(folder.iterdir()):
        if path.name in _MADE or path.name in without or path.suffix == ".pyc":
            continue
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def files() -> Iterator[tuple[str, bytes]]:
    """Yield the files of the package: names in the wheel and what they hold.

    Raises:
        SystemExit: if a link of a bundle is the text that Git writes where there can be no links.
    """
    for inner, without in (("common", frozenset[str]()), ("tools", frozenset(_CLONE_ONLY))):
        for path in _below(ROOT / inner, without=without):
            yield _entry(path, f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}")
    for bundle in sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/metadata.json")):
        for path in _below(bundle, without=frozenset({"common"})):
            name, content = _entry(path, f"{PACKAGE}/bundles/{bundle.name}/{path.relative_to(bundle).as_posix()}")
            if content.startswith(b"../") and len(content.split()) == 1:
                raise SystemExit(f"{path} is the text of a link; run python tools/links.py before")
            yield name, content
    for name in ("LICENSE", "requirements.txt", "locks/requirements.txt", "locks/cuda.txt"):
        yield f"{PACKAGE}/{name}", (ROOT / name).read_bytes()


def _entry(path: Path, name: str) -> tuple[str, bytes]:
    content = path.read_bytes()
    if path.suffix in (".py", ".yaml", ".json"):
        content = renamed(path.name, content.decode("utf-8")).encode()
    return name, content


def _project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return found


def _about(project: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the files of the wheel that say what it is."""
    folder = f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Summary: {project['description']}", f"Requires-Python: {project['requires-python']}"]
    lines += [f"License-Expression: {project['license']}", "License-File: LICENSE"]
    lines += [f"Requires-Dist: {each}" for each in project["dependencies"]]
    for extra, needed in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {each}; extra == "{extra}"' for each in needed]
    lines.append("Description-Content-Type: text/markdown")
    readme = (ROOT / project["readme"]).read_text("utf-8")
    yield f"{folder}/METADATA", "\n".join([*lines, "", readme]).encode()
    yield f"{folder}/WHEEL", b"Wheel-Version: 1.0\nGenerator: openmind\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    scripts = "".join(f"{name} = {target}\n" for name, target in project["scripts"].items())
    yield f"{folder}/entry_points.txt", f"[console_scripts]\n{scripts}".encode()
    yield f"{folder}/licenses/LICENSE", (ROOT / "LICENSE").read_bytes()


def _write(folder: str, contents: Iterator[tuple[str, bytes]], project: Mapping[str, Any]) -> str:
    """Write a wheel; return its name."""
    base = f"{project['name'].replace('-', '_')}-{project['version']}"
    name, record = f"{base}-py3-none-any.whl", []
    with zipfile.ZipFile(Path(folder) / name, "w", zipfile.ZIP_DEFLATED) as archive:

        def put(path: str, content: bytes) -> None:
            entry = zipfile.ZipInfo(path, _DATE)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)

        for path, content in (*contents, *_about(project)):
            put(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(content)}")
        record.append(f"{base}.dist-info/RECORD,,")
        put(f"{base}.dist-info/RECORD", ("\n".join(record) + "\n").encode())
    return name


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Write the wheel into a folder and return its name; pip calls this."""
    project = _project()
    init = _INIT.format(tools=".tools", place="", version=project["version"])
    first = [(f"{PACKAGE}/__init__.py", init.encode()), (f"{PACKAGE}/__main__.py", _MAIN.encode())]
    return _write(wheel_directory, iter([*first, *files()]), project)


def build_editable(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Write a wheel that leads to this clone, whose changes count at once; pip calls this.

    Importing ``openmind`` then puts the clone on the path, where ``common`` and ``tools`` are found by these names.
    """
    project = _project()
    place = f"\nimport sys\n\nsys.path.insert(1, {str(ROOT)!r})"
    init = _INIT.format(tools="tools", place=place, version=project["version"])
    both = [(f"{PACKAGE}/__init__.py", init.encode()), (f"{PACKAGE}/__main__.py", _MAIN.encode())]
    return _write(wheel_directory, iter(both), project)


def build_sdist(sdist_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    """Write what the wheel is built from as an archive, links as links, and return its name."""
    project = _project()
    base = f"{project['name'].replace('-', '_')}-{project['version']}"
    lines = [f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"]
    about = Path(sdist_directory) / "PKG-INFO"
    about.write_text("".join(lines), "utf-8")

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = os.path.basename(entry.name)
        return None if name in _MADE or name.endswith(".pyc") else entry

    with tarfile.open(Path(sdist_directory) / f"{base}.tar.gz", "w:gz") as archive:
        archive.add(about, f"{base}/PKG-INFO")
        for name in (*_INNER, "bundles", "docs", "locks", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"):
            archive.add(ROOT / name, f"{base}/{name}", filter=kept)
    about.unlink()
    return f"{base}.tar.gz"
