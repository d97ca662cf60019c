# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""The pages of a bundle as it is distributed: its own, with commands that hold there, settings, and the model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.bundles import sources
from common.weights import Known, Receipt
from common.weights.cells import describe
from common.weights.origins import licence_terms

from ..checkpoints import catalogue
from ..checkpoints.cells import published_file
from .configs import BUNDLES, OVERLAYS, Derived
from .sbom import required_packages, write_sbom

__all__ = ["Pages", "write_pages"]


@dataclass(frozen=True)
class Pages:
    """What the pages of a bundle tell.

    Attributes:
        bundle: of the collection.
        configs: that are distributed.
        metadata: of them.
        derived: task that the bundle is made for.
        start: what a derived task has of that bundle.
        receipt: of the encoder that is carried.
        trained: whether a fine-tuned model is carried.
        random: whether a random network is.
        hosted: whether the weights are to be fetched.
    """

    bundle: str
    configs: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, Any]
    derived: Derived | None
    start: str
    receipt: Receipt | None
    trained: bool
    random: bool
    hosted: bool


def write_pages(folder: Path, told: Pages) -> None:
    """Write README.md, docs with the pictures that they show, the licence of the weights, and what is in the bundle."""
    licence, of_weights = _licence(told.receipt, trained=told.trained)
    held = _held(told.bundle, told.receipt, trained=told.trained, random=told.random)
    about = _about(folder.name, told.metadata, weights=held, licence=of_weights, hosted=told.hosted)
    page = _page(told.bundle, told.derived, about=about, start=told.start)
    (folder / "docs").mkdir()
    (folder / "docs" / "README.md").write_text(page, "utf-8")
    (folder / "docs" / "settings.md").write_text(_settings_page(told.bundle, told.configs), "utf-8")
    (folder / "README.md").write_text(_card(page, told.bundle, licence, told.receipt, trained=told.trained), "utf-8")
    for picture in (BUNDLES / told.bundle / "docs").glob("*.png"):
        if f"]({picture.name})" in page:
            shutil.copyfile(picture, folder / "docs" / picture.name)
    if of_weights:
        text = f"Licence of the weights in models/: {of_weights}.\n"
        text += "".join(f"Mind: {term}.\n" for term in licence_terms(of_weights))
        if told.receipt is not None and (found := re.match(r"CC-(BY[A-Z-]*)-([\d.]+)", told.receipt.licence)):
            text += (
                "The encoder was translated from the checkpoint that its authors published; "
                "models/pretrained_encoder.json says from which file, and what was changed.\n"
                f"https://creativecommons.org/licenses/{found[1].lower()}/{found[2].rstrip('.')}/\n"
            )
        text += "The code is under the LICENSE file.\n"
        (folder / "docs" / "data_license.txt").write_text(text, "utf-8")
    write_sbom(folder, folder.name, told.metadata, licence=of_weights)


def _page(bundle: str, derived: Derived | None, *, about: str, start: str) -> str:
    """Return the bundle's page with the commands and links that hold in its distributed form.

    Args:
        bundle: of the collection.
        derived: task that the bundle is made for.
        about: what to say of its weights, their licence and its packages.
        start: what a derived task has of that bundle.
    """
    text = (BUNDLES / bundle / "docs" / "README.md").read_text("utf-8")
    text = re.sub(r"From the repository root \([^)]*\):", "From inside this folder:", text)
    text = re.sub(rf"--bundle_root bundles/{bundle} ?", "", text)
    text = re.sub(rf"(?:bundles/{bundle}/)?configs/(\w+)\.yaml", r"configs/\1.json", text)
    for source, name in OVERLAYS.items():
        text = text.replace(f"common/configs/{source}", f"configs/{name}").replace(
            f"common/configs/{Path(source).stem}.json", f"configs/{name}"
        )
    text = text.replace("[settings](../../../docs/settings.md)", "[settings](settings.md)")
    text = re.sub(r"\[([^\]]*)\]\(\.\./\.\./\.\./([^)]*)\)", r"\1 (`\2` of the collection)", text)
    text = re.sub(r"(`python tools/[^`]*`)", r"\1 (of the collection)", text)
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    head, rest = text.split("### Authors\n", 1)
    title, summary = head.split("\n", 1)
    note = (
        "This is the bundle as it is distributed. The code of all methods is in `scripts`, every setting with a line "
        "on what it does in [settings](settings.md). What is said to be *of the collection* belongs to the OpenMind "
        f"bundle collection, from which this was exported.\n\n{about}"
    )
    if derived is None:
        return f"{head}{note}\n### Authors\n{rest}"
    rest = re.sub(r" --labels \"\[[^\"]*\]\"", "", rest)
    return (
        f"# {derived.name}: {', '.join(derived.labels[1:])}\n\nA segmentation, {start} `{bundle}` "
        f"({title.split(': ', 1)[-1]}).\n\n{note}\n"
        "| value in a label map | class |\n|---|---|\n"
        + "".join(f"| {value} | {name} |\n" for value, name in enumerate(derived.labels))
        + f"\nImages of a case: {', '.join(derived.channels)}. `labels` and `channels` are set so in `configs`; what "
        f"follows is the page of the bundle that it was made from.\n{summary}### Authors\n{rest}"
    )


def _held(bundle: str, receipt: Receipt | None, *, trained: bool, random: bool) -> str:
    """Return which weights a bundle carries and what can be done with them."""
    other = _of_another(bundle, receipt)
    if trained:
        return f"`models/model.pt` is fine-tuned, ready to predict.{other}"
    if receipt is not None:
        return (
            "`models/pretrained_encoder.pt` is the pre-trained encoder, `models/model.pt` the same with a decoder that "
            f"has learned nothing yet: fine-tune before you predict.{other}"
        )
    if random:
        return "`models/model.pt` is a random network: train before you predict."
    if published_file(bundle) is None:
        return "None are in here: pre-train on your own scans."
    return (
        "None are in here: pre-train on your own scans, or import the published ones with "
        f"`python tools/import_checkpoint.py {bundle}` (of the collection)."
    )


def _about(name: str, metadata: Mapping[str, Any], *, weights: str, licence: str, hosted: bool) -> str:
    """Return what a page says of a bundle's weights, their licence, and how to get and install it."""
    pins = " ".join(f"{package}=={version}" for package, version in required_packages(metadata).items())
    commands = [
        f"pip install huggingface_hub {pins}",
        f"python -m monai.bundle download --name {name} --source huggingface_hub --repo OWNER/NAME --bundle_dir .",
        f"cd {name}",
    ]
    commands += ["python -m monai.bundle download_large_files --bundle_path ."] if hosted else []
    of_weights = f" Licence of the weights: {licence}." if licence else ""
    elsewhere = (
        "**From elsewhere** a command needs the full path of the config, and the folder in which weights are looked "
        f"for and results are written: `--config_file FOLDER/{name}/configs/train.json --bundle_root FOLDER/{name}`."
    )
    return (
        f"**Weights.** {weights} Licence of the code: Apache-2.0 (`LICENSE`).{of_weights}\n\n**To get it** from the "
        "Hugging Face Hub, with Python 3.11 or newer, OWNER/NAME being the repository there; further commands are run "
        "from inside the folder:\n\n```\n" + "\n".join(commands) + f"\n```\n\n{elsewhere}\n"
    )


def _settings_page(bundle: str, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the settings of each workflow: the defaults of its JSON, the comments of its YAML."""
    parts = ["# Settings\n\nEach is given on the command line as `--name value`.\n"]
    for file in sorted((BUNDLES / bundle / "configs").glob("*.yaml")):
        comments: dict[str, str] = {}
        for source in sources(file):
            for line in source.read_text("utf-8").split("\n# workflow")[0].splitlines():
                if found := re.match(r"(\w+): *\S.*?(?:\s+# (.*))?$", line):
                    comments[found[1]] = found[2] or comments.get(found[1], "")
        rows = []
        for name, comment in comments.items():
            value = configs[f"{file.stem}.json"].get(name, {})
            if name in ("network", "imports") or isinstance(value, dict):
                continue
            shown = value if isinstance(value, str) and value else json.dumps(value)
            cells = [name, f"`{shown}`", re.sub(r"(tools/\w+\.py)", r"\1 of the collection", comment)]
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append(
            f"\n## configs/{file.stem}.json\n\n| setting | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return re.sub(r"configs/(\w+)\.yaml", r"configs/\1.json", "".join(parts))


def _of_another(bundle: str, receipt: Receipt | None) -> str:
    """Return a sentence on an encoder that was not pre-trained by the method of its bundle, empty for one that was."""
    title = describe(bundle)[0]
    if receipt is None or receipt.method == title or "method" not in receipt.provenance:
        return ""
    name = f" ({receipt.name})" if receipt.name else ""
    return (
        f" The encoder was not pre-trained by {title}, as far as is known: {receipt.origin}{name}. What this page says "
        f"of {title} is not about it."
    )


def _catalogued(receipt: Receipt | None) -> Known | None:
    """Return the public checkpoint that an encoder is from, by the address in its receipt."""
    source = str(receipt.provenance.get("source")) if receipt is not None else ""
    found = re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)(?:/resolve/[^/]+/([^\s)]+))?", source)
    return catalogue.by_repository(found[1], found[2] or "") if found else None


def _hub_licence(words: str) -> str:
    """Return the name of a licence on the hub, ``other`` if it has none there."""
    found = re.match(r"(CC-BY(?:-NC)?(?:-SA|-ND)?-\d\.\d|Apache-2\.0|MIT)\b", words, re.I)
    return found[1].lower() if found else "other"


def _licence(receipt: Receipt | None, *, trained: bool) -> tuple[str, str]:
    """Return the licence of what a bundle holds as the Hub names it, and that of its weights in words, if any."""
    unstated = "that of whoever trained them, not stated here"
    of_encoder = receipt.licence.rstrip(".") if receipt is not None else ""
    if of_encoder.startswith(("yours", "unknown")):
        of_encoder = unstated
    if trained:
        return "other", unstated + (f"; of the pre-trained encoder {of_encoder}" if of_encoder else "")
    if not of_encoder:
        return "apache-2.0", ""
    return _hub_licence(of_encoder), of_encoder


def _card(page: str, bundle: str, licence: str, receipt: Receipt | None, *, trained: bool) -> str:
    """Return the page as a model card of the Hugging Face Hub: what it indexes first, pictures by their place."""
    method, backbone, size = bundle.rsplit("_", 2)
    about: dict[str, Any] = {"language": "en", "library_name": "monai", "license": licence}
    if licence == "other":
        words = receipt.licence if receipt is not None and not trained else "unknown"
        stated = words.lower() if re.fullmatch(r"(?!unknown)[\w.+-]+", words) else "not-stated"
        about |= {"license_name": f"code-apache-2.0-weights-{stated}", "license_link": "LICENSE"}
    other = _of_another(bundle, receipt)
    about["pipeline_tag"] = "image-segmentation"
    about["tags"] = ["monai", "medical", "mri", "3d", "self-supervised", "segmentation"]
    about["tags"] += [*([] if other else [method.replace("_", "-")]), f"{backbone}-{size}"]
    if known := _catalogued(receipt):
        about |= {"datasets": [known.data_set]} if known.data_set else {}
        about["base_model"] = known.repository
    text = re.sub(r"(\]\()(?!https?:|#)([^)]+)", r"\1docs/\2", page)
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n{text}"
