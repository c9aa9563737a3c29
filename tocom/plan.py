"""What some studies will take and can show, before anyone starts: jobs, images, device hours, disk space, power.

Counts are arithmetic on the configs; hours are counts times a short measurement, or times the rates in a benchmark.csv.
Where a count depends on what comes out, it is the most there can be. nan stands for what cannot be known yet.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tocom.bundled import resolve
from tocom.cli_common import say, table
from tocom.data.catalogue import read_catalogue, size_text
from tocom.data.listing import SPLITS
from tocom.data.registry import DEFAULT_VAL, GENERATED, TASKS, listing_of, pretraining_files
from tocom.data.texts import CONTEXT
from tocom.errors import TocomError
from tocom.files import load_metadata
from tocom.jobs import Plan
from tocom.parts import make_part, source_degree
from tocom.settings import BenchmarkSettings, LearnSettings, Optimisation
from tocom.study import Study, read_config

if TYPE_CHECKING:
    from tocom.stages.works import Subject

Sizes = Mapping[tuple[str, str], Mapping[str, float]]  # study and task -> split -> images
#: Images of 224 x 224 pixels, or as many pixels in others, in a step that is timed.
BATCHES = {"cuda": 64, "cpu": 2}


class Passes(NamedTuple):
    """Images that go through a model, shared evenly among some degrees.

    Attributes:
        stage: the workflow's rule. work: what is done with them, of :data:`tocom.stages.works.STAGES`.
    """

    stage: str
    work: str
    subject: Subject
    precision: str
    degrees: Sequence[int]
    images: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What its speed depends on, but for the degree."""
        return self.work, repr(self.subject), self.precision


Rates = Mapping[tuple[str, str, str], Mapping[int, float]]  # key -> seconds an image by degree


# --- counts -----------------------------------------------------------------------------------------------------------


def jobs_by_rule(plan: Plan) -> dict[str, int]:
    """Return the number of Snakemake's jobs by rule, in a folder without results."""
    counts = Counter(fetch=len(fetched(plan)), learn=len(plan.learned))
    for (_, name), study in plan.backbones.items():
        entry = study.backbone(name)
        counts.update(import_backbone=entry.timm is not None, pretrain_backbone=entry.architecture is not None)
    for study in plan.studies.values():
        counts.update(("study", "cells", "compare", "costs", "tables", "figures", "gather_throughput"))
        counts.update(paper_table=study.paper is not None, gather_transfer=study.transfer, prepare=len(study.tasks))
        batches = len(plan.per_model(study, "{backbone} {tuned} {task} {batch}"))
        gaps, speed = (len(plan.per_model(study, "{backbone} {tuned}", of)) for of in ("gaps", "speed"))
        counts.update(adapt=len(plan.per_model(study, "{backbone} {tuned} {task} {batch}", "adapted")))
        counts.update(finetune=batches, evaluate=batches, transfer=gaps, throughput=speed)
    return {rule: count for rule, count in counts.items() if count} | {"all": 1}


def fetched(plan: Plan) -> list[str]:
    """Return the marks of all data sets that are downloaded."""
    marks = [plan.fetched(job.settings.source, job.data_root) for job in plan.learned.values()]
    for name, study in plan.studies.items():
        marks += [plan.task_data(SimpleNamespace(study=name, task=task)) for task in study.task_names]
    return sorted({mark for found in marks for mark in found})


def sizes_of(study: Study, name: str) -> Mapping[str, float]:
    """Return the images in each split of a task: counted if they are there, else as the catalogue states; or nan."""
    entry, data = study.task(name), study.data_for(name)
    wanted = {split: getattr(data, split) for split in SPLITS}
    if entry.kind is None and name in TASKS and TASKS[name].group == GENERATED:
        return {split: wanted[split] or TASKS[name].sizes[split] for split in SPLITS}
    if entry.kind not in ("hub", "python"):  # those would be downloaded, or run
        try:
            listing = listing_of(name, wanted, source=entry if entry.kind else None, root=data.root)
            return {split: len(listing.splits[split]) for split in SPLITS}
        except TocomError:
            pass  # not there yet
    prepared = study.root / "data" / f"{name}.safetensors"
    if not entry.is_downloaded and prepared.is_file():
        return load_metadata(prepared)["sizes"]
    there = dict.fromkeys(SPLITS[::2], math.nan) | (_stated(name) if entry.is_downloaded else {})
    share = wanted["val"] or DEFAULT_VAL
    if "val" not in there:  # drawn from the training images, as tocom.data.registry does
        there["val"] = np.round(share * there["train"]) if share < 1 else share
        there["train"] -= there["val"]
    limits = {split: wanted[split] if (wanted[split] or 0) >= 1 else math.inf for split in SPLITS}
    return {split: min(there[split], limits[split]) for split in SPLITS}  # of nan and a number, nan


def _stated(name: str) -> dict[str, float]:
    """Return the sizes of splits in the catalogue's text, such as "800 train, 200 val"."""
    found = re.findall(r"([\d,]+) (train|val|test)\b", read_catalogue()[name].split)
    return {split: int(number.replace(",", "")) for number, split in found}


def checkpoints_of(study: Study) -> int:
    """Return the number of a study's checkpoints."""
    each = sum(len(study.train_degrees_of(tuned)) * len(study.seeds_of(tuned)) for tuned in study.tuned)
    return each * len(study.tasks) * len(study.backbones)


def cells_of(study: Study) -> int:
    """Return the number of a study's cells; what was trained at no one degree is not compensated."""
    each = 0
    for name, method in study.methods.items():
        labels = study.train_degrees_of(name)
        used = [label for label in labels if method.compensator is None or source_degree(label) is not None]
        each += len(used) * len(study.infer_degrees_of(name)) * len(study.seeds_of(name))
    return each * len(study.tasks) * len(study.backbones)


def passes(plan: Plan, sizes: Sizes) -> Iterator[Passes]:
    """Yield all passes of images through models."""
    for (store, name), study in plan.backbones.items():
        if study.backbone(name).architecture:
            job = plan.pretrain(SimpleNamespace(store=store, backbone=name))
            it, subject, highest = job.settings, subject_of(study, name), job.max_degree
            drawn, each = (it.drawn(highest), it.scored(highest)) if it.degree == "random" else ([0], [0])
            yield Passes("pretrain", "fine-tuning", subject, it.precision, drawn, it.images * it.epochs)
            scored = [*each] * it.epochs + [*job.degrees]
            yield Passes("pretrain", "evaluation", subject, "fp32", scored, it.held_out * len(scored))
    for (store, name, _), job in plan.learned.items():
        subject, it = subject_of(plan.backbones[store, name], name, job.compressor), job.settings
        images, held_out = learned_on(it, job.data_root)
        degrees, scored = range(job.max_degree + 1), 2 * held_out * (it.epochs + 1)  # by teacher and student
        yield Passes("learn", "distillation", subject, it.precision, degrees, _trained(images, it))
        yield Passes("learn", "evaluation", subject, it.precision, degrees, scored)
    for study in plan.studies.values():
        for backbone in study.backbones:
            speed = plan.per_model(study, "{tuned}", "speed")
            for tuned in study.tuned:
                segments = study.task_kind == "segment"
                subject = subject_of(study, backbone.name, study.methods[tuned].compressor.described(), segments)
                for task in study.task_names:
                    yield from _of_task(study, tuned, task, sizes[study.study, task], subject)
                yield from _timed(plan, study, tuned, subject) if tuned in speed else ()


def _trained(images: float, settings: Optimisation) -> float:
    """Return the images of all epochs: where images are mixed, the partial batch at the end of each is left out."""
    return settings.epochs * (images - (images % settings.batch_size if settings.mixes else 0))


def learned_on(settings: LearnSettings, root: str) -> tuple[float, float]:
    """Return how many images a part is learned on, and how many are held out, a tenth at most."""
    there = math.inf  # there is no end of letters
    if settings.source is not None:
        try:
            there = len(pretraining_files(settings.source, root))
        except TocomError:  # not there yet
            there = _stated(settings.source).get("train", math.nan) if settings.source in read_catalogue() else math.nan
    held_out = min(settings.held_out, there // 10)  # of a number and nan, the number
    left = there - held_out
    return left if settings.images is None or left < settings.images else settings.images, held_out


def _of_task(study: Study, tuned: str, task: str, sizes: Mapping[str, float], subject: Subject) -> Iterator[Passes]:
    """Fine-tune, score validation images after every epoch, evaluate all cells, and carry gaps."""
    it, n, evaluate = study.finetune_for(task, tuned), len(study.seeds_of(tuned)), study.evaluate
    highest = study.max_degree_of(tuned)
    tuning = make_part("tuning", study.methods[tuned].tuning.described(), max_degree=highest)
    for label in study.train_degrees_of(tuned):
        source, scored = source_degree(label), tuning.score_degrees(label)
        trained = tuning.options.drawn(highest) if source is None else [source]
        if tuning.trains_anything:
            yield Passes("finetune", "fine-tuning", subject, it.precision, trained, n * _trained(sizes["train"], it))
        images = n * len(scored) * (it.epochs if tuning.trains_anything else 1) * sizes["val"]
        yield Passes("finetune", "evaluation", subject, it.precision, scored, images)
        for name in study.sharing(tuned):
            method, adapted = study.methods[name], study.adapt_for(name)
            if adapted is not None and source is not None:
                trained, scored = n * _trained(sizes["train"], adapted), 2 * n * sizes["val"] * (adapted.epochs + 1)
                every = range(study.max_degree_of(name) + 1)
                yield Passes("adapt", "distillation", subject, adapted.precision, every, trained)
                yield Passes("adapt", "evaluation", subject, adapted.precision, every, scored)
            every, added = method.infer_degrees or study.infer_degrees, method.compensator is not None
            degrees = [degree for degree in every if not added or source not in (None, degree)]  # nothing to compensate
            scales = len(method.scales or evaluate.scales) if added else 1
            images = n * len(degrees) * (sizes["test"] + (scales * sizes["val"] if scales > 1 else 0))
            if degrees:
                yield Passes("evaluate", "evaluation", subject, evaluate.precision, degrees, images)
    if gap := study.gap_degrees(tuned):
        images = n * (len(study.tasks) + 1) * sizes["test"]
        yield Passes("transfer", "evaluation", subject, evaluate.precision, [int(gap[1])], images)


def _timed(plan: Plan, study: Study, tuned: str, subject: Subject) -> Iterator[Passes]:
    """At each degree, the model, the same with each compensator and the uncompressed one take turns."""
    job = plan.throughput(SimpleNamespace(study=study.study, backbone="", tuned=tuned))
    it, models = job.settings, {"evaluation": 1 + sum(job.methods.values()), "fine-tuning": int(job.settings.training)}
    for work, n in models.items():
        degrees = [*job.degrees * n, *[0] * len(job.degrees)]
        images = (it.warmup + it.repeats) * it.batch_size * len(degrees)
        if n:
            yield Passes("throughput", work, subject, it.precision, degrees, images)


def subject_of(study: Study, name: str, compressor: object = None, segments: bool = False) -> Subject:
    """Return a backbone behind a compressor (by default the first method's), perhaps with a head for its pixels."""
    from tocom.models import default_proportional_attention
    from tocom.stages.works import Subject

    entry, task = study.backbone(name), study.task_names[0]
    architecture, kwargs, attention = entry.timm or entry.architecture, entry.kwargs, entry.proportional_attention
    if architecture is None:
        about = load_metadata(resolve(entry.checkpoint))
        architecture, kwargs = about["architecture"], about["kwargs"]
        attention = about.get("proportional_attention", True)
    attention = default_proportional_attention(architecture) if attention is None else attention
    kwargs = {key: value for key, value in kwargs.items() if key != "num_classes" or value}
    if study.task_kind != "language":
        kwargs["img_size"] = study.image_size_for(task) if segments else entry.image_size
    compressor = compressor or next(iter(study.methods.values())).compressor.described()
    head = (study.finetune_for(task, study.tuned[0]).head, _classes(study, task)) if segments else None
    return Subject(architecture, kwargs, compressor, attention, head)


def _classes(study: Study, task: str) -> float:
    entry = study.task(task)
    return (entry.classes or math.nan) if entry.kind else (TASKS | read_catalogue())[task].classes


def disk(plan: Plan, sizes: Sizes) -> dict[str, list[float]]:
    """Return bytes by kind of file; small ones (logs, tables, learned parts) are left out."""
    sets = [read_catalogue()[Path(mark).parent.name] for mark in fetched(plan)]
    found = {"downloads": [it.download_bytes for it in sets], "data sets, unpacked": [it.unpacked_bytes for it in sets]}
    found |= {name: [] for name in ("backbones", "prepared tasks", "checkpoints", "predictions")}
    for (_, name), study in plan.backbones.items():
        found["backbones"] += [4 * subject_of(study, name).parameters] if study.backbone(name).is_made else []
    for study in plan.studies.values():
        segments = study.task_kind == "segment"
        for task in study.task_names:
            images, kept, channels, each = sizes[study.study, task], SPLITS, 3, 2
            size = study.image_size_for(task) ** 2
            if study.task_kind == "language":  # bytes; of each sequence its bits, bytes and bytes foretold
                size, channels, each = CONTEXT, 1, 16
            elif segments:  # one byte a label; images that are files stay what they are
                kept, channels, each = SPLITS if task in TASKS else (), 4, 3 * 4 * _classes(study, task)
            elif not plan.prepare(SimpleNamespace(study=study.study, task=task)).decode_train:
                kept = SPLITS[1:]
            found["prepared tasks"].append(channels * size * sum(images[s] for s in kept))
            found["predictions"].append(cells_of(study) / len(study.tasks) * images["test"] * each)
        for backbone in study.backbones:
            weights = subject_of(study, backbone.name, segments=segments).parameters
            found["checkpoints"].append(4 * weights * checkpoints_of(study) / len(study.backbones))
    return found


# --- hours ------------------------------------------------------------------------------------------------------------


def hours(item: Passes, rates: Rates) -> float:
    """Return the device hours of some passes; between measured degrees, time is interpolated linearly."""
    degrees, times = zip(*sorted(rates[item.key].items()), strict=True)
    return item.images * float(np.interp(list(item.degrees), degrees, times).mean()) / 3600


def measured(found: Iterable[Passes], device) -> Rates:
    """Time, at the lowest and the highest degree, a few steps of all that is done, on a torch device.

    Raises:
        TocomError: the device's memory does not suffice.
    """
    from tocom.stages.works import round_seconds
    from tocom.training import bar

    alike, rates = {}, {}
    for item in found:
        alike.setdefault(item.key, (item, set()))[1].update(item.degrees)
    for key, (item, degrees) in bar(alike.items(), "measure"):
        size = max(1, BATCHES[device.type] * 224**2 // item.subject.pixels)
        settings = BenchmarkSettings(batch_size=size, repeats=3, warmup=1, precision=item.precision)
        times = round_seconds(item.subject, item.work, sorted({min(degrees), max(degrees)}), settings, device)
        if not times:
            raise TocomError(f"{size} images of {item.subject.architecture} do not fit into the memory of {device}")
        rates[key] = {degree: float(np.median(each)) / size for degree, each in times.items()}
    return rates


def read_rates(path: Path, found: Iterable[Passes]) -> tuple[Rates, str]:
    """Take the rates of all that is done from a benchmark.csv, of whatever compressor it is; return its device, too.

    Raises:
        TocomError: the file is no such table, or lacks figures that are needed.
    """
    from tocom.stages.benchmark import MEASURED, read_csv

    rows = read_csv(path)
    rows, rates = rows[rows["status"] == MEASURED], {}
    for item in found:
        kwargs, name = item.subject.kwargs, item.subject.architecture.partition(".")[0]
        side = kwargs.get("img_size", 0)
        alike = (rows["backbone"].str.split(".").str[0] == name) & (rows["image_size"] == side)
        those = rows[alike & (rows["stage"] == item.work) & (rows["precision"] == item.precision)]
        if those.empty or not kwargs.keys() <= {"img_size", "num_classes"}:
            raise TocomError(
                f"{path} has no figures of {item.work} of {name} at {side} pixels in {item.precision};"
                " measure them there (`tocom benchmark`), or leave --rates out"
            )
        rates[item.key] = dict(zip(those["degree"], 1 / those["images_per_second"], strict=True))
    return rates, f"{', '.join(sorted(set(rows['device'])))}, from {path}"


# --- power ------------------------------------------------------------------------------------------------------------


def power_of(study: Study, sizes: Sizes) -> tuple[str, ...]:
    """Return the primary endpoint of a study, its seeds, its test images, and the gain that it can detect, as text."""
    from tocom.analysis.across import detectable
    from tocom.analysis.planned import endpoint
    from tocom.analysis.stats import Spreads

    end = endpoint(study)
    if end is None:
        return f"{study.study}: compares nothing", study.seeds_text, "", ""
    seeds = len(set(study.seeds_of(end.before)) & set(study.seeds_of(end.after)))
    name = f"{study.study}: {end.after} over {end.before} ({end.backbone}), {end.scope.name}"
    images = [sizes[study.study, task]["test"] for task in end.scope.tasks]
    expected = Spreads(**study.analysis.expected.model_dump(), task=math.nan)
    gain = detectable(study, (end.before, end.after), expected, seeds, images)
    known = not any(map(math.isnan, images))
    each = " to ".join(f"{size:,.0f}" for size in sorted({min(images), max(images)})) if known else "unknown"
    found = "none" if seeds < 2 else f"{gain:.2f} points" if known else "unknown: give data.test"
    return f"{name}, {end.point.train} → {end.point.infer}", str(seeds), f"{len(images)} × {each}", found


# --- output -----------------------------------------------------------------------------------------------------------


def total(values: Iterable[float], show: Callable[[float], str]) -> str:
    """Return a sum for people, which says if parts of it are not known."""
    values = list(values)
    known = [value for value in values if not math.isnan(value)]
    text = show(sum(known))
    return text if len(known) == len(values) else f"{text} + unknown" if sum(known) else "unknown"


def _hours_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_plan(configs: Sequence[Path], rates: Path | None, device: str | None) -> None:
    """Print what some studies will take together, from nothing; see `tocom plan`."""
    from tocom.stages.throughput import device_if_present, device_name
    from tocom.training import make_deterministic

    plan = Plan.of({"configs": [path for file in configs for path in read_config(file).get("configs", [file])]})
    sizes = {(name, task): sizes_of(study, task) for name, study in plan.studies.items() for task in study.task_names}
    found = list(passes(plan, sizes))
    if rates is not None:
        known, where = read_rates(rates, found)
    else:
        first = next(iter(plan.studies.values()))
        recipe = first.finetune_for(first.task_names[0], first.tuned[0])
        make_deterministic(recipe.threads)
        chosen = device_if_present(device or recipe.device)
        if chosen is None:
            say("torch sees no GPU: the hours are those of this processor; --rates takes figures of another machine")
        chosen = chosen or device_if_present("cpu")
        known, where = measured(found, chosen), device_name(chosen)
    jobs = jobs_by_rule(plan)
    table(("rule", "jobs"), [(rule, str(n)) for rule, n in (jobs | {"together": sum(jobs.values())}).items()])
    rows = []
    for stage in [*dict.fromkeys(item.stage for item in found), "together"]:
        items = [item for item in found if stage in (item.stage, "together")]
        kinds = ([i.images for i in items if (i.work == "evaluation") is infer] for infer in (False, True))
        images = [total(kind, "{:,.0f}".format) for kind in kinds]
        rows.append((stage, *images, total((hours(item, known) for item in items), _hours_text)))
    table(("stage", "training images", "inference images", "hours"), rows)
    table(("files", "size"), [(kind, total(each, size_text)) for kind, each in disk(plan, sizes).items()])
    header = ("primary endpoint", "seeds", "test images", "detectable gain")
    table(header, [power_of(study, sizes) for study in plan.studies.values()])
    print("Detectable: found with 80 % power at the 5 % level, over images and trainings, if gains vary as")
    print("analysis.expected says. With one seed, nothing can be detected over trainings.")
    trained, cells = (sum(map(count, plan.studies.values())) for count in (checkpoints_of, cells_of))
    print(f"{trained:,} checkpoints, {cells:,} cells. Hours are those of {where}, of models alone: no start-up, no")
    print("reading of images. Data sets that are not there count as the catalogue states.")
    if unknown := sorted({task for (_, task), each in sizes.items() if any(map(math.isnan, each.values()))}):
        print(f"Not known before they are downloaded or prepared: {', '.join(unknown)}.")
