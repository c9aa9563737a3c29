"""One line for every study: the published figure, ours, and how much of it was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
from scipy import stats

from tocom.analysis.paper import LARGEST_CAPTION, NOT_AT_HAND, READING_CAPTION, where
from tocom.analysis.planned import VTAB, Scope, same_models
from tocom.analysis.report import write_pages
from tocom.analysis.run import (
    Compared,
    Run,
    best_mean,
    largest,
    published_gain,
    sources,
    transfer_methods,
    transferred,
)
from tocom.analysis.tables import NOT_RUN, STARS_CAPTION, VTAB_NOTE, Table, Text, gain_text, signed, with_interval
from tocom.settings import PLAIN

#: What each kind of study (its key ``paper``) asks.
ASKS = {
    "degrees": "largest average gain",
    "backbones": "largest gain of any backbone",
    "methods": "largest gain of any method",
    "speedup": "largest gain of models trained compressed, run at the lowest degree",
    "ablation": "largest gain of the first compensator",
    "transfer": "mean change by the gap of another task",
    "segmentation": "largest gain in mIoU",
}
#: What a star means in the overview.
OVERVIEW_STARS = STARS_CAPTION.replace("all gains that are shown here", "all gains that the largest was taken from")
#: A backbone with two methods.
Model = tuple[str, Compared]


@dataclass(frozen=True)
class Overview:
    """A line in the overview: a study, or one group of its tasks.

    Attributes:
        what: what its figure is. published, ours: the figure, as text.
        n_run, n_planned: cells (of a transfer: accuracies with and without a gap).
        mean: where that stands beside a largest gain, the largest mean gain over inference degrees, as text.
    """

    study: str
    what: str
    published: str
    ours: str
    n_run: int
    n_planned: int
    mean: str = "–"

    @property
    def status(self) -> str:
        """Whether it was run, partly or not at all."""
        return NOT_RUN if not self.n_run else "run" if self.n_run == self.n_planned else "partly run"


def overview(study, folder: Path) -> list[Overview]:
    """Return the lines of one study: one for each group of tasks with a published figure, or one for all of it.

    Args:
        folder: its results; it may be incomplete or missing.
    """
    run, kind = Run(study, folder), study.paper or "degrees"
    if kind == "transfer":
        return [Overview(study.study, ASKS[kind], NOT_AT_HAND, _mean_transfer(run), *_transfer_progress(run))]
    models = list(product(run.backbones, same_models(study)))
    if kind == "ablation":
        models = [model for model in models if model[1] == study.compare[0]]
    if kind in ("degrees", "segmentation"):
        return [_beside_published(run, kind, scope, models) for scope in _to_compare(run, models)]
    infer, scope = min(run.infer_degrees) if kind == "speedup" else None, run.scopes[-1]
    ours = _largest_text(run, scope, models, infer)
    return [Overview(study.study, f"{ASKS[kind]}, {scope.name}", NOT_AT_HAND, ours, *run.progress())]


def _of_the_paper(run: Run, scope: Scope, models: Sequence[Model]) -> dict[Model, str]:
    """Return the models that a published gain over a group of tasks is of, and that gain."""
    found = {model: published_gain(run, scope, *model) for model in models}
    return {model: text for model, text in found.items() if text}


def _to_compare(run: Run, models: Sequence[Model]) -> list[Scope]:
    """Return the groups of tasks with a published figure; if they leave a task out, the widest group, too."""
    known = [scope for scope in run.scopes if _of_the_paper(run, scope, models)]
    left = set(run.study.groups) - {task for scope in known for task in scope.tasks}
    return known + ([run.scopes[-1]] if left else [])


def _beside_published(run: Run, kind: str, scope: Scope, models: Sequence[Model]) -> Overview:
    """Return the line of one group of tasks: of the paper's model where it has a figure, else of any."""
    theirs = _of_the_paper(run, scope, models)
    text, models = next(iter(theirs.values()), NOT_AT_HAND), list(theirs) or models
    ours, mean = _largest_text(run, scope, models), _mean_text(run, scope, models)
    return Overview(run.study.study, f"{ASKS[kind]}, {scope.name}", text, ours, *run.progress(scope.tasks), mean)


def _largest_text(run: Run, scope: Scope, models: Sequence[Model], infer: int | None = None) -> str:
    """Return the largest gain of some models over a group of tasks, and where it is."""
    found = {model: best for model in models if (best := largest(run, *model, scope, infer))}
    if not found:
        return NOT_RUN
    model, best = max(found.items(), key=lambda one: one[1].test.gain)
    backbones, compared = zip(*models, strict=True)
    corrected = run.corrected(dict.fromkeys(backbones), [scope], dict.fromkeys(compared))
    return f"{gain_text(best, corrected)} ({best.degrees}{_of_model(run, model)})"


def _mean_text(run: Run, scope: Scope, models: Sequence[Model]) -> str:
    """Return the largest mean gain of some models over inference degrees, and the train degree where it is."""
    found = {model: best for model in models if (best := best_mean(run, *model, scope))}
    if not found:
        return NOT_RUN
    model, (train, by_seed) = max(found.items(), key=lambda one: one[1][1].mean())
    return f"{signed(by_seed.mean())} (from {train}{_of_model(run, model)})"


def _of_model(run: Run, model: Model) -> str:
    return f", {where(run, *model)}" if len(run.backbones) * len(same_models(run.study)) > 1 else ""


def _all_transferred(run: Run) -> pd.DataFrame:
    return pd.concat(
        [transferred(run, *model) for model in product(run.backbones, transfer_methods(run.study))] or [run.transfer]
    )


def _mean_transfer(run: Run) -> str:
    changes = _all_transferred(run)
    others = changes[(changes.source_task != changes.target_task) & (changes.source_task != PLAIN)]
    by_seed = others.dropna(subset="change").groupby("seed").change.mean()
    if by_seed.empty:
        return NOT_RUN
    if len(by_seed) < 2 or not by_seed.std() > 0:
        return signed(by_seed.mean())
    ends = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    return f"{with_interval(by_seed.mean(), *ends)} (t interval over seeds)"


def _transfer_progress(run: Run) -> tuple[int, int]:
    tasks, seeds = len(run.study.task_names), sum(map(len, map(run.study.seeds_of, transfer_methods(run.study))))
    return len(_all_transferred(run)), len(run.backbones) * (tasks + 1) * tasks * seeds


def joint(lines: Sequence[Overview]) -> Table:
    """Return one table over all studies, from :func:`overview` of each."""
    rows = [
        [*(one.study, one.what, one.published, one.ours, one.mean), f"{one.n_run:,} of {one.n_planned:,}", one.status]
        for one in lines
    ]
    caption = (
        f"Gains in points. Published: arXiv 2408.06798, of DeiT-B with ToMe (mIoU: of its own segmenter on ADE20k); "
        f"{NOT_AT_HAND}: not at hand. Ours: with a "
        f"95 % interval and the degrees (train → inference) at which it was measured. {OVERVIEW_STARS} "
        f"{LARGEST_CAPTION} "
        "Mean gain: over all inference degrees but the train degree, from the train degree where it is largest. "
        f"{READING_CAPTION} Cells: how many were run of how many are planned."
    )
    caption += f" {VTAB_NOTE}." if any(line.what.endswith(f", {VTAB}") for line in lines) else ""
    header = ["study", "figure", "published", "ours", "mean gain (ours)", "cells", "status"]
    return Table("All studies", caption, header, [[Text(cell) for cell in row] for row in rows], "all-studies")


def write_overview(studies: Sequence[Path], output: Path) -> None:
    """Write :func:`joint` as Markdown, HTML and LaTeX; the ending of ``output``, if it has one, is theirs.

    Args:
        studies: folders with a study.json, or configs, whose studies are looked for where the workflow puts them.
    """
    runs = [Run.find(path) for path in studies]
    inputs = [file for run in runs for file in sources(run.folder)]
    lines = [line for run in runs for line in overview(run.study, run.folder)]
    write_pages([joint(lines)], output.with_suffix(""), inputs)
