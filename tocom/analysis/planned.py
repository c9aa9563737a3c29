"""What a study's declaration asks for: tasks and groups of them, families of methods, pairs of conditions, cells."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tocom.errors import TocomError
from tocom.settings import DegreeSettings

#: The group of all tasks, and that of the 19 tasks whose three parts are groups of their own.
ALL, VTAB = "all tasks", "VTAB-1k"


@dataclass(frozen=True)
class Scope:
    """A task or a group of tasks: its name in tables, its members, and which of the two it is."""

    name: str
    tasks: tuple[str, ...]
    is_group: bool

    @property
    def title(self) -> str:
        """The name as a heading starts with it."""
        return self.name[:1].upper() + self.name[1:]


def group_scopes(groups: dict[str, str]) -> list[Scope]:
    """Return every group in order of appearance, then those that span several: VTAB-1k and all tasks.

    No two have the same members.

    Args:
        groups: task -> its group's name.
    """
    members: dict[str, tuple[str, ...]] = {}
    for task, group in groups.items():
        members[group] = (*members.get(group, ()), task)
    parts = [name for name in members if name.startswith(f"{VTAB} ")]
    wider = {VTAB: tuple(task for name in parts for task in members[name])} if len(parts) > 1 else {}
    if len(members) > 1 and len(wider.get(VTAB, ())) < len(groups):
        wider[ALL] = tuple(groups)
    return [Scope(name, tasks, True) for name, tasks in (members | wider).items()]


def task_scopes(groups: dict[str, str]) -> list[Scope]:
    """Return every task; none where one task is the whole study, whose group is all there is to say."""
    return [Scope(task, (task,), False) for task in groups] if len(groups) > 1 else []


def families(study) -> list[tuple[str, ...]]:
    """Return the methods that share checkpoints, those without a compensator first; the order is the study's."""
    return [tuple(sorted(study.sharing(tuned), key=lambda name: is_compensated(study, name))) for tuned in study.tuned]


def is_compensated(study, method: str) -> bool:
    """Return whether a method has a compensator."""
    return study.methods[method].compensator is not None


def train_degrees(study, method: str) -> list[str]:
    """Return the train degrees of a method that are numbers, ascending, as text."""
    return sorted((label for label in study.train_degrees_of(method) if label.isdigit()), key=int)


def plain_methods(study) -> list[str]:
    """Return the methods without a compensator that train at fixed degrees."""
    return [name for name in study.methods if not is_compensated(study, name) and train_degrees(study, name)]


def without_degree(study, method: str) -> list[str]:
    """Return the methods that train at no one degree and are otherwise like ``method``, whatever their compensator."""

    def less_degrees(name: str) -> tuple:
        entry = study.methods[name]
        tuning = {key: v for key, v in entry.tuning.described().items() if key not in DegreeSettings.model_fields}
        return entry.compressor.described(), tuning, entry.finetune

    own = less_degrees(method)
    return [name for name in study.methods if not train_degrees(study, name) and less_degrees(name) == own]


class Mismatch(NamedTuple):
    """Models of a method, by their train degree, that run at a degree for which others of it were trained."""

    method: str
    train: str
    infer: int


def mismatches(study, method: str) -> list[Mismatch]:
    """Return where a method's models, and those of it that train at no one degree, run at a train degree of others."""
    trains = train_degrees(study, method)
    drawn = [name for name in without_degree(study, method) if not is_compensated(study, name)]
    lines = [(method, train) for train in trains] + [(name, study.train_degrees_of(name)[0]) for name in drawn]
    return [
        Mismatch(name, train, infer)
        for name, train in lines
        for infer in sorted({*study.infer_degrees_of(method)} & {*study.infer_degrees_of(name)})
        if str(infer) in trains and train != str(infer)
    ]


class Point(NamedTuple):
    """Two conditions to compare: the train degree that names them, the train degree of either, where both run."""

    train: str
    before: str
    after: str
    infer: int


def points(study, before: str, after: str) -> list[Point]:
    """Return where two methods are compared: at the train and inference degrees that both have.

    A method that trains at no one degree is compared with the other at every train degree of that one. Where a
    compensator takes part, models that run at their own train degree are left out: it changes nothing there.
    """
    first, second = (train_degrees(study, method) for method in (before, after))
    only = [study.train_degrees_of(method)[0] for method in (before, after)]
    if first and second:
        trains = [(train, train, train) for train in first if train in second]
    elif second:
        trains = [(train, only[0], train) for train in second]
    else:
        trains = [(train, train, only[1]) for train in first or only[:1]]
    infers = sorted(set(study.infer_degrees_of(before)) & set(study.infer_degrees_of(after)))
    found = [Point(*train, infer) for train, infer in product(trains, infers)]
    both = is_compensated(study, before) or is_compensated(study, after)
    return [point for point in found if point.train != str(point.infer) or not both]


class Endpoint(NamedTuple):
    """The one comparison that a study is made for: two methods on a backbone, on some tasks, at a pair of degrees."""

    backbone: str
    before: str
    after: str
    scope: Scope
    point: Point


def endpoint(study) -> Endpoint | None:
    """Return the comparison that a study was declared to be made for, or None if it compares nothing there."""
    wanted = study.endpoint
    if not study.compare:
        return None
    before, after = wanted.compare or study.compare[0]
    scopes = group_scopes(study.groups)
    scope = next((s for s in [*scopes, *task_scopes(study.groups)] if s.name == wanted.tasks), scopes[-1])
    here = [
        point
        for point in points(study, before, after)
        if (wanted.train_degree is None or point.train == str(wanted.train_degree))
        and wanted.infer_degree in (None, point.infer)
    ]
    point = min(here, key=lambda p: (int(p.train) if p.train.isdigit() else 0, -p.infer), default=None)
    return point and Endpoint(wanted.backbone or study.backbones[0].name, before, after, scope, point)


class Entry(NamedTuple):
    """A method, where it was trained, and where it runs; matched: trained at the degree it runs at, the ceiling."""

    method: str
    train: str
    infer: int
    matched: bool = False


def degrees(study) -> tuple[str, int]:
    """Return the endpoint's train and inference degree, or else the lowest and the highest of the first method."""
    lowest = next((labels[0] for method in study.methods if (labels := train_degrees(study, method))), "")
    declared = endpoint(study)
    if declared is None:
        return lowest, max(study.infer_degrees_of(next(iter(study.methods))))
    return declared.point.train if declared.point.train.isdigit() else lowest, declared.point.infer


def entries(study) -> list[Entry]:
    """Return every method that has the endpoint's degrees or trains at none, then the ceiling of every family."""
    train, infer = degrees(study)
    found = []
    for method in study.methods:
        fixed = train_degrees(study, method)
        label = train if fixed else study.train_degrees_of(method)[0]
        if infer in study.infer_degrees_of(method) and (not fixed or train in fixed):
            found.append(Entry(method, label, infer))
    plain = [first for first, *_ in families(study) if infer in study.infer_degrees_of(first)]
    own = str(infer)
    return found + [Entry(m, own, infer, True) for m in plain if own != train and own in train_degrees(study, m)]


def same_models(study) -> list[tuple[str, str]]:
    """Return the declared pairs whose methods share checkpoints: what a compensator does to the same models."""
    return [pair for pair in study.compare if study.tuned_as(pair[0]) == study.tuned_as(pair[1])]


def cells(study, tasks: tuple[str, ...] | None = None) -> set[tuple]:
    """Return (backbone, method, task, seed, train degree, inference degree) of every planned cell of some tasks."""
    return {
        (backbone.name, method, task, seed, train, infer)
        for backbone, method in product(study.backbones, study.methods)
        for task, seed in product(study.task_names if tasks is None else tasks, study.seeds_of(method))
        for train, infer in product(study.train_degrees_of(method), study.infer_degrees_of(method))
    }


def prediction_files(study, folder: Path) -> list[Path]:
    """Return the predictions files of a study that are there, and none that an earlier declaration of it has left."""
    root = folder / "predictions"
    planned = [
        root / backbone.name / tuned / task / f"{batch}.safetensors"
        for backbone, tuned, task in product(study.backbones, study.tuned, study.task_names)
        for batch in study.batches(tuned)
    ]
    found = [path for path in planned if path.is_file()]
    if not found:
        raise TocomError(f"no predictions of this study in {root}; run some of it first")
    return found
