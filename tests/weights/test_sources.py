# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Downloads, from a loopback server that stands in for the hub and cuts connections."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from common.errors import WeightsError
from common.files import read_record, sha256
from common.weights.sources import _Redirects, download, fetch
from tools.checkpoints import cells

from ..conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A server of one repository; the next ``cuts`` answers to a download end in the middle."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: int = 0
    tag: str = "one"
    digests: bool = False  # large files have their SHA-256 as tag, as the hub's do
    sent: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            content = state.files.get(name)
            if content is None or "/missing/" in self.path:
                code = "RepoNotFound" if "/missing/" in self.path else "EntryNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, tag = 0, f'"{state.tag} {name}"'
            if state.digests and name.endswith(".pth"):
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
            wanted = self.headers.get("Range")
            if wanted and self.headers.get("If-Range", tag) == tag:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", tag)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "HEAD":
                return
            rest = content[start:]
            if state.cuts and name.endswith(".pth"):
                state.cuts -= 1
                rest = rest[: len(rest) // 2]
                self.close_connection = True
            self.wfile.write(rest)
            state.sent[name] = state.sent.get(name, 0) + len(rest)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


FETCH = """
import json, sys
from common.errors import WeightsError
from common.weights.sources import fetch
try:
    found = fetch(sys.argv[1], folder=sys.argv[2], local=sys.argv[3], allow_http=len(sys.argv) > 4)
    print(json.dumps({"path": str(found.path), "revision": found.revision, "source": found.source,
                      "plan": str(found.plan_file), "repository": found.repository, "card": str(found.card),
                      "name": found.name}))
except WeightsError as error:
    print(json.dumps({"error": str(error)}))
"""


def fetched(source: str, address: str, folder: Path, **more: str) -> tuple[dict[str, str], str]:
    """Fetch in a process of its own, since the hub's client reads its address once."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"} | more
    result = subprocess.run(
        [sys.executable, "-c", FETCH, source, str(folder), str(folder / "openmind" / "checkpoint_final.pth"), "http"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_the_hub_with_a_cut_connection_then_without_network(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(24 << 20)  # the client asks for parts of 10 MB
    hub.files = {"checkpoint_final.pth": content, "adaptation_plan.json": b"{}"}
    hub.cuts = 1
    found, progress = fetched("AnonRes/ResEncL-OpenMind-MAE", hub.address, tmp_path)
    assert Path(found["path"]).read_bytes() == content
    assert found["revision"] == COMMIT
    assert found["repository"] == "AnonRes/ResEncL-OpenMind-MAE"
    assert Path(found["plan"]).read_bytes() == b"{}"
    assert "checkpoint_final.pth" in progress, "a progress bar"
    assert hub.sent["checkpoint_final.pth"] < 1.2 * len(content), "it went on where it was cut"
    again, _ = fetched("AnonRes/ResEncL-OpenMind-MAE", "http://127.0.0.1:9", tmp_path)
    assert again["path"] == found["path"], "from the cache"


@pytest.mark.parametrize(
    "offline", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=["switched_off", "unreachable"]
)
def test_without_network_a_sentence_says_which_file_to_bring(offline: str, tmp_path: Path) -> None:
    url = "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE/resolve/main/checkpoint_final.pth"
    found, _ = fetched(url, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE=offline)
    place = tmp_path / "openmind" / "checkpoint_final.pth"
    assert f"fetch {url} on a machine with access" in found["error"]
    assert f"put it at {place}" in found["error"]
    place.parent.mkdir()
    place.write_bytes(b"brought")
    here = fetch(url, folder=tmp_path, local=place)
    assert (here.path, here.repository) == (place, "AnonRes/ResEncL-OpenMind-MAE")


def test_a_file_deep_in_a_repository_comes_with_its_plan_and_card(hub: Hub, tmp_path: Path) -> None:
    hub.files = {
        "Team_ResEncL.pth": b"weights",
        "adaptation_plan.json": b"{}",
        "README.md": b"---\nlicense: mit\n---\n",
    }
    place = "MIC-DKFZ/SSL3D-checkpoints/resolve/main/ResEnc-L/Team/Team_ResEncL.pth"
    found, _ = fetched(f"https://huggingface.co/{place}", hub.address, tmp_path)
    assert Path(found["path"]).read_bytes() == b"weights"
    assert found["revision"] == COMMIT
    assert (found["repository"], found["name"]) == ("MIC-DKFZ/SSL3D-checkpoints", "ResEnc-L/Team/Team_ResEncL.pth")
    assert Path(found["plan"]).parent == Path(found["path"]).parent, "the plan lies beside its file"
    assert Path(found["card"]).read_bytes() == hub.files["README.md"]


def test_a_repository_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    found, _ = fetched("missing/ResEncL-OpenMind-SPARK3D", hub.address, tmp_path)
    assert "there is no repository missing/ResEncL-OpenMind-SPARK3D" in found["error"]
    assert "--source owner/name" in found["error"]


def test_an_address_goes_on_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    hub.files, hub.cuts = {"weights.pth": content}, 3
    found = fetch(f"{hub.address}/some/weights.pth", folder=tmp_path, allow_http=True)
    assert found.path.read_bytes() == content
    assert hub.sent["weights.pth"] == len(content)
    assert fetch(f"{hub.address}/some/weights.pth", folder=tmp_path, allow_http=True).path == found.path
    assert hub.sent["weights.pth"] == len(content), "it is kept"
    assert not list(tmp_path.rglob("*.part"))


def test_an_address_that_changed_in_between_is_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.files, hub.cuts = {"weights.pth": b"a" * 1000}, 100
    with pytest.raises(WeightsError, match="was cut 5 times"):
        download(f"{hub.address}/weights.pth", tmp_path / "weights.pth", allow_http=True)
    assert not (tmp_path / "weights.pth").exists()
    hub.files, hub.tag, hub.cuts = {"weights.pth": b"b" * 1000}, "two", 0
    assert download(f"{hub.address}/weights.pth", tmp_path / "weights.pth", allow_http=True).read_bytes() == b"b" * 1000


def test_two_downloads_at_once(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    hub.files = {"weights.pth": content}
    threads = [
        threading.Thread(
            target=download,
            args=(f"{hub.address}/weights.pth", tmp_path / "weights.pth"),
            kwargs={"allow_http": True},
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "weights.pth").read_bytes() == content
    assert hub.sent["weights.pth"] == len(content)


def test_sources_that_are_none(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="answers 404"):
        fetch(f"{hub.address}/none.pth", folder=tmp_path, allow_http=True)
    with pytest.raises(WeightsError, match="cannot be reached"):
        fetch("http://127.0.0.1:9/weights.pth", folder=tmp_path, allow_http=True)
    with pytest.raises(WeightsError, match="there is no file"):
        fetch("/nowhere/checkpoint.pth", folder=tmp_path)
    (tmp_path / "checkpoint_final.pth").write_bytes(b"x")
    assert fetch(str(tmp_path), folder=tmp_path).path == tmp_path / "checkpoint_final.pth"


def test_without_encryption_only_if_asked_for(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"weights.pth": b"a"}
    with pytest.raises(WeightsError, match=r"is not encrypted.*--allow_http true"):
        fetch(f"{hub.address}/weights.pth", folder=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    with pytest.raises(WeightsError, match="is not encrypted"):
        fetch("AnonRes/ResEncL-OpenMind-MAE", folder=tmp_path)
    assert hub.sent == {}
    redirects = _Redirects(allow_http=False)
    request = urllib.request.Request("https://host/weights.pth")
    with pytest.raises(WeightsError, match=r"http://host/weights\.pth is not encrypted"):
        redirects.redirect_request(request, None, 302, "", {}, "http://host/weights.pth")
    led = redirects.redirect_request(request, None, 302, "", {}, "https://other/weights.pth")
    assert led is not None
    assert led.full_url == "https://other/weights.pth"


def test_what_came_first_from_an_address_is_what_is_trusted(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"weights.pth": b"a" * 1000}
    address = f"{hub.address}/weights.pth"
    path = fetch(address, folder=tmp_path, allow_http=True).path
    assert read_record(path.with_suffix(".json")) == {"source": address, "sha256": sha256(path)}
    path.unlink()
    hub.files, hub.tag = {"weights.pth": b"b" * 1000}, "two"
    with pytest.raises(WeightsError, match=r"weights\.pth is not the file that weights\.json beside it is about"):
        fetch(address, folder=tmp_path, allow_http=True)
    path.with_suffix(".json").unlink()
    assert fetch(address, folder=tmp_path, allow_http=True).path.read_bytes() == b"b" * 1000


def test_a_damaged_file_of_the_hubs_cache_is_told(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(1000)
    hub.files = {"checkpoint_final.pth": content, "adaptation_plan.json": b"{}"}
    hub.digests = True
    found, _ = fetched("AnonRes/ResEncL-OpenMind-MAE", hub.address, tmp_path)
    Path(found["path"]).resolve().write_bytes(b"x" + content[1:])
    found, _ = fetched("AnonRes/ResEncL-OpenMind-MAE", hub.address, tmp_path)
    assert "is not what AnonRes/ResEncL-OpenMind-MAE has" in found["error"]


def test_the_first_digest_of_a_published_file_goes_into_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    catalogue = tmp_path / "bundles" / "mae_resenc_l" / "large_files.yml"
    catalogue.parent.mkdir(parents=True)
    before = (ROOT / "bundles" / "mae_resenc_l" / "large_files.yml").read_text()
    catalogue.write_text(before)
    address, place, digest = cells.published_file("mae_resenc_l") or ("", None, None)
    assert digest is None
    assert "another file is refused from now on" in cells.record_digest("mae_resenc_l", "ab" * 32)
    assert cells.published_file("mae_resenc_l") == (address, place, "ab" * 32)
    after = catalogue.read_text().splitlines()
    assert [line for line in after if "hash_" not in line] == before.splitlines(), "comments stay"
    assert yaml.safe_load("\n".join(after))["large_files"][0]["hash_type"] == "sha256", "which MONAI compares too"
