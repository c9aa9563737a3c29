"""What a study will take, before anyone starts it: jobs, passes of images through models, device hours, disk space.

All but :func:`plan_command` and what it measures is arithmetic on the config. Imports neither torch nor timm.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

import typer

from tocom.config import Checkpoint, Study, TaskEntry, read_study
from tocom.data.catalogue import DataSet, owner_of, read_catalogue, size_text
from tocom.errors import TocomError
from tocom.plan_inputs import Model, Sizes, describe, distillation_images, segmentation_sizes, task_sizes
from tocom.rates import Head, Rate, Rates, default_batch
from tocom.settings import RANDOM, Augmentation, Optimisation

#: Bytes of a weight of a checkpoint, of a label, of a prediction, and of a count of pixels.
FLOAT, LABEL, PREDICTION, COUNT = 4, 8, 2, 4


class Runs(NamedTuple):
    """What images go through: a backbone behind a compressor, for images of some size."""

    backbone: str
    compressor: str
    image_size: int
    head: Head | None = None


@dataclass(frozen=True)
class Work:
    """Passes of images through one model.

    Attributes:
        stage: what a plan sums over. runs: the model. mode: "train" or "infer".
        degrees: the degrees that the images are shared among evenly.
        images: how many passes; None: not known.
    """

    stage: str
    runs: Runs
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
    distil_images: Mapping[str | None, int | None],
    catalogue: Mapping[str, DataSet] | None = None,
) -> Plan:
    """Work out what a study takes; pure arithmetic.

    Args:
        models: backbone -> model. sizes: task, or what is segmented -> images in its splits.
        distil_images: what ToCom is distilled on (None: letters) -> images in it; None: not known, or without end.

    Raises:
        TocomError: a rate that is needed is not among those that were measured.
    """
    catalogue = read_catalogue() if catalogue is None else catalogue
    passes: dict[str, Amount] = {}
    hours: dict[str, Amount] = {}
    for work in works(study, sizes, distil_images):
        backbone, compressor, image_size, head = work.runs
        name = models[backbone].label(head)
        each = rates.seconds(name, image_size, compressor, work.precision, work.mode, work.degrees)
        passes.setdefault(work.stage, Amount()).add(work.images)
        hours.setdefault(work.stage, Amount()).add(None if work.images is None else work.images * each / 3600)
    unknown = [name for name, splits in sizes.items() if None in splits]
    if any(study.distil_for(variant).images is None for variant in _distilled(study)):
        unknown += [f"images of {name or 'letters'} to distil on" for name, n in distil_images.items() if n is None]
    return Plan(
        jobs(study, catalogue), passes, hours, disk(study, models, sizes, catalogue), tuple(unknown), rates.device
    )


# --- jobs -----------------------------------------------------------------------------------------------------------


def jobs(study: Study, catalogue: Mapping[str, DataSet]) -> dict[str, int]:
    """Return the number of Snakemake's jobs by rule, in a folder without results; see workflow/rules."""
    pairs = len(study.backbones) * len(study.compressors)
    counts = {
        "fetch": len(downloads(study, catalogue)),
        "import_backbone": sum(backbone.timm is not None for backbone in study.backbones),
        "pretrain_backbone": sum(backbone.architecture is not None for backbone in study.backbones),
        "distil": pairs * len(_distilled(study)),
    }
    counts |= _segmentation_jobs(study, pairs) if study.segmentation else _classification_jobs(study, pairs)
    counts |= {"throughput": pairs, "gather_throughput": 1, "all": 1}
    return {rule: count for rule, count in counts.items() if count}


def _classification_jobs(study: Study, pairs: int) -> dict[str, int]:
    per_batch = pairs * len(study.tasks) * len(study.batches)
    carried = bool(study.gap_degrees)
    return {
        "prepare": len(study.tasks),
        "finetune": per_batch,
        "evaluate": per_batch,
        "transfer": pairs * carried,
        "gather_transfer": int(carried),
        "cells": 1,
        "significance": 1,
        "tables": 1,
        "paper_table": int("paper" in study.table_names),
        "figures": 1,
    }


def _segmentation_jobs(study: Study, pairs: int) -> dict[str, int]:
    runs = pairs * len(study.checkpoints)
    return {"segment_prepare": 1, "segment_train": runs, "segment_evaluate": runs, "segment_table": 1}


def downloads(study: Study, catalogue: Mapping[str, DataSet]) -> list[str]:
    """Return the data sets of the catalogue that are downloaded for the study."""
    names = [task.name for task in study.tasks if task.is_downloaded]
    names += ["ade20k"] if study.segmentation and study.segmentation.is_downloaded else []
    names += [name for name in images_of(study) if name in catalogue]
    return list(dict.fromkeys(owner_of(name, catalogue) for name in names))


def images_of(study: Study) -> list[str | None]:
    """Return everything that ToCom is distilled on; None: letters."""
    pairs = product(study.backbones, _distilled(study))
    return list(dict.fromkeys(study.distil_images_for(backbone.name, variant) for backbone, variant in pairs))


def _distilled(study: Study) -> list[str]:
    """Return the variants of ToCom that are distilled; those that differ in scales alone share one."""
    return list(dict.fromkeys(study.distilled_as(variant) for variant in study.variants))


# --- passes ---------------------------------------------------------------------------------------------------------


def works(study: Study, sizes: Mapping[str, Sizes], distil_images: Mapping[str | None, int | None]) -> list[Work]:
    """Return all passes of images through models.

    Where the number depends on what comes out, it is the most there can be: every compensated cell is counted, although
    one whose scale is chosen as 0 is not run again.
    """
    found = []
    for backbone in study.backbones:
        if backbone.architecture:
            found += _pretraining(study, Runs(backbone.name, study.compressors[0], backbone.image_size))
        for compressor in study.compressors:
            runs = Runs(backbone.name, compressor, backbone.image_size)
            found += _distillation(study, runs, distil_images)
            for task, checkpoint in product(study.tasks, study.checkpoints):
                found += _finetuning(study, runs, task, sizes[task.name], checkpoint)
                found += _evaluation(study, runs, sizes[task.name], checkpoint)
            if study.gap_degrees:
                found += [_transfer(study, runs, sizes[task.name]) for task in study.tasks]
            if study.segmentation:
                found += _segmentation(study, backbone.name, compressor, sizes[study.segmentation.name])
                runs = _segmenter(study, backbone.name, compressor)  # its speed is measured at that size
            found += _throughput(study, runs)
    return found


def _times(images: int | None, *factors: float) -> float | None:
    return None if images is None else images * math.prod(factors)


def _epoch(images: int | None, settings: Optimisation) -> int | None:
    """Return the images of an epoch: where images are mixed, the partial batch at the end is left out."""
    if images is None or not (isinstance(settings, Augmentation) and settings.mixes):
        return images
    return images - images % settings.batch_size


def _pretraining(study: Study, runs: Runs) -> list[Work]:
    """Train without compression, score after each epoch, and at the end at every degree; scores are in fp32."""
    settings, degrees = study.pretrain, tuple(range(study.max_degree + 1))
    return [
        Work("pretrain", runs, "train", settings.precision, (0,), settings.images * settings.epochs),
        Work("pretrain", runs, "infer", "fp32", (0,), settings.held_out * settings.epochs),
        Work("pretrain", runs, "infer", "fp32", degrees, settings.held_out * len(degrees)),
    ]


def _distillation(study: Study, runs: Runs, distil_images: Mapping[str | None, int | None]) -> list[Work]:
    """Teacher and student run at degrees drawn evenly from 0 to the highest; the student is also differentiated.

    The student's weights are frozen, so that its backward pass is a little cheaper than the one that was timed.
    """
    degrees = tuple(range(study.max_degree + 1))
    found = []
    for variant in _distilled(study):
        settings = study.distil_for(variant)
        available = distil_images[study.distil_images_for(runs.backbone, variant)]
        held_out = settings.held_out if available is None else min(settings.held_out, available // 10)
        left = None if available is None else available - held_out
        images = min((n for n in (left, settings.images) if n is not None), default=None)
        passes = _times(_epoch(images, settings), settings.epochs)
        scored = held_out * (settings.epochs + 1) * 2  # once before the first epoch; teacher and student
        found += [
            Work("distil", runs, "infer", settings.precision, degrees, passes),
            Work("distil", runs, "train", settings.precision, degrees, passes),
            Work("distil", runs, "infer", settings.precision, degrees, scored),
        ]
    return found


def _finetuning(study: Study, runs: Runs, task: TaskEntry, sizes: Sizes, checkpoint: Checkpoint) -> list[Work]:
    """Train on the training images, and classify the validation images after every epoch.

    A model that is used as it is, is only scored. Adapters are counted as if all weights were trained.
    """
    settings, degree = study.finetune_for(task.name), checkpoint.train_degree
    low, high = (0, study.max_degree) if degree == RANDOM else (degree, degree)
    scored = (low, high // 2, high) if degree == RANDOM else (degree,)
    epochs = 0 if settings.tuning.mode == "none" else settings.epochs
    parts = [
        ("train", tuple(range(low, high + 1)), _times(_epoch(sizes.train, settings), epochs)),
        ("infer", scored, _times(sizes.val, len(scored), max(epochs, 1))),
    ]
    return [
        Work("finetune", runs, mode, settings.precision, degrees, images)
        for mode, degrees, images in parts
        if images != 0
    ]


def _evaluation(study: Study, runs: Runs, sizes: Sizes, checkpoint: Checkpoint, stage: str = "evaluate") -> list[Work]:
    """Test images in every cell; validation images at every candidate scale of the compensated ones."""
    settings, degrees = study.evaluate, study.infer_degrees
    found = [("infer", degrees, _times(sizes.test, len(degrees)))]
    others = tuple(degree for degree in degrees if degree != checkpoint.train_degree)
    if checkpoint.train_degree != RANDOM and others:
        for variant in study.variants:
            scales = len(study.scales_for(variant) or settings.scales)
            found.append(("infer", others, _times(sizes.test, len(others))))
            found.append(("infer", others, _times(sizes.val, len(others), scales if scales > 1 else 0)))
    return [Work(stage, runs, mode, settings.precision, where, images) for mode, where, images in found]


def _transfer(study: Study, runs: Runs, sizes: Sizes) -> Work:
    """Test images at the high degree: once without a gap, and once with the gap of every task."""
    images = _times(sizes.test, len(study.seeds), len(study.tasks) + 1)
    return Work("transfer", runs, "infer", study.evaluate.precision, (study.gap_degrees[1],), images)


def _segmenter(study: Study, backbone: str, compressor: str) -> Runs:
    wanted = study.segmentation
    return Runs(backbone, compressor, wanted.image_size, Head(wanted.train.head, wanted.n_classes))


def _segmentation(study: Study, backbone: str, compressor: str, sizes: Sizes) -> list[Work]:
    """Train on the training images and score the validation images after every epoch; then evaluate every cell."""
    training, runs = study.segmentation.train, _segmenter(study, backbone, compressor)
    found = []
    for checkpoint in study.checkpoints:
        own = (checkpoint.train_degree,)
        for mode, images in (("train", sizes.train), ("infer", sizes.val)):
            found.append(Work("segment train", runs, mode, training.precision, own, _times(images, training.epochs)))
        found += _evaluation(study, runs, sizes, checkpoint, "segment evaluate")
    return found


def _throughput(study: Study, runs: Runs) -> list[Work]:
    """Compare, at each degree, with and without ToCom, with the uncompressed model."""
    settings, degrees = study.throughput, tuple(sorted({0, *study.infer_degrees}))
    each = (settings.warmup + settings.repeats) * settings.batch_size * len(degrees)
    parts = [("infer", degrees, 2 * each), ("infer", (0,), each)]
    if settings.training:
        parts += [("train", degrees, each), ("train", (0,), each)]
    return [Work("throughput", runs, mode, settings.precision, where, images) for mode, where, images in parts]


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
    if study.segmentation:
        _add_segmentation(found, study, models, sizes[study.segmentation.name])
    return found


def _add_segmentation(found: dict[str, Amount], study: Study, models: Mapping[str, Model], sizes: Sizes) -> None:
    """Add what segmentation leaves on disk; the images of a folder are not decoded beforehand."""
    wanted = study.segmentation
    if wanted.data == "scenes":
        found["prepared tasks"].add(sum(sizes) * (3 + 1) * wanted.image_size**2)  # three channels and a label
    trained = len(study.compressors) * len(study.checkpoints)
    cells = len(study.compressors) * sum(_cells(study, checkpoint) for checkpoint in study.checkpoints)
    for backbone in study.backbones:
        found["checkpoints"].add(models[backbone.name].segmenter_parameters * FLOAT * trained)
        # True positives, false positives and false negatives of every class.
        found["predictions"].add(_times(sizes.test, cells, wanted.n_classes, 3 * COUNT))


def _cells(study: Study, checkpoint: Checkpoint) -> int:
    """Return the number of cells of a checkpoint; one that was trained at random degrees has no compensated ones."""
    variants = 0 if checkpoint.train_degree == RANDOM else len(study.variants)
    return len(study.infer_degrees) * (1 + variants)


# --- rates ----------------------------------------------------------------------------------------------------------


def measured_degrees(work: Sequence[Work]) -> list[int]:
    """Return the lowest, the middle and the highest degree of some passes."""
    degrees = [degree for item in work for degree in item.degrees]
    low, high = min(degrees), max(degrees)
    return sorted({low, (low + high) // 2, high})


def measure_study(
    study: Study,
    work: Sequence[Work],
    models: Mapping[str, Model],
    device: str,
    batch_size: int | None,
    seconds: float,
) -> list[Rate]:
    """Measure every rate that a study's plan needs on this machine; see :func:`tocom.rates.measure`.

    Args:
        batch_size: images a pass; None: see :func:`tocom.rates.default_batch`.
    """
    from tocom.models import pick_device
    from tocom.rates import measure
    from tocom.training import bar, make_deterministic

    make_deterministic(study.finetune.threads)
    where = pick_device(device)
    most = (study.segmentation.train if study.segmentation else study.finetune).batch_size
    # Backbones that differ in weights alone are measured once.
    alike: dict[tuple, dict[str, list[Work]]] = defaultdict(lambda: defaultdict(list))
    for item in work:
        name = models[item.runs.backbone].label(item.runs.head)
        alike[name, item.runs._replace(backbone=""), item.precision][item.mode].append(item)
    wanted = [
        (next(iter(by_mode.values()))[0], {mode: measured_degrees(items) for mode, items in by_mode.items()})
        for by_mode in alike.values()
    ]
    total = sum(_PASSES[mode] * len(found) for _, degrees in wanted for mode, found in degrees.items())
    rates = []
    with bar(None, "measure", total=total) as progress:
        for item, degrees in wanted:
            backbone, compressor, image_size, head = item.runs
            model = models[backbone]
            rates += measure(
                model.architecture,
                degrees,
                where,
                batch_size or default_batch(where.type, image_size, most),
                seconds,
                kwargs=model.kwargs,
                image_size=image_size,
                compressor=compressor,
                precision=item.precision,
                proportional_attention=model.proportional_attention,
                head=head,
                advance=lambda mode: progress.update(_PASSES[mode]),
            )
    return rates


#: What a measurement counts in the time left: training takes about three times as long as a forward pass.
_PASSES = {"train": 3, "infer": 1}


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
    if "segment train" in result.passes:
        console.print("The segmentation head and the loss of its pixels are timed; counting labelled pixels is not.")
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
    batch_size: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="Images a pass while measuring; by default 32 of 224 x 224 pixels on a GPU, 2 on a CPU."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long each model, degree and mode is measured, at least once.")
    ] = 2.0,
) -> None:
    """Print the jobs, hours and disk space that a study will take, from rates measured now or read from a file."""
    from tocom.rates import read_rates, write_rates

    if rates is not None and save_rates is not None:
        raise TocomError("--rates reads what --save-rates measures; give one of them")
    study, catalogue = read_study(config), read_catalogue()
    models = {backbone.name: describe(backbone, study.segmentation) for backbone in study.backbones}
    sizes = {task.name: task_sizes(study, task, catalogue) for task in study.tasks}
    if study.segmentation:
        sizes[study.segmentation.name] = segmentation_sizes(study, catalogue)
    images = {name: distillation_images(name, study.data.root, catalogue) for name in images_of(study)}
    if rates is not None:
        known = read_rates(rates)
    else:
        _warn_of_a_processor(study, device)
        known = measure_study(study, works(study, sizes, images), models, device, batch_size, seconds)
    if save_rates is not None:
        write_rates(known, save_rates)
    show(plan(study, Rates(known), models, sizes, images, catalogue))


def _warn_of_a_processor(study: Study, device: str) -> None:
    """Say so before minutes go by if a study for a GPU is measured without one."""
    from tocom.models import pick_device

    if pick_device(device).type == "cpu" and study.distil.device.startswith("cuda"):
        print(
            "This study is for a GPU, but the hours will be those of this CPU. Measure with --save-rates on the machine"
            " that will run it, and give that file to --rates here.",
            file=sys.stderr,
        )
