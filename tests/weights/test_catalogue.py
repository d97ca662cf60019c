# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The catalogue of known public checkpoints: what is in it, how it is found, and where it is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from common.errors import SettingsError, WeightsError
from common.weights.cells import BACKBONES, METHODS
from common.weights.origins import licence_terms
from common.weights.sources import Fetched
from tools.checkpoints import catalogue, importing
from tools.checkpoints.importing import import_checkpoint
from tools.checkpoints.settings import ImportCheckpoint

from ..conftest import BUNDLES, ROOT
from .synthetic import CELLS, ORDERS

OPENMIND = [known for known in catalogue.checkpoints() if "-OpenMind-" in known.repository]


def test_the_published_files_are_those_that_the_bundles_fetch() -> None:
    assert sorted(f"{known.bundle}_{known.backbone}" for known in OPENMIND) == CELLS
    for known in OPENMIND:
        bundle = f"{known.bundle}_{known.backbone}"
        files = yaml.safe_load((ROOT / "bundles" / bundle / "large_files.yml").read_text())["large_files"]
        assert files[0]["url"] == f"https://huggingface.co/{known.repository}/resolve/main/{known.file}"
        assert known.former == known.repository.replace("MIC-DKFZ/", "AnonRes/")
        assert known.token_order == (ORDERS[bundle] if bundle.endswith("primus_m") else None)
    for bundle in set(BUNDLES) - set(CELLS):
        assert "url" not in (ROOT / "bundles" / bundle / "large_files.yml").read_text()


def test_every_entry_is_whole_and_says_how_certain_it_is() -> None:
    assert len(catalogue.checkpoints()) == 30
    names = [(known.repository, known.file) for known in catalogue.checkpoints()]
    assert len(set(names)) == len(names)
    for known in catalogue.checkpoints():
        assert known.backbone in (*BACKBONES, "other")
        assert known.bundle is None or known.bundle in METHODS
        assert known.seen in ("page", "reported", "pattern")
        assert set(known.inferred) <= set(vars(known))
        assert known.note or known.backbone != "other"
        assert known.citation or known.backbone == "other"
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", known.repository)
        if known.token_order is not None:
            assert "token_order" in known.inferred, "nobody states it"
    openmind = {known.licence for known in OPENMIND}
    assert openmind == {"CC-BY-4.0"}
    foundation = [known for known in catalogue.checkpoints() if "nnFoundation" in known.repository]
    assert [bool(licence_terms(known.licence)) for known in foundation] == [True, True]
    assert all(known.token_order is None for known in foundation)


def test_a_file_is_found_by_repository_and_name_or_by_its_digest() -> None:
    vox = catalogue.by_repository("MIC-DKFZ/SSL3D-checkpoints", "ResEnc-L/Datamen/Datamen_ResEncL.pth")
    other = catalogue.by_repository("MIC-DKFZ/SSL3D-checkpoints", "Primus-M/Team/Team_PrimusM.pth")
    assert vox is not None
    assert vox.method == "VoxCon"
    assert other is not None
    assert (other.backbone, other.bundle) == ("primus_m", None)
    for name in ("AnonRes/PrimusM-OpenMind-MG", "MIC-DKFZ/PrimusM-OpenMind-MG"):
        known = catalogue.by_repository(name, "checkpoint_final.pth")
        assert known is not None
        assert known.repository == "MIC-DKFZ/PrimusM-OpenMind-MG"
    assert catalogue.by_repository("someone/else") is None
    assert catalogue.by_repository("MIC-DKFZ/PrimusM-OpenMind-MG", "checkpoint_best.pth") is None
    digest = "b866ac5f61d7e90d3a6cbb00a759ffc9d73beb5e63baa6b3cd654671ebc9a552"
    known = catalogue.by_digest(digest)
    assert known is not None
    assert known.repository == "MIC-DKFZ/PrimusM-OpenMind-MAE"
    assert catalogue.by_digest("0" * 64) is None


def test_the_first_digest_that_a_bundle_saw_is_known_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    listed = tmp_path / "bundles" / "mae_primus_m" / "large_files.yml"
    listed.parent.mkdir(parents=True)
    text = (ROOT / "bundles" / "mae_primus_m" / "large_files.yml").read_text()
    listed.write_text(f"{text.rstrip()}\n  hash_val: {'ab' * 32}\n")
    known = catalogue.by_digest("ab" * 32)
    assert known is not None
    assert known.repository == "MIC-DKFZ/PrimusM-OpenMind-MAE"


def test_the_list_is_shown_and_is_the_one_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    import_checkpoint(ImportCheckpoint(list=True))
    shown = capsys.readouterr().out
    for words in (
        "MIC-DKFZ/nnFoundationCNN",
        "CC-BY-SA-4.0 (demands share-alike)",
        "Vox-MSD",
        "not known",
        "inferred: ",
    ):
        assert words in shown
    table = "\n".join(catalogue.table())
    assert table in shown
    assert table in (ROOT / "docs" / "checkpoints.md").read_text("utf-8")
    import_checkpoint(ImportCheckpoint("mae_primus_m", list=True))
    assert "ResEncL" not in capsys.readouterr().out
    with pytest.raises(SettingsError, match="needs the name of a bundle"):
        ImportCheckpoint()


def test_where_the_present_home_does_not_answer_the_earlier_one_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def fetch(source: str, **_: object) -> Fetched:
        asked.append(source)
        if "AnonRes" not in source or len(asked) > 2:
            raise WeightsError(f"{source} cannot be reached")
        return Fetched(tmp_path / "none.pth", source)

    monkeypatch.setattr(importing, "fetch", fetch)
    monkeypatch.setattr(importing, "announce", lambda *_, **__: None)
    with pytest.raises(FileNotFoundError):
        import_checkpoint(ImportCheckpoint("mae_resenc_l"))
    home = "https://huggingface.co/{}/ResEncL-OpenMind-MAE/resolve/main/checkpoint_final.pth"
    assert asked == [home.format("MIC-DKFZ"), home.format("AnonRes")]
    with pytest.raises(WeightsError, match=r"MIC-DKFZ/ResEncL-OpenMind-MAE.* cannot be reached"):
        import_checkpoint(ImportCheckpoint("mae_resenc_l"))
    asked.clear()
    with pytest.raises(WeightsError, match="MIC-DKFZ/nnFoundationCNN cannot be reached"):
        import_checkpoint(ImportCheckpoint("mae_resenc_l", source="MIC-DKFZ/nnFoundationCNN"))
    assert asked == ["MIC-DKFZ/nnFoundationCNN"], "what was asked for is fetched, nothing else"
