# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Names of cases as files, and settings as paths."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from common.errors import DataError, SettingsError
from common.paths import as_path, check_names, file_name, output_file

# every letter and word that some file system reads as something else, alone and together
PARTS = [
    "a",
    "A b",
    "aux",
    "AUX",
    "%61ux",
    "nul.gz",
    "a:b",
    "a%3Ab",
    "a\\b",
    "x.",
    "x%2E",
    ".x",
    "50%",
    "q?",
    "\t",
    "é",
]


def test_no_two_names_share_a_file_and_all_lie_below_the_folder(tmp_path: Path) -> None:
    names = [*PARTS, *("/".join(pair) for pair in itertools.product(PARTS, repeat=2))]
    files = [output_file(tmp_path, name, ".nii.gz") for name in names]
    assert len(set(files)) == len(names)
    for file in files:
        assert tmp_path in Path(os.path.normpath(file)).parents
        assert not set('<>:"|?*\\\t') & set(str(file.relative_to(tmp_path)))
        assert not any(part.startswith(".") or part.endswith((".", " ")) for part in file.relative_to(tmp_path).parts)


def test_folders_and_plain_names_stay_as_they_are() -> None:
    for name in ("siteA/scan", "sub-01_T1w", "Größe 1.5 (2)", "1.2.840.113", "100% sure", "a-b+c=d", "脳/画像"):
        assert file_name(name) == name
    for name in ("con", "Lpt1.old", "COM\u00b9"):
        assert file_name(f"x/{name}").split("/")[1].startswith("%")


@pytest.mark.parametrize("name", ["", "/", "/etc/x", "..", "../x", "a/../../x", "a/.", "a//b", "a/", "\ud800"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r'give it another "name" in a datalist'):
        file_name(name)


def test_a_name_may_be_as_long_as_files_with_endings_can_be(tmp_path: Path) -> None:
    longest = "é" * 100
    output_file(tmp_path, longest, "_probabilities.nii.gz").touch()
    for name in (longest + "e", "/".join(["x" * 150] * 8)):
        with pytest.raises(DataError, match=r"no file can be called after .*: it has \d+ bytes"):
            file_name(name)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], "several cases are called a"),
        (["siteA/scan", "SITEa/Scan"], "siteA/scan and SITEa/Scan would share one file where capital letters"),
        (["Straße", "STRASSE"], "would share one file"),
        (["e\u0301", "\u00c9"], "would share one file"),
    ],
)
def test_cases_that_would_share_a_file_are_refused(names: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_names(names)
    check_names(names[:1])
    check_names(["scan", "siteA/scan", "siteB/scan", "scan_"])


def test_settings_become_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, path in (("~/my scans", "/home/me/my scans"), ("~", "/home/me"), ("a/~", "a/~"), (2024, "2024")):
        assert as_path(value) == Path(path)  # type: ignore[arg-type]
    assert as_path(Path("~/x")) == Path("/home/me/x")
    for wrong in (True, None, ["a"], "a\0b", "~nobody_of_this_name/x"):
        with pytest.raises(SettingsError, match="--output_dir is "):
            as_path(wrong, "--output_dir")  # type: ignore[arg-type]
