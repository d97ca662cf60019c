# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""What is wrong with the configs of the project."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc import locate

import yaml
from monai.bundle import ConfigParser

from common.bundles import read_config

from ..commanding.environment import ROOT
from ..linking.links import problems as link_problems

__all__ = ["config_problems", "configs_are_good"]


def config_problems(path: Path) -> list[str]:
    """Return what is wrong with a config: repeated keys, references to nothing, missing targets."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            problems.append(f"repeated key {sorted(map(str, twice))}")
        return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))

    problems: list[str] = []
    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    yaml.load(path.read_text("utf-8"), Strict)
    if path.parts[-2] != "configs" or path.parts[-4] != "bundles":
        return problems
    parser = ConfigParser(read_config(path))
    parser.resolve_macro_and_relative_ids()
    resolved = parser.get()

    def walk(value: object, where: str) -> None:
        if isinstance(value, dict):
            target = value.get("_target_")
            if isinstance(target, str) and "." in target and locate(target) is None:
                problems.append(f"{where}: there is no {target}")
            for key, inner in value.items():
                walk(inner, f"{where}#{key}")
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                walk(inner, f"{where}#{index}")
        elif isinstance(value, str) and value[:1] in "@$":
            for reference in re.findall(r"@([\w:#]+)", value):
                if reference.replace("#", "::") not in parser:
                    problems.append(f"{where}: @{reference} refers to nothing")

    walk(resolved, "")
    return problems


def configs_are_good() -> bool:
    """Check all YAML of the project and print each problem; of the links to one source, the first."""
    good = True
    linked = {path.resolve(): path for path in sorted(ROOT.glob("bundles/*/configs/*.yaml"), reverse=True)}
    paths = [*ROOT.glob("common/configs/*.yaml"), *linked.values()]
    for path in sorted(paths):
        for problem in config_problems(path):
            print(f"{path.relative_to(ROOT)}: {problem}")
            good = False
    for problem in link_problems():
        print(problem)
        good = False
    return good and bool(paths)
