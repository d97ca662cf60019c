# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What the files of a bundle say, each fact being written once.

A file that lies in many bundles is a link to its one source. A file that differs between bundles holds what is its own
and names under ``shared`` the files of ``common/configs`` that say the rest, lowest first. Its names stand above
theirs. A mapping in it with the key ``shared`` adds to theirs, a list that begins with it goes on from theirs, and any
other value stands in the place of theirs.

    shared: [pretraining.yaml, pretraining_resenc_l.yaml]
    batch_size: 32                    # instead of what they say
    optimizer: {shared, lr: 0.1}      # theirs, with another rate

MONAI reads such a file as it is and adds what the command line says, so ``--optimizer#lr 0.1`` needs the mapping in it.
Its ``initialize`` starts with :func:`complete`. Python code calls :func:`read_config`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import SettingsError, end_in_a_sentence, line_of
from .paths import as_path

__all__ = [
    "bundle_name",
    "bundle_of",
    "callers",
    "check_link",
    "check_links",
    "complete",
    "completed",
    "config_files",
    "is_bundle",
    "read_config",
    "read_metadata",
    "running_bundle",
    "running_call",
    "running_parser",
    "runs_for_a_user",
    "sources",
]

SHARED = "shared"
FOLDER = Path(__file__).absolute().parent / "configs"
# modules that run a bundle for a user: MONAI's command line, and MONAI Label, whose viewers show the last lines
_ENTRIES = ("monai.bundle.__main__", "monailabel.interfaces.utils.app")
_LONGEST_LINK = 1000


def check_link(path: str | Path) -> Path:
    """Return the path of a file, or say so if it is the text that Git writes where there can be no links.

    Raises:
        SettingsError: naming the command that puts copies in the place of such texts.
    """
    path = Path(path)
    if path.is_file() and not path.is_symlink() and path.stat().st_size <= _LONGEST_LINK:
        text = path.read_text("utf-8", errors="replace")
        if text.startswith("../") and len(text.split()) == 1:
            raise SettingsError(
                f"{path} is not a link but the text {text.strip()!r}, as Git writes it where links are not supported; "
                "run python tools/links.py, which puts a copy of the file there"
            )
    return path


def check_links(bundle: Path) -> None:
    """Check every file of a bundle's folder that is a link, and the code that it links to.

    Raises:
        SettingsError: as :func:`check_link`.
    """
    for path in [*sorted((bundle / "configs").iterdir()), bundle / "LICENSE", bundle / "common"]:
        check_link(path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.*")], n=1)
        raise SettingsError(
            f"there is no config {path}{f'; did you mean {near[0]}?' if near else ', correct the path'}"
        )
    text = check_link(path).read_text("utf-8")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml  # which bundles that are exported do without

            content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except Exception as error:  # of parsers that have none in common
        raise SettingsError(f"{path} cannot be read: {line_of(error, text)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds no names with values; restore the file")
    return content


def _joined(below: Any, above: Any) -> Any:
    """Return a value of a file with what is shared below it."""
    if isinstance(above, Mapping) and SHARED in above:
        if not isinstance(below, Mapping):
            raise SettingsError(f"nothing is shared that {dict(above)} could add to; leave out its key {SHARED!r}")
        own = {key: _joined(below.get(key), value) for key, value in above.items() if key != SHARED}
        return {**below, **own}
    if isinstance(above, list) and above and isinstance(above[0], str) and above[0] == SHARED:
        return [*(below or []), *above[1:]]
    return above


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with what is shared; one that names nothing under ``shared`` comes back as it is.

    Raises:
        SettingsError: if it adds to a name that is not shared.

    Example:
        >>> page = {"shared": ["pretraining.yaml"], "seed": 3, "schedule": {"shared": None, "lr": 0.1}}
        >>> config = completed(page)
        >>> config["seed"], config["save_interval"], config["schedule"]["lr"], config["schedule"]["epochs"]
        (3, 1, 0.1, '@epochs')
    """
    if SHARED not in config:
        return dict(config)
    below: dict[str, Any] = {}
    for name in config[SHARED]:
        below = _joined(below, _read(FOLDER / name) | {SHARED: None})
    joined: dict[str, Any] = _joined(below, config)
    return joined


def sources(file: str | Path) -> list[Path]:
    """Return the files that say what a config is, the lowest first, itself last."""
    return [*(FOLDER / name for name in _read(Path(file)).get(SHARED, [])), Path(file)]


def read_config(file: str | Path) -> dict[str, Any]:
    """Return what a config file of a bundle says, complete and not resolved.

    Raises:
        SettingsError: if it is the text of a link, or cannot be completed.
    """
    return completed(_read(Path(file)))


def read_metadata(bundle: str | Path) -> dict[str, Any]:
    """Return the complete metadata of a bundle's folder, without the name that :func:`bundle_name` gives."""
    metadata = read_config(Path(bundle) / "configs" / "metadata.json")
    metadata.pop("bundle", None)
    return metadata


def callers() -> Iterator[FrameType]:
    """Yield the frames from which the calling function was called, the nearest first."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling_objects() -> Iterator[Any]:
    """Yield the objects whose methods called the calling function, the nearest first.

    Of other functions nothing is looked at: a frame whose variables were looked at holds them until its function ends.
    """
    for frame in callers():
        if frame.f_code.co_varnames[:1] == ("self",):
            yield frame.f_locals.get("self")


def running_parser() -> Any | None:
    """Return the parser of MONAI that evaluates the entry of a config from which this is called."""
    monai = sys.modules.get("monai.bundle")
    for owner in calling_objects():
        if monai is not None and isinstance(owner, monai.ConfigParser):
            return owner
    return None


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is that of a bundle."""
    return (folder / "configs" / "metadata.json").is_file()


def config_files(config_file: Any) -> list[str]:
    """Return the config files that ``monai.bundle run`` was given: a path, several, or several with commas."""
    if isinstance(config_file, str) and not Path(config_file).is_file():
        config_file = config_file.split(",")
    given = config_file if isinstance(config_file, (list, tuple)) else [config_file]
    return [str(file) for file in given if isinstance(file, (str, Path)) and str(file)]


def bundle_of(config_file: Any) -> Path | None:
    """Return the folder of the bundle in which a config file lies, of several the first that lies in one."""
    for file in config_files(config_file):
        configs = as_path(file).absolute().parent
        if configs.name == "configs" and is_bundle(configs.parent):
            return configs.parent
    return None


def running_call() -> Mapping[str, Any]:
    """Return what the ``monai.bundle.run`` that is running was called with, nothing if there is none."""
    for frame in callers():
        if frame.f_code.co_name == "run" and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            return frame.f_locals
    return {}


def running_bundle() -> Path | None:
    """Return the folder of the bundle whose config runs, None if it lies in none."""
    if (folder := bundle_of(running_call().get("config_file"))) is not None:
        return folder
    for owner in calling_objects():
        own = getattr(owner, "__dict__", {})  # not hasattr: a workflow looks names up in its config
        if "config_root_path" in own:
            return bundle_of(str(own["config_root_path"] / "x"))
    return None


def complete() -> None:
    """Give the config that runs what it shares with others, below its own names and those of the command line.

    It is the first entry of ``initialize``, before which MONAI evaluates nothing.

    Raises:
        SettingsError: if the config adds to a name that is not shared.
    """
    if runs_for_a_user():
        end_in_a_sentence()
    parser = running_parser()
    if parser is None or SHARED not in parser.get():
        return
    config = dict(parser.get())
    metadata = config.pop("_meta_", {})
    parser.set({"_meta_": completed(metadata), **completed(config)})
    parser.parse(reset=True)


def runs_for_a_user() -> bool:
    """Return whether this process was started as MONAI's command line or as a MONAI Label server."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) in _ENTRIES


def bundle_name(bundle_root: str | Path) -> str:
    """Return the name of a bundle by its metadata; its folder may have any.

    Args:
        bundle_root: its folder, or another that the user chose for weights and results; then the metadata beside the
            config that runs say it.

    Raises:
        SettingsError: if neither says it.
    """
    file = as_path(bundle_root) / "configs" / "metadata.json"
    metadata = _read(file) if file.is_file() else {}
    if "bundle" not in metadata and (parser := running_parser()) is not None:
        metadata = parser.get("_meta_") or {}
    if "bundle" not in metadata:
        raise SettingsError(f"{file} does not say which bundle this is; add --bundle_root and the bundle's folder")
    return str(metadata["bundle"])
