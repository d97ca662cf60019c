# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A server on this machine that stands in for where bundles are published, with nothing but the standard library.

It serves plain files, and as much of the Hugging Face Hub as ``huggingface_hub`` uses without its xet extension: who a
token belongs to, creating repositories, commits of small files in the request and of large ones through LFS, tags,
listings and downloads. Repositories live in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Answer = tuple[int, Any, dict[str, str]]

EMPTY = hashlib.sha1(b"").hexdigest()
LARGE = (".pt", ".png")  # goes through LFS
TOKEN, USER, ORGANISATION = "hf_of_the_tests", "someone", "lab"


@dataclass
class Repository:
    """Commits by their name, each the files that it holds; what points at them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {EMPTY: {}})
    head: str = EMPTY
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        content = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        self.head = hashlib.sha1("\n".join([str(len(self.commits)), *content]).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.head
        return self.tags.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds and was asked.

    Attributes:
        address: of the server.
        files: by the last part of their address.
        cut: names of files whose download ends half way.
        repositories: by owner/name.
        objects: large files by their SHA-256.
        requests: method and path of each request so far.
        broken: starts of the paths of requests that are refused, with the status.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Answer:
        """Return status, content (bytes, or what becomes JSON) and headers."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        for start, status in self.broken.items():
            if path.startswith(start):
                return status, {"error": "out of order"}, {}
        if parts[:2] == ["api", "whoami-v2"]:
            return self._whoami(token)
        if parts[:2] == ["api", "validate-yaml"]:
            return self._validate(json.loads(body)["content"])
        if parts[:3] == ["api", "repos", "create"]:
            return self._create(json.loads(body), token)
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._of_repository(method, "/".join(parts[2:4]), parts[4:], body, token)
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            return self._lfs_batch(json.loads(body), token)
        if parts[0] == "lfs":
            return self._lfs_object(method, parts[1], body)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._download("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        if method in ("GET", "HEAD") and parts[-1] in self.files:
            return 200, self.files[parts[-1]], {}
        return 404, {"error": "not found"}, {}

    def _whoami(self, token: str | None) -> Answer:
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}, {}
        return 200, {"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}]}, {}

    def _validate(self, content: str) -> Answer:
        """Refuse a card as the Hub does: no mapping, or a licence that is not a name."""
        about = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
        if not isinstance(about, dict) or not isinstance(about.get("license"), str):
            return 400, {"errors": [{"message": '"license" must be a string'}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _create(self, asked: dict[str, Any], token: str | None) -> Answer:
        owner = asked["organization"] or USER
        name = f"{owner}/{asked['name']}"
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}, {}
        if owner not in (USER, ORGANISATION):
            error = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            return 403, {"error": error}, {}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}, {}
        self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.address}/{name}", "name": name}, {}

    def _of_repository(self, method: str, name: str, rest: list[str], body: bytes, token: str | None) -> Answer:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            code = 404 if token == TOKEN else 401
            return code, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        verb = rest[0] if rest else "revision"
        if method != "GET" and token != TOKEN:
            return 401, {"error": "Invalid username or password."}, {}
        if method != "GET" and name.split("/")[0] not in (USER, ORGANISATION):
            return 403, {"error": "You don't have write access"}, {}
        if verb == "refs":
            return 200, self._refs(repository), {}
        if verb == "tag" and method == "DELETE":
            if repository.tags.pop(rest[1], None) is None:
                return 404, {"error": "no such tag"}, {"X-Error-Code": "RevisionNotFound"}
            return 200, {}, {}
        revision = repository.resolve(rest[1] if len(rest) > 1 else "main")
        if revision is None:
            return 404, {"error": f"Invalid rev id: {rest[1]}"}, {"X-Error-Code": "RevisionNotFound"}
        files = repository.commits[revision]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            about = {"id": name, "sha": revision, "private": repository.private, "tags": [], "siblings": siblings}
            return 200, about, {}
        if verb == "tree":
            return 200, [self._listed(path, data) for path, data in sorted(files.items())], {}
        if verb == "tag":
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                return 409, {"error": "Tag reference exists already"}, {}
            repository.tags[tag] = revision
            return 200, {}, {}
        if verb == "preupload":
            return 200, {"files": [self._upload_mode(file["path"], files) for file in json.loads(body)["files"]]}, {}
        if verb == "commit":
            return self._commit(name, repository, body)
        return 404, {"error": "not found"}, {}

    def _refs(self, repository: Repository) -> dict[str, Any]:
        def named(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit} for n, commit in refs.items()]

        heads = named("heads", {"main": repository.head})
        return {"branches": heads, "converts": [], "tags": named("tags", repository.tags)}

    def _listed(self, path: str, data: bytes) -> dict[str, Any]:
        about = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith(LARGE):
            about["lfs"] = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return about

    def _upload_mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}

    def _commit(self, name: str, repository: Repository, body: bytes) -> Answer:
        files = dict(repository.commits[repository.head])
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    return 400, {"error": f"{value['path']} was not uploaded"}, {}
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit}, {}

    def _lfs_batch(self, asked: dict[str, Any], token: str | None) -> Answer:
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}, {}
        listed = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.address}/lfs/{one['oid']}", "header": {}}}
            listed.append(one if one["oid"] in self.objects else one | {"actions": upload})
        return 200, {"transfer": "basic", "objects": listed}, {}

    def _lfs_object(self, method: str, digest: str, body: bytes) -> Answer:
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != digest:
                return 400, {"error": "the content has another digest"}, {}
            self.objects[digest] = body
            return 200, {}, {}
        return (200, self.objects[digest], {}) if digest in self.objects else (404, {"error": "not found"}, {})

    def _download(self, name: str, revision: str, path: str, token: str | None) -> Answer:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        commit = repository.resolve(revision)
        data = repository.commits.get(commit or "", {}).get(path)
        if data is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        about = {"X-Repo-Commit": str(commit), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not path.endswith(LARGE):
            return 200, data, about
        digest = hashlib.sha256(data).hexdigest()
        about |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self.objects[digest] = data
        elsewhere = self.address.replace("127.0.0.1", "localhost")  # another host, as the real one's storage
        return 302, b"", about | {"Location": f"{elsewhere}/lfs/{digest}"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, content, headers = hub.answer(self.command, path, body, token)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if isinstance(content, dict) and "error" in content:
                headers = headers | {"X-Error-Message": content["error"]}
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                if path.rsplit("/", 1)[-1] in hub.cut:
                    data, self.close_connection = data[: len(data) // 2], True
                self.wfile.write(data)

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

        def log_message(self, format: str, *args: object) -> None:
            pass

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
