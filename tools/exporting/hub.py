# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A distributed bundle on the Hugging Face Hub: MONAI's own upload, then our model card, then the tags.

MONAI writes a card of its own over README.md, never moves the tag ``latest_version``, which its download prefers, and
leaves files there that a new version no longer has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import SettingsError

__all__ = ["check_repository", "push_bundle"]

LATEST = "latest_version"


@contextmanager
def _in_a_sentence(doing: str, remedy: str) -> Iterator[None]:
    """End with a sentence whatever the client of the Hub raises; it has errors of several libraries."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if status in (401, 403):
            remedy = f"the token must be one that may write there, by 'hf auth login' or HF_TOKEN; then {remedy}"
        raise SettingsError(f"{doing} failed ({reason}); {remedy}") from error


def check_repository(repository: object, *, version: str, private: bool, overwrite: bool) -> set[str] | None:
    """Look whether a version of a bundle can be uploaded to a repository.

    Args:
        repository: owner/name.
        version: that is to be tagged.
        private: whether the repository is to be private.
        overwrite: replace a version that is there.

    Returns:
        the files that are there, None if there is no such repository yet.

    Raises:
        SettingsError: if it cannot be asked, is public where a private one is meant or the other way round, holds
            something else, or has that version.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not isinstance(repository, str) or len(list(filter(None, repository.split("/")))) != 2:
        raise SettingsError(f"--push is {repository!r}; it must be owner/name")
    if get_token() is None:
        raise SettingsError(
            "there is no token for the Hugging Face Hub; make one that may write, and run 'hf auth login' or "
            "set HF_TOKEN"
        )
    api = HfApi()
    with _in_a_sentence(f"asking the Hub about {repository}", "check the name and the network, and run this again"):
        api.whoami()
        try:
            found = api.model_info(repository)
        except RepositoryNotFoundError:
            return None
        tags = [tag.name for tag in api.list_repo_refs(repository).tags]
    files = {file.rfilename for file in found.siblings or []}
    if found.private != private:
        there, meant = ("private", "public") if found.private else ("public", "private")
        raise SettingsError(
            f"{repository} is {there}, and a {meant} one is meant; add --private {str(found.private).lower()} "
            "or change it in its settings on the Hub"
        )
    if files - {".gitattributes", "README.md"} and "configs/metadata.json" not in files:
        raise SettingsError(f"{repository} holds something else than a bundle; choose another name")
    if version in tags and not overwrite:
        raise SettingsError(
            f"{repository} has version {version}, which others may have fetched; raise the version in "
            "configs/metadata.json, or replace it with --overwrite true"
        )
    return files


def push_bundle(folder: Path, repository: str, *, version: str, private: bool, there: set[str] | None) -> None:
    """Say what will be uploaded, upload it, and tag it as that version and as the latest one.

    Args:
        folder: bundle in its distributed form.
        repository: owner/name; made if it does not exist.
        version: of the bundle.
        private: whether a new repository is private.
        there: files of the repository, as :func:`check_repository` returned them.

    Raises:
        SettingsError: if it fails; without the tags, so that nobody gets half a version.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError
    from monai.bundle import push_to_hf_hub

    address = f"{constants.ENDPOINT}/{repository}"
    sizes = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    state = f"{'new' if there is None else 'there already'}, {'private' if private else 'public'}"
    plan = [f"upload of {len(sizes)} files, {_megabytes(sizes.values())}, to {address} ({state}):"]
    for name in sorted({path.parts[0] for path in sizes}):
        inside = [size for path, size in sizes.items() if path.parts[0] == name]
        plan.append(f"  {name:24} {len(inside):4} file(s) {_megabytes(inside):>12}")
    stale = sorted((there or set()) - {path.as_posix() for path in sizes} - {".gitattributes"})
    if stale:
        plan.append(f"  and {len(stale)} file(s) of an earlier version deleted: {', '.join(stale)}")
    print("\n".join(plan), flush=True)
    api, card = HfApi(), folder / "README.md"
    content = card.read_bytes()
    again = "run this again with --overwrite true: what has arrived is not sent a second time"
    with _in_a_sentence(f"uploading to {repository}", again):
        try:
            push_to_hf_hub(
                repository,
                folder.name,
                str(folder.parent),
                private=private,
                delete_patterns="*",
                commit_message=f"{folder.name} {version}",
            )
        finally:
            card.write_bytes(content)
        done = api.upload_file(
            path_or_fileobj=content,
            path_in_repo="README.md",
            repo_id=repository,
            commit_message=f"Model card of {folder.name} {version}",
        )
        for tag in (version, LATEST):  # made again, a tag would stay where it is
            with suppress(RevisionNotFoundError):
                api.delete_tag(repository, tag=tag)
            api.create_tag(repository, tag=tag, revision=done.oid)
    print(
        f"uploaded: {address}, version {version}; fetch it: python -m monai.bundle download --name {folder.name} "
        f"--source huggingface_hub --repo {repository} --version {version} --bundle_dir FOLDER"
    )


def _megabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:,.1f} MB"
