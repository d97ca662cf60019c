# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Help without the environment, words of a command line, and settings that are judged by their types."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from common.errors import SettingsError
from tools.commanding import settings as settings_module
from tools.commanding.ending import config_command, end, tool_command
from tools.commanding.helping import explanations, help_text
from tools.commanding.parsing import parse
from tools.commanding.running import run
from tools.commanding.settings import Existing, From, Labels, Rests, Shard, filled, kinds, plain, settings

from ..conftest import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")
SEVERAL = {"prepare_data": ["scan", "list", "prepare", "verify"], "study": ["plan", "run", "report", "slurm", "card"]}
# asked for in one process: help of every tool and command, and what of the heavy packages that took
HELPS = """
import contextlib, io, json, runpy, sys
import importlib.abc

class NoPackages(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "tools", "common", "_virtualenv"}:
            raise ImportError(f"there is no {name} in a fresh clone")

sys.meta_path.insert(0, NoPackages())
found = {}
for line in json.loads(sys.argv[1]):
    name, *arguments = line.split()
    sys.argv = [f"tools/{name}.py", *arguments]
    sys.path.insert(0, "tools")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):  # of argparse
        runpy.run_path(f"tools/{name}.py", run_name="__main__")
    found[line] = out.getvalue()
print(json.dumps(found))
"""


@settings
class Study:
    """What a study is told."""

    file: Path
    """YAML
    file."""
    jobs: Annotated[int, From(1)] = 1
    """At a time."""
    hours: Annotated[float, From(0)] = 0.0
    """There are so many."""
    again: bool = False
    """Once more."""
    way: Literal["auto", "never"] = "auto"
    """How."""
    labels: Labels | None = None
    """Names."""
    rates: tuple[float, ...] = (0.5, 1.0)
    """Factors."""
    regions: dict[str, tuple[int, ...]] | None = None
    """Sets."""
    spacing_mm: float | tuple[float, ...] | None = 1.0
    """Voxels."""
    shard: Shard | None = None
    """Part."""
    others: Rests = field(default_factory=dict)
    """Of the config."""


@settings
class Plain:
    """What is told without the settings of a config."""

    folder: Path
    """Which."""
    output: str = ""
    """Where."""
    quick: bool = True
    """Soon."""


def told(line: str) -> dict[str, Any]:
    return {name: value for name, value in vars(parse("study", Study, line.split())).items() if name != "file"}


def study(command: Study) -> None:
    """Do it."""
    raise AssertionError("it began")


def test_help_of_every_command_needs_nothing_but_python() -> None:
    asked = [f"{name} {flag}" for name in TOOLS for flag in ("-h", "--help")]
    asked += [f"{name} {command} --help" for name, commands in SEVERAL.items() for command in commands]
    asked += list(SEVERAL)  # without a command
    began = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){HELPS}", json.dumps(asked)]
    result = subprocess.run(began, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    for name in TOOLS:
        text = found[f"{name} -h"]
        assert text == found[f"{name} --help"]
        about = importlib.import_module(f"tools.{name}").__doc__ or ""
        assert about.strip() in text, name
        assert f"python tools/{name}.py" in text
        assert text.count("\n  python tools/") >= 1, "an example, where one looks for it"
    for name, commands in SEVERAL.items():
        for command in commands:
            assert f"\n  python tools/{name}.py {command} " in found[f"{name} {command} --help"]
    assert "--num_workers  a whole number from 0; default" in found["prepare_data prepare --help"]
    assert "--study  a file or folder that is there; needed\n      YAML file." in found["study plan --help"]
    assert found["study"] == found["study -h"]
    assert "--lr  a number above 0; default 0.001\n      Peak learning rate." in found["schedules -h"]


def test_every_setting_is_explained() -> None:
    count = 0
    for path in sorted((ROOT / "tools").glob("*/settings.py")):
        module = importlib.import_module(f"tools.{path.parent.name}.settings")
        for cls in {
            each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__
        }:
            if hasattr(cls, "__dataclass_fields__") and path.parent.name != "commanding":
                assert set(explanations(cls)) == {each.name for each in fields(cls)}, cls
                assert all(text.endswith((".", ")")) for text in explanations(cls).values()), cls
                count += 1
    assert count >= 24


def test_what_is_refused_is_refused_before_the_heavy_packages(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import json, runpy, sys",
            "sys.path.insert(0, '')",
            "for name, *arguments in json.loads(sys.argv[1]):",
            "    sys.argv = [name, *arguments]",
            "    try:",
            "        runpy.run_path(f'tools/{name}.py', run_name='__main__')",
            "        raise AssertionError(name)",
            "    except ValueError as error:",
            "        print(error)",
            "print([name for name in ('torch', 'monai', 'numpy', 'matplotlib') if name in sys.modules])",
        ]
    )
    lines = [
        ["inspect_weights", str(tmp_path / "none.pt")],
        ["schedules", "--epochs", "2.5"],
        ["study", "plan", str(tmp_path), "--hous", "3"],
        ["study", "pan", "x.yaml"],
        ["quickstart", "--bundle", "mae_resen_l"],
        ["export_bundle", "mae_resenc_l", "--weights", "none"],
        ["evaluate", str(tmp_path), str(tmp_path), "--regions", "{'a': [1]}"],
        ["choose", "--data", str(tmp_path), "--seeds", "0"],
    ]
    command = [sys.executable, "-c", script, json.dumps(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    *sentences, loaded = result.stdout.splitlines()
    assert loaded == "[]"
    assert sentences == [
        f"--file is '{tmp_path}/none.pt'; it must be a file or folder that is there",
        "--epochs is '2.5'; it must be a whole number from 1",
        "plan has no setting --hous; did you mean --hours?",
        "there is no command 'pan'; did you mean plan?",
        *[
            each
            for each in sentences
            if each.startswith("there is no bundle 'mae_resen_l'; did you mean mae_resenc_l? There are ")
        ],
        "--weights is 'none'; it must be auto, true or false",
        "regions need the names of the label values: --labels background,edema,core",
        "--seeds is '0'; it must be a whole number from 1",
    ]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("a --jobs 2", "jobs", 2),
        ("a --jobs=2", "jobs", 2),
        ("--file a -j 2", "jobs", 2),
        ("a --jobs 2 --jobs 3", "jobs", 3),
        ("a 4", "jobs", 4),
        ("a --again", "again", True),
        ("a --again true", "again", True),
        ("a --again=False", "again", False),
        ("a --again --no-again", "again", False),
        ("a --noagain", "again", False),
        ("a --labels a,b", "labels", ("a", "b")),
        ("a --labels ['a','b']", "labels", ("a", "b")),
        ("a --labels [a,b]", "labels", ("a", "b")),
        ("a --labels 2024,b", "labels", ("2024", "b")),
        ("a --labels ~/x.json", "labels", str(Path("~/x.json").expanduser())),
        ("a --labels=", "labels", None),
        ("a --rates 3", "rates", (3.0,)),
        ("a --rates 1,2.5", "rates", (1.0, 2.5)),
        ("a --regions {'x':[1,2],'y':3}", "regions", {"x": (1, 2), "y": (3,)}),
        ("a --spacing-mm 2", "spacing_mm", 2.0),
        ("a --spacing_mm 1,2,3", "spacing_mm", (1.0, 2.0, 3.0)),
        ("a --spacing_mm null", "spacing_mm", None),
        ("a --shard 3/8", "shard", (3, 8)),
        ("a --patch-size [64,64,32]", "others", {"patch_size": [64, 64, 32]}),
        ("a --train#trainer#max_epochs 3 --amp", "others", {"train#trainer#max_epochs": 3, "amp": True}),
        ("a --lr 1e-3 --schedule warmup --amp false", "others", {"lr": 0.001, "schedule": "warmup", "amp": False}),
        ("a --offset -3", "others", {"offset": -3}),
        ("a --rates -1,2", "rates", (-1.0, 2.0)),
        ("a -jobs=3", "jobs", 3),
        ("a -lr .5 --amp", "others", {"lr": 0.5, "amp": True}),
    ],
)
def test_words_become_settings(line: str, name: str, value: Any) -> None:
    found = told(line)
    assert found.pop(name) == value
    assert found == {key: each for key, each in told("a").items() if key != name}, "the others are the defaults"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "study needs --file (a path), and --file is not given; --help tells of each"),
        ("a --jobs 0", "--jobs is '0'; it must be a whole number from 1"),
        ("a --jobs 1.5", "--jobs is '1.5'; it must be a whole number from 1"),
        ("a --jobs true", "--jobs is 'true'; it must be a whole number from 1"),
        ("a --hours inf", "--hours is 'inf'; it must be a number from 0"),
        ("a --hours nan", "--hours is 'nan'; it must be a number from 0"),
        ("a --jobs", "--jobs of study has no value; write --jobs VALUE"),
        ("a --jobs --again", "--jobs of study has no value; write --jobs VALUE, and a value that begins with"),
        ("a --again=maybe", "unable to convert"),
        ("a --way no", "--way is 'no'; it must be auto or never"),
        ("a --labels a,,b", "--labels is 'a,,b'; it must be names with commas between, background first"),
        ("a --rates 1,x", "--rates is '1,x'; it must be numbers with commas between"),
        ("a --regions 3", "--regions is '3'; it must be a mapping"),
        ("a --shard 8/8", "--shard is '8/8'; it must be i/n with i from 0 to n - 1"),
        ("a --spacing_mm fine", "--spacing_mm is 'fine'; it must be a number or numbers with commas between"),
    ],
)
def test_wrong_words_end_in_a_sentence(line: str, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse("study", Study, line.split())
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --ouput b", "plain has no setting --ouput; did you mean --output?"),
        ("a --no-quik", "plain has no setting --no-quik"),
        ("a --xyz 3", "plain has no setting --xyz; it has: folder, output, quick"),
        ("a b true c", "plain does not know what to do with 'c'; it has: folder, output, quick"),
        (
            "a --output -x",
            "--output of plain has no value; write --output VALUE, and a value that begins with a hyphen as",
        ),
    ],
)
def test_what_is_no_setting_stops_with_the_nearest_name(line: str, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse("plain", Plain, line.split())
    assert words in str(error.value)


def test_texts_are_not_numbers() -> None:
    found = parse("plain", Plain, ["2024", "--output", "1e3"])
    assert (found.folder, found.output) == (Path("2024"), "1e3")
    assert parse("plain", Plain, ["a", "--output=--x y"]).output == "--x y"
    assert parse("plain", Plain, ["a", "--output", ""]).output == ""


def test_python_tells_settings_in_the_same_words(tmp_path: Path) -> None:
    found = filled(Study, tmp_path, jobs="2", labels=["a", "b"], rates=(1, 2), lr=0.1, shard=(0, 2))
    assert (found.jobs, found.labels, found.rates, found.shard, found.others) == (
        2,
        ("a", "b"),
        (1.0, 2.0),
        (0, 2),
        {"lr": 0.1},
    )
    assert filled(Study, str(tmp_path), spacing_mm=None).spacing_mm is None
    for name, value in (("jobs", 0), ("jobs", True), ("jobs", 2.0), ("again", 1), ("labels", True), ("hours", "x")):
        with pytest.raises(SettingsError, match=f"--{name} is {re.escape(repr(value))}; it must be"):
            filled(Study, tmp_path, **{name: value})
    with pytest.raises(TypeError):
        filled(Plain, tmp_path, lr=3)


def test_a_command_gets_what_it_was_told() -> None:
    taken: list[Study] = []

    def take(settings: Study) -> None:
        taken.append(settings)

    run(take, ["a", "--jobs", "3"])
    run({"take": take, "other": study}, ["take", "b", "--lr", "1"])
    assert [(each.file.name, each.jobs, each.others) for each in taken] == [("a", 3, {}), ("b", 1, {"lr": 1})]
    with pytest.raises(SettingsError, match="there is no command 'tke'; did you mean take"):
        run({"take": take, "other": study}, ["tke"])
    with pytest.raises(SettingsError, match="there is no command 'xyz'; there are: take, other"):
        run({"take": take, "other": study}, ["xyz"])


def test_help_says_what_each_setting_takes() -> None:
    text = help_text("About.\n\n  example\n", {"": (study, Study)}, [])
    assert text.startswith("About.\n\n  example\n\nSettings")
    assert "  --file  a path; needed\n      YAML file.\n" in text
    assert "  --hours  a number from 0; default 0\n" in text
    assert "  --again  true or false; default false\n" in text
    assert "  --rates  numbers with commas between; default 0.5,1\n" in text
    assert "  --shard  i/n with i from 0 to n - 1, such as 0/8 to 7/8\n" in text
    assert text.endswith("  --ANY_OTHER\n      Of the config.")
    several = {"study": (study, Study), "again": (study, Study)}
    assert help_text("About.", several, []).endswith("  study  Do it.\n  again  Do it.")
    assert help_text("About.", several, ["again", "-h"]).startswith("again: Do it.\n\nSettings")


def test_values_of_configs_are_read_as_monai_reads_them() -> None:
    for text, value in (
        ("3", 3),
        ("[1,2]", [1, 2]),
        ("a b", "a b"),
        ("x-1", "x-1"),
        ("{'a': 1}", {"a": 1}),
        ("1,2", (1, 2)),
    ):
        assert plain(text) == value
    assert plain("2024-01-01") == "2024-01-01"
    assert plain(Path("a")) == Path("a")


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(settings_module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed == 0
    assert kinds(Study)["file"] is Path
    assert Existing is not None


def test_commands_end_with_three_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    following = config_command("mae_resenc_l", "train", tmp_path / "my data")
    end(tmp_path / "out" / "scores.csv", look=tmp_path / "out" / "scores.png", following=following)
    config = ROOT / "bundles" / "mae_resenc_l" / "configs" / "train.yaml"
    assert capsys.readouterr().out.splitlines() == [
        "result:  out/scores.csv",
        "look at: out/scores.png",
        f"next:    python -m monai.bundle run --config_file {config} --dataset_dir 'my data'",
    ]
    monkeypatch.chdir(ROOT)
    end("nothing was written", following=tool_command("study", "run", Path("a.yaml")))
    assert capsys.readouterr().out.splitlines() == [
        "result:  nothing was written",
        "look at: nothing was written",
        "next:    python tools/study.py run a.yaml",
    ]
    end(following="what is next")
    assert capsys.readouterr().out == "next:    what is next\n", "of what only prints"
