# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is wrong with the settings of a config, found before any work is done, and how a run ends with it.

MONAI puts what fails in a config into errors of its own, which say "Failed to evaluate" and hide the reason in their
causes. Here the reason itself is what a caller in Python gets.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from numbers import Integral
from types import FrameType
from typing import Any

import torch

from ..bundles import callers
from ..data.listing.descriptions import check_names_of_classes
from ..errors import DataError, SettingsError, plainly
from ..paths import as_path

__all__ = ["check_device", "end_plainly", "judge"]

# settings of all configs that are whole numbers, and the least that each may be
_WHOLE = {
    **dict.fromkeys(("epochs", "iterations_per_epoch", "val_interval", "save_interval", "batch_size"), 1),
    **dict.fromkeys(("accumulation_steps", "channels", "tiles_per_step", "block_size", "lora_rank"), 1),
    **dict.fromkeys(("embed_dim", "depth", "num_heads", "token_size"), 1),
    **dict.fromkeys(("val_iterations", "picture_interval", "num_workers", "warmup_epochs", "resamples", "seed"), 0),
    "probe_interval": 0,
}
_READ = {"volumes", "lists", "cases", "evaluation"}  # entries, one of which reads the data of every workflow
_OVERRIDES = ("max_epochs", "accumulation_steps")  # of the trainer, which a command line may set there


def judge(parser: Any) -> None:
    """Refuse settings that can mean nothing or lead to scores of something else.

    Args:
        parser: of MONAI, with the config as it will run.

    Raises:
        SettingsError: naming the setting, its value and the remedy.
        DataError: if the data are not there.
    """
    config = parser.get()
    trainer = config.get("train", {}).get("trainer", {}) if isinstance(config.get("train"), Mapping) else {}
    for name in _OVERRIDES:
        if isinstance(trainer, Mapping) and isinstance(trainer.get(name), (int, float)):
            _whole(f"--train#trainer#{name}", trainer[name], 1)
    for name, least in _WHOLE.items():  # in this order, since later ones may be worked out from the first
        if name in config:
            _whole(f"--{name}", parser.get_parsed_content(name), least)
    if _READ & config.keys():
        _data(*(parser.get_parsed_content(name) if name in config else None for name in ("dataset_dir", "datalist")))
    for name in ("probe_data", "probe_table"):
        value = parser.get_parsed_content(name) if name in config else None
        if value and not as_path(value, f"--{name}").exists():
            raise DataError(f"there is no {as_path(value)}; correct --{name}")
    if "device" in config:
        check_device(parser.get_parsed_content("device"))
    if {"batch_size", "accumulation_steps"} <= config.keys():
        _batch(*(parser.get_parsed_content(name) for name in ("batch_size", "accumulation_steps")))
    if {"labels", "dataset_dir"} <= config.keys() and "trained" not in config:  # there the model says them
        check_names_of_classes(config["labels"], *filter(None, [config["dataset_dir"]]))


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SettingsError(f"{name} is {value!r}; it must be a whole number from {least}")


def _data(dataset_dir: Any, datalist: Any) -> None:
    """Refuse data that are not there, before anything is said of an earlier run."""
    if datalist and not as_path(datalist, "--datalist").is_file():
        raise DataError(f"there is no datalist {as_path(datalist)}; correct --datalist")
    if dataset_dir and not datalist and not as_path(dataset_dir, "--dataset_dir").exists():
        raise DataError(
            f"there is no folder {as_path(dataset_dir)}; give --dataset_dir the folder that holds your volumes"
        )


def _batch(batch_size: int, accumulation_steps: int) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % (parts := accumulation_steps * processes):
        raise SettingsError(
            f"batch_size {batch_size} does not split over {processes} process(es) x {accumulation_steps} accumulation "
            f"step(s); make it a multiple of {parts}, or set --accumulation_steps with it"
        )


def check_device(value: Any) -> None:
    """Refuse a device that is none, or that is not there.

    Raises:
        SettingsError: naming one that is.
    """
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(f"--device is {value!r}; it must be cpu, cuda, cuda:0, mps or the like") from error
    told = f"--device is {device}, and "
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "cpu"
            raise SettingsError(f"{told}PyTorch finds {count or 'no'} GPU(s) here; write --device {there}")
    elif device.type not in ("cpu", "meta"):
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise SettingsError(f"{told}PyTorch cannot use it here; write --device cpu") from error


def end_plainly(parser: Any, problem: Exception | None = None) -> bool:
    """Let what a workflow does next end with the reason itself, where MONAI would wrap it.

    Args:
        parser: of the workflow, from an entry of whose ``run`` this is called.
        problem: what it has to end with as soon as it goes on to the next entry.

    Returns:
        whether there is a workflow that goes on to a next entry; nothing is done otherwise.
    """
    if not _goes_on(parser):
        return False
    ours, itself = type(parser).get_parsed_content, weakref.ref(parser)  # or nothing of a run would go when it ends

    def get_parsed_content(id: str = "", **kwargs: Any) -> Any:
        nonlocal problem
        if problem is not None:
            found, problem = problem, None  # once: who mends a setting may run it again
            raise found
        try:
            return ours(itself(), id, **kwargs)
        except Exception as error:
            reason = plainly(error)
            if reason is None:
                raise
        raise reason

    parser.get_parsed_content = get_parsed_content
    return True


def _goes_on(parser: Any) -> bool:
    """Return whether a workflow of this parser evaluates a list of entries, and not the last one."""

    def ours(frame: FrameType) -> bool:
        named = frame.f_code.co_name == "_run_expr"  # before its variables are looked at, which keeps them alive
        return named and getattr(frame.f_locals.get("self"), "parser", None) is parser

    for frame in filter(ours, callers()):
        entries = parser.get().get(frame.f_locals.get("id"), ())
        return isinstance(entries, list) and frame.f_locals.get("i", len(entries)) < len(entries) - 1
    return False
