# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""A bundle as it is distributed: real files, every config one complete JSON, the shared code as package ``scripts``.

MONAI Label, the Model Zoo and ``monai.bundle.load`` read one JSON file at a time, and ``scripts`` is the only package
that MONAI Label unloads between two bundles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.cells import published_file
from ..commanding.environment import ROOT
from .sbom import required_packages, write_sbom

if TYPE_CHECKING:
    from common.weights import Receipt

__all__ = [
    "ENCODER",
    "Derived",
    "bundle_names",
    "check_name",
    "check_settings",
    "check_target",
    "known_settings",
    "write_bundle",
    "write_zip",
]

BUNDLES = ROOT / "bundles"
ENCODER, MODEL = "models/pretrained_encoder.pt", "models/model.pt"
# files of common/configs that are added to a config on the command line, and what they are called in a bundle
OVERLAYS = {
    "multi_gpu.yaml": "multi_gpu_pretrain.json",
    "multi_gpu_train.yaml": "multi_gpu_train.json",
    "fsdp.yaml": "fsdp_pretrain.json",
}
# the workflows that get these settings of a derived task: features are computed as the encoder was pre-trained, but
# with the input that its position table is fitted to
_OF_TASK = {
    "spacing_mm": ["train", "inference"],
    "normalization": ["train", "inference"],
    "patch_size": ["train", "inference", "features"],
}
_FILE_DATE = (
    2022,
    5,
    30,
    0,
    0,
    0,
)  # of every entry of a zip, as the Model Zoo does, so that equal files give equal zips
_STORED = {".pt", ".png", ".ts", ".safetensors"}  # compressing these again takes long and gains nothing


@dataclass(frozen=True)
class Derived:
    """What a bundle made for a task of the user's has of its own.

    Attributes:
        name: of the new bundle.
        labels: class names, background first.
        channels: names of the images of a case.
    """

    name: str
    labels: Sequence[str]
    channels: Sequence[str] = field(default_factory=lambda: ["image"])

    def settings(self) -> dict[str, Any]:
        """Return what they are to the configs."""
        return {"labels": list(self.labels), "channels": len(self.channels)}


def bundle_names(which: str = "all") -> list[str]:
    """Return the bundles of the collection that ``which`` names: one, several with commas between, or ``all``.

    Raises:
        SystemExit: if one is unknown.
    """
    known = sorted(path.parent.parent.name for path in BUNDLES.glob("*/configs/metadata.json"))
    asked = known if which == "all" else which.split(",")
    for name in asked:
        if name not in known:
            raise SystemExit(f"Stopped: there is no bundle {name!r}; choose all, or one of {', '.join(known)}")
    return asked


def check_name(name: str) -> None:
    """Refuse a bundle name that MONAI or MONAI Label would not take as it is.

    Raises:
        SystemExit: saying why.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise SystemExit(
            f"Stopped: {name!r} cannot be the name of a bundle; use letters, digits, _ and -, a letter first"
        )
    if re.search(r"._v", name):
        raise SystemExit(
            f"Stopped: MONAI takes what follows _v in a bundle's name for a version, and would call {name!r} "
            f"{re.split('_v', name)[0]!r}; choose a name without _v, such as {name.replace('_v', '-v')!r}"
        )
    if name.lower() in ("scripts", "common", "monai"):
        raise SystemExit(f"Stopped: {name!r} is the name of a Python package that bundles use; choose another")


def _on_its_own(value: Any, bundle: str) -> Any:
    """Return a complete config that asks no other file what it is, and in which the shared package is ``scripts``."""
    if isinstance(value, dict):
        if value.get("_target_") == "common.bundles.bundle_name":
            return bundle
        return {key: _on_its_own(one, bundle) for key, one in value.items()}
    if isinstance(value, list):
        completes = [isinstance(one, dict) and one.get("_target_") == "common.bundles.complete" for one in value]
        return [_on_its_own(one, bundle) for one, done in zip(value, completes, strict=True) if not done]
    return re.sub(r"\bcommon(?=\.[a-z])", "scripts", value) if isinstance(value, str) else value


def _with_settings(
    config: dict[str, Any],
    name: str,
    settings: Mapping[str, Any],
    *,
    data: Mapping[str, Any] | None = None,
    task: bool = False,
) -> dict[str, Any]:
    """Return a config with other defaults; what it reads from a trained model's JSON keeps doing so.

    Args:
        config: of one workflow.
        name: of the workflow.
        settings: of which it takes those that it has and that mean the same there; a text may be an expression.
        data: further ones, below these, which are what they are, such as the names of classes.
        task: they are of a derived task, which only its segmentation follows.
    """
    from common.literals import as_data, literal

    changed = dict(config)
    for key, value in {**(data or {}), **settings}.items():
        if key not in config or (task and name not in _OF_TASK.get(key, (name,))):
            continue
        if name != "train" and _is_rule(key, value):
            continue
        if key == "patch_size" and "crop_size" in config:  # there it is the region that the crops are cut from
            continue
        from_model = re.match(r"\$@trained\.get\('(\w+)'", str(config[key]))
        if from_model:
            changed[key] = f"$@trained.get({from_model[1]!r}, {literal(value)})"
        else:
            changed[key] = value if key in settings else as_data(value)
    return changed


def _is_rule(key: str, value: Any) -> bool:
    """Return whether fine-tuning turns a setting into numbers, which inference reads beside the model."""
    if key == "spacing_mm":
        return isinstance(value, str)
    return key == "normalization" and (value == "ct" or (isinstance(value, list) and "ct" in value))


def _of_model(bundle: str, model: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what inference has to know of a fine-tuned model, by the JSON beside it.

    It reads that JSON itself, but a TorchScript file with the config inside is used where there is none.

    Raises:
        SystemExit: if the model is of another bundle, or ``settings`` say otherwise.
    """
    from common.bundles import read_config
    from common.weights import differences, trained_settings

    inference = read_config(BUNDLES / bundle / "configs" / "inference.yaml")
    asked = {key for key, value in inference.items() if str(value).startswith(f"$@trained.get('{key}'")}
    told = trained_settings(str(model))
    if told.get("bundle", bundle) != bundle:
        raise SystemExit(f"Stopped: {model} was trained with {told['bundle']}, not with {bundle}; name that bundle")
    fixed = {key: value for key, value in settings.items() if key in asked and not _is_rule(key, value)}
    for key, (theirs, ours) in differences({"settings": told}, fixed).items():
        raise SystemExit(
            f"Stopped: {model} was trained with {key} {theirs}, and here it is {ours}; leave it out: the JSON beside "
            "the model says it"
        )
    return {key: value for key, value in told.items() if key in asked}


def _configs(
    bundle: str,
    settings: Mapping[str, Any],
    of_model: Mapping[str, Any] | None = None,
    derived: Derived | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the complete configs of a bundle by the names of their JSON files.

    Args:
        bundle: of the collection.
        settings: other defaults for all of them.
        of_model: what a fine-tuned model was made for: defaults of segmentation, the network's size of all, and the
            input that an encoder is fitted to, of features.
        derived: task that the bundle is made for, whose classes and channels all of them have.
    """
    from common.bundles import read_config

    configs, of_model = {}, of_model or {}
    of_task = {} if derived is None else derived.settings()
    network = read_config(BUNDLES / bundle / "configs" / "train.yaml")["network_settings"]
    sizes = {key: value for key, value in of_model.items() if key in network}
    for file in sorted((BUNDLES / bundle / "configs").glob("*.yaml")):
        config = _on_its_own(read_config(file), bundle)
        own = dict(of_model if file.stem in ("train", "inference", "evaluate") else sizes)
        if file.stem == "train" and isinstance(own.get("normalization"), list):
            # figures of the model's data; training finds its own
            own["normalization"] = ["ct" if isinstance(one, dict) else one for one in own["normalization"]]
        if file.stem == "features" and "patch_size" in of_model:
            own["patch_size"] = of_model["patch_size"]
        changed = _on_its_own(dict(settings), bundle)
        configs[f"{file.stem}.json"] = _with_settings(
            config, file.stem, changed, data={**own, **of_task}, task=derived is not None
        )
    for source, name in OVERLAYS.items():
        if (overlay := ROOT / "common" / "configs" / source).is_file():
            configs[name] = _on_its_own(read_config(overlay), bundle)
    return configs


def known_settings(bundle: str) -> dict[str, Any]:
    """Return every top-level name of a bundle's configs with its default."""
    return {name: value for config in _configs(bundle, {}).values() for name, value in config.items()}


def check_settings(bundle: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the bundle does not have, or whose values can be nothing but mistakes.

    Raises:
        SystemExit: naming the setting.
        SettingsError: if the spacing is none to train at.
    """
    from common.data import check_spacing
    from common.settings import unknown_settings

    known = known_settings(bundle)
    if told := unknown_settings(settings, known):
        raise SystemExit(f"Stopped: {told}")
    if "spacing_mm" in settings:
        check_spacing(settings["spacing_mm"])
    for name, value in settings.items():
        default = known.get(name)
        numbers = default if isinstance(default, list) and default else [default]
        number = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers)
        if name != "spacing_mm" and number and isinstance(value, str) and value[:1] not in ("$", "@"):
            raise SystemExit(f"Stopped: {name} is {value!r}; it must be like {default}, the default")


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse to write over a folder that is there.

    Raises:
        SystemExit: if it may not be replaced.
    """
    if target.exists() and not overwrite:
        raise SystemExit(
            f"Stopped: {target} exists, and what was trained in it would be lost; give another --output, or replace it "
            "with --overwrite true"
        )


def _metadata(bundle: str, settings: Mapping[str, Any], derived: Derived | None, start: str) -> dict[str, Any]:
    from common.bundles import read_metadata

    metadata = read_metadata(BUNDLES / bundle)
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    if patch := settings.get("patch_size"):
        image["spatial_shape"] = pred["spatial_shape"] = [patch] * 3 if isinstance(patch, int) else list(patch)
    if derived is None:
        return metadata
    image |= {"num_channels": len(derived.channels), "channel_def": {str(i): n for i, n in enumerate(derived.channels)}}
    pred |= {"num_channels": len(derived.labels), "channel_def": {str(i): n for i, n in enumerate(derived.labels)}}
    classes = ", ".join(derived.labels[1:])
    return metadata | {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"derived from {bundle} {metadata['version']}"},
        "name": derived.name,
        "task": f"Segmentation of {classes}",
        "description": f"Segmentation of {classes}, {start} {bundle}. " + metadata["description"],
        "data_source": "The user's own",
        "image_classes": f"{len(derived.channels)} channel(s): {', '.join(derived.channels)}",
        "label_classes": "integer label map: " + ", ".join(f"{i} {name}" for i, name in enumerate(derived.labels)),
    }


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
    text = re.sub(r"\[([^\]]*)\]\(\.\./\.\./\.\./([^)]*)\)", r"\1 (`\2` of the collection)", text)
    text = re.sub(r"(`python tools/[^`]*`)", r"\1 (of the collection)", text)
    text = text.replace("are in the README at the root", "are in [settings](settings.md)")
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


def _held(bundle: str, *, encoder: bool, trained: bool, random: bool) -> str:
    """Return which weights a bundle carries and what can be done with them."""
    if trained:
        return "`models/model.pt` is fine-tuned, ready to predict."
    if encoder:
        return (
            "`models/pretrained_encoder.pt` is the pre-trained encoder, `models/model.pt` the same with a decoder that "
            "has learned nothing yet: fine-tune before you predict."
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
    from common.bundles import sources

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


def _published(receipt: Receipt | None) -> bool:
    """Return whether these are published OpenMind weights; of a file of unknown origin that is not certain."""
    return receipt is not None and receipt.licence.startswith("CC-BY-4.0")


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
    return ("cc-by-4.0" if _published(receipt) else "other"), of_encoder


def _card(page: str, bundle: str, licence: str, receipt: Receipt | None) -> str:
    """Return the page as a model card of the Hugging Face Hub: what it indexes first, pictures by their place."""
    import yaml

    method, backbone, size = bundle.rsplit("_", 2)
    about: dict[str, Any] = {"language": "en", "library_name": "monai", "license": licence}
    if licence == "other":
        about |= {"license_name": "code-apache-2.0-weights-not-stated", "license_link": "LICENSE"}
    about["pipeline_tag"] = "image-segmentation"
    about["tags"] = ["monai", "medical", "mri", "3d", "self-supervised", "segmentation"]
    about["tags"] += [method.replace("_", "-"), f"{backbone}-{size}"]
    if receipt is not None and _published(receipt):
        about["datasets"] = ["AnonRes/OpenMind"]
        if origin := re.search(r"huggingface\.co/([\w.-]+/[\w.-]+)", str(receipt.provenance.get("source"))):
            about["base_model"] = origin[1]
    text = re.sub(r"(\]\()(?!https?:|#)([^)]+)", r"\1docs/\2", page)
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n{text}"


def _weights(
    bundle: str, target: Path, encoder: Path | None, settings: Mapping[str, Any], data: Mapping[str, Any]
) -> Receipt | None:
    """Write the encoder, fitted to the network of the segmentation, and a model to start from; return its receipt.

    Args:
        bundle: of the collection.
        target: folder to write to.
        encoder: pre-trained; None for a random network.
        settings: as in :func:`_with_settings`.
        data: as there.

    Raises:
        WeightsError: if the encoder does not fit; nothing is written then.
    """
    import torch
    from monai.bundle import ConfigParser

    from common.bundles import read_config
    from common.errors import WeightsError
    from common.files import sha256, write_record
    from common.networks import mark_untrained
    from common.weights import differences, read_checkpoint, transfer_weights, write_checkpoint

    config = read_config(BUNDLES / bundle / "configs" / "train.yaml")
    parser = ConfigParser(_with_settings(config, "train", settings, data=data))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # equal exports are equal to the bit
        network = parser.get_parsed_content("network_def")
    if encoder is None:
        write_checkpoint(mark_untrained(network.state_dict()), target / MODEL)
        return None
    receipt = transfer_weights(network, encoder)
    heads = {"num_heads": parser.get_parsed_content("num_heads")} if "num_heads" in config else {}
    for theirs, ours in differences(receipt.provenance, heads).values():  # no tensor shows it
        raise WeightsError(f"{encoder} was made with num_heads {theirs}, not {ours}; add --num_heads {theirs}")
    if any(key.endswith("position_embedding") for key in receipt.adapted):
        patch = parser.get_parsed_content("patch_size")
        receipt.fitted_to = [patch] * 3 if isinstance(patch, int) else list(patch)
    weights, found = network.state_dict(), read_checkpoint(encoder)
    decoder = {key: value for key, value in found.items() if key.startswith("decoder.")}
    fits = all(key in weights and weights[key].shape == value.shape for key, value in decoder.items())
    kept = {key: value for key, value in weights.items() if key.startswith("encoder.")} | (decoder if fits else {})
    write_checkpoint(kept, target / ENCODER)
    source = str(receipt.provenance.get("source", encoder))
    address = re.search(r"https?://[^\s)]+", source)
    write_record(
        receipt.provenance
        | {
            "source": address[0] if address else Path(source).name,  # a path would tell of the machine
            "sha256": sha256(target / ENCODER),
            "derived_from": {"file": encoder.name, "sha256": receipt.sha256},
            "licence": receipt.licence,
            "citation": receipt.citation,
            "adapted": receipt.adapted,
        }
        | ({"fitted_to": receipt.fitted_to} if receipt.fitted_to else {}),
        (target / ENCODER).with_suffix(".json"),
    )
    write_checkpoint(mark_untrained(weights), target / MODEL)
    return receipt


def _copy_trained(model: Path, target: Path) -> None:
    """Take over a fine-tuned model and what inference must know of it."""
    for source, place in ((model, target / MODEL), (model.with_suffix(".json"), (target / MODEL).with_suffix(".json"))):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


def _large_files(folder: Path, address: str) -> list[dict[str, str]]:
    """Return the entries of large_files.yml for the weights in a folder, which are fetched from under ``address``."""
    from common.files import sha256

    return [
        {
            "path": file.relative_to(folder).as_posix(),
            "url": f"{address.rstrip('/')}/{file.name}",
            "hash_val": sha256(file),
            "hash_type": "sha256",
        }
        for file in sorted((folder / "models").glob("*.pt"))
    ]


def write_bundle(
    bundle: str,
    target: Path,
    *,
    settings: Mapping[str, Any],
    encoder: Path | None = None,
    optional: bool = False,
    model: Path | None = None,
    from_scratch: bool = False,
    weights_url: str | None = None,
    derived: Derived | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the distributed form of a bundle, whole or not at all.

    Args:
        bundle: of the collection.
        target: folder to write, named like the bundle.
        settings: top-level names of its configs with other defaults.
        encoder: pre-trained encoder to carry; ``models/model.pt`` becomes this encoder with a decoder that is marked as
            untrained.
        optional: leave the encoder out if it does not fit the network, as the bundle's own need not fit a model.
        model: fine-tuned model to carry as ``models/model.pt`` instead, with its JSON beside it.
        from_scratch: carry a random network, marked as untrained, and train from it.
        weights_url: leave the weights out and say in large_files.yml that they are found under this address; they are
            written beside the folder, to be put there.
        derived: task of the user's that the bundle is made for.
        overwrite: replace a folder that is there.

    Returns:
        the folder.

    Raises:
        SystemExit: if the folder is there and may not be replaced, or settings are not those of the model.
        WeightsError: if the encoder does not fit and is not optional.
    """
    import yaml

    from common.bundles import check_links
    from common.errors import WeightsError
    from common.files import write_json

    check_target(target, overwrite=overwrite)
    check_links(BUNDLES / bundle)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    of_task = {} if derived is None else derived.settings()
    of_model = _of_model(bundle, model, {**of_task, **settings}) if model is not None else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    source = BUNDLES / bundle
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        folder = Path(scratch) / target.name
        shutil.copytree(
            ROOT / "common", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__", "configs", "*.pyc")
        )
        random = {"from_scratch": True} if from_scratch else {}
        configs = _configs(bundle, {**settings, **random}, of_model, derived)
        data = {**of_model, **of_task}
        for name, config in configs.items():
            write_json(config, folder / "configs" / name)
        start = "to be fine-tuned from the encoder of"
        if model is not None or from_scratch:
            start = f"{'fine-tuned' if model is not None else 'to be trained from scratch'} with the network of"
        metadata = _metadata(bundle, {**data, **settings}, derived, start)
        write_json(metadata, folder / "configs" / "metadata.json")
        for name in ("configs/logging.conf", "LICENSE"):
            shutil.copyfile(source / name, folder / name)
        receipt = None
        if encoder is not None or from_scratch:
            try:
                receipt = _weights(bundle, folder, None if from_scratch else encoder, settings, data)
            except WeightsError:
                if not optional:
                    raise
        if model is not None:
            _copy_trained(model, folder)
        licence, of_weights = _licence(receipt, trained=model is not None)
        held = _held(bundle, encoder=receipt is not None, trained=model is not None, random=from_scratch)
        about = _about(target.name, metadata, weights=held, licence=of_weights, hosted=bool(weights_url))
        page = _page(bundle, derived, about=about, start=start)
        (folder / "docs").mkdir()
        (folder / "docs" / "README.md").write_text(page, "utf-8")
        (folder / "docs" / "settings.md").write_text(_settings_page(bundle, configs), "utf-8")
        (folder / "README.md").write_text(_card(page, bundle, licence, receipt), "utf-8")
        for picture in (source / "docs").glob("*.png"):
            if f"]({picture.name})" in page:
                shutil.copyfile(picture, folder / "docs" / picture.name)
        if of_weights:
            text = f"Licence of the weights in models/: {of_weights}.\n"
            if _published(receipt):
                text += (
                    "The encoder was translated from the checkpoint that its authors published; "
                    "models/pretrained_encoder.json says from which file, and what was changed.\n"
                    "https://creativecommons.org/licenses/by/4.0/\n"
                )
            text += "The code is under the LICENSE file.\n"
            (folder / "docs" / "data_license.txt").write_text(text, "utf-8")
        write_sbom(folder, target.name, metadata, licence=of_weights)
        if weights_url:
            entries = _large_files(folder, weights_url)
            (folder / "large_files.yml").write_text(yaml.safe_dump({"large_files": entries}, sort_keys=False), "utf-8")
            beside = target.parent / f"{target.name}_weights"
            beside.mkdir(exist_ok=True)
            for file in (folder / "models").glob("*.pt"):
                os.replace(file, beside / file.name)
        for path in sorted(folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.replace(Path(scratch) / "old")
        folder.replace(target)
    return target


def write_zip(folder: Path, *, version: str) -> tuple[Path, str]:
    """Pack a bundle as ``<name>_v<version>.zip`` beside it, with one folder at the top; equal files give equal bytes.

    Returns:
        the zip and its SHA-1, which the Model Zoo's list holds.
    """
    from common.files import replace_file

    path = folder.parent / f"{folder.name}_v{version}.zip"

    def write(temporary: str) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for file in sorted(
                path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
            ):
                entry = zipfile.ZipInfo(f"{folder.name}/{file.relative_to(folder).as_posix()}", _FILE_DATE)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_STORED if file.suffix in _STORED else zipfile.ZIP_DEFLATED
                with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, 2**20)

    replace_file(path, write)
    with path.open("rb") as stream:
        return path, hashlib.file_digest(stream, "sha1").hexdigest()
