# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""README and docs: short enough to be read, every command is one that exists, every link leads somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import yaml

from common.bundles import read_config
from common.settings import OWN_SETTINGS, unknown_settings
from tools.commanding import running
from tools.commanding.parsing import parse
from tools.commanding.settings import kinds, rest_of

from .conftest import BUNDLES, ROOT

README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = sorted(
    [README, ROOT / "findings" / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/README.md")]
)
FIGURES = {ROOT / "docs" / name for name in ("benchmark.md", "budget.md")}
OURS = {"simmim_resenc_l", "spark3d_primus_m"}
EXPERIMENTAL = {"dino_primus_m", "dino_resenc_l", "jepa_primus_m", "jepa_resenc_l"}
NOT_COMPARED = "experimental: not compared yet"
QUESTIONS = [
    *("have scans without labels", "have 10 labelled cases", "have a published checkpoint", "use MONAI Label"),
    *("run a cluster", "want to add a method"),
]
# other programs, and those of their settings that pages name without them
PROGRAMS = {
    "./runtests.sh",
    "mlflow",
    "apptainer",
    "dask",
    "docker",
    "git",
    "monailabel",
    "nnUNetv2_predict_from_modelfolder",
    "pip",
    "sbatch",
}
OTHERS = {
    *("nproc_per_node", "nnodes", "max_restarts", "rdzv_endpoint", "rdzv_conf"),  # torchrun
    *("ipc", "user", "build-arg", "memory-limit", "host", "conf", "require-hashes", "disable_tta", "gres", "time"),
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text("utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^ *```\w*\n.*?^ *```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """Return what stands between single ticks, but for what leads out of a sentence."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of paragraphs, points of lists and cells of tables."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:\*|\d+\.|#|\|) ?)", text):
        cells = block.split("|") if block.lstrip().startswith("|") else [block]
        for cell in cells:
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(cell.split()))
            yield from re.split(r"(?<=[.!?])[\"*)]* (?=\S)", plain)


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 200
    found = list(sentences(prose(README)))
    assert len(found) > 80
    assert [each for each in found if len(each.split()) > 30] == []


@pytest.mark.parametrize("page", sorted(set(ROOT.glob("docs/*.md")) - FIGURES), ids=lambda page: page.name)
def test_sentences_of_the_docs_are_no_paragraphs(page: Path) -> None:
    assert [each for each in sentences(prose(page)) if len(each.split()) > 45] == []


def test_sentences_are_found() -> None:
    found = {
        each.strip("#* ") for each in sentences("# one two\n\nthree. four!\n* five\n  six\n\n| a | b. c |\n|---|---|\n")
    }
    assert {"one two", "three.", "four!", "five six", "a", "b.", "c"} <= found


def test_the_numbers_of_the_readme_are_the_published_ones() -> None:
    tables = yaml.safe_load((ROOT / "tools" / "studies" / "published.yaml").read_text("utf-8"))["tables"]
    kinds_of = {"openmind_segmentation": ("All", 150), "openmind_classification_ap": ("mean", 200)}
    published = {
        (row["method"], row["backbone"], table): row["printed"][mean]
        for table, (mean, epochs) in kinds_of.items()
        for row in tables[table]["rows"]
        if row["epochs"] == epochs
    }
    expected = {}
    for bundle in [*BUNDLES, "scratch_resenc_l", "scratch_primus_m"]:
        method, backbone = re.fullmatch(r"(.*)_(resenc_l|primus_m)", bundle).groups()
        both = [published.get((method, backbone, table)) for table in kinds_of]
        ours = NOT_COMPARED if bundle in EXPERIMENTAL else "ours"
        expected[bundle] = ours if None in both else " / ".join(f"{value:.2f}" for value in both)
    assert {bundle for bundle, numbers in expected.items() if numbers in ("ours", NOT_COMPARED)} == OURS | EXPERIMENTAL
    text = README.read_text("utf-8")
    rows = re.findall(r"\[(\w+)\]\(bundles/\1/docs/README\.md\): ([^|]*?) \|", text)
    (scratch,) = re.findall(r"^\| from scratch \|.*?\| ([^|]*) \| ([^|]*) \|$", text, re.M)
    told = {**dict(rows), **dict(zip(["scratch_resenc_l", "scratch_primus_m"], scratch, strict=True))}
    assert {bundle: numbers.replace("*", "") for bundle, numbers in told.items()} == expected
    for column, backbone in enumerate(("resenc_l", "primus_m")):
        for position in (0, 1):
            numbers = {
                name: told[name].split(" / ")[position]
                for name in told
                if name.endswith(backbone) and " / " in told[name]
            }
            best = max(numbers, key=lambda name: float(numbers[name].strip("*")))
            assert [name for name in numbers if "**" in numbers[name]] == [best], (column, position)


# commands


@cache
def tools() -> dict[str, dict[str, type]]:
    """Return the classes of the settings of each tool, by its commands; the name of a tool's only one is empty."""
    found: dict[str, dict[str, type]] = {}
    main, path, arguments = running.main, sys.path, sys.argv
    try:
        for file in sorted((ROOT / "tools").glob("*.py")):
            if file.stem not in ("__init__", "links"):
                sys.path, sys.argv = [str(file.parent), *path], [str(file)]

                def caught(commands: Any, _: Any, _name: str = file.stem, **__: Any) -> None:
                    known = running._with_settings(commands)
                    found[_name] = {command: cls for command, (_function, cls) in known.items()}

                running.main = caught
                runpy.run_path(str(file), run_name="__main__")
    finally:
        running.main, sys.path, sys.argv = main, path, arguments
    return found


@cache
def config(bundle: str, name: str) -> frozenset[str]:
    return frozenset(read_config(ROOT / "bundles" / bundle / "configs" / f"{name}.yaml"))


@cache
def every_setting() -> frozenset[str]:
    """Return the names at the top of all configs."""
    files = ROOT.glob("bundles/*/configs/*.yaml")
    own = {name for file in files for name in config(file.parent.parent.name, file.stem)}
    return frozenset(own | {name for file in ROOT.glob("common/configs/*.yaml") for name in read_config(file)})


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of its blocks, and what stands between ticks in its text."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.split(r" && |; (?=python)", line.strip().removeprefix("$ "))
    yield from spans(page)


def words_of(line: str) -> list[str]:
    """Return the words of a command, with names in the place of what a reader fills in."""
    line = line.replace("$SLURM_ARRAY_TASK_ID", "0")
    line = re.sub(r"\[(--[^\]]*)\]", r"\1", re.sub(r"<bundle>|\$bundle", "mae_resenc_l", line))  # [--may be left out 1]
    return [word for word in shlex.split(line, comments=True) if word not in ("...", "&", "$small")]


def judge_tool(name: str, words: list[str]) -> None:
    """Raise an error if a tool does not take these words."""
    if name == "links":
        options = set(re.findall(r'add_argument\("(--\w+)"', (ROOT / "tools" / "links.py").read_text("utf-8")))
        assert set(words) <= options, words
        return
    known = tools()[name]
    command = "" if "" in known else words.pop(0) if words else None
    if command is None or set(words) & {"-h", "--help"} or not words:
        return
    cls = known[command]
    settings = parse(name, cls, words)
    if rest := rest_of(cls):
        assert unknown_settings(getattr(settings, rest), every_setting()) is None, words


def judge_run(words: list[str]) -> None:
    """Raise an error if a config is not there, or does not have a setting."""
    given = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    files = re.findall(r"[^\s'\",\[\]]+\.(?:yaml|json)", words[words.index("--config_file") + 1])
    assert files, words
    known: set[str] = set()
    for file in files:
        if file.startswith("common/"):
            known |= {*read_config(ROOT / file)}
        elif file != "mine.yaml":
            name = Path(file).stem
            bundle = next((each for each in BUNDLES if f"{each}/" in file), None)
            if file.endswith(".yaml") and file.startswith("bundles/"):
                assert (ROOT / file).is_file(), file
            known |= config(bundle or "mae_resenc_l", name)
            if bundle is None:
                known |= config("mae_primus_m", name)
    assert unknown_settings(given, known) is None, words
    for word in words:
        if word.startswith("["):
            ast.literal_eval(word)


def judge(line: str) -> bool:
    """Judge a command of this project or of MONAI; return whether it is one."""
    if line.startswith("openmind "):
        words = words_of(line)[1:]
        judge_tool(*("study", words[1:]) if words[0] == "study" else ("openmind", words))
        return True
    if "python tools/" not in line and "monai.bundle" not in line and "--config_file" not in line:
        return False
    if inner := re.search(r"'(python tools/[^']*)'", line):
        return judge(inner[1])
    if not re.match(r"(\w+=\S+ )*(python|torchrun|unshare|docker|apptainer|--config_file) ?", line):
        return False
    words = words_of(line)
    if script := next((word for word in words if re.fullmatch(r"tools/\w+\.py", word)), None):
        assert (ROOT / script).is_file(), script
        judge_tool(Path(script).stem, words[words.index(script) + 1 :])
        return True
    if "monai.bundle" in words:
        verb, *rest = words[words.index("monai.bundle") + 1 :] or ["run"]
        if verb != "run":
            function: Callable[..., Any] = getattr(monai.bundle, verb)
            taken = inspect.signature(function).parameters
            assert {word.removeprefix("--") for word in rest if word.startswith("--")} <= {*taken}, words
            return True
    if "--config_file" in words:
        judge_run(words[words.index("--config_file") :])
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools()
    for name in ("exists", "is_dir", "is_file"):  # files of the reader's are taken to be there
        here = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda self, _here=here: _here(self) or not self.is_relative_to(ROOT))
    count = 0
    for line in commands(page):
        if line.startswith(("python", "openmind")) and "--lrr" in line:  # shown as what is refused
            with pytest.raises(AssertionError, match="did you mean --lr"):
                judge(line)
            continue
        try:
            count += judge(line)
        except Exception as error:
            raise AssertionError(f"{page.relative_to(ROOT)}: {line}: {error}") from error
    if page.parent.parent.parent.name == "bundles":
        assert count >= 7


def test_wrong_commands_are_found() -> None:
    run = "python -m monai.bundle run --config_file bundles/mae_resenc_l/configs"
    for wrong in (
        "python tools/nothing.py",
        "python tools/budget.py mae_resenc_l --gpus 24",
        "python tools/budget.py mae_resenc_1",
        "python tools/study.py pan study.yaml",
        "openmind finetun mae_resenc_l task/",
        "openmind finetune mae_resenc_l task/ --label background,lesion",
        "openmind study pan study.yaml",
        "python tools/export_bundle.py mae_resenc_l --pach_size [96,96,96]",
        f"{run}/pretrain.yaml --bundle_root x --lrr 0.1",
        f"{run}/pretraining.yaml --bundle_root x",
        "python -m monai.bundle run --config_file configs/train.json --dataset FOLDER",
        "python -m monai.bundle download --nam NAME",
        "torchrun --nproc_per_node 4 -m monai.bundle run --config_file \"['common/configs/multi.yaml']\"",
        "sbatch --wrap 'python tools/prepare_data.py prepar /data/mri'",
    ):
        with pytest.raises((AssertionError, KeyError, ValueError, OSError)):
            judge(wrong)
    assert judge(f"{run}/pretrain.yaml --bundle_root x --lr 0.1")
    assert not judge("pip install x")


def test_every_setting_that_a_page_names_is_one() -> None:
    of_tools = {name for classes in tools().values() for cls in classes.values() for name in kinds(cls)}
    of_monai = {name for verb in ("run", "download", "onnx_export") for name in signature(verb)}
    known = every_setting() | of_tools | of_monai | OWN_SETTINGS | {"help", "refresh", "undo", "fix", "fast", "all"}
    known |= {"large_file_name", "bundle_path"} | OTHERS
    wrong = []
    for page in PAGES:
        for span in spans(page):
            if span.split()[0] in PROGRAMS:
                continue
            for name in re.findall(r"(?:^|\s)--([A-Za-z][\w-]*)", span):
                if not {name, name.replace("-", "_")} & known:
                    wrong.append(f"{page.relative_to(ROOT)}: {span}")
    assert wrong == []


def signature(verb: str) -> set[str]:
    return {*inspect.signature(getattr(monai.bundle, verb)).parameters}


def test_versions_of_packages_are_those_of_the_requirements() -> None:
    pins: dict[str, set[str]] = {}
    for file in ROOT.glob("requirements*.txt"):
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", file.read_text("utf-8"), re.M):
            pins.setdefault(name, set()).add(version)
    count = 0
    for page in PAGES:
        for name, version in re.findall(r"([\w.-]+)==([\w.]*\w)", page.read_text("utf-8")):
            if name in pins:
                count += 1
                assert version in pins[name], f"{page.relative_to(ROOT)}: {name}=={version}"
    assert count >= 8


# links


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page as GitHub makes them of its headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(((?!https?:)[^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_leads_to_every_page_and_asks_the_readers_questions() -> None:
    linked = {(INDEX.parent / link.partition("#")[0]).resolve() for link in links(INDEX)}
    assert {*(ROOT / "docs").glob("*.md")} - {INDEX} <= linked
    text = INDEX.read_text("utf-8")
    assert [question for question in QUESTIONS if question not in text] == []
    first = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert INDEX in first
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")}
    assert {*ROOT.glob("docs/**/*.png")} <= shown, "pictures that no page shows"


def test_every_tool_is_on_a_page() -> None:
    text = " ".join(page.read_text("utf-8") for page in PAGES)
    assert [name for name in tools() if f"tools/{name}.py" not in text] == []
