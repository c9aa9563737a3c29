"""What a study will take, before anyone starts it: jobs, passes of images through models, device hours, disk space.

All but :func:`plan_command` and what it measures is arithmetic on the config. Imports neither torch nor timm.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import typer

from tocom.config import Backbone, Checkpoint, DataSettings, Study, TaskEntry, read_study
from tocom.data.catalogue import DataSet, owner_of, read_catalogue, size_text
from tocom.data.registry import DEFAULT_SIZES, DEFAULT_VAL, GENERATED, TASKS
from tocom.errors import TocomError
from tocom.rates import Rate, Rates, label
from tocom.settings import RANDOM

#: Bytes of a weight of a checkpoint, of a label and of a prediction.
FLOAT, LABEL, PREDICTION = 4, 8, 2


class Sizes(NamedTuple):
    """Images in each split of a task; None: not known before it is downloaded or prepared."""

    train: int | None
    val: int | None
    test: int | None


UNKNOWN = Sizes(None, None, None)


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a backbone.

    Attributes:
        architecture, kwargs: what timm builds. parameters: how many numbers its weights are, classifier included.
        proportional_attention: whether ToMe's log(token size) is added, which takes time.
    """

    architecture: str
    kwargs: dict[str, Any]
    parameters: int
    proportional_attention: bool = True

    @property
    def label(self) -> str:
        """Its name in a CSV of rates."""
        return label(self.architecture, self.kwargs)


@dataclass(frozen=True)
class Work:
    """Passes of images through one model.

    Attributes:
        stage: what a plan sums over. mode: "train" or "infer".
        degrees: the degrees that the images are shared among evenly.
        images: how many passes; None: not known.
    """

    stage: str
    backbone: str
    compressor: str
    mode: str
    precision: str
    degrees: tuple[int, ...]
    images: float | None


@dataclass
class Amount:
    """A sum of which parts may be unknown."""

    known: float = 0.0
    whole: bool = True

    def add(self, value: float | None) -> Amount:
        """Add a part; None is one that is not known."""
        self.known += value or 0
        self.whole = self.whole and value is not None
        return self

    def text(self, show: Callable[[float], str]) -> str:
        """Return the sum for people: a figure, a figure and "unknown", or "unknown"."""
        if self.whole:
            return show(self.known)
        return f"{show(self.known)} + unknown" if self.known else "unknown"


@dataclass(frozen=True)
class Plan:
    """What a study takes.

    Attributes:
        jobs: Snakemake's jobs by rule, from nothing; the numbered rules of fine-tuning and evaluation are summed up.
        passes: images through a model, by stage. hours: of the device, by stage.
        disk: bytes, by kind of file.
        unknown: tasks and images whose number is not known yet.
        device: what the rates were measured on.
    """

    jobs: dict[str, int]
    passes: dict[str, Amount]
    hours: dict[str, Amount]
    disk: dict[str, Amount]
    unknown: tuple[str, ...] = ()
    device: str = ""


def plan(
    study: Study,
    rates: Rates,
    models: Mapping[str, Model],
    sizes: Mapping[str, Sizes],
    distil_images: Mapping[str, int | None],
    catalogue: Mapping[str, DataSet] | None = None,
) -> Plan:
    """Work out what a study takes; pure arithmetic.

    Args:
        models: backbone -> model. sizes: task -> images in its splits.
        distil_images: backbone -> images that ToCom can be distilled on; None: not known, or without end.

    Raises:
        TocomError: a rate that is needed is not among those that were measured.
    """
    catalogue = read_catalogue() if catalogue is None else catalogue
    passes: dict[str, Amount] = {}
    hours: dict[str, Amount] = {}
    for work in works(study, sizes, distil_images):
        model = models[work.backbone]
        image_size = study.backbone(work.backbone).image_size
        each = rates.seconds(model.label, image_size, work.compressor, work.precision, work.mode, work.degrees)
        passes.setdefault(work.stage, Amount()).add(work.images)
        hours.setdefault(work.stage, Amount()).add(None if work.images is None else work.images * each / 3600)
    unknown = [name for name in study.task_names if None in sizes[name]]
    if any(study.distil_for(variant).images is None for variant in study.variants):
        unknown += [f"images to distil {name} on" for name, n in distil_images.items() if n is None]
    return Plan(
        jobs(study, catalogue), passes, hours, disk(study, models, sizes, catalogue), tuple(unknown), rates.device
    )


# --- jobs -----------------------------------------------------------------------------------------------------------


def jobs(study: Study, catalogue: Mapping[str, DataSet]) -> dict[str, int]:
    """Return the number of Snakemake's jobs by rule, in a folder without results; see workflow/rules.

    Raises:
        TocomError: the study segments images, which this arithmetic does not cover.
    """
    if study.segmentation:
        raise TocomError("`tocom plan` does not cover segmentation; count the jobs with `snakemake --dry-run`")
    pairs = len(study.backbones) * len(study.compressors)
    per_batch = pairs * len(study.tasks) * len(study.batches)
    counts = {
        "fetch": len(downloads(study, catalogue)),
        "prepare": len(study.tasks),
        "import_backbone": sum(backbone.timm is not None for backbone in study.backbones),
        "pretrain_backbone": sum(backbone.architecture is not None for backbone in study.backbones),
        "distil": pairs * len(_distilled(study)),
        "finetune": per_batch,
        "evaluate": per_batch,
        "transfer": pairs if study.gap_degrees else 0,
        "throughput": pairs,
        "gather_throughput": 1,
        "gather_transfer": 1 if study.gap_degrees else 0,
        "cells": 1,
        "significance": 1,
        "tables": 1,
        "figures": 1,
        "all": 1,
    }
    return {rule: count for rule, count in counts.items() if count}


def downloads(study: Study, catalogue: Mapping[str, DataSet]) -> list[str]:
    """Return the data sets of the catalogue that are downloaded for the study."""
    names = [task.name for task in study.tasks if task.is_downloaded]
    names += [b.distil_images for b in study.backbones if b.distil_images in catalogue]
    return list(dict.fromkeys(owner_of(name, catalogue) for name in names))


def _distilled(study: Study) -> list[str]:
    """Return the variants of ToCom that are distilled; those that differ in scales alone share one."""
    return list(dict.fromkeys(study.distilled_as(variant) for variant in study.variants))


# --- passes ---------------------------------------------------------------------------------------------------------


def works(study: Study, sizes: Mapping[str, Sizes], distil_images: Mapping[str, int | None]) -> list[Work]:
    """Return all passes of images through models.

    Where the number depends on what comes out, it is the most there can be: every compensated cell is counted, although
    one whose scale is chosen as 0 is not run again.
    """
    found = []
    for backbone in study.backbones:
        if backbone.architecture:
            found += _pretraining(study, backbone.name)
        for compressor in study.compressors:
            model = (backbone.name, compressor)
            found += _distillation(study, model, distil_images[backbone.name])
            for task, checkpoint in product(study.tasks, study.checkpoints):
                found += _finetuning(study, model, task, sizes[task.name], checkpoint)
                found += _evaluation(study, model, sizes[task.name], checkpoint)
            if study.gap_degrees:
                found += [_transfer(study, model, sizes[task.name]) for task in study.tasks]
            found += _throughput(study, model)
    return found


def _times(images: int | None, *factors: float) -> float | None:
    return None if images is None else images * math.prod(factors)


def _pretraining(study: Study, backbone: str) -> list[Work]:
    settings = study.pretrain
    model = (backbone, study.compressors[0])
    score = settings.held_out * (settings.epochs + study.max_degree + 1)
    return [
        Work("pretrain", *model, "train", settings.precision, (0,), settings.images * settings.epochs),
        Work("pretrain", *model, "infer", settings.precision, (0,), score),
    ]


def _distillation(study: Study, model: tuple[str, str], available: int | None) -> list[Work]:
    """Teacher and student run at degrees drawn evenly from 0 to the highest; the student is also differentiated.

    The student's weights are frozen, so that its backward pass is a little cheaper than the one that was timed.
    """
    degrees = tuple(range(study.max_degree + 1))
    found = []
    for variant in _distilled(study):
        settings = study.distil_for(variant)
        images = min((n for n in (available, settings.images) if n is not None), default=None)
        passes = _times(images, settings.epochs)
        held_out = settings.held_out * (settings.epochs + 1) * 2  # once before the first epoch; teacher and student
        found += [
            Work("distil", *model, "infer", settings.precision, degrees, passes),
            Work("distil", *model, "train", settings.precision, degrees, passes),
            Work("distil", *model, "infer", settings.precision, degrees, held_out),
        ]
    return found


def _finetuning(
    study: Study, model: tuple[str, str], task: TaskEntry, sizes: Sizes, checkpoint: Checkpoint
) -> list[Work]:
    """Train on the training images, and classify the validation images after every epoch.

    A model that is used as it is, is only scored. Adapters are counted as if all weights were trained.
    """
    settings, degree = study.finetune_for(task.name), checkpoint.train_degree
    low, high = (0, study.max_degree) if degree == RANDOM else (degree, degree)
    scored = (low, high // 2, high) if degree == RANDOM else (degree,)
    epochs = 0 if settings.tuning.mode == "none" else settings.epochs
    parts = [
        ("train", tuple(range(low, high + 1)), _times(sizes.train, epochs)),
        ("infer", scored, _times(sizes.val, len(scored), max(epochs, 1))),
    ]
    return [
        Work("finetune", *model, mode, settings.precision, degrees, images)
        for mode, degrees, images in parts
        if images != 0
    ]


def _evaluation(study: Study, model: tuple[str, str], sizes: Sizes, checkpoint: Checkpoint) -> list[Work]:
    """Test images in every cell; validation images at every candidate scale of the compensated ones."""
    settings, degrees = study.evaluate, study.infer_degrees
    found = [("infer", degrees, _times(sizes.test, len(degrees)))]
    others = tuple(degree for degree in degrees if degree != checkpoint.train_degree)
    if checkpoint.train_degree != RANDOM and others:
        for variant in study.variants:
            scales = len(study.scales_for(variant) or settings.scales)
            found.append(("infer", others, _times(sizes.test, len(others))))
            found.append(("infer", others, _times(sizes.val, len(others), scales if scales > 1 else 0)))
    return [Work("evaluate", *model, mode, settings.precision, where, images) for mode, where, images in found]


def _transfer(study: Study, model: tuple[str, str], sizes: Sizes) -> Work:
    """Test images at the high degree: once without a gap, and once with the gap of every task."""
    images = _times(sizes.test, len(study.seeds), len(study.tasks) + 1)
    return Work("transfer", *model, "infer", study.evaluate.precision, (study.gap_degrees[1],), images)


def _throughput(study: Study, model: tuple[str, str]) -> list[Work]:
    """Compare, at each degree, with and without ToCom, with the uncompressed model."""
    settings, degrees = study.throughput, tuple(sorted({0, *study.infer_degrees}))
    each = (settings.warmup + settings.repeats) * settings.batch_size * len(degrees)
    parts = [("infer", degrees, 2 * each), ("infer", (0,), each)]
    if settings.training:
        parts += [("train", degrees, each), ("train", (0,), each)]
    return [Work("throughput", *model, mode, settings.precision, where, images) for mode, where, images in parts]


# --- disk -----------------------------------------------------------------------------------------------------------


def disk(
    study: Study, models: Mapping[str, Model], sizes: Mapping[str, Sizes], catalogue: Mapping[str, DataSet]
) -> dict[str, Amount]:
    """Return the bytes that stay on disk, by kind of file; the small ones (logs, tables, compensators) are left out."""
    found = {name: Amount() for name in ("data sets, unpacked", "prepared tasks", "backbones", "checkpoints")}
    found["predictions"] = Amount()
    for name in downloads(study, catalogue):
        found["data sets, unpacked"].add(catalogue[name].unpacked_bytes)
    pixels = 3 * study.backbones[0].image_size ** 2
    for task in study.tasks:
        splits = sizes[task.name]
        # Training images that are augmented from files are not decoded beforehand.
        decoded = splits[1:] if study.finetune_for(task.name).augmentation == "timm" else splits
        for images in decoded:
            found["prepared tasks"].add(_times(images, pixels))
        for checkpoint in study.checkpoints:
            rows = len(study.compressors) * len(study.backbones)
            each = _cells(study, checkpoint) * PREDICTION + LABEL
            found["predictions"].add(_times(splits.test, rows, each))
    for backbone in study.backbones:
        weights = models[backbone.name].parameters * FLOAT
        found["backbones"].add(weights if backbone.is_made else 0)
        trained = len(study.compressors) * len(study.tasks) * len(study.checkpoints)
        found["checkpoints"].add(weights * trained)
    return found


def _cells(study: Study, checkpoint: Checkpoint) -> int:
    """Return the number of cells of a checkpoint; one that was trained at random degrees has no compensated ones."""
    variants = 0 if checkpoint.train_degree == RANDOM else len(study.variants)
    return len(study.infer_degrees) * (1 + variants)


# --- what the plan has to know of data and models -------------------------------------------------------------------


def split_sizes(train: int, val: int | None, test: int, data: DataSettings) -> Sizes:
    """Return the sizes of a task's splits as :func:`tocom.data.registry.downloaded` makes them.

    Args:
        train, val, test: images in the source's splits; val is None if it has none.
    """
    if val is None:
        wanted = DEFAULT_VAL if data.val is None else data.val
        val = round(wanted * train) if wanted < 1 else int(wanted)
        train -= val
    limits = (data.train, None if (data.val or 0) < 1 else data.val, data.test)
    counts = (train, val, test)
    return Sizes(*(n if limit is None else min(n, limit) for n, limit in zip(counts, limits, strict=True)))


def task_sizes(study: Study, task: TaskEntry, catalogue: Mapping[str, DataSet]) -> Sizes:
    """Find out how many images a task has without decoding or downloading any.

    Downloaded data, folders and CSV files are counted; of a data set that is not there, the catalogue states the
    splits. Hub data sets and Python functions are known once the task is prepared.
    """
    data = study.data_for(task.name)
    if task.kind in ("folder", "csv"):
        from tocom.data.own import read_own

        counts = {split: len(items) for split, items in read_own(task.name, task, Path(data.root)).splits.items()}
    elif task.kind:
        return _prepared_sizes(Path("results") / study.study / "data" / f"{task.name}.safetensors")
    elif task.name in TASKS:
        return _bundled_sizes(task.name, data)
    else:
        counts = _downloaded_counts(task.name, data.root, catalogue)
    if not {"train", "test"} <= counts.keys():
        return UNKNOWN
    return split_sizes(counts["train"], counts.get("val"), counts["test"], data)


def _prepared_sizes(path: Path) -> Sizes:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return UNKNOWN
    try:
        with safe_open(path, framework="np") as file:
            sizes = json.loads((file.metadata() or {}).get("sizes", "{}"))
    except (SafetensorError, ValueError):
        return UNKNOWN
    return Sizes(*(sizes.get(split) for split in Sizes._fields))


def _bundled_sizes(name: str, data: DataSettings) -> Sizes:
    wanted = {split: getattr(data, split) or DEFAULT_SIZES[split] for split in Sizes._fields}
    if TASKS[name].group != GENERATED:
        left = len(TASKS[name].load()[1]) - wanted["train"] - wanted["val"]
        wanted["test"] = min(wanted["test"], left)
    return Sizes(**wanted)


def _downloaded_counts(name: str, root: str, catalogue: Mapping[str, DataSet]) -> dict[str, int]:
    """Count the images of a data set that is there; otherwise read the catalogue's statement ("800 train, ...")."""
    from tocom.data.families import load_listing

    try:
        return {split: len(items) for split, items in load_listing(name, root, catalogue).splits.items()}
    except TocomError:  # not downloaded, or only in part
        stated = re.findall(r"([\d,]+) (train|val|test)\b", catalogue[name].split)
        return {split: int(number.replace(",", "")) for number, split in stated}


def distillation_images(study: Study, backbone: Backbone, catalogue: Mapping[str, DataSet]) -> int | None:
    """Return how many images ToCom can be distilled on, the held-out tenth left out.

    None: not known, or without end, as for generated letters.
    """
    if backbone.distil_images is None:
        return None
    if backbone.distil_images in catalogue:
        total = _downloaded_counts(backbone.distil_images, study.data.root, catalogue).get("train")
    else:
        from tocom.data.registry import pretraining_files

        try:
            total = len(pretraining_files(backbone.distil_images, study.data.root))
        except TocomError:  # the folder is not there yet
            total = None
    return None if total is None else total - total // 10


def describe(backbone: Backbone) -> Model:
    """Return what a plan needs to know of a backbone; builds it, without memory for its weights.

    Raises:
        TocomError: the checkpoint is missing, or timm cannot build the model.
    """
    import torch

    from tocom.models import create, default_proportional_attention

    architecture = backbone.timm or backbone.architecture
    kwargs, attention = backbone.kwargs, backbone.proportional_attention
    if architecture is None:
        metadata = _checkpoint_metadata(backbone.checkpoint)
        architecture, kwargs = metadata["architecture"], metadata["kwargs"]
        attention = metadata.get("proportional_attention", True)
    elif attention is None:
        attention = default_proportional_attention(architecture)
    with torch.device("meta"):
        model = create(architecture, kwargs | {"img_size": backbone.image_size})
    return Model(architecture, kwargs, sum(p.numel() for p in model.parameters()), attention)


def _checkpoint_metadata(checkpoint: str) -> dict[str, Any]:
    from tocom.bundled import resolve
    from tocom.files import load_arrays

    metadata = load_arrays(resolve(checkpoint))[1]
    if "architecture" not in metadata:
        raise TocomError(f"{checkpoint} is not a model's checkpoint; check the path")
    return metadata


def measured_degrees(work: Sequence[Work]) -> list[int]:
    """Return the lowest, the middle and the highest degree of some passes."""
    degrees = [degree for item in work for degree in item.degrees]
    low, high = min(degrees), max(degrees)
    return sorted({low, (low + high) // 2, high})


def measure_study(
    study: Study, work: Sequence[Work], models: Mapping[str, Model], device: str, batch_size: int, seconds: float
) -> list[Rate]:
    """Measure every rate that a study's plan needs on this machine; see :func:`tocom.rates.measure`."""
    from tocom.models import pick_device
    from tocom.rates import measure
    from tocom.training import make_deterministic

    make_deterministic(study.finetune.threads)
    alike: dict[tuple, list[Work]] = defaultdict(list)  # backbones that differ in weights alone are measured once
    for item in work:
        image_size = study.backbone(item.backbone).image_size
        alike[models[item.backbone].label, image_size, item.compressor, item.precision, item.mode].append(item)
    rates = []
    for (_, image_size, compressor, precision, mode), items in alike.items():
        model = models[items[0].backbone]
        rates += measure(
            model.architecture,
            measured_degrees(items),
            pick_device(device),
            batch_size,
            seconds,
            kwargs=model.kwargs,
            image_size=image_size,
            compressor=compressor,
            precision=precision,
            modes=[mode],
            proportional_attention=model.proportional_attention,
        )
    return rates


# --- output ---------------------------------------------------------------------------------------------------------


def show(result: Plan) -> None:
    """Print a plan as tables."""
    from rich.console import Console
    from rich.table import Table

    def table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        made = Table(*header[:1], title=title, title_justify="left")
        for name in header[1:]:
            made.add_column(name, justify="right")
        for row in rows:
            made.add_row(*row)
        console.print(made)

    console = Console()
    total = ("together", str(sum(result.jobs.values())))
    table("Jobs", ("rule", "jobs"), [(rule, str(count)) for rule, count in result.jobs.items()] + [total])
    stages = [
        (stage, amount.text("{:,.0f}".format), result.hours[stage].text(hours_text))
        for stage, amount in result.passes.items()
    ]
    together = (total_of(result.passes).text("{:,.0f}".format), total_of(result.hours).text(hours_text))
    table("Device time", ("stage", "images through a model", "hours"), [*stages, ("together", *together)])
    kinds = [(kind, amount.text(size_text)) for kind, amount in result.disk.items()]
    table("Disk", ("files", "size"), [*kinds, ("together", total_of(result.disk).text(size_text))])
    console.print(f"Rates were measured on: {result.device}", highlight=False)
    console.print("Hours are of models alone: no start-up, no reading and augmenting of images, no optimizer.")
    if result.unknown:
        console.print(f"Not known before download or preparation: {', '.join(result.unknown)}", highlight=False)


def total_of(amounts: Mapping[str, Amount]) -> Amount:
    """Return the sum of some amounts."""
    return Amount(sum(a.known for a in amounts.values()), all(a.whole for a in amounts.values()))


def hours_text(hours: float) -> str:
    """Return hours with as many digits as they deserve."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def plan_command(
    config: Annotated[Path, typer.Argument(help="A study's config.")],
    rates: Annotated[
        Optional[Path], typer.Option(help="CSV that --save-rates wrote on the machine that will run it.")
    ] = None,
    save_rates: Annotated[Optional[Path], typer.Option(help="CSV to write the measured rates to.")] = None,
    device: Annotated[str, typer.Option(help="Device to measure on: auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass while measuring.")] = 32,
    seconds: Annotated[float, typer.Option(min=0, help="How long each model, degree and mode is measured.")] = 2.0,
) -> None:
    """Print the jobs, hours and disk space that a study will take, from rates measured now or read from a file."""
    from tocom.rates import read_rates, write_rates

    if rates is not None and save_rates is not None:
        raise TocomError("--rates reads what --save-rates measures; give one of them")
    study, catalogue = read_study(config), read_catalogue()
    jobs(study, catalogue)  # refuses what cannot be planned before anything is measured
    models = {backbone.name: describe(backbone) for backbone in study.backbones}
    sizes = {task.name: task_sizes(study, task, catalogue) for task in study.tasks}
    images = {backbone.name: distillation_images(study, backbone, catalogue) for backbone in study.backbones}
    if rates is not None:
        known = read_rates(rates)
    else:
        known = measure_study(study, works(study, sizes, images), models, device, batch_size, seconds)
    if save_rates is not None:
        write_rates(known, save_rates)
    show(plan(study, Rates(known), models, sizes, images, catalogue))
