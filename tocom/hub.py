"""Learned parts as repositories of the Hugging Face Hub: their layout, their model card, how they come and go."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tocom.errors import TocomError, first_line

#: What a repository, or a folder that becomes one, is made of; all that is read is in the first.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
#: OWNER/NAME or OWNER/NAME@REVISION.
_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def download(repository: str, names: Sequence[str], revision: str | None, instead: str) -> tuple[Path, str]:
    """Return the first of some files that a repository has, in the Hub's cache, fetched if it is not there.

    Args:
        instead: what an error says that can be done without the Hub.

    Returns:
        The file, and the commit that it is of.

    Raises:
        TocomError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in names:
        try:
            path = Path(hf_hub_download(repository, name, revision=revision))
            return path, path.parent.name  # a snapshot's folder is named after its commit
        except Exception as error:  # the Hub's client raises its own, OS and HTTP errors alike
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if absent and name != names[-1]:
                continue
            raise TocomError(
                f"{repository} (revision {revision or 'main'}) cannot be fetched from the Hub"
                f" ({first_line(error)}); check the network and the revision, or {instead}"
            ) from error
    raise AssertionError("unreachable: the last name either returns or raises")


def locate(place: str | os.PathLike) -> tuple[Path, bool]:
    """Return the file that a path, a folder or the name of a repository stands for, and whether it is from the Hub.

    What exists is never looked for on the Hub, nor what has the ending of a file.

    Raises:
        TocomError: a repository cannot be fetched.
    """
    path = Path(place)
    if path.is_dir():
        return path / WEIGHTS, False
    match = _REPOSITORY.fullmatch(str(place))
    if path.exists() or path.suffix == ".safetensors" or match is None:
        return path, False
    instead = f"check the path: there is no file {place} either"
    return download(match["name"], [WEIGHTS], match["revision"], instead)[0], True


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder as a repository, which is made if there is none; return its address.

    Raises:
        TocomError: it cannot be uploaded.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a part of tocom")
    except Exception as error:  # as above
        raise TocomError(
            f"{repository} cannot be uploaded ({first_line(error)}); check its name and the network, and log in"
            " (`hf auth login`)"
        ) from error
    return str(address)


def check_repository(name: str) -> str:
    """Return the name of a repository; raise TocomError unless it is one, without a revision."""
    match = _REPOSITORY.fullmatch(name)
    if match is None or match["revision"]:
        raise TocomError(f"{name!r} is no repository of the Hub; write OWNER/NAME")
    return name


def card(about: dict[str, Any], title: str, trains: str, reference: str, license: str, repository: str | None) -> str:
    """Return the model card of a learned part.

    Args:
        about: what its file says of it. title, trains, reference: what its class says. license: as the Hub names it.

    Raises:
        TocomError: that is no name of a licence.
    """
    if not _LICENSE.fullmatch(license):
        raise TocomError(f"{license!r} is no licence as the Hub names them; write one such as apache-2.0")
    role, backbone = about["kind"], about.get("backbone", "unknown")
    tags = ["token-compression", role, *(["vision-transformer"] if "mean" in about else [])]
    head = [f"license: {license}", "library_name: tocom", f"tags: [{', '.join(tags)}]"]
    head += [f"base_model: timm/{backbone}"] if "." in backbone else []
    behind = about.get("compressor")
    facts = {
        "part": f"`{json.dumps(about['part'])}`",
        "backbone": f"{backbone}, SHA-256 of its weights `{about.get('backbone_sha256', 'unknown')}`",
        "compressor": f"`{json.dumps(behind)}`" if behind else None,
        "degrees": f"0 to {about['max_degree']}",
        "held-out loss": _held_out(about),
        "seed": about.get("seed"),
        "recipe": f"`{json.dumps(about['recipe'])}`" if "recipe" in about else None,
        "SHA-256 of its parameters": f"`{about['sha256']}`",
        "adapted to": f"the model whose file has SHA-256 `{about['adapted_to']}`" if "adapted_to" in about else None,
        "licence": f"{license}; that of the backbone's weights may bind what was learned on them",
        "paper": _linked(reference),
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    load = f'tocom.load_part("{repository or "OWNER/NAME"}", "{role}")'
    return "\n".join(
        [
            *("---", *head, "---", "", f"# {title} for {backbone}", ""),
            f"{trains[:1].upper()}{trains[1:]}: a {role} of tocom, a benchmark of token compression in transformers.",
            *([_COMPENSATES, ""] if role == "compensator" else [""]),
            *("```python", "import tocom", "", f"part = {load}"),
            *(["vit.attach(part).set_degree(degree)"] if role == "compensator" else []),
            *("```", "", "| | |", "| --- | --- |", *rows, ""),
        ]
    )


_COMPENSATES = (
    "Added to any model that was fine-tuned from the backbone, it changes weights so that the model can run at\n"
    "another degree of compression than it was trained at, without training, and at no cost once it is folded in."
)


def _held_out(about: dict[str, Any]) -> str | None:
    if "held_out_kl" not in about:
        return None
    return f"{about['held_out_kl_without']:.4f} nats without, {about['held_out_kl']:.4f} with it"


def _linked(reference: str) -> str:
    return re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", reference)
