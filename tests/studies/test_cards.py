# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Cards of data sets, published numbers, and the page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import rankdata

from common.errors import DataError, SettingsError
from tools.preparing.template import LABELS
from tools.studies.cards import card_for_folder, card_table, cards, published, read_card

from ..conftest import ROOT, blobs, write_volume

ID = ["ATL", "SBM", "ISL", "HNT", "HAN", "MSF", "TPC", "YBM", "COS"]
OOD = ["ACD", "AMO", "KIT"]
CLASSIFICATION = ["MRN", "RSN", "ABI"]
RANKS = {  # mean ranks over the twelve data sets, worked out by hand from the tables, not published
    ("resenc_l", False): "mae 1.92 spark3d 2.33 models_genesis 3.25 volumefusion 3.58 simclr 4.33 voco 5.92 "
    "swinunetr 6.67",
    (
        "resenc_l",
        True,
    ): "mae 3.17 scratch-1000 3.54 spark3d 3.67 models_genesis 4.92 nnunet-1000 5.50 volumefusion 5.50 "
    "simclr 6.17 scratch 7.42 voco 8.21 nnunet 8.42 swinunetr 9.50",
    (
        "primus_m",
        False,
    ): "mae 1.17 simmim 2.17 volumefusion 2.67 models_genesis 4.00 simclr 5.00 swinunetr 6.25 voco 6.75",
    ("primus_m", True): "mae 1.25 simmim 2.25 volumefusion 2.92 scratch-1000 4.21 models_genesis 4.88 scratch 6.00 "
    "simclr 6.50 swinunetr 8.25 voco 8.75",
}


def test_every_data_set_of_the_benchmark_has_a_card() -> None:
    by_code = {read_card(name).code: read_card(name) for name in cards()}
    assert len(by_code) == len(cards()) == 19
    assert {code for code, card in by_code.items() if card.group == "ID"} == {*ID}
    assert {code for code, card in by_code.items() if card.group == "OOD"} == {*OOD}
    assert {code for code, card in by_code.items() if card.task == "classification"} == {*CLASSIFICATION}
    assert {"D3", "D11", "D12", "MNI"} < {*by_code}


@pytest.mark.parametrize("name", cards())
def test_a_card_says_how_to_get_the_data_and_is_json(name: str) -> None:
    card = read_card(name)
    assert card.download
    assert card.modality
    assert card.channels
    assert json.loads(json.dumps(card.content())) == card.content()
    if card.task == "classification":
        assert card.input_size is not None
        assert {"fit", "batch_size", "accumulation_steps"} <= {*card.settings}
    else:
        task = card.segmentation()
        assert task is not None
        assert task.labels[0] == "background"
    if card.code in ID + OOD:  # the size of the release is known, that of the benchmark is not
        assert {"labels", "cases"} <= {*card.inferred}


def test_names_codes_and_files_lead_to_the_same_card() -> None:
    file = ROOT / "tools" / "studies" / "cards" / "atl.yaml"
    assert read_card("ATL") == read_card("atl") == read_card(file) == read_card(str(file))
    assert read_card("D3") == read_card("hippocampus")


def test_sizes_and_batches_of_classification_are_those_of_the_train_config() -> None:
    text = (ROOT / "bundles/mae_resenc_l/configs/train_classification.yaml").read_text("utf-8")
    pattern = r"(MRNet|RSNA|ABIDE) +--input_size (\[[\d,]+\]) +--batch_size (\d+) +--accumulation_steps (\d+)"
    published_settings = {name: (json.loads(size), int(b), int(a)) for name, size, b, a in re.findall(pattern, text)}
    for name, code in (("MRNet", "MRN"), ("RSNA", "RSN"), ("ABIDE", "ABI")):
        card = read_card(code)
        told = (card.input_size, card.settings["batch_size"], card.settings["accumulation_steps"])
        assert told == published_settings[name]


def test_the_card_of_the_template_has_its_labels() -> None:
    assert read_card("mni").labels == LABELS


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lables": ["background", "a"]}, "unknown field lables; did you mean labels?"),
        ({"task": "segmentaton"}, "must be segmentation, classification or regression"),
        ({"task": None}, "has no task"),
        ({"name": None}, "has no name"),
        ({"name": 7}, "write a text"),
        ({"labels": ["lesion", "background"]}, "the value 0 is the background"),
        ({"labels": ["background"]}, "list a different name for each value"),
        ({"labels": ["background", "a", "a"]}, "list a different name for each value"),
        ({"labels": ["background", "a"], "regions": {"whole": [1, 2]}}, "which are 0 to 1"),
        ({"labels": ["background", "a"], "ignore_label": 1}, "beyond the classes"),
        ({"regions": {"whole": [1]}}, "needs labels beside it"),
        ({"target": "diagnosis"}, "a card of segmentation has none"),
        ({"task": "classification", "labels": ["background", "a"]}, "a card of classification has none"),
        ({"task": "classification", "target": ["a", "b"], "classes": ["c", "d"]}, "is its own classes"),
        ({"task": "classification", "target": "a", "classes": [0, 1]}, "in quotes if they look like numbers"),
        ({"task": "classification", "input_size": [16, 16]}, "three sides in voxels"),
        ({"task": "classification", "target": "a", "units": "years"}, "a card of classification has none"),
        ({"task": "regression", "target": "age", "classes": ["a", "b"]}, "a card of regression has none"),
        ({"task": "regression", "target": ["age", "weight"]}, "a regression predicts one number"),
        ({"task": "regression", "target": "age", "units": 7}, "write a text"),
        ({"spacing_mm": [1, 1, 0]}, "three sizes of a voxel"),
        ({"channels": ["T1w", "T1w"]}, "a different name for each image"),
        ({"group": "id"}, "must be ID or OOD"),
        ({"cases": 0}, "a number of labelled cases"),
        ({"settings": {"spacing": 1}}, "did you mean spacing_mm?"),
        ({"settings": ["spacing_mm"]}, "write settings of the train config"),
        ({"inferred": ["labels"]}, "which the card does not say"),
        ({"inferred": ["nonsense"]}, "which the card does not say"),
    ],
)
def test_a_card_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "mine", "task": "segmentation"} | changes), "utf-8")
    with pytest.raises(SettingsError, match=re.escape(told)) as caught:
        read_card(file)
    assert str(file) in str(caught.value)


def test_a_card_of_two_lines_is_enough(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: segmentation\n", "utf-8")
    assert read_card(tmp_path / "mine.yaml").segmentation() is None


def test_a_card_that_is_not_there_or_no_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no card is called hipocampus; did you mean hippocampus\? There are abi"):
        read_card("hipocampus")
    with pytest.raises(SettingsError, match=r"there is no card .*gone.yaml; give a YAML file, or a name: abi"):
        read_card(tmp_path / "gone.yaml")
    for text, told in (("name: [mine", "is not a card"), ("- name", "holds no fields"), ("", "holds no fields")):
        (tmp_path / "bad.yaml").write_text(text, "utf-8")
        with pytest.raises(SettingsError, match=told):
            read_card(tmp_path / "bad.yaml")


def test_printed_means_are_the_means_of_the_columns() -> None:
    everything = published()
    checked = 0
    for table in everything.tables.values():
        for row in table.rows:
            for name, printed in row.printed.items():
                agrees = abs(table.mean(row, name) - printed) <= 0.01
                assert agrees == table.means_agree, (table.name, row.label, name)
                checked += agrees
    assert checked == 20 * 3 + 2 * 16 + 7
    assert [name for name, table in everything.tables.items() if not table.means_agree] == ["openmind_schedules"]


def test_the_segmentation_table_is_whole() -> None:
    table = published().tables["openmind_segmentation"]
    assert table.columns == ID + OOD
    assert table.means == {"ID": ID, "OOD": OOD, "All": ID + OOD}
    assert all(None not in row.values.values() for row in table.rows)
    bundles = {path.name for path in (ROOT / "bundles").iterdir() if (path / "configs" / "metadata.json").is_file()}
    named = {f"{row.method}_{row.backbone}" for row in table.rows if row.method not in ("scratch", "nnunet")}
    assert named <= bundles
    assert len(named) == 14
    (row,) = table.find(method="mae", backbone="resenc_l", epochs=150)
    assert (row.values["HNT"], row.printed["All"], row.grade) == (66.58, 70.91, "copied")


@pytest.mark.parametrize(("family", "with_scratch"), RANKS)
def test_mean_ranks_follow_from_the_table(family: str, with_scratch: bool) -> None:
    table = published().tables["openmind_segmentation"]
    rows = [
        row for row in table.rows if row.family == family and (with_scratch or row.method not in ("scratch", "nnunet"))
    ]
    values = np.array([[row.values[column] for column in table.columns] for row in rows])
    ranks = rankdata(-values, axis=0).mean(axis=1)
    words = RANKS[family, with_scratch].split()
    expected = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    names = [f"{row.method}-1000" if row.epochs == 1000 else row.method for row in rows]
    found = dict(zip(names, ranks, strict=True))
    assert found == pytest.approx(expected, abs=0.006)


def test_every_number_has_a_source_and_a_grade_and_every_column_a_name() -> None:
    everything = published()
    for table in everything.tables.values():
        assert {"citation", "read_at"} <= {*everything.sources[table.source]}
        assert {row.grade for row in table.rows} <= {*everything.grades}
        if table.kind == "data_set":
            for column in table.columns:
                about = everything.about(column)
                assert about["name"]
                if about["card"]:
                    read_card(about["card"])
    assert len(everything.missing) >= 9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table["rows"][0]["values"].pop(), "must have 12 values"),
        (lambda table: table["rows"][0].update(values=["58.7"] * 12), "is no number"),
        (lambda table: table["rows"][0].update(grade="sure"), "it must be one of authors, copied"),
        (lambda table: table["rows"][0].update(methd="mae"), "did you mean method?"),
        (lambda table: table["rows"][0]["printed"].update(Most=1.0), "no mean is called Most"),
        (lambda table: table.update(source="hearsay"), "source is 'hearsay'"),
        (lambda table: table["columns"].__setitem__(0, "XYZ"), "no card and no entry of data_sets is called XYZ"),
        (lambda table: table["means"]["ID"].append("D1"), "which is no column"),
        (lambda table: table.pop("metric"), "has no metric"),
    ],
)
def test_a_published_table_that_cannot_be_right_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    content = yaml.safe_load((ROOT / "tools" / "studies" / "published.yaml").read_text("utf-8"))
    content["tables"] = {"openmind_segmentation": content["tables"]["openmind_segmentation"]}
    change(content["tables"]["openmind_segmentation"])
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(content), "utf-8")
    with pytest.raises(SettingsError, match=re.escape(told)) as caught:
        published(tmp_path / "published.yaml")
    assert "table openmind_segmentation" in str(caught.value)


def test_the_page_shows_the_cards_and_the_grades() -> None:
    page = (ROOT / "docs" / "data_sets.md").read_text("utf-8")
    shown = page.partition("<!-- cards")[2].partition("-->\n")[2].partition("\n<!-- end of cards")[0]
    assert shown == card_table(), "write the result of studies.cards.card_table() into docs/data_sets.md"
    for name, text in published().grades.items():
        assert f"| `{name}` | {text} |" in page


def test_a_proposal_for_images_and_labels(labelled: Path, tmp_path: Path) -> None:
    proposal = card_for_folder(labelled)
    assert proposal == {
        "name": "labelled",
        "task": "segmentation",
        "channels": ["image"],
        "labels": ["background", "class 1"],
        "cases": 5,
        "spacing_mm": [1.0, 1.0, 1.0],
        "inferred": ["channels", "labels"],
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(proposal), "utf-8")
    assert read_card(tmp_path / "card.yaml").labels == ["background", "class 1"]


def test_a_proposal_for_an_nnunet_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        for channel in range(2):
            write_volume(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", blobs(1)[0], spacing=0.5)
        write_volume(tmp_path / "labelsTr" / f"{name}.nii.gz", blobs(1)[1], spacing=0.5)
    told: dict[str, Any] = {
        "name": "Gliomas",
        "channel_names": {"1": "FLAIR", "0": "T1w"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "licence": "CC0",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(told), "utf-8")
    proposal = card_for_folder(tmp_path)
    assert proposal["name"] == "Gliomas"
    assert proposal["channels"] == ["T1w", "FLAIR"]
    assert proposal["labels"] == ["background", "label 1", "core"]
    assert (proposal["regions"], proposal["ignore_label"]) == ({"whole": [1, 2], "core": [2]}, 3)
    assert (proposal["cases"], proposal["licence"], proposal["spacing_mm"]) == (3, "CC0", [0.5] * 3)
    assert "spacing_mm median" in proposal["notes"]
    assert "inferred" not in proposal
    (tmp_path / "dataset.json").unlink()
    assert card_for_folder(tmp_path)["channels"] == ["image 0", "image 1"]


def test_a_proposal_for_a_decathlon_folder(tmp_path: Path) -> None:
    image = np.stack([blobs(1)[0]] * 2, axis=-1)
    write_volume(tmp_path / "imagesTr" / "prostate_00.nii.gz", image)
    write_volume(tmp_path / "labelsTr" / "prostate_00.nii.gz", blobs(1)[1])
    told = {
        "name": "PROSTATE",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "Background", "1": "PZ", "2": "TZ"},
        "licence": "CC-BY-SA 4.0",
        "reference": "Radboud University",
        "release": "1.0 04/05/2018",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(told), "utf-8")
    proposal = card_for_folder(tmp_path)
    assert proposal["channels"] == ["T2", "ADC"]
    assert proposal["labels"] == ["background", "PZ", "TZ"]
    assert (proposal["licence"], proposal["citation"]) == ("CC-BY-SA 4.0", "Radboud University")
    assert "source" not in proposal
    (tmp_path / "dataset.json").unlink()
    assert card_for_folder(tmp_path)["channels"] == ["image 0", "image 1"]


def test_gaps_and_the_ignored_value_among_labels_are_told(labelled: Path) -> None:
    mask = blobs(0)[1].copy()
    mask[0, 0, 0], mask[0, 0, 1] = 4, 255
    write_volume(labelled / "labels" / "case_0.nii.gz", mask)
    proposal = card_for_folder(labelled)
    assert proposal["labels"] == ["background", "class 1", "class 2", "class 3", "class 4"]
    assert proposal["ignore_label"] == 255
    assert "holds 2, 3." in proposal["notes"]
    assert {"labels", "ignore_label"} <= {*proposal["inferred"]}


def test_values_as_an_atlas_numbers_them(labelled: Path) -> None:
    for file in sorted((labelled / "labels").iterdir()):
        write_volume(file, blobs(0)[1].astype(np.int32) * 614_454_277)
    proposal = card_for_folder(labelled)
    assert proposal["labels"] == {"background": 0, "class 614454277": 614_454_277}
    assert "notes" not in proposal


def test_names_that_end_in_four_digits_are_cases(tmp_path: Path) -> None:
    for number in (1, 4):
        write_volume(tmp_path / "images" / f"scan_{number:04d}.nii.gz", blobs(number)[0])
        write_volume(tmp_path / "labels" / f"scan_{number:04d}.nii.gz", blobs(number)[1])
    proposal = card_for_folder(tmp_path)
    assert (proposal["cases"], proposal["channels"]) == (2, ["image"])


def test_spacing_is_that_of_canonical_axes(tmp_path: Path) -> None:
    import nibabel as nib

    image, mask = blobs(1)
    affine = np.zeros((4, 4))  # a sagittal file: its first axis goes front, its second up, its third right
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = 0.5, 2.0, 3.0, 1.0
    for part, values in (("images", image), ("labels", mask)):
        (tmp_path / part).mkdir()
        nib.save(nib.Nifti1Image(values, affine), tmp_path / part / "a.nii.gz")
    assert card_for_folder(tmp_path)["spacing_mm"] == [2.0, 0.5, 3.0]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (blobs(0)[0], "a label map holds whole numbers"),
        (
            np.arange(24 * 28 * 26, dtype=np.int32).reshape(24, 28, 26),
            "17,472 values from 0 to 17471, .* is it an image",
        ),
        (np.zeros((24, 28, 26), np.uint8), "hold nothing but 0"),
    ],
)
def test_label_maps_that_are_none_are_refused(tmp_path: Path, values: np.ndarray, told: str) -> None:
    write_volume(tmp_path / "images" / "a.nii.gz", blobs(0)[0])
    write_volume(tmp_path / "labels" / "a.nii.gz", values)
    with pytest.raises(DataError, match=told):
        card_for_folder(tmp_path)


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no labelled data"):
        card_for_folder(tmp_path)
