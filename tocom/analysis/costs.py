"""What each method needs: images, labels, steps, minutes and stored bytes, once for a backbone and for every task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pandas as pd

from tocom.analysis.cells import checked
from tocom.analysis.planned import train_degrees
from tocom.analysis.run import Run
from tocom.analysis.tables import NOT_PLANNED, NOT_RUN, Table, Text, cost_text
from tocom.files import load_metadata, read_rows
from tocom.made import check
from tocom.methods import ROLES
from tocom.settings import Optimisation

#: What a training is, as costs.csv has it -> what tables call it.
KINDS = {f"learn {role}": f"learn {role}, once" for role in ROLES}
KINDS |= {"finetune": "fine-tune, each task", "adapt": "adapt, each task"}
#: What is counted of a training.
FIGURES = ("images", "labels", "steps", "minutes", "bytes")


# --- the trainings of a study, and costs.csv --------------------------------------------------------------------------


class Training(NamedTuple):
    """A training that a method needs, done once with each of some seeds.

    Attributes:
        what: one of :data:`KINDS`. made_for: the first method that it is done for; others share it.
        task: on which; "": on the backbone, once for all tasks. train: label of the train degree, or "".
        images, labels: how many it sees; nan: not known. settings: None: the model is used as it is.
        files: what it leaves, one a seed, each beside its curve.
    """

    what: str
    made_for: str
    task: str
    train: str
    images: float
    labels: float
    settings: Optimisation | None
    files: Sequence[Path]

    def row(self) -> dict | None:
        """Return what it takes, the mean over the seeds that are there, or None if none is."""
        curves = {file: file.with_suffix(".csv") for file in self.files if file.is_file()}
        done = [file for file, curve in curves.items() if self.settings is None or curve.is_file()]
        if not done:
            return None
        figures = dict.fromkeys(FIGURES, 0)
        if self.settings is not None:
            steps = math.nan if math.isnan(self.images) else self.settings.epochs * self.settings.steps(self.images)
            minutes = fmean(_minutes(curves[file]) for file in done)
            figures |= {"images": self.images, "labels": self.labels, "steps": steps, "minutes": minutes}
        figures["bytes"] = fmean(file.stat().st_size for file in done)
        names = {"what": self.what, "made_for": self.made_for, "task": self.task, "train_degree": self.train}
        return names | {"seeds": len(done)} | figures


def _minutes(curve: Path) -> float:
    check(curve)
    return checked(read_rows(curve, ("seconds",)), ("seconds",), curve).seconds.iloc[-1] / 60


def gather(run: Run) -> list[dict]:
    """Return the rows of costs.csv: one for every method and training that it needs and that is there.

    Raises:
        TocomError: the metadata of a prepared task, or the curve of a training, cannot be read.
    """
    return [
        {"study": run.study.study, "backbone": backbone, "method": method} | row
        for backbone in run.backbones
        for method in run.study.methods
        for training in trainings(run, backbone, method)
        if (row := training.row()) is not None
    ]


def trainings(run: Run, backbone: str, method: str) -> Iterator[Training]:
    """Yield every training that a method needs on a backbone: once for all tasks, then by task and train degree."""
    from tocom.jobs import learn_job  # these import torch, which tables do without
    from tocom.plan import learned_on

    study = run.study
    for role in _learned_roles(run, backbone, method):
        name = partial(study.learned_name, backbone, seed=0, role=role)  # of a recipe, whatever the seeds
        first = next(other for other in study.methods if name(other) == name(method))
        job = learn_job(study, backbone, method, study.seeds_of(method)[0], role)
        files = [run.learned_file(backbone, method, seed, role) for seed in study.seeds_of(method)]
        yield Training(
            f"learn {role}", first, "", "", learned_on(job.settings, job.data_root)[0], 0, job.settings, files
        )
    tuned, adapted = study.tuned_as(method), study.adapt_for(method)
    trains_anything = study.methods[tuned].tuning.part.trains_anything
    for task in study.task_names:
        images = _images(run, task)
        labels = 0 if study.task_kind == "language" else images
        settings = study.finetune_for(task, tuned) if trains_anything else None
        for train, files in _by_degree(run, "checkpoints", backbone, tuned, task):
            yield Training("finetune", tuned, task, train, images, labels, settings, files)
        for train, files in _by_degree(run, "adapted", backbone, method, task) if adapted else ():
            yield Training("adapt", method, task, train, images, 0, adapted, files)


def _learned_roles(run: Run, backbone: str, method: str) -> list[str]:
    return [role for role in ROLES if run.study.learned_name(backbone, method, 0, role) is not None]


def _images(run: Run, task: str) -> float:
    """Return the training images of a prepared task; nan if it is not there."""
    prepared = run.folder / "data" / f"{task}.safetensors"
    return load_metadata(prepared)["sizes"]["train"] if prepared.is_file() else math.nan


def _by_degree(run: Run, stage: str, backbone: str, method: str, task: str) -> Iterator[tuple[str, list[Path]]]:
    found = list(run.model_files(stage, backbone, method, task))
    for train in run.study.train_degrees_of(method):
        yield train, [file for checkpoint, file in found if checkpoint.train_degree == train]


# --- tables, from costs.csv alone -------------------------------------------------------------------------------------


def serving_table(run: Run, backbone: str) -> Table:
    """Return what it takes to run one task at every inference degree: once for all tasks, and for each task."""
    rows = []
    for method in run.study.methods:
        rows.append(_serving_row(run, backbone, method))
        if (degrees := _matched(run, method)) > 1:
            rows.append(_serving_row(run, backbone, method, models=degrees))
    unit = _unit(run)
    once = [f"{name}, once" for name in (unit, "steps", "minutes", "MB")]
    header = ["method", "models a task", *once, f"{unit} / labels", "steps", "minutes", "MB"]
    caption = (
        "What a method takes to run at every inference degree. Once: to learn on the backbone, for all tasks and "
        f"without labels. Then for each task: training {unit} and labels, and the steps, minutes and stored bytes of "
        "all its models. One fine-tuned model, trained at any degree, runs at all; matched: a model of its own for "
        "each inference degree, on the same labels, each as costly as the mean over the train degrees that were run; "
        f"adapted: with a compensator of its own, learned on the task's {unit} without their labels. {_caption(run)}"
    )
    return Table(f"What it takes to serve every degree ({backbone})", caption, header, rows, f"{backbone}-costs")


def _matched(run: Run, method: str) -> int:
    """Return how many models it takes to have each inference degree run by one that was trained at it; 0: none can."""
    can = run.study.tuned_as(method) == method and train_degrees(run.study, method)
    trains = run.study.methods[method].tuning.part.trains_anything
    return len(run.study.infer_degrees_of(method)) if can and trains else 0


def _serving_row(run: Run, backbone: str, method: str, models: int = 1) -> list[Text]:
    """Return the line of a method that fine-tunes so many models a task."""
    learned = [f"learn {role}" for role in _learned_roles(run, backbone, method)]
    adapts = run.study.methods[method].adapt is not None
    means = _means(run, backbone, method)
    names = [f"{run.title(method)}{', matched' * (models > 1)}", f"{models}{', adapted' * adapts}"]
    if not {*learned, "finetune", *["adapt"] * adapts} <= set(means.index):
        return list(map(Text, [*names, *[NOT_RUN] * 8]))
    once = means.loc[learned].sum(skipna=False)
    tuned = means.loc["finetune"]
    each = models * tuned + (means.loc["adapt"] if adapts else 0)
    seen = f"{_number(tuned.images)} / {_number(tuned.labels)}"
    before = _numbers(once[["images", "steps", "minutes", "bytes"]]) if learned else [NOT_PLANNED] * 4
    return list(map(Text, [*names, *before, seen, *_numbers(each[["steps", "minutes", "bytes"]])]))


def trainings_table(run: Run, backbone: str) -> Table:
    """Return what every training takes; one that methods share stands at the first of them."""
    rows = []
    for method in run.study.methods:
        means = _means(run, backbone, method, made_for=method)
        for what in KINDS:
            if what in means.index:
                texts = [run.title(method), KINDS[what], *_numbers(means.loc[what, list(FIGURES)])]
                rows.append(list(map(Text, texts)))
    header = ["method", "training", _unit(run), "labels", "steps", "minutes", "MB"]
    rows = rows or [[Text(NOT_RUN)] * len(header)]
    caption = f"One training each; one that methods share stands at the first of them alone. {_caption(run)}"
    return Table(f"What every training takes ({backbone})", caption, header, rows, f"{backbone}-trainings")


def _means(run: Run, backbone: str, method: str, **where: str) -> pd.DataFrame:
    """Return the figures of a method by what is done, the mean over tasks and train degrees."""
    frame = run.costs[(run.costs.backbone == backbone) & (run.costs.method == method)]
    for name, value in where.items():
        frame = frame[frame[name] == value]
    columns = frame[list(FIGURES)].astype(float)
    return columns.groupby(frame.what).agg(lambda values: values.mean(skipna=False))


def _caption(run: Run) -> str:
    means = "seeds" if len(run.study.tasks) == 1 else "tasks, train degrees and seeds"
    text = " A text is its own label." if run.study.task_kind == "language" else ""
    return (
        f"Means over {means}. Minutes: of training, with scoring after every epoch, where the study ran and jobs may "
        "have run side by side; other machines take others. MB: 10^6 bytes, of the files that are kept. Validation "
        f"{_unit(run)}, which choose epochs and scales, are not counted.{text}"
    )


def _unit(run: Run) -> str:
    return "sequences" if run.study.task_kind == "language" else "images"


def _numbers(figures: pd.Series) -> list[str]:
    """Return figures as text, bytes in MB."""
    return [_number(value / 1e6 if name == "bytes" else value) for name, value in figures.items()]


def _number(value: float) -> str:
    return NOT_PLANNED if math.isnan(value) else cost_text(value)
