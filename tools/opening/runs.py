# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""From what a verb is told to the command line of ``monai.bundle``, which then runs in this process as if typed."""

from __future__ import annotations

import json
import logging
import os
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import SettingsError
from common.files import write_json
from common.terminal import near

from ..commanding.ending import by_verbs, command_line
from ..commanding.environment import RUNS
from .options import BUNDLES, config_file, judged
from .settings import Classify, Embed, Finetune, Predict, Pretrain, model_error
from .weights import find_or_fetch

__all__ = ["Call", "classify", "embed", "finetune", "predict", "pretrain", "run"]


@dataclass(frozen=True)
class Call:
    """A run of a config.

    Attributes:
        config: its file.
        folder: where weights and results go unless told otherwise, MONAI's bundle_root.
        settings: words by name.
        code: folder of an exported bundle, whose code has to be found.
    """

    config: Path
    folder: Path
    settings: Mapping[str, str]
    code: Path | None = None

    @property
    def words(self) -> list[str]:
        """The arguments of ``python -m monai.bundle``."""
        named = {"config_file": near(self.config), "bundle_root": near(self.folder), **self.settings}
        return ["run", *(word for name, value in named.items() for word in _option(name, value))]

    @property
    def command(self) -> str:
        """The equal command of MONAI."""
        line = command_line(["python", "-m", "monai.bundle", *self.words])
        return line if self.code is None else f"PYTHONPATH={shlex.quote(near(self.code))} {line}"


def _option(name: str, value: str) -> list[str]:
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def run(call: Call, *, show: bool = False) -> Call:
    """Run a config as its command line does, or only print that.

    Args:
        call: what to run.
        show: print the command and run nothing.

    Raises:
        Exception: whatever the run raises.
    """
    if show:
        print(call.command)
        return call
    before, path = sys.argv, [*sys.path]
    sys.argv = ["monai.bundle", *call.words]
    if call.code is not None:
        sys.path.insert(0, str(call.code.absolute()))
    try:
        with warnings.catch_warnings(), by_verbs(), _quiet():
            if call.config.is_relative_to(BUNDLES):  # the collection's own
                warnings.filterwarnings("ignore", "parsing config_file")
            # __main__ is then MONAI's, so that the config knows a command line, with its words
            runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path[:] = before, path
    return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Let MONAI not repeat its call: a run says itself what it has understood of it."""
    import monai.bundle  # whose loggers set their own level when they are made

    loggers = [logging.getLogger(f"{monai.bundle.__name__}.{name}") for name in ("scripts", "workflows")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _data(data: Sequence[str], folder: Path, part: str = "test") -> dict[str, str]:
    """Return the setting that names the data; of images, a datalist is written.

    Args:
        data: as told.
        folder: of the datalist.
        part: of it that has the images.
    """
    if len(data) == 1 and Path(data[0]).is_dir():
        return {"dataset_dir": data[0]}
    if len(data) == 1 and data[0].endswith(".json"):
        return {"datalist": data[0]}
    file = folder / "images.json"
    write_json({part: [{"image": os.path.abspath(each)} for each in data]}, file)
    return {"datalist": near(file)}


def pretrain(settings: Pretrain) -> Call:
    """Pre-train; return what was run."""
    folder = settings.output or RUNS / settings.bundle
    told = judged(settings.bundle, "pretrain", settings.settings)
    where = _data(settings.data, folder, "training")
    return run(Call(config_file(settings.bundle, "pretrain"), folder, where | told), show=settings.show_command)


def finetune(settings: Finetune) -> Call:
    """Fine-tune; return what was run."""
    folder = settings.output or RUNS / settings.bundle
    told = judged(settings.bundle, "train", settings.settings)
    one = Path(settings.data[0])
    if len(settings.data) > 1 or not (one.is_dir() or one.suffix == ".json"):
        raise SettingsError(f"{one} has no label with it; give a folder with images/ and labels/, or a datalist")
    where = _data(settings.data, folder)
    description = one / "dataset.json"
    if "labels" not in told and description.is_file():
        where["labels"] = str(description)
    where |= _pretrained(settings.bundle, folder, told, show=settings.show_command)
    return run(Call(config_file(settings.bundle, "train"), folder, where | told), show=settings.show_command)


def _pretrained(bundle: str, folder: Path, told: Mapping[str, str], *, show: bool) -> dict[str, str]:
    """Return the setting that names the encoder, unless the user did, wants none, or the config looks where it is."""
    if told.get("from_scratch") == "true" or "pretrained" in told:
        return {}
    file = find_or_fetch(bundle, folder, show=show)
    own = folder / "models" / "pretrained_encoder.pt"
    return {} if file == own else {"pretrained": near(file)}


def _output(folder: Path | None) -> dict[str, str]:
    """Return the setting that names the folder of what is written, where the user names one."""
    return {} if folder is None else {"output_dir": near(folder)}


def embed(settings: Embed) -> Call:
    """Embed volumes; return what was run."""
    folder = RUNS / settings.bundle
    told = judged(settings.bundle, "features", settings.settings)
    where = _data(settings.data, settings.output or folder / "output" / "features")
    where |= _output(settings.output)
    where |= _pretrained(settings.bundle, folder, told, show=settings.show_command)
    return run(Call(config_file(settings.bundle, "features"), folder, where | told), show=settings.show_command)


def predict(settings: Predict) -> Call:
    """Predict label maps; return what was run."""
    model, exported = _model(settings.model)
    folder = exported or _run_of(Path(model))
    if exported is not None:
        bundle, config = "", exported / "configs" / "inference.json"
        told = {name: str(value) for name, value in settings.settings.items()}
    else:
        bundle = _bundle_of(model)
        config, told = config_file(bundle, "inference"), judged(bundle, "inference", settings.settings)
    where = _data(settings.data, settings.output or folder / "output" / "predictions")
    where |= _output(settings.output)
    if exported is None and Path(model) != folder / "models" / "model.pt":
        where["model"] = model if "*" in model else near(Path(model))
    return run(Call(config, folder, where | told, code=exported), show=settings.show_command)


def classify(settings: Classify) -> Call:
    """Train a classifier of whole volumes, or predict with one; return what was run."""
    if config_file(settings.bundle, "train_classification").is_file():
        bundle, workflow, folder = settings.bundle, "train_classification", settings.output or RUNS / settings.bundle
        where = {}
    else:
        model, exported = _model(settings.bundle, "classifier.pt")
        if exported is not None:
            raise SettingsError(
                f"{exported} is a bundle that runs on its own: python -m monai.bundle run --config_file "
                f"{exported}/configs/inference_classification.json --bundle_root {exported}"
            )
        bundle, workflow, folder = _bundle_of(model), "inference_classification", _run_of(Path(model))
        where = {"model": near(Path(model)), **_output(settings.output)}
    told = judged(bundle, workflow, settings.settings)
    where |= _data(settings.data, folder)
    if workflow.startswith("train"):
        where |= _pretrained(bundle, folder, told, show=settings.show_command)
    return run(Call(config_file(bundle, workflow), folder, where | told), show=settings.show_command)


def _run_of(model: Path) -> Path:
    """Return the folder of the run that a model is of."""
    return model.parent.parent if model.parent.name == "models" else model.parent


def _model(told: str, name: str = "model.pt") -> tuple[str, Path | None]:
    """Return the file, or pattern, of a model, and the folder of the exported bundle that it lies in, if it does.

    Raises:
        SettingsError: if there is none.
    """
    path = Path(told).expanduser()
    if "*" in told or path.is_file():
        return str(path), None
    if not path.is_dir() and len(path.parts) == 1 and (RUNS / told).is_dir():
        path = RUNS / told
    if (path / "configs" / "inference.json").is_file():
        return str(path / "models" / name), path
    for file in (path / name, path / "models" / name):
        if file.is_file():
            return str(file), None
    raise model_error(told)


def _bundle_of(model: str) -> str:
    """Return the bundle that the JSON beside a model names.

    Raises:
        SettingsError: if there is no such file, or it names none of the collection.
    """
    file = Path(model)
    if "*" in model:
        file = next(iter(sorted(file.parent.glob(file.name))), file)
    beside = file.with_suffix(".json")
    try:
        bundle = json.loads(beside.read_text("utf-8"))["settings"]["bundle"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{beside} does not say which bundle {file.name} is of; training writes it beside the model: bring it along"
        ) from error
    if not config_file(str(bundle), "inference").is_file():
        raise SettingsError(f"{beside} names the bundle {bundle!r}, which is none of this collection")
    return str(bundle)
