# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The lines with which a command ends, as the workflows of the bundles do; paths are as the user sees them.

What writes ends with three: where the result is, where to look, what to run next. What only prints ends with the last.
Run as a verb of ``openmind``, the next command is one, too.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.terminal import OPENMIND, ending, near, openmind

from .environment import ROOT

__all__ = [
    "by_verbs",
    "command_line",
    "config_command",
    "end",
    "exported_command",
    "model_command",
    "tool",
    "tool_command",
]

_VERBS = {  # of openmind, for tools and for configs
    "import_checkpoint": "import",
    "inspect_weights": "inspect",
    "evaluate": "evaluate",
    "probe": "probe",
    "choose": "choose",
    "label_curve": "curve",
    "study": "study",
    "export_bundle": "export",
    "new_task": "new-task",
    "pretrain": "pretrain",
    "train": "finetune",
    "inference": "predict",
    "features": "embed",
    "train_classification": "classify",
}


@contextmanager
def by_verbs() -> Iterator[None]:
    """Tell next commands as verbs of ``openmind`` while something runs, in this process and those that it starts."""
    before = os.environ.get(OPENMIND)
    script = ROOT / "tools" / "openmind.py"
    called = Path(sys.argv[0]).name == script.name
    os.environ[OPENMIND] = before or (_line(["python", script]) if called else "openmind")
    try:
        yield
    finally:
        if before is None:
            del os.environ[OPENMIND]


def end(result: str | Path | None = None, *, look: str | Path | None = None, following: str | None = None) -> None:
    """Print where the result is, where to look, and what to run next.

    Args:
        result: file or folder, or words where nothing is written; None of what only prints.
        look: picture or page; the result unless given.
        following: command, ready to paste; words in capitals in it stand for what is the user's.
    """
    seen = None if result is None else _told(look or result)
    if last := ending(None if result is None else _told(result), look=seen, following=following):
        print(last, flush=True)


def tool(name: str) -> str:
    """Return how a tool is called in a sentence, or the verb that it is."""
    command = openmind()
    return f"{command} {_VERBS[name]}" if command is not None and name in _VERBS else f"python tools/{name}.py"


def tool_command(name: str, *words: str | Path) -> str:
    """Return a command line of a tool, or of the verb that it is.

    Args:
        name: of its file, without ending.
        words: that follow.
    """
    if (command := openmind()) is not None and name in _VERBS:
        return f"{command} {_line([_VERBS[name], *words])}"
    return _line(["python", ROOT / "tools" / f"{name}.py", *words])


def config_command(bundle: str, config: str, data: str | Path, *words: str | Path) -> str:
    """Return a command line that runs a config of a bundle of the collection, or the verb that does.

    Args:
        bundle: of the collection; ``BUNDLE`` where it is the user's choice.
        config: its name, without ending.
        data: folder, or a datalist, which ends in ``.json``.
        words: that follow.
    """
    if (command := openmind()) is not None:
        return f"{command} {_line([_VERBS[config], bundle, data, *words])}"
    file = ROOT / "bundles" / bundle / "configs" / f"{config}.yaml"
    of_data = "--datalist" if str(data).endswith(".json") else "--dataset_dir"
    return _line(["python", "-m", "monai.bundle", "run", "--config_file", file, of_data, data, *words])


def model_command(bundle: str, model: Path, data: str | Path, *words: str | Path) -> str:
    """Return a command line that predicts with a model of a bundle of the collection; ``words`` follow."""
    if (command := openmind()) is not None:
        return f"{command} {_line(['predict', model, data, *words])}"
    return config_command(bundle, "inference", data, "--model", model, *words)


def exported_command(bundle: Path, *, trained: bool) -> str:
    """Return a command line that predicts with an exported bundle, or trains it if it was not trained yet.

    Its own code is found in its folder, where MONAI's command has to run; ``openmind`` predicts from anywhere.

    Args:
        bundle: its folder.
        trained: whether it holds a model that was fine-tuned.
    """
    if trained and (command := openmind()) is not None:
        return f"{command} {_line(['predict', bundle, 'IMAGES'])}"
    kind, data = ("inference", "IMAGES") if trained else ("train", "LABELLED_FOLDER")
    run = ["python", "-m", "monai.bundle", "run", "--config_file", f"configs/{kind}.json", "--dataset_dir", data]
    return f"cd {_line([bundle])} && {_line([*run])}"


def command_line(words: Iterable[str]) -> str:
    """Return words as a line to paste, with quotes that a reader can follow.

    Example:
        >>> print(command_line(["run", "--labels", "['background','lesion']", "--data", "my scans"]))
        run --labels "['background','lesion']" --data 'my scans'
    """
    return " ".join(f'"{word}"' if "'" in word and not {*word} & {*'"$`\\!'} else shlex.quote(word) for word in words)


def _line(words: list[str | Path]) -> str:
    return command_line(map(_told, words))


def _told(each: str | Path) -> str:
    return near(each) if isinstance(each, Path) else each
