# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Stop a run whose command line names a setting that the config does not have."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from types import FrameType

from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS
from monai.utils import ensure_tuple

from ..errors import SettingsError, ends_in_a_sentence

__all__ = ["check_settings", "unknown_settings"]

# arguments of monai.bundle.run itself, and the settings that --tracking reads
_OWN = {
    *("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "args_file", "tracking"),
    *("workflow_type", "workflow", "workflow_name", "properties_path"),
    *DEFAULT_EXP_MGMT_SETTINGS["mlflow"]["configs"],
}


def unknown_settings(given: Iterable[str], known: Iterable[str]) -> str | None:
    """Return a sentence about settings whose top-level name is not among ``known``, None if all are.

    Example:
        >>> unknown_settings(["lrr", "train#trainer#amp"], ["lr", "train", "seed"])
        'unknown setting --lrr (did you mean --lr?); this config has: lr, seed, train'
    """
    known = sorted(known)
    wrong = []
    for name in given:
        top = re.split("#|::", name.lstrip("+"))[0]
        if top not in known and top not in _OWN:
            near = difflib.get_close_matches(top, known, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(f'--{n}' for n in near)}?)" if near else ""
            wrong.append(f"--{top}{hint}")
    if not wrong:
        return None
    return f"unknown setting {', '.join(wrong)}; this config has: {', '.join(known)}"


@ends_in_a_sentence
def check_settings() -> None:
    """Compare the overrides of the running ``monai.bundle run`` with the top-level names of its config files.

    MONAI adds an unknown name to the config without a word, so ``--lrr 0.1`` would train with the old rate. This is the
    first entry of every config's ``run``. It finds the call on the stack and does nothing if there is none, so Python
    code that builds a ``ConfigWorkflow`` itself is not affected.

    Raises:
        SystemExit: naming the unknown settings and the nearest known ones.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "run" and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            break
        frame = frame.f_back
    if frame is None or not {"override", "args_file", "config_file"} <= frame.f_locals.keys():
        return
    given = dict(frame.f_locals["override"])
    config_file = frame.f_locals["config_file"]
    for file in ensure_tuple(frame.f_locals["args_file"] or ()):
        arguments = ConfigParser.load_config_file(file)
        config_file = config_file or arguments.get("config_file")
        given |= arguments
    sentence = unknown_settings(given, ConfigParser.load_config_files(config_file))
    if sentence:
        raise SettingsError(sentence)
