"""One line for every study: the published figure, ours, and how much of it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from tocom.analysis.cells import TEXT
from tocom.analysis.grid import Grid
from tocom.analysis.paper import LARGEST_CAPTION, NOT_AT_HAND, READING_CAPTION, degrees_text, where
from tocom.analysis.published import read_published
from tocom.analysis.report import write_pages
from tocom.analysis.run import Run, best_mean, largest, transfer_change
from tocom.analysis.significance import VTAB, Scope
from tocom.analysis.tables import NOT_RUN, VTAB_NOTE, Table, Text, gain_text, signed
from tocom.errors import TocomError, suggest
from tocom.settings import NO_GAP, PLAIN

#: What each kind of study asks.
ASKS = {
    "degrees": "largest average gain",
    "backbones": "largest gain of any backbone",
    "compressors": "largest gain of any compressor",
    "speedup": "largest gain of models trained compressed, run at the lowest degree",
    "ablation": "largest gain of the main compensator",
    "transfer": "mean change by the gap of another task",
    "segmentation": "mIoU without and with ToCom where it gains most",
}


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


def overview(
    name: str, kind: str, folder: Path, config: Mapping[str, Any], groups: Mapping[str, str] | None = None
) -> list[Overview]:
    """Return the lines of one study: one for each group of tasks with a published figure, or one for all of it.

    Args:
        name: what the table calls it. kind: one of :data:`ASKS`.
        folder, config, groups: as for :func:`tocom.analysis.paper.paper_table`; a segmentation has no groups.

    Raises:
        TocomError: there is no such kind, or the config lacks a part of the grid.
    """
    if kind not in ASKS:
        raise TocomError(f"unknown kind of study {kind!r}{suggest(kind, ASKS)}; there are: {', '.join(ASKS)}")
    run = Run.read(folder, config, groups or {})
    if kind == "transfer":
        return [Overview(name, ASKS[kind], NOT_AT_HAND, _mean_transfer(run), *_transfer_progress(run))]
    if kind == "segmentation":
        scores = _scores(folder)
        published = _published_miou() if run.grid.tasks == ("ade20k",) else NOT_AT_HAND
        return [Overview(name, ASKS[kind], published, _miou(run.grid, scores), *run.grid.progress(scores))]
    if kind == "degrees":
        return [_degrees(name, run, scope) for scope in _to_compare(run)]
    infer, scope = min(run.grid.infer_degrees) if kind == "speedup" else None, run.scopes[-1]
    ours = _largest_text(run, scope, run.grid.models, infer)
    return [Overview(name, f"{ASKS[kind]}, {scope.name}", NOT_AT_HAND, ours, *run.grid.progress(run.cells))]


def _of_the_paper(run: Run, scope: Scope) -> list[tuple[str, str]]:
    """Return the models that the published figure of a group of tasks is of."""
    return [model for model in run.grid.models if run.published(scope, *model)]


def _to_compare(run: Run) -> list[Scope]:
    """Return the groups of tasks with a published figure; if they leave a task out, the widest group, too."""
    known = [scope for scope in run.scopes if _of_the_paper(run, scope)]
    left = set(run.groups) - {task for scope in known for task in scope.tasks}
    return known + ([run.scopes[-1]] if left else [])


def _degrees(name: str, run: Run, scope: Scope) -> Overview:
    """Return the line of one group of tasks: of the paper's model where it has a figure, else of any."""
    published = _of_the_paper(run, scope)
    models = published or list(run.grid.models)
    return Overview(
        name,
        f"{ASKS['degrees']}, {scope.name}",
        run.published(scope, *published[0]).text() if published else NOT_AT_HAND,
        _largest_text(run, scope, models),
        *replace(run.grid, tasks=scope.tasks).progress(run.cells),
        _mean_text(run, scope, models),
    )


def _largest_text(run: Run, scope: Scope, models: Sequence[tuple[str, str]], infer: int | None = None) -> str:
    """Return the largest gain of some models over a group of tasks, and where it is."""
    found = {model: largest(run, *model, scope, infer) for model in models}
    tested = {model: best for model, best in found.items() if best}
    if not tested:
        return NOT_RUN
    model = max(tested, key=lambda name: tested[name].test.gain)
    return f"{gain_text(tested[model].test)} ({degrees_text(tested[model])}{_of_model(run, model)})"


def _mean_text(run: Run, scope: Scope, models: Sequence[tuple[str, str]]) -> str:
    """Return the largest mean gain of some models over inference degrees, and the train degree where it is."""
    found = {model: best_mean(run, *model, scope) for model in models}
    there = {model: best for model, best in found.items() if best}
    if not there:
        return NOT_RUN
    model = max(there, key=lambda name: there[name][1].mean())
    train, by_seed = there[model]
    return f"{signed(by_seed.mean())} (from {train}{_of_model(run, model)})"


def _of_model(run: Run, model: tuple[str, str]) -> str:
    return f", {where(*model)}" if len(run.grid.models) > 1 else ""


def _mean_transfer(run: Run) -> str:
    changes = pd.concat([transfer_change(run, *model) for model in run.grid.models])
    by_seed = changes[changes.source_task != changes.target_task].groupby("seed").points.mean()
    if by_seed.empty:
        return NOT_RUN
    text = signed(by_seed.mean())
    if len(by_seed) < 2 or not by_seed.std() > 0:
        return text
    low, high = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    return f"{text} [{signed(low)}, {signed(high)}] (t interval over seeds)"


def _scores(folder: Path) -> pd.DataFrame:
    """Return segmentation.csv, or an empty table."""
    path = folder / "segmentation.csv"
    columns = ["backbone", "compressor", "task", "seed", "train_degree", "infer_degree", "compensator", "miou"]
    return pd.read_csv(path, dtype=TEXT, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=columns)


def _miou(grid: Grid, scores: pd.DataFrame) -> str:
    """Return the mean over seeds of mIoU without and with the compensator where it gains most."""
    if scores.empty:
        return NOT_RUN
    planned = scores.merge(grid.cells(), on=list(grid.cells().columns))
    keys = ["backbone", "compressor", "train_degree", "infer_degree", "seed"]
    wide = planned.pivot(index=keys, columns="compensator", values="miou").reindex(columns=[PLAIN, grid.main])
    wide = wide.astype(float).dropna().groupby(level=keys[:-1]).mean()
    wide = wide.loc[[train != str(infer) for _, _, train, infer in wide.index]]
    if wide.empty:
        return NOT_RUN
    where_most = (wide[grid.main] - wide[PLAIN]).idxmax()
    plain, ours = wide.loc[where_most]
    return f"{plain:.1f} → {ours:.1f} % ({where_most[2]} → {where_most[3]})"


def _published_miou() -> str:
    """Return the same of the published figures."""
    miou = {(f.infer_degree, f.compensated): f for f in read_published() if f.of == "miou"}
    both = [infer for infer, compensated in miou if compensated]
    infer = max(both, key=lambda n: miou[n, True].value - miou[n, False].value)
    plain, ours = miou[infer, False], miou[infer, True]
    return f"{plain.text()} → {ours.text()} % ({ours.train_degree} → {infer})"


def _transfer_progress(run: Run) -> tuple[int, int]:
    grid, frame = run.grid, run.transfer
    there = frame[
        frame.backbone.isin(grid.backbones)
        & frame.compressor.isin(grid.compressors)
        & frame.source_task.isin([NO_GAP, *grid.tasks])
        & frame.target_task.isin(grid.tasks)
        & frame.seed.isin(grid.seeds)
    ].drop_duplicates(["backbone", "compressor", "source_task", "target_task", "seed"])
    return len(there), len(grid.models) * (len(grid.tasks) + 1) * len(grid.tasks) * len(grid.seeds)


def joint(lines: Sequence[Overview]) -> Table:
    """Return one table over all studies, from :func:`overview` of each."""
    rows = [
        [
            line.study,
            line.what,
            line.published,
            line.ours,
            line.mean,
            f"{line.n_run:,} of {line.n_planned:,}",
            line.status,
        ]
        for line in lines
    ]
    caption = (
        f"Gains in points. Published: arXiv 2408.06798, of DeiT-B with ToMe (mIoU: of its own segmenter on ADE20k); "
        f"{NOT_AT_HAND}: not at hand. Ours: with a "
        "95 % interval and the degrees (train → inference) at which it was measured; * p < 0.05, ** p < 0.01, "
        f"*** p < 0.001, paired sign-flip test on images, Holm-corrected. {LARGEST_CAPTION} "
        "Mean gain: over all inference degrees but the train degree, from the train degree where it is largest. "
        f"{READING_CAPTION} Cells: how many were run of how many are planned."
    )
    caption += f" {VTAB_NOTE}." if any(line.what.endswith(f", {VTAB}") for line in lines) else ""
    header = ["study", "figure", "published", "ours", "mean gain (ours)", "cells", "status"]
    return Table("All studies", caption, header, [[Text(cell) for cell in row] for row in rows], "all-studies")


def write_joint(lines: Sequence[Overview], output: Path) -> None:
    """Write :func:`joint` as Markdown, HTML and LaTeX; the ending of ``output`` is replaced by each of theirs."""
    write_pages([joint(lines)], output.with_suffix(""))
