"""Methods side by side over tasks and seeds: typical scores, how often one wins, ranks, and what could be seen.

Everything is at the degrees of the study's endpoint and on all tasks. Scores are [seeds, tasks], in percent.
Agarwal et al. 2021: "Deep reinforcement learning at the edge of the statistical precipice", arXiv 2108.13264.
Demsar 2006: "Statistical comparisons of classifiers over multiple data sets", JMLR 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as distributions

from tocom.analysis import stats
from tocom.analysis.planned import Entry, Point, Scope, degrees, endpoint, entries, points
from tocom.analysis.run import Compared, Run
from tocom.analysis.tables import DECLINED, NOT_PLANNED, NOT_RUN, Table, Text, p_is, score_text, signed

#: Fewer methods or tasks than that have no ranks to test.
_METHODS, _TASKS = 3, 2


# --- what is compared -------------------------------------------------------------------------------------------------


def scores_of(run: Run, backbone: str, scope: Scope, entry: Entry) -> NDArray:
    """Return the scores of an entry under the seeds that have all tasks of a scope."""
    alone = [Scope(task, (task,), False) for task in scope.tasks]
    by_task = [run.score(backbone, entry.method, one, entry.train, entry.infer) for one in alone]
    return pd.concat(by_task, axis=1, join="inner").to_numpy(dtype=float)


def measured(run: Run, backbone: str) -> dict[Entry, NDArray]:
    """Return the scores of all entries that were run, on all tasks."""
    each = {entry: scores_of(run, backbone, run.scopes[-1], entry) for entry in entries(run.study)}
    return {entry: scores for entry, scores in each.items() if len(scores)}


def ranks_of(there: dict[Entry, NDArray]) -> tuple[list[Entry], Ranks | None]:
    """Return the entries that are no ceilings, and how they rank by their means over seeds."""
    rivals = [entry for entry in there if not entry.matched]
    return rivals, ranked([there[entry].mean(axis=0) for entry in rivals])


def title(run: Run, entry: Entry) -> str:
    """Return what tables and figures call an entry."""
    return f"{run.title(entry.method)}{', matched' * entry.matched}"


# --- statistics -------------------------------------------------------------------------------------------------------


def iqm(scores: NDArray) -> NDArray:
    """Return the interquartile mean over seeds and tasks, [...] for [..., seeds, tasks] (Agarwal et al., 4.3)."""
    return distributions.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def resampled(scores: NDArray, resamples: int) -> NDArray:
    """Return [resamples, seeds, tasks]: seeds drawn with replacement, for each task anew (Agarwal et al., 4.1)."""
    drawn = np.random.default_rng(0).integers(len(scores), size=(resamples, *scores.shape))
    return np.take_along_axis(scores[None], drawn, axis=1)


def percentiles(draws: NDArray) -> NDArray:
    """Return the ends [2, ...] of the percentile interval of draws [resamples, ...]."""
    return np.quantile(draws, [(1 - stats.LEVEL) / 2, (1 + stats.LEVEL) / 2], axis=0)


def profile(scores: NDArray, thresholds: NDArray) -> NDArray:
    """Return the share of runs above each threshold, [..., T] for [..., seeds, tasks] (Agarwal et al., 4.2)."""
    return (scores.reshape(*scores.shape[:-2], -1, 1) > thresholds).mean(axis=-2)


def improvement(scores: NDArray, over: NDArray) -> float:
    """Return how likely a run scores above one ``over`` which it is to improve, of the same task (Agarwal et al., 4.4).

    The mean over tasks, of all pairs of seeds, whose numbers may differ; ties count half.
    """
    return float((1 + np.sign(scores[:, None] - over[None])).mean() / 2) if len(scores) and len(over) else np.nan


class Ranks(NamedTuple):
    """Methods by their ranks, 1 the best: means over tasks [K], Friedman's test, Nemenyi's critical difference."""

    means: NDArray
    statistic: float
    p: float
    critical: float

    @property
    def is_enough(self) -> bool:
        """Whether there are tasks enough for Nemenyi's test to tell any two methods apart."""
        return self.critical <= len(self.means) - 1


def ranked(scores: Sequence[NDArray]) -> Ranks | None:
    """Rank K methods on every task by their scores [tasks] each; None of too few (Demsar, 3.2.2). Ties share a rank."""
    if len(scores) < _METHODS or len(scores[0]) < _TASKS:
        return None
    ranks = distributions.rankdata(-np.round(scores, 9), axis=0)  # [K, tasks]
    with np.errstate(invalid="ignore"):  # undefined if all methods are equal on all tasks
        statistic, p = distributions.friedmanchisquare(*ranks)
    return Ranks(ranks.mean(axis=1), float(statistic), float(p), critical_difference(*ranks.shape))


def critical_difference(k: int, n: int) -> float:
    """Return by how much mean ranks of two of k methods on n tasks have to differ (Nemenyi; Demsar, equation 6)."""
    quantile = distributions.studentized_range.ppf(stats.LEVEL, k, np.inf) / np.sqrt(2)
    return float(quantile * np.sqrt(k * (k + 1) / (6 * n)))


def alike(means: NDArray, apart: NDArray) -> list[tuple[float, float]]:
    """Return the lowest and highest mean rank of each largest row of methods that cannot be told apart.

    Args:
        means: mean ranks [K]. apart: [K, K] bool, which two are told apart.
    """
    order, k = np.argsort(means, kind="stable"), len(means)
    ranks, apart = means[order], apart[np.ix_(order, order)]
    ends = [next((j for j in range(i + 1, k) if apart[i:j, j].any()), k) for i in range(k)]
    spans = [(ranks[i], ranks[end - 1]) for i, end in enumerate(ends) if not i or end > ends[i - 1]]
    return [(low, high) for low, high in spans if high > low]


def told_apart(run: Run, backbone: str, rivals: Sequence[Entry], ranks: Ranks) -> NDArray:
    """Return [K, K] bool: which two methods are told apart at the 5 % level.

    By Nemenyi's test, which speaks for other tasks, where the tasks are enough for it; else by the study's own test
    over other trainings and images of these tasks (pairwise.csv), corrected by Holm's method for all pairs.
    """
    if ranks.is_enough:
        return np.abs(np.subtract.outer(ranks.means, ranks.means)) >= ranks.critical
    tests = run.pairwise[run.pairwise.backbone == backbone]
    below = stats.holm(tests.p.astype(float)) < 1 - stats.LEVEL
    found = {frozenset(pair) for pair in zip(tests.before[below], tests.after[below], strict=True)}
    return np.array([[{one.method, other.method} in found for other in rivals] for one in rivals])


def detectable(study, compared: Compared, spreads: stats.Spreads, seeds: int, images: Sequence[float]) -> float:
    """Return the gain that a comparison finds with 80 % power at the 5 % level; NaN with one seed, or if unknown.

    Args:
        spreads: its standard deviations, in points. images: test images of each task.
    """
    tied = any(map(study.learns, compared))
    spreads = spreads._replace(compensator=np.nan_to_num(spreads.compensator) if tied else 0.0)
    return stats.detectable(stats.planned(spreads, seeds, images, tied))


# --- tables -----------------------------------------------------------------------------------------------------------


def methods_table(run: Run, backbone: str) -> Table:
    """Return what is typical of every method over tasks and seeds, and how they rank."""
    study, scope, there = run.study, run.scopes[-1], measured(run, backbone)
    rivals, ranks = ranks_of(there)
    means = dict(zip(rivals, ranks.means, strict=True)) if ranks else {}
    first = _plain(study)
    rows = [_methods_row(run, backbone, scope, entry, there, first, means) for entry in entries(study)]
    header = ["method", "degrees", "mean", "median", "IQM", "mean rank", f"P(above {run.title(first.method)})"]
    caption = (
        f"Test {study.metric} in % of {study.seeds_text} seed(s) on {len(scope.tasks)} task(s), at train → inference "
        "degree. Mean: ± standard deviation over seeds. Median: of the tasks. IQM: mean of the middle half of all "
        "runs, with a 95 % interval by drawing seeds within tasks (Agarwal et al. 2021)"
        f"{_not_drawn(study)}. Mean rank: over tasks, 1 is the best. P: how often a training scores above one of "
        f"{run.title(first.method)} on the same task, ties half. matched: trained at the degree it runs at, the "
        f"ceiling, which is not ranked. {ranks_note(ranks, len(scope.tasks))}"
    )
    return Table(f"Methods over tasks and seeds ({backbone})", caption, header, rows, f"{backbone}-methods")


def _plain(study) -> Entry:
    """Return the entry that others are held against: the endpoint's first method, or else the study's."""
    declared, listed = endpoint(study), entries(study)
    return next((entry for entry in listed if declared and entry.method == declared.before), listed[0])


def _not_drawn(study) -> str:
    if study.most_seeds < 2:
        return "; none with one seed"
    learns = any(map(study.learns, study.methods))
    return "; what a learned part does to all tasks alike is not in it" if learns else ""


def _methods_row(
    run: Run, backbone: str, scope: Scope, entry: Entry, there: dict, first: Entry, means: dict
) -> list[Text]:
    names = [Text(title(run, entry)), Text(f"{entry.train} → {entry.infer}")]
    if entry not in there:
        return [*names, *[Text(NOT_RUN)] * 5]
    scores = there[entry]
    by_seed = run.score(backbone, entry.method, scope, entry.train, entry.infer)
    typical = f"{iqm(scores):.1f}"
    if len(scores) > 1:
        low, high = percentiles(iqm(resampled(scores, run.study.analysis.resamples)))
        typical += f" [{low:.1f}, {high:.1f}]"
    above = improvement(scores, there[first]) if first in there and entry != first else np.nan
    return [
        *names,
        score_text(by_seed, len(run.study.seeds_of(entry.method))),
        Text(f"{np.median(scores.mean(axis=0)):.1f}"),
        Text(typical),
        Text(_number(means.get(entry, np.nan))),
        Text(_number(above)),
    ]


def ranks_note(ranks: Ranks | None, tasks: int) -> str:
    """Return what captions say of the test of ranks, and of its power."""
    if ranks is None:
        return f"No ranks: they take {_METHODS} methods and {_TASKS} tasks that were run."
    instead = "" if ranks.is_enough else ", so none can be; the figure of ranks takes the tests of pairwise.csv instead"
    return (
        f"Friedman's test of {len(ranks.means)} methods on {tasks} tasks: {p_is(ranks.p)}. "
        f"With {tasks} tasks, two methods are told apart at the 5 % level (Nemenyi) only where their mean ranks, which "
        f"are at most {len(ranks.means) - 1} apart, differ by {ranks.critical:.2f}{instead}."
    )


def variance_table(run: Run, backbone: str) -> Table:
    """Return where the errors of every declared gain come from, and which gain could be seen, a line a group."""
    rows = [_variance_row(run, backbone, pair, scope) for pair in run.study.compare for scope in run.scopes]
    sources = [f"SD {name}" for name in stats.Spreads._fields]
    header = ["comparison", "tasks and degrees", "gain", "error", *sources, "effect", "detectable", "P(above)"]
    caption = (
        "Points. Error: standard error of the gain over images and trainings. SD: standard deviations of the gain that "
        "it comes from, estimated: of an image, of a training on one task, of what is learned once for all tasks, of "
        "an image under a training, of a task. Effect: gain in standard deviations of a training (Cohen's d). "
        "Detectable: the gain that a study with these deviations, seeds and images finds with 80 % power at the 5 % "
        "level. P: how often a training of the first method scores above one of the second on the same task, ties half."
    )
    rows = rows or [[Text(NOT_RUN)] * len(header)]
    return Table(f"Where errors come from ({backbone})", caption, header, rows, f"{backbone}-variance")


def point_of(study, before: str, after: str) -> Point | None:
    """Return where two methods are compared at the endpoint's degrees, or None if they are not."""
    train, infer = degrees(study)
    here = [point for point in points(study, before, after) if point.infer == infer]
    return next((point for point in here if point.train == train or not point.train.isdigit()), None)


def _variance_row(run: Run, backbone: str, compared: Compared, scope: Scope) -> list[Text]:
    before, after = compared
    point = point_of(run.study, before, after)
    at = f", {point.train} → {point.infer}" if point else ""
    names = [Text(f"{run.title(after)} over {run.title(before)}"), Text(f"{scope.name}{at}")]
    pair = run.pairs(backbone, compared, scope)[point.train, point.infer] if point else None
    if pair is None or not pair.is_run or pair.test is None:
        return [*names, *[Text(NOT_RUN if point else NOT_PLANNED)] * 10]
    test = pair.test
    spreads = stats.Spreads(*(float(test[f"sd_{name}"]) for name in stats.Spreads._fields))
    entered = Entry(before, point.before, point.infer), Entry(after, point.after, point.infer)
    low, high = (scores_of(run, backbone, scope, entry) for entry in entered)
    numbers = [
        *(test.error, *spreads, test.effect),
        detectable(run.study, compared, spreads, int(test.n_seeds), images_of(run, scope, test.n_images)),
        improvement(high, low),
    ]
    return [*names, Text(DECLINED if pair.declined else signed(pair.gain)), *map(Text, map(_number, numbers))]


def images_of(run: Run, scope: Scope, images: float) -> NDArray:
    """Return so many test images [tasks] as they are shared among tasks by what cells.csv counts: images, or pixels."""
    counted = run.cells[run.cells.task.isin(scope.tasks)].astype({"n": float}).groupby("task").n.max()
    return (images * counted / counted.sum()).to_numpy()


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
