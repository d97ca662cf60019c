# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Read a study from its YAML file, and check all that it names before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.data import classified_lists, labelled_lists, segmentation_task, split_cases
from common.data.cases import case_name
from common.data.listing.descriptions import check_names_of_classes
from common.data.listing.members import members_of
from common.errors import DataError, SettingsError, line_of
from common.files import replace_file
from common.literals import as_data
from common.optimizers.schedules import SCHEDULES
from common.paths import as_path
from common.settings import unknown_settings

from ..commanding.ending import tool
from ..commanding.environment import ROOT
from ..commanding.weights import encoder_at_hand
from .cards import read_card
from .definition import (
    MEAN,
    NO_FILE,
    OWN,
    OWN_INFERENCE,
    PRETRAINING,
    Arm,
    DataSet,
    Study,
    bundle_config,
    cell_of,
    plain_name,
)
from .plain import plain_arms, wanted_rows

__all__ = ["read_study", "study_from", "write_yaml"]

TEMPLATE = "template"  # folder of the task that needs no download
_TEMPLATE_SCANS = 4  # of each half of the brain
_TOP = (
    *("name", "output", "arms", "data_sets", "budgets", "folds", "seeds", "schedules", "lengths", "spacings"),
    *("settings", "pretraining", "inference", "backbones", "keep", "plain_rows", "pretrain_each_seed"),
)
_ARM = ("bundle", "weights", "schedule", "epochs", "spacing", "settings", "pretraining", "inference")
_DATA_SET = (
    *("card", "folder", "datalist", "splits", "groups", "group", "labels", "channels", "table", "target", "classes"),
    *("patient", "pretrain_on", "settings", "pretraining", "inference"),
)
_LEVEL = ("settings", "pretraining", "inference")  # what every level may hold: settings of these configs
_KEEP = ("models", "predictions")
_NAMES = {  # entries that are texts, whatever they look like
    *("name", "output", "bundle", "weights", "card", "folder", "datalist", "splits", "groups", "group"),
    *("patient", "table", "target", "pretrain_on"),
}
_MEANS = ("ID", "OOD", "All")  # columns of the report that no data set may be called like
_POSITIVE = ("epochs", "iterations_per_epoch", "batch_size", "lr", "patch_size", "input_size", "spacing_mm", "channels")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # numbers that YAML takes for texts without a point or a sign


class _Loader(yaml.SafeLoader):
    """Refuses a name that is written twice, of which YAML would take the last, and keeps names and paths as written."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, value in node.value:  # 20_24 would be 2024, and yes true
            for each in (key, *([value] if str(key.value) in _NAMES else [])):
                if each.tag.rsplit(":", 1)[-1] in ("int", "float", "bool", "timestamp"):
                    each.tag = "tag:yaml.org,2002:str"
        names = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            raise SettingsError(f"{twice!r} is written twice below line {node.start_mark.line}; leave one out")
        return super().construct_mapping(node, deep)


def read_study(path: str | Path, *, output: str | Path | None = None) -> Study:
    """Read a study's file and check all that it names; relative paths start at the file.

    Raises:
        SettingsError: naming the entry that does not fit, and the remedy.
        DataError: if labelled cases or a split cannot be read.
    """
    file = as_path(path).absolute()
    text = ""
    try:
        text = file.read_text("utf-8")
        content = yaml.load(text, _Loader)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"the study {file} cannot be read: {line_of(error, text)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} is no study; it must have arms and data_sets, see docs/study.md")
    try:
        return study_from(content, base=file.parent, output=output or content.get("output") or file.stem, source=file)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from error


def write_yaml(content: Mapping[str, Any], path: Path) -> None:
    """Write a study, or a card, as a file that reads back as the same; all at once."""
    text = yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, allow_unicode=True)
    replace_file(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


def study_from(content: Mapping[str, Any], *, base: Path, output: str | Path, source: str | Path = "") -> Study:
    """Make a study of what its file says.

    Args:
        content: of the file.
        base: folder where relative paths start.
        output: folder of the study, from ``base``.
        source: name of the file, for messages.

    Raises:
        SettingsError: naming the entry that does not fit.
        DataError: if labelled cases or a split cannot be read.
    """
    _known(content, _TOP, "the study")
    levels = {level: _settings(content, level, "the study") for level in _LEVEL}
    folder = (base / as_path(output)).absolute()
    arms = _arms(content, base)
    folds, used = _folds(content.get("folds", 1))
    sets = content.get("data_sets")
    if not isinstance(sets, Mapping) or not sets:
        raise SettingsError("it names no data_sets; add for example data_sets: {mine: {folder: /data/task}}")
    backbones = dict(_entry(content.get("backbones"), "backbones"))
    _known(backbones, sorted({cell_of(bundle)[1] for bundle in _bundles()}), "backbones")
    for name, each in backbones.items():
        _known(each, _LEVEL, f"backbone {name}")
        backbones[name] = {level: _settings(each, level, f"backbone {name}") for level in _LEVEL if level in each}
    data = {
        str(name): _data_set(str(name), _entry(each, f"the data set {name}"), base=base, folder=folder, folds=folds)
        for name, each in sets.items()
    }
    arms |= plain_arms(arms, wanted_rows(content.get("plain_rows", True)), {each.task for each in data.values()})
    study = Study(
        name=str(content.get("name") or Path(output).name),
        folder=folder,
        arms=arms,
        data_sets=data,
        budgets=[str(each) for each in _several(content, "budgets", ["all"])],
        folds=[],
        seeds=[_number(each, "seeds", least=0) for each in _several(content, "seeds", [0])],
        backbones=backbones,
        keep=[str(each) for each in _listed(content.get("keep", []))],
        pretrain_each_seed=_yes(content.get("pretrain_each_seed", False), "pretrain_each_seed"),
        source=str(source),
        **levels,
    )
    _known(dict.fromkeys(study.keep), _KEEP, "keep")
    for name, each_set in data.items():
        lost = [fold for fold in used or range(len(each_set.parts)) if fold >= len(each_set.parts)]
        if lost:
            raise SettingsError(f"fold {lost[0]} of {name} does not exist; it has {len(each_set.parts)}, from 0")
    counts = {len(each_set.parts) for each_set in data.values()}
    if used is None and len(counts) > 1:
        raise SettingsError(
            f"the data sets have {sorted(counts)} folds; say which to use in all, such as folds: {{use: [0]}}"
        )
    study.folds = list(used) if used is not None else list(range(counts.pop()))
    _check_budgets(study)
    _check_pretraining(study)
    _check_settings(study)
    folders: dict[str, str] = {}
    for title in (*arms, *data):
        if not plain_name(title):
            raise SettingsError(f"no folder can be called {title!r}; use letters or digits")
        if first := folders.get(plain_name(title).casefold()):
            raise SettingsError(f"{first!r} and {title!r} would share the folder {plain_name(title)}; rename one")
        folders[plain_name(title).casefold()] = title
    return study


def _known(given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise SettingsError(f"{where} is {given!r}; it must have entries such as {known[0]}: ...")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it may have {', '.join(known)}"
            raise SettingsError(f"{where} has no {name!r}; {hint}")


def _entry(value: Any, where: str) -> dict[str, Any]:
    """Return what is said of one entry; nothing is an empty one."""
    if not isinstance(value, Mapping | None):
        raise SettingsError(f"{where} is {value!r}; it must have entries of its own, see docs/study.md")
    return dict(value or {})


def _settings(given: Mapping[str, Any], level: str, where: str) -> dict[str, Any]:
    found = given.get(level) or {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise SettingsError(f"{level} of {where} is {found!r}; it must be settings such as {{epochs: 150}}")
    taken = {"settings": OWN, "inference": OWN_INFERENCE, "pretraining": OWN}[level] & found.keys()
    if taken:
        raise SettingsError(f"{level} of {where} name {min(taken)}, which the study itself decides; leave it out")
    return {
        name: float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        for name, value in found.items()
    }


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _several(content: Mapping[str, Any], name: str, otherwise: list[Any]) -> list[Any]:
    """Return an entry that lists different values."""
    values = _listed(content.get(name, otherwise))
    texts = [str(value) for value in values]
    if not values or (twice := next((text for text in texts if texts.count(text) > 1), None)) is not None:
        told = f"has {twice} twice" if values else "is empty"
        raise SettingsError(f"{name} {told}; list each value once, or leave {name} out")
    return values


def _number(value: Any, what: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{what} has {value!r}; it must hold whole numbers from {least}")
    return value


def _yes(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise SettingsError(f"{what} is {value!r}; it must be true or false")
    return value


def _folds(value: Any) -> tuple[int, list[int] | None]:
    """Return how many folds there are and which are used, None for all; ``{of: 2, use: [0]}`` is one half."""
    if isinstance(value, Mapping):
        _known(value, ("of", "use"), "folds")
        use = value.get("use")
        used = None
        if use is not None:
            used = [_number(each, "folds: use", least=0) for each in _several(value, "use", [])]
        return _number(value.get("of", 2), "folds: of", least=1), used
    return _number(value, "folds", least=1), None


def _arms(content: Mapping[str, Any], base: Path) -> dict[str, Arm]:
    given = content.get("arms")
    if isinstance(given, list) and all(isinstance(each, str) for each in given):
        given = dict.fromkeys(given)
    if not isinstance(given, Mapping) or not given:
        raise SettingsError("it names no arms; add for example arms: {mae_resenc_l: {}}")
    several = {name: _several(content, name, []) for name in ("schedules", "lengths", "spacings") if name in content}
    arms: dict[str, Arm] = {}
    for title, entry in given.items():
        where = f"the arm {title}"
        entry = _entry(entry, where)
        _known(entry, _ARM, where)
        bundle = str(entry.get("bundle", title))
        if bundle not in _bundles():
            near = difflib.get_close_matches(bundle, _bundles(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(_bundles())}"
            raise SettingsError(f"{where}: there is no bundle {bundle!r}; {hint}")
        levels = {level: _settings(entry, level, where) for level in _LEVEL}
        weights = _weights(entry.get("weights"), bundle, base, where)
        for schedule in several.get("schedules", [None]):
            for epochs in several.get("lengths", [None]):
                for spacing in several.get("spacings", [None]):
                    schedule_ = entry.get("schedule", schedule)
                    epochs_ = entry.get("epochs", epochs)
                    spacing_ = _spacing(entry.get("spacing", spacing), where)
                    told = [
                        str(title),
                        *([str(schedule_ or "own schedule")] if len(several.get("schedules", [])) > 1 else []),
                        *([f"{epochs_} epochs"] if len(several.get("lengths", [])) > 1 else []),
                        *([f"spacing {spacing_}"] if len(several.get("spacings", [])) > 1 else []),
                    ]
                    arm = Arm(", ".join(told), bundle, weights, schedule_, epochs_, spacing_, **levels)
                    if epochs_ is not None:
                        _number(epochs_, f"epochs of {where}", least=1)
                    if schedule_ is not None:
                        _check_value("schedule", schedule_, "", where)
                    arms[arm.name] = arm
    return arms


def _bundles() -> list[str]:
    return sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/train.yaml"))


def _weights(value: Any, bundle: str, base: Path, where: str) -> str:
    """Return a word for weights that are no file, or the path of a file that is there."""
    if value in NO_FILE:
        return str(value)
    if value is None:
        file = encoder_at_hand(bundle)
        remedy = f"fetch it with {tool('import_checkpoint')} {bundle}, pre-train it, or say weights: scratch"
    else:
        file = base / as_path(value, f"weights of {where}")
        remedy = f"give the path of an encoder, or one of {', '.join(NO_FILE)}"
    if not file.is_file():
        raise SettingsError(f"{where}: there are no weights {file}; {remedy}")
    return str(file.absolute())


def _spacing(value: Any, where: str) -> str | float | None:
    if value in (None, "fixed", "median", "own", "card"):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise SettingsError(
        f"spacing of {where} is {value!r}; it must be fixed (as in the configs), median or card (of the data set), own "
        "(of each file), or millimetres"
    )


def _data_set(name: str, entry: dict[str, Any], *, base: Path, folder: Path, folds: int) -> DataSet:
    where = f"the data set {name}"
    _known(entry, _DATA_SET, where)
    if name.casefold() in {mean.casefold() for mean in _MEANS}:
        raise SettingsError(f"{where} is called like a mean of the report ({', '.join(_MEANS)}); rename it")
    about = _card(str(entry.get("card", name)), base, where)

    def path(key: str) -> str | None:
        value = entry.get(key)
        return None if value is None else str(base / as_path(value, f"{key} of {where}"))

    segmentation = about["task"] == "segmentation"
    labels = entry.get("labels", about.get("labels"))
    if isinstance(labels, str):
        labels = str(base / as_path(labels))
    channels = _number(entry.get("channels", len(about.get("channels") or [1])), f"channels of {where}", least=1)
    told: dict[str, Any] = {"group": entry.get("group"), "patient": entry.get("patient")}
    together, splits = DataSet(name, about, [], None, **told).kept_together, path("splits")
    data_folder, datalist = path("folder") or "", path("datalist")
    if entry.get("folder") == TEMPLATE:
        data_folder, datalist, splits, folds = "", *_template(folder), 2
    if not data_folder and not datalist:
        raise SettingsError(f"{where} has no folder; say where its labelled cases are")
    places: dict[str, Any] = {**told, "group": together, "channels": channels, "splits": splits, "folds": folds}
    target = entry.get("target", about.get("target"))
    classes = entry.get("classes", about.get("classes"))
    _check_asked(segmentation, labels, target, where)
    try:
        count = _split_count(splits) if splits else folds
        parts = []
        for fold in range(count):
            if segmentation:
                if fold == 0:
                    cases = labelled_lists(data_folder, datalist, channels=channels, groups=path("groups"), fold="all")[
                        "training"
                    ]
                parts.append(_segmentation_part(cases, fold, places))
            else:
                lists = classified_lists(
                    data_folder,
                    datalist,
                    table=path("table"),
                    target=target or "",
                    fold=None if count == 1 and not splits else fold,
                    validation_share=0.5,
                    **_asked(about, target, classes),
                    **places,
                )
                classes = None if about["task"] == "regression" else list(lists["task"].names)
                parts.append({part: [_columns(case) for case in lists[part]] for part in ("training", "validation")})
        if segmentation:
            described = {name: about.get(name) for name in ("regions", "ignore_label", "regions_class_order")}
            segmentation_task(labels or [], **described)
            check_names_of_classes(labels, *filter(None, [data_folder]))
        if not together:
            _check_members(parts[0], told)
    except (OSError, ValueError) as error:
        if isinstance(error, (DataError, SettingsError)):
            raise type(error)(f"{where}: {error}") from error
        raise SettingsError(f"{where}: the splits {splits} cannot be read: {error}") from error
    _check_parts(parts, where)
    return DataSet(
        name,
        about,
        parts,
        labels,
        channels=int(channels),
        groups=path("groups"),
        **told,
        target=target if not segmentation else None,
        classes=classes if not segmentation else None,
        pretrain_on=entry.get("pretrain_on"),
        settings={**_of_card(about), **_task_settings(about), **_settings(entry, "settings", where)},
        pretraining=_settings(entry, "pretraining", where),
        inference=_settings(entry, "inference", where),
    )


def _card(chosen: str, base: Path, where: str) -> dict[str, Any]:
    """Return what a card says: one of the collection's by its name, or a file."""
    try:
        return read_card(base / chosen if chosen.endswith((".yaml", ".yml")) else chosen).content()
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def _asked(card: Mapping[str, Any], target: Any, classes: Any) -> dict[str, Any]:
    """Return what is to be told of whole volumes, as the listing takes it."""
    return {
        "task": card["task"],
        "classes": None if isinstance(target, list) else classes,
        "units": card.get("units"),
    }


def _check_asked(segmentation: bool, labels: Any, target: Any, where: str) -> None:
    """Refuse a data set that does not say what is to be told."""
    if segmentation and not labels:
        raise SettingsError(f"{where} has no labels; add labels: [background, ...] or the path of a dataset.json")
    if not segmentation and not target:
        raise SettingsError(f"{where} has no target; name the column of its table with the classes or numbers")


def _check_members(part: Mapping[str, Sequence[Mapping[str, Any]]], told: Mapping[str, Any]) -> None:
    """Refuse columns of groups or patients that do not tell of the cases, before anything runs."""
    cases = [dict(case) for own in part.values() for case in own]
    members_of([case_name(case) for case in cases], cases, **told)


def _split_count(splits: str) -> int:
    """Return how many splits a file has."""
    content = json.loads(Path(splits).read_text("utf-8"))
    if not isinstance(content, list) or not content:
        raise ValueError("it must be a list with an entry of train and val for each split")
    return len(content)


def _check_parts(parts: Sequence[Mapping[str, Sequence[dict[str, Any]]]], where: str) -> None:
    """Refuse a fold without cases to train or to test on, and one that tests on what it trained on."""
    for fold, part in enumerate(parts):
        names = {key: {case_name(case) for case in part[key]} for key in ("training", "validation")}
        for key, what in (("training", "train"), ("validation", "test")):
            if not names[key]:
                raise SettingsError(f"fold {fold} of {where} has no case to {what} on; give more cases or other splits")
        if both := names["training"] & names["validation"]:
            raise SettingsError(
                f"fold {fold} of {where} would test on {min(both)}, on which it trains; mend the splits, or give at "
                "least two cases"
            )


def _of_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a card asks for, in which nothing is a command."""
    told = card.get("settings") or {}
    return {name: value if value is None else as_data(value) for name, value in told.items()}


def _task_settings(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card says of the network's input."""
    size = card.get("input_size")
    return {"input_size": list(size)} if size and card["task"] != "segmentation" else {}


def _segmentation_part(
    cases: Sequence[dict[str, Any]], fold: int, places: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Split once in halves, as the study does, or into folds."""
    if places["splits"]:
        return split_cases(cases, fold=fold, splits=places["splits"], patient=places["patient"])
    together = {name: places[name] for name in ("group", "patient")}
    if places["folds"] == 1:
        return split_cases(cases, fold=None, validation_share=0.5, **together)
    return split_cases(cases, fold=fold, folds=places["folds"], **together)


def _columns(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return a case as a datalist holds it."""
    return {name: value for name, value in case.items() if isinstance(value, (str, int, float)) or name == "image"}


def _template(folder: Path) -> tuple[str, str]:
    """Return datalist and splits of the task on the MNI152 template, each half of which is tested on in one fold."""
    from ..preparing.template import write_template_task

    return write_template_task(folder / "data" / "template", back=_TEMPLATE_SCANS, front=_TEMPLATE_SCANS)


def _check_budgets(study: Study) -> None:
    for budget in study.budgets:
        for name, data in study.data_sets.items():
            most = min(len(data.parts[fold]["training"]) for fold in study.folds)
            if budget != "all" and not (budget.isdecimal() and budget.isascii() and 1 <= int(budget) <= most):
                raise SettingsError(
                    f"budgets has {budget}; {name} has {most} cases to train on, so give numbers from 1 to that, or all"
                )


def _check_pretraining(study: Study) -> None:
    """Refuse a data set to pre-train on that is not there, or that holds what another is tested on."""
    for name, data in study.data_sets.items():
        where = f"pretrain_on of {name}"
        if data.pretrain_on is None:
            continue
        if data.pretrain_on not in study.data_sets:
            raise SettingsError(f"{where} is {data.pretrain_on!r}; it must be one of {', '.join(study.data_sets)}")
        for fold in study.folds:
            seen = {case_name(case) for case in study.data_sets[data.pretrain_on].parts[fold]["training"]}
            if both := seen & {case_name(case) for case in data.parts[fold]["validation"]}:
                raise SettingsError(
                    f"{where}: fold {fold} would test on {min(both)}, on which {data.pretrain_on} pre-trains; "
                    "give both the same splits"
                )


def _check_settings(study: Study) -> None:
    """Refuse settings that no config of any arm knows, or whose value cannot be right, before hours are spent."""
    for arm in study.arms.values():
        for data in study.data_sets.values():
            if arm.weights == MEAN and data.task != "regression":
                continue
            if arm.spacing == "card" and not data.card.get("spacing_mm"):
                raise SettingsError(
                    f"spacing of {arm.name} is that of the card, but the card of {data.name} has no spacing_mm; add it"
                )
            levels = {"settings": study.config_of(data, "train"), "inference": study.config_of(data, "inference")}
            if arm.weights == PRETRAINING:
                levels["pretraining"] = "pretrain"
            for level, config in levels.items():
                given, where = study.merged(level, arm, data), f"{level} of {arm.name} on {data.name}"
                told = unknown_settings(given, bundle_config(arm.bundle, config))
                if told:
                    raise SettingsError(f"{where}: {told.replace('--', '')}")
                for name, value in given.items():
                    _check_value(name, value, bundle_config(arm.bundle, config).get(name), where)


def _check_value(name: str, value: Any, usual: Any, where: str) -> None:
    """Refuse a value that is no number where the config has one, and sizes that are not above 0."""
    if isinstance(value, str) and value[:1] in "$@":
        return
    number = name in _POSITIVE or (isinstance(usual, (int, float)) and not isinstance(usual, bool))
    if number and isinstance(value, (str, bool)) and name != "spacing_mm":  # which may be median
        raise SettingsError(f"{where}: {name} is {value!r}; it must be a number")
    if name in _POSITIVE and any(each <= 0 for each in _listed(value) if isinstance(each, (int, float))):
        raise SettingsError(f"{where}: {name} is {value!r}; it must be above 0")
    if name in ("patch_size", "input_size") and isinstance(value, (list, tuple)) and len(value) != 3:
        raise SettingsError(f"{where}: {name} is {value!r}; it must have three numbers")
    if name == "schedule" and isinstance(usual, str) and value is not None and value not in SCHEDULES:
        raise SettingsError(f"{where}: schedule is {value!r}; it must be one of {', '.join(SCHEDULES)}")
