# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Cards of data sets, one small YAML file each in ``cards/``, and the numbers published on them (``published.yaml``).

A card says what a data set is: where it comes from, its channels and labels, and how its official download becomes a
folder that the bundles read. A value that is null is not known; a field that ``inferred`` lists follows from the public
release or from a name, and no source says that the benchmark used it so. Cards of your own have the same form;
:func:`card_for_folder` proposes one.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.bundles import read_config
from common.data.listing.descriptions import segmentation_task
from common.data.listing.labelled import labelled_lists
from common.errors import DataError, SettingsError, line_of
from common.tasks import SegmentationTask
from common.transforms import read_header, read_volume, whole_numbers
from common.transforms.grids import prepared_sides

from ..commanding.environment import ROOT

__all__ = ["Card", "Published", "Row", "Table", "card_for_folder", "card_table", "cards", "published", "read_card"]

FOLDER = Path(__file__).parent / "cards"
PUBLISHED = Path(__file__).parent / "published.yaml"
TASKS = ("segmentation", "classification", "regression")
GROUPS = ("ID", "OOD")
KINDS = ("data_set", "method", "quantity")
_OF_SEGMENTATION = ("labels", "regions", "ignore_label", "regions_class_order")
_OF_VOLUMES = ("target", "classes", "units", "input_size")
_FOREIGN = {  # fields that a card of each task has no use for
    "segmentation": _OF_VOLUMES,
    "classification": (*_OF_SEGMENTATION, "units"),
    "regression": (*_OF_SEGMENTATION, "classes"),
}
_TEXTS = ("name", "code", "source", "licence", "modality", "notes", "download", "citation", "units")
_IGNORED = 255  # value that marks voxels without a verdict where nothing says so
_MOST_CLASSES = 256
_FINE_MM = 0.75  # voxels so much finer than the published 1 mm lose what is small


@dataclass(frozen=True)
class Card:
    """What a data set is.

    Attributes:
        name: full name.
        task: segmentation, classification or regression.
        code: short name in the tables of the papers.
        source: address of the official download.
        licence: of the data, as their provider states it.
        modality: in words.
        channels: names of the images of a case, in order.
        labels: names of the label values 0, 1, 2, ..., background first; or the value of each name.
        regions: overlapping classes instead, as in train.yaml.
        ignore_label: value of voxels without a verdict.
        regions_class_order: label value that each region is painted with, as in train.yaml.
        target: column of the class or number, or list of columns of 0 and 1.
        classes: of the one column, in order.
        units: of the number, in words.
        group: ID or OOD, for the means of segmentation.
        cases: labelled cases of the public release.
        spacing_mm: of the files, ``(slice, row, column)``.
        input_size: voxels that a classifier or regression sees, ``(slice, row, column)``.
        settings: of the train config that this data set wants otherwise.
        notes: what to look out for.
        download: how the official download becomes a labelled folder.
        citation: of the data.
        inferred: fields that are not confirmed.
    """

    name: str
    task: str
    code: str | None = None
    source: str | None = None
    licence: str | None = None
    modality: str | None = None
    channels: list[str] | None = None
    labels: list[str] | dict[str, int] | None = None
    regions: dict[str, list[int]] | None = None
    ignore_label: int | None = None
    regions_class_order: list[int] | None = None
    target: str | list[str] | None = None
    classes: list[str] | None = None
    units: str | None = None
    group: str | None = None
    cases: int | None = None
    spacing_mm: list[float] | None = None
    input_size: list[int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: str | None = None
    download: str | None = None
    citation: str | None = None
    inferred: list[str] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """Return all fields in their order, as JSON holds them."""
        return asdict(self)

    def segmentation(self) -> SegmentationTask | None:
        """Return the task that the labels make, None if they are not known."""
        if not self.labels:
            return None
        return SegmentationTask(self.labels, self.regions, self.ignore_label, self.regions_class_order)  # type: ignore[arg-type]


def read_card(name_or_path: str | Path) -> Card:
    """Read a card by its name or code (``hippocampus``, ``ATL``), or from a YAML file of your own.

    Raises:
        SettingsError: if there is no such card, or it says what a card cannot say.
    """
    text = str(name_or_path)
    if Path(text).suffix in (".yaml", ".yml") or "/" in text or "\\" in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise SettingsError(f"there is no card {path}; give a YAML file, or a name: {', '.join(cards())}")
        return _card(_mapping(path, "a card"), str(path))
    ours = _cards()
    by_any_name = ours | {str(card.code).lower(): card for card in ours.values()}
    if text.lower() in by_any_name:
        return by_any_name[text.lower()]
    near = difflib.get_close_matches(text.lower(), by_any_name, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise SettingsError(f"no card is called {text}; {hint} {', '.join(ours)}; or give the path of a YAML file")


def cards() -> list[str]:
    """Return the names of the cards that come with the repository."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def card_for_folder(folder: str | Path, *, most: int = 200) -> dict[str, Any]:
    """Propose a card for a folder of labelled cases; what could not be read from the folder is listed as inferred.

    Labels and channels are those of a ``dataset.json`` of nnU-Net or of the Decathlon if there is one; else the values
    that the label maps hold, under names to be replaced.

    Args:
        folder: as ``train.yaml`` reads it.
        most: label maps to look into, spread over the cases.

    Returns:
        the content of a card.

    Raises:
        DataError: if the folder holds no labelled cases, or a label map is none.
        SettingsError: if its dataset.json cannot be read.
    """
    folder = Path(folder).expanduser()
    try:
        cases = labelled_lists(str(folder), channels=None, fold="all")["training"]
    except DataError:  # names that end in four digits need not be channels
        cases = labelled_lists(str(folder), fold="all")["training"]
    if not cases:
        raise DataError(f"{folder} holds no labelled cases; it needs images/ and labels/ with files of the same name")
    description = folder / "dataset.json"
    told = _mapping(description, "a dataset.json") if description.is_file() else {}
    proposal: dict[str, Any] = {"name": str(told.get("name") or folder.resolve().name), "task": "segmentation"}
    inferred, notes = [], []
    for key, names in (("licence", ("licence", "license")), ("citation", ("reference",))):
        value = next((told[name] for name in names if told.get(name)), None)
        if value:
            proposal[key] = str(value)

    shown = _spread(cases, most)
    first = shown[0]["image"]
    header = read_header(first if isinstance(first, str) else first[0])
    channels = _told_channels(told)
    if not channels:
        count = len(first) if not isinstance(first, str) else header.shape[3] if len(header.shape) > 3 else 1
        channels = ["image"] if count == 1 else [f"image {index}" for index in range(count)]
        inferred.append("channels")
    proposal["channels"] = channels

    if "labels" in told:
        task = segmentation_task(str(description))
        classes = ["background", *map(str, task.labels[1:])]
        proposal["labels"] = classes if task.counted else dict(zip(classes, task.label_values, strict=True))
        if task.regions is not None:
            proposal["regions"] = {str(name): list(values) for name, values in task.regions.items()}
        if task.ignore_label is not None:
            proposal["ignore_label"] = task.ignore_label
        if task.regions_class_order is not None:
            proposal["regions_class_order"] = list(task.regions_class_order)
    else:
        values = _label_values([str(case["label"]) for case in shown])
        if values[-1] == _IGNORED and len(values) > 2:
            proposal["ignore_label"] = values.pop()
            inferred.append("ignore_label")
            notes.append(f"The value {_IGNORED} is taken for voxels without a verdict.")
        counted = values[-1] <= _IGNORED  # else as an atlas numbers them
        every = range(1, values[-1] + 1) if counted else values[1:]
        classes = ["background", *(f"class {value}" for value in every)]
        proposal["labels"] = classes if counted else dict(zip(classes, values, strict=True))
        inferred.append("labels")
        absent = sorted(set(every) - set(values))
        if absent:
            notes.append(f"No label map looked into holds {', '.join(map(str, absent[:10]))}.")
        if len(shown) < len(cases):
            notes.append(f"Labels are those of {len(shown)} of {len(cases)} label maps.")
    proposal["cases"] = len(cases)
    spacing = _median_spacing(shown)
    proposal["spacing_mm"] = spacing
    if spacing and min(spacing) < _FINE_MM:
        notes.append("Voxels are finer than 1 mm: try spacing_mm median if structures are small.")
    if notes:
        proposal["notes"] = " ".join(notes)
    content = _card(proposal | {"inferred": inferred}, str(folder)).content()
    return {name: value for name, value in content.items() if value is not None and value not in ([], {})}


def card_table() -> str:
    """Return the Markdown table of all cards that docs/data_sets.md holds."""
    lines = [
        "| card | code | data set | task | group | modality | channels | classes | cases | licence | inferred |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, card in sorted(_cards().items(), key=lambda pair: (_order(pair[1]), pair[0])):
        title = f"[{card.name}]({card.source})" if (card.source or "").startswith("http") else card.name
        cells = [
            name,
            card.code,
            title,
            card.task,
            card.group,
            card.modality,
            None if card.channels is None else str(len(card.channels)),
            _classes(card),
            None if card.cases is None else f"{card.cases:,}",
            card.licence,
            ", ".join(card.inferred),
        ]
        lines.append("| " + " | ".join(cell or "" for cell in cells) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Row:
    """One row of a published table.

    Attributes:
        label: as printed.
        method: name that the bundles have, ``scratch`` or ``nnunet``; None where it is not said.
        backbone: ``resenc_l`` or ``primus_m``; None for another network or where it is not said.
        family: block of the table in which it stands, for ranks.
        epochs: of fine-tuning, None where it is not said.
        grade: how the numbers came here, of :attr:`Published.grades`.
        variant: what else sets the row apart.
        parameters_million: of the network.
        values: by column, None where nothing was found.
        printed: means as the source prints them.
    """

    label: str
    method: str | None
    backbone: str | None
    family: str | None
    epochs: int | None
    grade: str
    variant: str | None
    parameters_million: float | None
    values: dict[str, float | None]
    printed: dict[str, float]


@dataclass(frozen=True)
class Table:
    """One published table.

    Attributes:
        name: by which the file lists it.
        title: for the reader.
        source: of :attr:`Published.sources`.
        grade: how the numbers came here.
        task: segmentation or classification.
        metric: dice, nsd, iou, ap or balanced_accuracy.
        unit: percent.
        kind: what the columns are: data_set, method or quantity.
        columns: in order.
        means: columns of each printed mean.
        means_agree: whether printed means are the means of their columns.
        note: what the reader must know.
        rows: in order.
    """

    name: str
    title: str
    source: str
    grade: str
    task: str
    metric: str
    unit: str
    kind: str
    columns: list[str]
    means: dict[str, list[str]]
    means_agree: bool
    note: str
    rows: list[Row]

    def find(self, *, method: str | None = None, backbone: str | None = None, epochs: int | None = None) -> list[Row]:
        """Return the rows of a method, a backbone and a length; None takes any."""
        return [
            row
            for row in self.rows
            if method in (None, row.method) and backbone in (None, row.backbone) and epochs in (None, row.epochs)
        ]

    def mean(self, row: Row, name: str) -> float:
        """Return a mean recomputed from the columns, NaN if one of them is missing."""
        values = [row.values[column] for column in self.means[name]]
        return math.nan if None in values else float(np.mean(values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Published:
    """All published numbers.

    Attributes:
        tables: by name.
        grades: how sure a number is, in words.
        sources: papers, each with ``citation`` and ``read_at``.
        data_sets: columns that are no codes of cards: ``name``, and ``card`` (a code or a name) or None.
        missing: sentences on what was not found.
    """

    tables: dict[str, Table]
    grades: dict[str, str]
    sources: dict[str, dict[str, str]]
    data_sets: dict[str, dict[str, str | None]]
    missing: list[str]

    def about(self, column: str) -> dict[str, str | None]:
        """Return ``name`` and ``card`` of a column of data sets."""
        if column in self.data_sets:
            return self.data_sets[column]
        card = read_card(column)
        return {"name": card.name, "card": card.code}


def published(path: str | Path = PUBLISHED) -> Published:
    """Read the published numbers.

    Raises:
        SettingsError: naming the table and row that cannot be right.
    """
    path = Path(path)
    content = _mapping(path, "a file of published numbers")
    for key in ("grades", "sources", "data_sets", "tables", "missing"):
        if not isinstance(content.get(key), list if key == "missing" else dict):
            raise SettingsError(f"{path} has no {key}; it needs grades, sources, data_sets, tables and missing")
    codes = {card.code for card in _cards().values()} | {*content["data_sets"]}
    tables = {name: _table(name, told, content, codes, path) for name, told in content["tables"].items()}
    return Published(
        tables,
        {name: text.strip() for name, text in content["grades"].items()},
        content["sources"],
        content["data_sets"],
        list(content["missing"]),
    )


def _mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML or JSON file that holds fields."""
    text = ""
    try:
        text = path.read_text("utf-8-sig")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} is not {what}: {line_of(error, text)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds no fields; {what} is a list of lines such as name: value")
    return content


def _check_fields(told: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str) -> None:
    for name in told:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise SettingsError(f"{where} has an unknown field {name}; {hint}")
    for name in needed:
        if told.get(name) in (None, ""):
            raise SettingsError(f"{where} has no {name}; add a line {name}: ...")


def _are_texts(value: Any, least: int = 1) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= least
        and all(isinstance(each, str) and each for each in value)
        and len(set(value)) == len(value)
    )


def _are_sizes(value: Any, *, whole: bool = False) -> bool:
    kinds = int if whole else (int, float)
    numbers = [each for each in value if isinstance(each, kinds)] if isinstance(value, list) else []
    return len(numbers) == 3 == len(value) and all(each > 0 and not isinstance(each, bool) for each in numbers)


@cache
def _cards() -> dict[str, Card]:
    """Return the cards that come with the repository by their names."""
    return {path.stem: _card(_mapping(path, "a card"), str(path)) for path in sorted(FOLDER.glob("*.yaml"))}


@cache
def _known_settings() -> frozenset[str]:
    """Return every setting of the train configs of all bundles."""
    configs = {config.resolve() for config in (ROOT / "bundles").glob("*/configs/train*.yaml")}
    return frozenset(name for config in configs for name in read_config(config))


def _card(told: Mapping[str, Any], where: str) -> Card:
    """Check the fields of a card and return it.

    Raises:
        SettingsError: naming the file, the field and the remedy.
    """
    known = [each.name for each in fields(Card)]
    _check_fields(told, known, ("name", "task"), where)

    def refuse(name: str, remedy: str) -> None:
        raise SettingsError(f"{where}: {name} is {told[name]!r}; {remedy}")

    given = {name: value for name, value in told.items() if value is not None}
    for name in _TEXTS:
        if name in given and not (isinstance(given[name], str) and given[name].strip()):
            refuse(name, "write a text, in quotes if it looks like a number, or null if it is not known")
    if given["task"] not in TASKS:
        refuse("task", f"it must be {', '.join(TASKS[:-1])} or {TASKS[-1]}")
    for name in _FOREIGN[given["task"]]:
        if name in given:
            refuse(name, f"a card of {given['task']} has none; drop the line")
    if given.get("group", GROUPS[0]) not in GROUPS:
        refuse("group", f"it must be {' or '.join(GROUPS)}, or null")
    if "channels" in given and not _are_texts(given["channels"]):
        refuse("channels", "list a different name for each image of a case: [T1w, FLAIR]")
    if given["task"] == "regression" and isinstance(given.get("target"), list):
        refuse("target", "a regression predicts one number; name one column")
    _check_classes(given, refuse)
    if "cases" in given and (
        isinstance(given["cases"], bool) or not isinstance(given["cases"], int) or given["cases"] < 1
    ):
        refuse("cases", "it must be a number of labelled cases, or null")
    if "spacing_mm" in given and not _are_sizes(given["spacing_mm"]):
        refuse("spacing_mm", "write three sizes of a voxel in mm: [slice, row, column]")
    if "input_size" in given and not _are_sizes(given["input_size"], whole=True):
        refuse("input_size", "write three sides in voxels: [slice, row, column]")
    settings = given.get("settings", {})
    if not isinstance(settings, dict):
        refuse("settings", "write settings of the train config: {spacing_mm: median}")
    wrong = [name for name in settings if str(name).split("#")[0] not in _known_settings()]
    if wrong:
        near = difflib.get_close_matches(str(wrong[0]), _known_settings(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see the top of configs/train.yaml"
        raise SettingsError(f"{where}: no train config has a setting {wrong[0]}; {hint}")
    inferred = given.get("inferred", [])
    if inferred and not _are_texts(inferred):
        refuse("inferred", "list names of fields: [labels, cases]")
    for name in inferred:
        if name not in known or given.get(name) in (None, [], {}):
            raise SettingsError(f"{where}: inferred names {name}, which the card does not say; drop it")
    return Card(**given)


def _check_classes(given: Mapping[str, Any], refuse: Any) -> None:
    """Check labels, or target and classes."""
    labels = given.get("labels")
    if labels is None:
        for name in _OF_SEGMENTATION[1:]:
            if name in given:
                refuse(name, "it needs labels beside it; add them, or drop the line")
    else:
        names = list(labels) if isinstance(labels, dict) else labels
        if not _are_texts(names, 2):
            refuse("labels", "list a different name for each value, background first: [background, lesion]")
        if names[0].lower() != "background":
            refuse("labels", f"the value 0 is the background, so write it first: [background, {', '.join(names)}]")
        try:
            SegmentationTask(labels, *(given.get(name) for name in _OF_SEGMENTATION[1:]))
        except SettingsError as error:
            meant = (name for name in reversed(_OF_SEGMENTATION) if str(error).startswith(name))
            refuse(next(meant, "regions"), str(error))
    target, classes = given.get("target"), given.get("classes")
    if target is not None and not (isinstance(target, str) and target) and not _are_texts(target):
        refuse("target", "name the column with the class, or list columns of 0 and 1")
    if classes is not None:
        if not _are_texts(classes, 2):
            refuse("classes", "list two or more, in quotes if they look like numbers: [healthy, ill]")
        if isinstance(target, list):
            refuse("classes", "a list of target columns is its own classes; drop the line")


def _told_channels(told: Mapping[str, Any]) -> list[str]:
    """Return the channels that a dataset.json names, in the order of their numbers."""
    named = told.get("channel_names") or told.get("modality") or {}
    if not isinstance(named, dict) or not all(str(key).isdigit() for key in named):
        return []
    names = [str(named[key]) for key in sorted(named, key=lambda key: int(key))]
    return names if len(set(names)) == len(names) else [f"{name} {index}" for index, name in enumerate(names)]


def _spread(cases: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most so many of the cases, evenly from first to last."""
    places = np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(int))
    return [cases[place] for place in places]


def _label_values(files: Sequence[str]) -> list[int]:
    """Return the values that label maps hold, 0 among them, in order.

    Raises:
        DataError: if a file holds what no label map holds, or none holds foreground.
    """
    found = {0}
    for file in files:
        values = np.unique(whole_numbers(read_volume(file)[0], file))
        if values[0] < 0 or len(values) > _MOST_CLASSES:
            raise DataError(
                f"{file} holds {len(values):,} values from {values[0]} to {values[-1]}, which are no classes; is it an "
                "image?"
            )
        found |= {int(value) for value in values}
    if found == {0}:
        raise DataError(
            f"the {len(files)} label map(s) such as {files[0]} hold nothing but 0; are they the right ones?"
        )
    return sorted(found)


def _median_spacing(cases: Sequence[dict[str, Any]]) -> list[float] | None:
    """Return the median voxel of the images along canonical axes, ``(slice, row, column)``; None if a file lacks it."""
    spacings = []
    for case in cases:
        header = read_header(case["image"] if isinstance(case["image"], str) else case["image"][0])
        if len(header.spacing_mm) < 3 or min(header.spacing_mm[:3]) <= 0 or not np.linalg.det(header.affine[:3, :3]):
            return None
        spacings.append(prepared_sides(header.affine))
    return [round(float(value), 4) for value in np.median(spacings, axis=0)]


def _order(card: Card) -> tuple[int, int]:
    """Put the cards as the papers' tables do: segmentation ID, OOD, classification, the others."""
    openmind = _openmind_codes()
    place = openmind.index(card.code) if card.code in openmind else len(openmind)
    return (0 if place < len(openmind) else 1, place)


@cache
def _openmind_codes() -> tuple[str, ...]:
    """Return the codes of OpenMind's data sets in the order of its tables."""
    tables = _mapping(PUBLISHED, "a file of published numbers")["tables"]
    return (*tables["openmind_segmentation"]["columns"], *tables["openmind_classification_ap"]["columns"])


def _classes(card: Card) -> str | None:
    """Return the number of classes in words."""
    if isinstance(card.target, list):
        return f"{len(card.target)} labels"
    if card.classes is not None:
        return str(len(card.classes))
    task = card.segmentation()
    return None if task is None else str(len(task.names))


def _table(name: str, told: Any, content: Mapping[str, Any], codes: set[Any], path: Path) -> Table:
    """Check one published table and return it."""
    where = f"{path}, table {name}"
    if not isinstance(told, dict):
        raise SettingsError(f"{where} holds no fields")
    needed = ("title", "source", "grade", "task", "metric", "unit", "kind", "columns", "rows")
    _check_fields(told, (*needed, "means", "means_agree", "note"), needed, where)
    choices = {"source": content["sources"], "grade": content["grades"], "task": TASKS, "kind": KINDS}
    for key, known in choices.items():
        if told[key] not in known:
            raise SettingsError(f"{where}: {key} is {told[key]!r}; it must be one of {', '.join(known)}")
    columns, means = told["columns"], told.get("means") or {}
    if not _are_texts(columns):
        raise SettingsError(f"{where}: columns is {columns!r}; list different names")
    unknown = [column for column in columns if told["kind"] == "data_set" and column not in codes]
    if unknown:
        raise SettingsError(f"{where}: no card and no entry of data_sets is called {unknown[0]}; add one")
    wrong = [column for of in means.values() for column in of if column not in columns]
    if wrong:
        raise SettingsError(f"{where}: a mean is over {wrong[0]}, which is no column")
    rows = [_row(row, f"{where}, row {index + 1}", told, means, content) for index, row in enumerate(told["rows"])]
    return Table(
        name=name,
        means=means,
        means_agree=told.get("means_agree", True),
        note=str(told.get("note") or "").strip(),
        rows=rows,
        **{key: told[key] for key in needed if key != "rows"},
    )


def _row(told: Any, where: str, table: Mapping[str, Any], means: Mapping[str, Any], content: Mapping[str, Any]) -> Row:
    """Check one published row and return it."""
    if not isinstance(told, dict):
        raise SettingsError(f"{where} holds no fields")
    known = [each.name for each in fields(Row)]
    _check_fields(told, known, ("label", "values"), where)
    values, printed = told["values"], told.get("printed") or {}
    if not isinstance(values, list) or len(values) != len(table["columns"]):
        raise SettingsError(f"{where} must have {len(table['columns'])} values, one for each column; it has {values!r}")
    for value in [*values, *printed.values()]:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise SettingsError(f"{where}: {value!r} is no number; write null for what was not found")
    if printed.keys() - means.keys():
        raise SettingsError(f"{where}: no mean is called {min(printed.keys() - means.keys())}; say over which columns")
    grade = told.get("grade", table["grade"])
    if grade not in content["grades"]:
        raise SettingsError(f"{where}: grade is {grade!r}; it must be one of {', '.join(content['grades'])}")
    return Row(
        label=told["label"],
        method=told.get("method"),
        backbone=told.get("backbone"),
        family=told.get("family"),
        epochs=told.get("epochs"),
        grade=grade,
        variant=told.get("variant"),
        parameters_million=told.get("parameters_million"),
        values=dict(zip(table["columns"], values, strict=True)),
        printed=printed,
    )
