"""Evaluate every cell of a checkpoint: (method, inference degree)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from tocom.bundled import resolve
from tocom.compressed import Compressed, gflops
from tocom.errors import TocomError
from tocom.files import Paths, checkpoint_files, listed, save_arrays, sha256
from tocom.hub import WEIGHTS, locate
from tocom.jobs import EvaluatedMethod, EvaluateJob
from tocom.made import made
from tocom.models import compress, family_of, load_model, pick_device
from tocom.parts import Compensator, Part, file_of_seed, kind_of, load_part, source_degree
from tocom.settings import PLAIN, EvaluateSettings
from tocom.tasks import Task, Validated, load_task
from tocom.training import bar, make_deterministic

Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluated:
    """A method, how it is evaluated, and the compensator that it adds to a checkpoint, if it adds one, and its file."""

    name: str
    how: EvaluatedMethod
    compensator: Compensator | None
    file: Path | None = None


@dataclass
class Used:
    """What took part in an evaluation beside checkpoints: compressors and compensators, and files of the latter."""

    parts: list[Part] = field(default_factory=list)
    files: dict[Path, None] = field(default_factory=dict)


def evaluate(
    job: EvaluateJob,
    checkpoints: Paths,
    data: str | os.PathLike,
    compensators: Mapping[str, Paths],
    output: str | os.PathLike,
) -> list[dict[str, Any]]:
    """Evaluate all cells of some checkpoints of one task and keep what was predicted for every test image.

    Args:
        checkpoints: files, or a folder of them. data: the prepared task.
        compensators: method -> file, for the job's methods that add one; or files, of which a model gets the one that
            was learned with its seed; or a folder of files that were adapted to the checkpoints, named as they are.
        output: a file with what is predicted, arrays [cells, images, ...], and the cells in its metadata.

    Returns:
        The cells: method, compressor, train_degree, seed, infer_degree, compensated, compensator, compensator_seed
        (that it was learned with, where its file says so), scale (chosen on validation images; 0: declined), gflops,
        and of language models cache_bytes.

    Raises:
        TocomError: an input is missing, corrupt, of another task or of no seed that is needed, or a degree is out of
            range.
    """
    make_deterministic(job.settings.threads)
    task = load_task(data, pick_device(job.settings.device))
    for name, how in job.methods.items():
        if how.compensated and name not in compensators:
            raise TocomError(f"method {name!r} adds a compensator; name its file (--compensator {name}=FILE)")
    files = checkpoint_files(checkpoints)
    cells, records = [], []
    total = len(files) * sum(len(how.infer_degrees) for how in job.methods.values())
    used = Used()
    with bar(None, f"evaluate {task.name}", total=total) as progress:
        for path in files:
            for cell, record in evaluate_checkpoint(path, task, job, compensators, progress, used):
                cells.append(cell)
                records.append(record)
    arrays = {name: np.stack([record[name] for record in records]) for name in records[0]}
    about = {"kind": "predictions", "task": task.name, "backbone": job.backbone, "metric": task.metric, "cells": cells}
    inputs = {"data": data, "checkpoint": files, "compensator": list(used.files)}
    about["made"] = made(job, output, inputs, used.parts)
    save_arrays(output, arrays | task.labels(), about)
    return cells


def _method(
    name: str, how: EvaluatedMethod, compensators: Mapping[str, Paths], checkpoint: str | os.PathLike, seed: int
) -> Evaluated:
    if not how.compensated:
        return Evaluated(name, how, None)
    places = listed(compensators[name])
    if len(places) == 1 and _of_checkpoints(places[0]):
        file = place = places[0] / Path(checkpoint).name
    else:
        files = [locate(place)[0] for place in places]
        file = file_of_seed(files, seed)
        place = places[files.index(file)]  # by which a part knows that it comes from the Hub
    return Evaluated(name, how, load_part(place, "compensator"), file)


def _of_checkpoints(place: Path) -> bool:
    """Return whether a folder has a file for each checkpoint, named as it is, and not one part as the Hub has it."""
    return place.is_dir() and not (place / WEIGHTS).is_file()


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    task: Task,
    job: EvaluateJob,
    compensators: Mapping[str, Paths],
    progress: tqdm,
    used: Used | None = None,
) -> list[tuple[dict[str, Any], Record]]:
    """Return the cells of a checkpoint with what is predicted in each; plain methods come first.

    A model that was trained at no one degree has no compensated cells.

    Args:
        used: is told what took part.
    """
    settings = job.settings
    model, meta = load_model(checkpoint)
    if meta.get("task") != task.name:
        raise TocomError(
            f"{checkpoint} was fine-tuned for {meta.get('task')!r}, not for {task.name!r}; check the paths"
        )
    source = source_degree(meta["train_degree"])
    chosen = {
        name: how
        for name, how in job.methods.items()
        if how.concerns(str(meta["train_degree"]), meta["seed"]) and (source is not None or not how.compensated)
    }
    methods = [_method(name, how, compensators, checkpoint, meta["seed"]) for name, how in chosen.items()]
    for method in methods:
        if method.compensator is not None:
            check_compensator(checkpoint, meta, model, method.compensator)
    vit = compress(model.to(task.device), meta, meta["compressor"], source or 0)
    module = task.restore(vit, meta)
    if used is not None:
        used.parts += [vit.compressor, *(method.compensator for method in methods)]
        used.files |= dict.fromkeys(method.file for method in methods if method.file is not None)
    run = {
        "compressor": meta["compressor"]["kind"].rpartition(":")[2],
        "train_degree": meta["train_degree"],
        "seed": meta["seed"],
    }
    cells: list[tuple[dict[str, Any], Record]] = []
    # By degree, since neither depends on a compensator: what the bare model predicts, and what a forward pass costs.
    plain: dict[int, Record] = {}
    costs: dict[int, float] = {}
    unchanged: dict[int, Validated] = {}  # what the bare model makes of the validation images

    def record(method: Evaluated, scale: float, known: Record | None = None) -> Record:
        predicted = task.test(module, settings.batch_size, settings.precision) if known is None else known
        added = method.compensator
        cell = {"method": method.name, **run, "infer_degree": vit.degree, "compensated": added is not None}
        cell |= {"compensator": PLAIN if added is None else kind_of(type(added)).rpartition(":")[2]}
        cell |= {"compensator_seed": None if added is None else added.metadata.get("seed")}
        if vit.degree not in costs:
            costs[vit.degree] = round(gflops(vit), 6)
        cell |= {"scale": scale, "gflops": costs[vit.degree]}
        kept = vit.cache_bytes()
        cells.append((cell if kept is None else cell | {"cache_bytes": kept}, predicted))
        progress.update()
        return predicted

    def validate() -> Validated:
        if vit.scale or vit.degree not in unchanged:
            found = task.validate(module, settings.batch_size, settings.precision)
            if vit.scale:
                return found
            unchanged[vit.degree] = found
        return unchanged[vit.degree]

    for method in methods:
        if method.compensator is None:
            for degree in method.how.infer_degrees:
                vit.set_degree(degree)
                plain[degree] = record(method, 0.0, plain.get(degree))
    for method in methods:
        if method.compensator is not None:
            vit.detach().set_degree(source)
            vit.attach(method.compensator)
            scales = [scale * method.compensator.trained_scale for scale in method.how.scales or settings.scales]
            for degree in method.how.infer_degrees:
                vit.set_degree(degree)  # at the train degree there is nothing to compensate
                scale = 0.0 if degree == source else choose_scale(vit, scales, validate, settings)
                vit.set_degree(degree, scale)
                record(method, scale, known=None if scale else plain.get(degree))
    return cells


def choose_scale(
    vit: Compressed, scales: Sequence[float], validate: Callable[[], Validated], settings: EvaluateSettings
) -> float:
    """Return the scale that validation images speak for at the model's present degree; see :func:`chosen`.

    Args:
        validate: returns what the model as it is makes of the validation images.
    """
    if len(scales) == 1:
        return scales[0]
    degree, found = vit.degree, {}
    for scale in sorted(scales):
        vit.set_degree(degree, scale)
        found[scale] = validate()
    return chosen(found, settings.select_by, settings.decline_within)


def chosen(found: Mapping[float, Validated], select_by: str, decline_within: float) -> float:
    """Return the scale with the best validation figure, or 0 if that is among them and the best is not clearly better.

    Args:
        found: scale -> what validation images say of the model with it.
        select_by: "score" (ties go to the lower loss, then to the smaller scale) or "loss".
        decline_within: the best figure is clearly better if it is above that of 0 by more than so many standard errors
            of their difference; 0: it always is.
    """

    def rank(scale: float) -> tuple[float, ...]:
        return found[scale][:2] if select_by == "score" else (found[scale].loss,)

    best = max(sorted(found), key=rank)  # the first of equals
    if best == 0 or 0 not in found or decline_within == 0:
        return best
    gains = found[best].by_image[select_by] - found[0].by_image[select_by]
    return best if is_beyond(gains, decline_within) else 0.0


def is_beyond(gains: NDArray, standard_errors: float) -> bool:
    """Return whether the mean of paired differences [images] is more than so many standard errors above 0."""
    n = len(gains)
    return n > 1 and float(gains.mean()) > standard_errors * float(gains.std(ddof=1)) / sqrt(n)


def check_compensator(checkpoint: str | os.PathLike, meta: dict, model: nn.Module, compensator: Compensator) -> None:
    """Raise TocomError if a compensator was learned on another backbone, or on one run in another way.

    What a compensator's file does not say (a foreign one) is not checked.

    Args:
        meta: what the checkpoint says of itself. model: what was built from it.
    """
    made_for = compensator.metadata.get("backbone_sha256", meta["backbone_sha256"])
    if made_for != meta["backbone_sha256"]:
        raise TocomError(
            f"{checkpoint} was trained from another backbone than this compensator was learned on"
            f" ({meta['backbone_sha256'][:12]}, {made_for[:12]}); learn one for its backbone"
        )
    adapted_to = compensator.metadata.get("adapted_to")
    if adapted_to is not None and adapted_to != sha256(resolve(checkpoint)):
        raise TocomError(f"{checkpoint} is not the model that this compensator was adapted to; adapt one to it")
    run = family_of(model).how(meta) | family_of(model).run_as(model)
    for name, value in run.items():
        learned = compensator.metadata.get(name, value)
        if learned != value:
            raise TocomError(
                f"{checkpoint} is run with {name} {value}, this compensator was learned with {learned};"
                " learn one for the backbone that it was trained from"
            )
