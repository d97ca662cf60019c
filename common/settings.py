# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Settings as a command line gives them: which a config does not have, and what values are meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["OWN_SETTINGS", "meant_values", "unknown_settings"]

# arguments of monai.bundle.run itself, and the settings that --tracking reads
OWN_SETTINGS = {
    *("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "args_file", "tracking"),
    *("workflow_type", "workflow", "workflow_name", "properties_path"),
    *("output_dir", "tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0"),
    *("trainer", "validator", "evaluator"),
}

# what YAML reads as these values, the command line gives as text
_TEXTS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None}


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
        if top not in known and top not in OWN_SETTINGS:
            near = difflib.get_close_matches(top, known, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(f'--{n}' for n in near)}?)" if near else ""
            wrong.append(f"--{top}{hint}")
    if not wrong:
        return None
    return f"unknown setting {', '.join(wrong)}; this config has: {', '.join(known)}"


def meant_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a command line with the texts that YAML reads as true, false or null replaced by these.

    Example:
        >>> meant_values({"strict": "false", "datalist": "null", "labels": "no.json", "lr": 0.1})
        {'strict': False, 'datalist': None, 'labels': 'no.json', 'lr': 0.1}
    """
    return {
        name: _TEXTS[value] if isinstance(value, str) and value in _TEXTS else value for name, value in given.items()
    }
