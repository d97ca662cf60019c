# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What of the Dockerfile can be checked without Docker: its sources, its pins, its user, its command."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest

from ..conftest import ROOT, blobs, write_volume
from ..starts import python

BUNDLE = "mae_resenc_l"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text("utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], " ".join(line.split(" ", 1)[1].split())) for line in lines]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for found, arguments in instructions if found == name]


def sent_to_docker(path: str) -> bool:
    """Return whether .dockerignore lets a file through: the last pattern that fits it or a folder above it decides."""
    places = [path, *map(str, PurePosixPath(path).parents)][:-1]
    sent = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        plain = pattern.removeprefix("!")
        depth = plain.count("/")
        fits = any(
            fnmatchcase(PurePosixPath(place).name, plain.removeprefix("**/"))
            if plain.startswith("**/")
            else place.count("/") == depth and fnmatchcase(place, plain)
            for place in places
        )
        sent = pattern.startswith("!") if fits else sent
    return sent


def test_it_installs_the_pins_and_nothing_else(instructions: list[tuple[str, str]]) -> None:
    (base,) = of(instructions, "FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+\$\{BASE_DIGEST:\+@\}\$\{BASE_DIGEST\}", base)
    assert version, "the base is not pinned"
    assert [name for name, _ in instructions].index("ARG") < [name for name, _ in instructions].index("FROM")
    assert of(instructions, "ARG")[0] == 'BASE_DIGEST=""', "no digest that nobody has looked up"
    looked_up = re.findall(r"^docker buildx imagetools inspect (\S+)$", (ROOT / "docs/container.md").read_text(), re.M)
    assert looked_up == [base.split("$")[0]]
    assert f">={version[1]}.{version[2]}" in (ROOT / "pyproject.toml").read_text("utf-8")
    (install,) = (line for line in of(instructions, "RUN") if "pip" in line or "install" in line)
    assert re.fullmatch(
        r'PIP_EXTRA_INDEX_URL="\$\{EXTRA_INDEX\}" PIP_NO_CACHE_DIR=1 '
        r"python /tmp/build/tools/commanding/environment\.py install requirements\.txt "
        r"&& pip check && rm -r /tmp/build",
        install,
    )
    pins = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line[:1] not in ("#", "")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


def test_what_it_copies_is_there_and_nothing_more_is_sent(
    instructions: list[tuple[str, str]], exported: Callable[[str], Path]
) -> None:
    copied = [line.split() for line in of(instructions, "COPY")]
    assert copied.pop() == ["dist/${BUNDLE}/", "/opt/bundle/"]
    for *sources, folder in copied:
        assert {folder} == {f"/tmp/build/{Path(file).parent}/" for file in sources}, "as in the repository"
    files = sorted(file for *sources, _ in copied for file in sources)
    assert files == ["locks/cuda.txt", "locks/requirements.txt", "tools/commanding/environment.py"]
    assert all(sent_to_docker(file) and (ROOT / file).is_file() for file in files)
    bundle = exported(BUNDLE)
    for file in bundle.rglob("*.*"):
        place = f"dist/{BUNDLE}/{file.relative_to(bundle).as_posix()}"
        assert sent_to_docker(place) == ("__pycache__" not in place), place
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert sorted(file for file in tracked.splitlines() if sent_to_docker(file)) == files
    for file in (f"dist/{BUNDLE}_v0.1.0.zip", f"bundles/{BUNDLE}/models/model.pt", ".venv/bin/python", ".git/config"):
        assert not sent_to_docker(file), file


def test_it_does_not_run_as_root_and_holds_no_secret(instructions: list[tuple[str, str]]) -> None:
    (user,) = of(instructions, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    names = [name for name, _ in instructions]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert not re.search(r"(?i)token|password|secret|api_?key", (ROOT / "Dockerfile").read_text("utf-8"))


def test_its_command_runs_in_a_bundle(
    instructions: list[tuple[str, str]], exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """The entry point with the default command finds code, config and data, and says that nobody trained the model."""
    (entry,), (command,) = (map(json.loads, of(instructions, name)) for name in ("ENTRYPOINT", "CMD"))
    assert entry[0] == "python"
    write_volume(tmp_path / "data" / "case.nii.gz", blobs(0)[0])
    places = {"/data": str(tmp_path / "data"), "/output": str(tmp_path / "output")}
    assert [json.dumps(sorted(places))] == [json.dumps(sorted(json.loads(v))) for v in of(instructions, "VOLUME")]
    line = [python(), *entry[1:], *(places.get(part, part) for part in command)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, cwd=exported(BUNDLE), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "has not been trained to segment yet" in done.stderr
