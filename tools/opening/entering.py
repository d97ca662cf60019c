# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The verbs on the command line: their help, with the settings of the configs, and their words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..commanding import running
from .options import BUNDLES, options_text

__all__ = ["WORKFLOWS", "enter"]

WORKFLOWS = {"pretrain": "pretrain", "finetune": "train", "predict": "inference", "embed": "features"}
_EXAMPLE = "mae_resenc_l"


def enter(verbs: Mapping[str, Callable[[Any], None]], about: str, arguments: Sequence[str]) -> None:
    """Print the help that is asked for, or do a verb."""
    more = ""
    if running.asks_for_help(arguments) and arguments[0] in WORKFLOWS:
        named = next((word for word in arguments[1:] if (BUNDLES / word / "configs").is_dir()), None)
        more = options_text(named or _EXAMPLE, WORKFLOWS[arguments[0]])
        if named is None:
            more += "\n\nThose of another bundle differ a little: name it before --help."
    running.main(verbs, about, arguments=arguments, more=more)
