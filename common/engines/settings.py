# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings of a running config: unknown ones stop it, the others mean what was written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.utils import ensure_tuple

from ..bundles import (
    bundle_of,
    completed,
    config_files,
    is_bundle,
    running_bundle,
    running_call,
    running_parser,
    runs_for_a_user,
)
from ..errors import DataError, SettingsError, WeightsError, end_in_a_sentence
from ..literals import as_data
from ..paths import as_path
from ..settings import OWN_SETTINGS, meant_values, unknown_settings
from ..tasks import SegmentationTask
from .judging import end_plainly, judge
from .presets import chosen_settings, tell_small
from .threads import choose_threads
from .written import path_settings, plain_numbers, typed_settings, written_settings

__all__ = ["check_settings", "elsewhere", "model_settings"]

_LONGEST_SOCKET = 103  # bytes of a path that every system of today takes
_SHORT = os.path.join(os.sep, "tmp")


def model_settings(
    task: SegmentationTask, *, data: Mapping[str, Any], network: Mapping[str, Any], **others: Any
) -> dict[str, Any]:
    """Gather what a model was made for and how, in plain values: classes, preprocessing, network, and the rest."""
    regions = None if task.regions is None else {name: list(values) for name, values in task.regions.items()}
    return {
        "labels": task.plain_labels,
        "regions": regions,
        "regions_class_order": None if task.regions_class_order is None else list(task.regions_class_order),
        "ignore_label": task.ignore_label,
        **data,
        **network,
        **others,
    }


def _code(folder: Path) -> str:
    """Return a digest of the Python files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _check_code(bundle_root: str | Path) -> None:
    """Refuse to run a bundle with the code of another one, where the two differ.

    Distributed bundles call their code by one name, and Python loads a name once in a process: from the working
    directory if it is there, else from the bundle that ran first.
    """
    loaded = Path(__file__).resolve().parents[1]
    own = (as_path(bundle_root) / __name__.split(".")[0]).resolve()
    if own.is_dir() and own != loaded and _code(own) != _code(loaded):
        raise SettingsError(
            f"this process has loaded the code of {loaded.parent}, and that of {own.parent} is another version; run "
            "each bundle in a process of its own and from inside its own folder"
        )


def elsewhere(config_file: Any, bundle_root: str | Path) -> str | None:
    """Return a sentence if a config file lies in a bundle, and the user named the folder of another one.

    Args:
        config_file: as ``monai.bundle run`` takes it: a path or several.
        bundle_root: where weights are looked for and results are written; any folder that is no bundle may be.
    """
    root, folder = as_path(bundle_root).resolve(), bundle_of(config_file)
    if folder is None or folder.resolve() == root or not is_bundle(root):
        return None
    return (
        f"{folder / 'configs'} belongs to the bundle {folder}, but its weights would be looked for, and its results "
        f"written, in that of --bundle_root {root}; leave --bundle_root out, or write {folder}"
    )


def _make_room_for_sockets() -> None:
    """Make the folder of this run's sockets, in the system's own place where ``TMPDIR`` is too long a path for them.

    Reading processes share it, so that it goes with this process even if they are killed. The system takes no socket
    whose path is longer; a reading process would say so without end, and the run would wait for it.
    """
    ours = tempfile.tempdir
    try:
        if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_SOCKET - len(
            "/pymp-12345678/listener-12345678"
        ) and os.path.isdir(_SHORT):
            tempfile.tempdir = _SHORT
        get_temp_dir()
    finally:
        tempfile.tempdir = ours


def check_settings(bundle_root: str = ".", presets: Sequence[str] | str | None = None) -> None:
    """Give the settings of the running config the values that were meant, and refuse what cannot be meant.

    This is the first entry of every config's ``run``: it finds the parser, and the call of ``monai.bundle run``, on the
    stack. Settings that are paths become the paths that were written. On the command line, MONAI adds an unknown name
    to the config without a word, so that ``--lrr 0.1`` would train with the old rate, and hands on ``--strict false``
    as a text, which is true, and ``--spacing_mm None`` not at all: there the first is refused, the others mean what
    they say, and errors that a user can mend end in a sentence. From Python, these errors are raised themselves.

    It also refuses to run a bundle with the code of another one. Unless told otherwise, weights are looked for and
    results are written in the bundle to which the config belongs, wherever it is run from.

    Args:
        bundle_root: of the bundle that runs.
        presets: where its presets are, as :func:`.presets.chosen_settings` takes them.

    Raises:
        SettingsError: naming the unknown settings and the nearest known ones, or the folder of the other code, or that
            of the bundle, or a setting that can be no path, or what :func:`judge` finds.
    """
    if runs_for_a_user():
        end_in_a_sentence()
        _make_room_for_sockets()
    parser = running_parser()
    if parser is None:
        _check_code(bundle_root)
        return
    try:
        given = _settle(parser, bundle_root)
        if presets is not None and (chosen := chosen_settings(parser, presets, given)):
            parser.update(chosen)
            parser.parse(reset=True)
        judge(parser)
        if runs_for_a_user() and "device" in parser.get():
            choose_threads(parser.get_parsed_content("device"))
        if presets is not None:
            tell_small(parser, presets, given)
    except (DataError, SettingsError, WeightsError) as error:
        if not end_plainly(parser, error):
            raise
    else:
        end_plainly(parser)


def _settle(parser: ConfigParser, bundle_root: str) -> set[str]:
    """Give the settings of a config the values that were meant; return those of the call.

    Errors are those of :func:`check_settings`.
    """
    call = running_call()
    override, files = dict(call.get("override", {})), ensure_tuple(call.get("args_file") or ())
    given = {name: value for file in files for name, value in ConfigParser.load_config_file(file).items()} | override
    config_file = call.get("config_file") or given.get("config_file")
    typed = {name: text for name, text in typed_settings().items() if name in override}
    as_written = written_settings([*config_files(config_file), *files]) | override | typed
    meant = path_settings(parser.get(), as_written)
    root = path_settings({"bundle_root": bundle_root}, as_written).get("bundle_root", bundle_root)
    own = bundle_of(config_file) if call else running_bundle()
    if own is not None and given.get("bundle_root") is None and root == "." and not own.samefile("."):
        root = meant["bundle_root"] = as_data(str(own))
    _check_code(root)
    if runs_for_a_user() and call:
        written = ConfigParser.load_config_files(config_file)
        if told := unknown_settings(given, completed(written)):
            raise SettingsError(told)
        if told := elsewhere(config_file, root):
            raise SettingsError(told)
        if (call.get("tracking") or given.get("tracking")) and "shared" in written:
            raise SettingsError(
                "--tracking would keep half a config: MONAI reads it before what is shared is taken in; pre-train with "
                "an exported bundle, which tools/export_bundle.py writes, or use TensorBoard, which is always on"
            )
        texts = {name: value for name, value in meant_values(given).items() if value is not given[name]}
        dropped = [name for name, value in given.items() if value is None and name not in OWN_SETTINGS]  # by MONAI
        texts |= dict.fromkeys(dropped)
        meant = texts | plain_numbers(typed) | meant
    if meant:
        parser.update(meant)
        parser.parse(reset=True)
    return {*given}
