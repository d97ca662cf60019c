# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Where checkpoints come from: the Hugging Face hub, an address, or a file that is already here.

Downloads show a progress bar, go on where a cut connection left them, and are kept, so that a second import needs none.
The SHA-256 of what came first from an address is kept beside it, and anything else is refused from then on. Addresses
without encryption are refused unless they are asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import WeightsError
from ..files import sha256, write_record
from ..paths import as_path
from ..terminal import progress_bar
from .files import checked_sha256
from .reference import PLAN_FILE

__all__ = ["Fetched", "download", "fetch"]

CHECKPOINT_FILE, CARD_FILE = "checkpoint_final.pth", "README.md"
COLLECTION = "https://huggingface.co/collections/MIC-DKFZ/openmind-models-6819c21c7fe6f0aaaab7dadf"
_ATTEMPTS, _CHUNK = 5, 1 << 20


@dataclass
class Fetched:
    """A checkpoint that is now here.

    Attributes:
        path: of the file.
        source: what to name as its source.
        revision: commit of the repository, if it is from one.
        plan_file: adaptation plan that came with it.
        repository: ``owner/name`` on the hub.
        name: of the file in it.
        card: README.md that came with it.
    """

    path: Path
    source: str
    revision: str | None = None
    plan_file: Path | None = None
    repository: str = ""
    name: str = ""
    card: Path | None = None


def fetch(source: str, *, folder: str | Path, local: str | Path | None = None, allow_http: bool = False) -> Fetched:
    """Make a checkpoint available.

    Args:
        source: a file; a folder with ``checkpoint_final.pth``; an address; or a repository of the hub as
            ``owner/name``, ``owner/name@revision`` or the address of a file in it.
        folder: where downloads from an address go; the hub has its own cache.
        local: where a user without network access would put the file; used instead of the hub if it is there.
        allow_http: take it without encryption too, where anyone on the way can change it.

    Raises:
        WeightsError: if it cannot be had, or is not what came first; the message says which file to bring and where to
            put it.
    """
    path = as_path(source)
    if path.is_dir():
        path = path / CHECKPOINT_FILE
    if path.is_file():
        return Fetched(path, str(path), card=_beside(path))
    on_hub = _hub_parts(source)
    if on_hub is not None:
        if local is not None and Path(local).is_file():
            tqdm.write(f"taking {local}, which is already here, instead of {source}")
            here = Path(local)
            return Fetched(here, f"{local} (for {source})", repository=on_hub[0], name=on_hub[2], card=_beside(here))
        _check_encrypted(os.environ.get("HF_ENDPOINT", ""), allowed=allow_http)
        return _from_hub(*on_hub, bring_to=Path(local) if local is not None else None)
    if re.match(r"https?://", source):
        kept = as_path(folder) / hashlib.sha256(source.encode()).hexdigest()[:12]
        name = re.split(r"[?#]", source)[0].rsplit("/", 1)[-1] or CHECKPOINT_FILE
        path = download(source, kept / name, allow_http=allow_http)
        if not (beside := path.with_suffix(".json")).exists():
            write_record({"source": source, "sha256": sha256(path)}, beside)
        checked_sha256(path)
        return Fetched(path, source)
    raise WeightsError(
        f"there is no file {source}, and it is neither an address nor a repository (owner/name); check --source"
    )


def _beside(path: Path) -> Path | None:
    card = path.with_name(CARD_FILE)
    return card if card.is_file() else None


def _check_encrypted(address: str, *, allowed: bool) -> None:
    if address.startswith("http:") and not allowed:
        raise WeightsError(
            f"{address} is not encrypted, so that anyone on the way can change what arrives; use https://, or take it "
            "all the same with --allow_http true"
        )


def _hub_parts(source: str) -> tuple[str, str, str] | None:
    """Return repository, revision and file name of a source on the hub, None if it is elsewhere."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for start in {endpoint, "https://huggingface.co", "https://hf.co"}:
        if source.startswith(f"{start}/"):
            match = re.fullmatch(
                r"([\w.-]+/[\w.-]+)(?:/(?:resolve|blob|tree)/([\w.-]+)(?:/(.+?))?)?/?(?:\?.*)?",
                source[len(start) + 1 :],
            )
            return (match[1], match[2] or "main", match[3] or CHECKPOINT_FILE) if match else None
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w.-]+))?", source)
    return (match[1], match[2] or "main", CHECKPOINT_FILE) if match else None


def _from_hub(repository: str, revision: str, name: str, *, bring_to: Path | None) -> Fetched:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    address = f"https://huggingface.co/{repository}/resolve/{revision}/{name}"
    put = f"put it at {bring_to}, {PLAN_FILE} beside it, and run this again" if bring_to else "give it with --source"
    try:
        path = Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"{repository} cannot be reached from here; fetch {address} on a machine with access, and {put}"
        ) from error
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository} asks for a login; run 'hf auth login', or fetch {address} and {put}"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"there is no repository {repository} on the hub; look for its present name in {COLLECTION} and give it "
            "with --source owner/name"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise WeightsError(
            f"{repository} has no {name} at revision {revision}; look at https://huggingface.co/{repository}/tree/main"
        ) from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"fetching {repository} failed ({reason}); run this again to go on where it stopped, or fetch {address} "
            f"elsewhere and {put}"
        ) from error
    except Exception as error:  # of the HTTP client, which is not ours to name
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub"):
            raise
        raise WeightsError(
            f"{repository} cannot be reached from here ({type(error).__name__}: {error}); run this again to go on "
            f"where it stopped, or fetch {address} on a machine with access, and {put}"
        ) from error
    blob = path.resolve().name  # where a repository keeps large files, the hub names them by their SHA-256
    if re.fullmatch("[0-9a-f]{64}", blob) and sha256(path) != blob:
        raise WeightsError(f"{path} is not what {repository} has (sha256 {blob[:12]}...); remove it and run this again")
    commit = next((part for part in path.parts if re.fullmatch("[0-9a-f]{40}", part)), None)  # a file may lie deeper
    folder = name.rpartition("/")[0]
    plan = _also(
        repository, f"{folder}/{PLAN_FILE}".lstrip("/"), commit or revision, "the one in the checkpoint is used"
    )
    card = _also(repository, CARD_FILE, commit or revision, "what it says of the licence is not known here")
    return Fetched(path, f"https://huggingface.co/{repository}", commit, plan, repository, name, card)


def _also(repository: str, name: str, revision: str, otherwise: str) -> Path | None:
    """Return a small file that a repository may have beside the checkpoint."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        tqdm.write(f"note: {repository} gave no {name} ({type(error).__name__}); {otherwise}")
        return None


def download(address: str, path: Path, *, allow_http: bool = False) -> Path:
    """Fetch an address to a file, going on with what an earlier attempt left.

    Raises:
        WeightsError: if it is not encrypted and that is not allowed, cannot be reached or was cut too often.
    """
    from filelock import FileLock

    if path.is_file():
        return path
    _check_encrypted(address, allowed=allow_http)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with FileLock(f"{path}.lock"):  # of two processes, the second waits and finds the file
        for attempt in range(_ATTEMPTS):
            if path.is_file():
                return path
            try:
                if _read_on(address, part, allow_http=allow_http):
                    os.replace(part, path)
            except WeightsError:  # led on to where there is no encryption
                raise
            except urllib.error.HTTPError as error:
                if error.code != 416:  # nothing after what is here, so the file there is another one now
                    raise WeightsError(f"{address} answers {error.code} {error.reason}; check the address") from error
                part.unlink(missing_ok=True)
            except (OSError, urllib.error.URLError, ValueError) as error:
                if attempt == _ATTEMPTS - 1:
                    raise WeightsError(
                        f"{address} cannot be reached or was cut ({error}); run this again to go on where it stopped, "
                        "or fetch it elsewhere and give the file with --source"
                    ) from error
                time.sleep(min(2**attempt, 5) / 10)
    if not path.is_file():
        raise WeightsError(f"{address} was cut {_ATTEMPTS} times; run this again to go on where it stopped")
    return path


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows an address to another one, unless that is without encryption."""

    def __init__(self, *, allow_http: bool) -> None:
        self.allow_http = allow_http

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_encrypted(newurl, allowed=self.allow_http)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_on(address: str, part: Path, *, allow_http: bool) -> bool:
    """Append what ``part`` lacks; return whether it is whole."""
    have = part.stat().st_size if part.is_file() else 0
    tag_file = part.with_name(f"{part.name}.tag")
    headers = {"User-Agent": "openmind-bundles"}
    if have and tag_file.is_file():
        headers |= {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()}
    opener = urllib.request.build_opener(_Redirects(allow_http=allow_http))
    with opener.open(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            tag_file.write_text(tag)
        else:
            tag_file.unlink(missing_ok=True)
        bar = progress_bar(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "r+b" if have else "wb") as stream, bar:
            stream.seek(have)
            stream.truncate()
            while chunk := answer.read(_CHUNK):
                stream.write(chunk)
                bar.update(len(chunk))
    whole = total is None or part.stat().st_size == total
    if whole:
        tag_file.unlink(missing_ok=True)
    return whole
