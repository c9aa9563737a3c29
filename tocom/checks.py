"""What a config names and a valid config may still lack: files, folders, modules, classes, enough images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy as np

from tocom.bundled import resolve
from tocom.data.catalogue import read_catalogue
from tocom.data.registry import listing_of
from tocom.errors import TocomError, suggest
from tocom.files import alone
from tocom.study import Study, TaskEntry, read_study


def check_study(study: Study) -> None:
    """Look at everything that a study needs and that is not made or fetched by the workflow.

    What was prepared already is not looked at again.

    Raises:
        TocomError: something is missing or cannot work; all of it is named.
    """
    found = [*_other_reference(study), *_missing_files(study), *_optimizers(study)]
    for task in study.tasks:
        if not task.is_downloaded and not (study.root / "data" / f"{task.name}.safetensors").is_file():
            found += _bad_images(study, task)
    if found:
        raise TocomError(f"study {study.study!r}: " + "; ".join(found))


def claim(studies: Iterable[Study], stores: bool) -> ExitStack:
    """Keep other runs, wherever they were started, from making the same files until what is returned is closed.

    Snakemake itself tells runs in one folder apart. Others may share a store, or a results folder by a link; each would
    delete what the other is about to read, before it makes it again.

    Args:
        stores: whether backbones and learned parts are made, and not read alone.

    Raises:
        TocomError: another run holds one of the folders.
    """
    studies = list(studies)
    folders = {study.root for study in studies} | {study.store_folder for study in studies if stores}
    with ExitStack() as claimed:
        for folder in sorted(folders):
            busy = (
                f"another run makes files in {folder}; start this one again when it has ended, or run both studies as"
                " one, with --config 'configs=[ONE.yaml,OTHER.yaml]'"
            )
            claimed.enter_context(alone(folder / ".lock", busy, wait=False))
        return claimed.pop_all()


def _other_reference(study: Study) -> Iterator[str]:
    """Yield that the study's folder holds the reference of another one, whose results would be overwritten."""
    path = study.root / "reference" / "study.json"
    if path.is_file() and read_study(path) != study:
        yield (
            f"{study.root} holds the reference run of another config of this name; give yours a name of its own"
            f" (`study:`), or remove {study.root} if it is this config that has changed"
        )


def _missing_files(study: Study) -> Iterator[str]:
    for backbone in study.backbones:
        for key, given in (("checkpoint", backbone.checkpoint), ("weights", backbone.weights)):
            if given is not None and not resolve(given).is_file():
                yield f"backbone {backbone.name!r}: {key}: no such file: {given}"
        yield from _missing_source(f"backbone {backbone.name!r}: images", backbone.images)
    yield from _missing_source("learn.source", study.learn.source)
    for name, method in study.methods.items():
        yield from _missing_source(f"method {name!r}: learn.source", method.learn.get("source"))
    for task in study.tasks:
        if task.fine_tuned is not None and not resolve(task.fine_tuned).is_file():
            yield f"task {task.name!r}: fine_tuned: no such file: {task.fine_tuned}"


def _missing_source(what: str, source: str | None) -> Iterator[str]:
    if source is not None and source not in read_catalogue() and not Path(source).is_dir():
        yield f"{what}: no such folder or data set: {source}{suggest(source, read_catalogue())}"


def _optimizers(study: Study) -> Iterator[str]:
    given = {"learn": study.learn.optimizer, "pretrain": study.pretrain.optimizer}
    given |= {f"backbone {it.name!r}: pretrain": study.pretrain_for(it.name).optimizer for it in study.backbones}
    for name, method in product(study.task_names, study.methods):
        given[f"task {name!r}, method {method!r}: finetune"] = study.finetune_for(name, method).optimizer
        if (adapted := study.adapt_for(method)) is not None:
            given[f"method {method!r}: adapt"] = adapted.optimizer
    if set(given.values()) == {"adamw"}:  # spares a slow import
        return
    from timm.optim import list_optimizers

    known = list_optimizers()
    for where, optimizer in given.items():
        if optimizer.lower() not in known:
            yield f"{where}: optimizer: timm has no {optimizer!r}{suggest(optimizer, known)}"


def _bad_images(study: Study, task: TaskEntry) -> Iterator[str]:
    """Yield what is wrong with the images of a task that needs no download."""
    data = study.data_for(task.name)
    sizes = {"train": data.train, "val": data.val, "test": data.test}
    try:
        listing = listing_of(task.name, sizes, study.image_size_for(task.name), task.source() or None, Path(data.root))
    except TocomError as error:
        named = f"task {task.name!r}: "  # which errors of one's own images begin with
        yield named + str(error).removeprefix(named)
        return
    if listing.kind == "classify":
        seen = np.unique(np.asarray(listing.splits["train"].labels))
        if len(seen) < 2:
            yield f"task {task.name!r}: its training images are of {len(seen)} class; two or more are needed to learn"
