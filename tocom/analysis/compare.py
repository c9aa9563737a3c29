"""Compare methods pair by pair: gains, intervals, tests, and where errors come from.

Which pairs is declared by the study (``compare``). Each is compared on every backbone, for every task and group of
tasks, at every pair of a train and an inference degree; see docs/statistics.md for the question of each test.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tocom.analysis import stats
from tocom.analysis.cells import BySeed, Condition
from tocom.analysis.planned import (
    Entry,
    Mismatch,
    Point,
    Scope,
    endpoint,
    entries,
    group_scopes,
    mismatches,
    plain_methods,
    points,
    same_models,
    task_scopes,
)
from tocom.analysis.scores import METRICS
from tocom.errors import TocomError

_GAP = ("score_matched", "gap_closed", "gap_low", "gap_high")
_SPREADS = tuple(f"sd_{name}" for name in stats.Spreads._fields)
#: Columns of significance.csv: scores in percent, gains, their standard error and deviations in points, p-values that
#: are corrected for nothing. group: whether the scope is a group of tasks. primary: the study's endpoint.
COLUMNS = (
    *("study", "backbone", "before", "after", "scope", "group", "train_degree", "infer_degree", "primary"),
    *("n_tasks", "n_seeds", "n_images", "score_before", "score_after", "gain", "low", "high", "error", "effect"),
    *("p", "p_images", "p_seeds", "p_tasks", *_GAP, *_SPREADS),
)
#: Columns of pairwise.csv: as in significance.csv, of every two methods at the endpoint's degrees on all tasks.
PAIRWISE_COLUMNS = (
    *("study", "backbone", "before", "after", "train_before", "train_after", "infer_degree"),
    *("n_tasks", "n_seeds", "n_images", "gain", "low", "high", "error", "effect", "p"),
)
#: Columns of mismatch.csv: scores in percent, loss = score_matched - score, its interval and its error in points.
#: matched: the method whose models were trained at the inference degree.
MISMATCH_COLUMNS = (
    *("study", "backbone", "method", "matched", "scope", "group", "train_degree", "infer_degree", "n_tasks", "n_seeds"),
    *("n_images", "score", "score_matched", "loss", "low", "high", "error", "effect", "p"),
)
_GAIN = (-1.0, 1.0)
#: Columns of harm.csv: cost and its interval in points; p of the cost being the margin or more.
HARM_COLUMNS = (
    *("study", "backbone", "before", "after", "scope", "n_conditions", "n_tasks", "n_seeds"),
    *("cost", "low", "high", "p"),
)


def compare(study, records: dict[Condition, BySeed]) -> pd.DataFrame:
    """Make every declared comparison.

    A comparison takes the seeds that all its tasks and conditions have; it is left out without one.

    Args:
        records: what :func:`tocom.analysis.cells.records` returns; conditions may be missing.

    Returns:
        A row with :data:`COLUMNS` for each comparison.
    """
    primary, models = endpoint(study), Models(study, records)
    rows = [
        {
            **{"study": study.study, "backbone": backbone.name, "before": before, "after": after},
            **found,
            "primary": primary == (backbone.name, before, after, scope, point),
        }
        for backbone in study.backbones
        for scope in group_scopes(study.groups) + task_scopes(study.groups)
        for before, after in study.compare
        for point in points(study, before, after)
        if (found := models.compared(backbone.name, before, after, scope, point))
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def corrected(frame: pd.DataFrame) -> pd.Series:
    """Return the p-values of the comparisons that are shown together, corrected for each other.

    The primary endpoint is tested first, at the full level. All others are corrected by Holm's method and are no
    smaller than it: they count only where it does (a fixed sequence), so that the chance of any false claim among all
    of them stays below the level.
    """
    first = frame.primary.astype(bool)
    adjusted = frame.p.astype(float)
    adjusted[~first] = stats.holm(adjusted[~first])
    return adjusted.clip(lower=adjusted[first].max()) if first.any() else adjusted


def harm(study, records: dict[Condition, BySeed]) -> pd.DataFrame:
    """Estimate what compensators cost where they are not needed: where a mismatch costs a model little.

    Returns:
        A row with :data:`HARM_COLUMNS` for each backbone, pair of methods that share models, and group of tasks that
        has such a condition.
    """
    models = Models(study, records)
    rows = [
        {
            "study": study.study,
            "backbone": backbone.name,
            "before": before,
            "after": after,
            "scope": scope.name,
            **found,
        }
        for backbone in study.backbones
        for before, after in same_models(study)
        for scope in group_scopes(study.groups)
        if (found := models.harm(backbone.name, before, after, scope))
    ]
    return pd.DataFrame(rows, columns=list(HARM_COLUMNS))


def mismatch(study, records: dict[Condition, BySeed]) -> pd.DataFrame:
    """Estimate what methods without a compensator lose where they run at another degree than they were trained at.

    Returns:
        A row with :data:`MISMATCH_COLUMNS` for each backbone, task and group of tasks, method that trains at fixed
        degrees or is one of those trained at no one degree, train degree, and other inference degree for which the
        study trains models of the method.
    """
    models = Models(study, records)
    rows = [
        {"study": study.study, "backbone": backbone.name, "method": at.method, "matched": method, **found}
        for backbone in study.backbones
        for scope in group_scopes(study.groups) + task_scopes(study.groups)
        for method in plain_methods(study)
        for at in mismatches(study, method)
        if (found := models.mismatched(backbone.name, method, scope, at))
    ]
    return pd.DataFrame(rows, columns=list(MISMATCH_COLUMNS))


def pairwise(study, records: dict[Condition, BySeed]) -> pd.DataFrame:
    """Compare every two methods at the degrees of the endpoint on all tasks, whatever pairs the study declares.

    Returns:
        A row with :data:`PAIRWISE_COLUMNS` for each backbone and two of the methods that rank there; ceilings do not.
    """
    models, scope = Models(study, records), group_scopes(study.groups)[-1]
    rivals = [entry for entry in entries(study) if not entry.matched]
    rows = [
        {"study": study.study, "backbone": backbone.name, "before": before.method, "after": after.method, **found}
        for backbone in study.backbones
        for before, after in combinations(rivals, 2)
        if (found := models.both(backbone.name, before, after, scope))
    ]
    return pd.DataFrame(rows, columns=list(PAIRWISE_COLUMNS))


class Models:
    """What was predicted by the models of a study."""

    def __init__(self, study, records: dict[Condition, BySeed]):
        self.study, self.records, self.metric = study, records, METRICS[study.metric]

    def compared(self, backbone: str, before: str, after: str, scope: Scope, point: Point) -> dict:
        """Return the columns of a comparison, or none of them where no seed has all it takes."""
        both = (before, point.before, point.infer), (after, point.after, point.infer)
        tasks = self.values(backbone, scope.tasks, both)
        if not tasks:
            return {}
        trained = self.trained(both)
        means = stats.Means.of(tasks, trained)
        gain, spreads = means.contrast(_GAIN), means.spreads(_GAIN)
        matched = before, str(point.infer), point.infer
        return {
            "scope": scope.name,
            "group": scope.is_group,
            "train_degree": point.train,
            "infer_degree": point.infer,
            "score_before": means.values[0],
            "score_after": means.values[1],
            "gain": gain.value,
            **self._tested(tasks, means, gain),
            "p_images": stats.sign_flip_test([task[1] - task[0] for task in tasks]),
            "p_seeds": means.p_seeds(_GAIN),
            "p_tasks": stats.task_test([np.diff(task.mean(axis=(1, 2)))[0] for task in tasks]),
            **self._gap(backbone, scope.tasks, (*both, matched)),
            **dict(zip(_SPREADS, spreads, strict=True)),
        }

    @staticmethod
    def _tested(tasks: list[NDArray], means: stats.Means, gain: stats.Contrast) -> dict:
        """Return what a difference of means was estimated from, its errors, and its test."""
        low, high = gain.interval()
        return {
            "n_tasks": len(tasks),
            "n_seeds": means.seeds,
            "n_images": sum(task.shape[2] for task in tasks),
            "low": low,
            "high": high,
            "error": gain.error,
            "effect": gain.effect,
            "p": gain.p(),
        }

    def both(self, backbone: str, before: Entry, after: Entry, scope: Scope) -> dict:
        """Return the columns of pairwise.csv, or none of them where no seed has all it takes."""
        means, gain, tested = self._difference(backbone, scope, (before[:3], after[:3]))
        where = {"train_before": before.train, "train_after": after.train, "infer_degree": after.infer}
        return where | {"gain": gain.value} | tested if means else {}

    def mismatched(self, backbone: str, matched: str, scope: Scope, at: Mismatch) -> dict:
        """Return the columns of what a mismatch costs, or none of them where no seed has all it takes."""
        means, loss, tested = self._difference(backbone, scope, (at, (matched, str(at.infer), at.infer)))
        if not means:
            return {}
        return {
            "scope": scope.name,
            "group": scope.is_group,
            "train_degree": at.train,
            "infer_degree": at.infer,
            "score": means.values[0],
            "score_matched": means.values[1],
            "loss": loss.value,
            **tested,
        }

    def _difference(
        self, backbone: str, scope: Scope, both: tuple[tuple[str, str, int], ...]
    ) -> tuple[stats.Means, stats.Contrast, dict] | tuple[None, None, None]:
        """Return the means of two conditions, the second's less the first's, and the columns that it is tested by."""
        tasks = self.values(backbone, scope.tasks, both)
        if not tasks:
            return None, None, None
        means = stats.Means.of(tasks, self.trained(both))
        difference = means.contrast(_GAIN)
        return means, difference, self._tested(tasks, means, difference)

    def _gap(self, backbone: str, tasks: tuple[str, ...], three: tuple[tuple[str, str, int], ...]) -> dict:
        """Return which share of the gap to the models trained at the degree that they run at is closed."""
        values = self.values(backbone, tasks, three)
        if not values:
            return dict.fromkeys(_GAP, np.nan)
        means = stats.Means.of(values, self.trained(three))
        return dict(zip(_GAP, (means.values[2], *means.gap_closed()), strict=True))

    def harm(self, backbone: str, before: str, after: str, scope: Scope) -> dict:
        """Return the columns of a cost, or none of them where no mismatch is harmless."""
        tasks, trained, counts = [], self.trained([(before, "", 0), (after, "", 0)]), []
        for task in scope.tasks:
            found = [
                values[0][:2]
                for point in points(self.study, before, after)
                if point.train != str(point.infer)
                and (values := self.values(backbone, [task], self._harmless(before, after, point)))
                and values[0][2].mean() - values[0][0].mean() < self.study.analysis.harmless
            ]
            counts += [len(found)] if found else []
            tasks += [np.mean(found, axis=0)] if found else []
        if not tasks or len({task.shape[1] for task in tasks}) > 1:
            return {}
        means = stats.Means.of(tasks, trained, np.array(counts) / sum(counts))
        gain = means.contrast(_GAIN)
        low, high = gain.interval()
        return {
            "n_conditions": sum(counts),
            "n_tasks": len(tasks),
            "n_seeds": means.seeds,
            "cost": 0.0 - gain.value,
            "low": 0.0 - high,
            "high": 0.0 - low,
            "p": gain.p_above(-self.study.analysis.margin),
        }

    @staticmethod
    def _harmless(before: str, after: str, point: Point) -> tuple[tuple[str, str, int], ...]:
        """Return both conditions, and the one without a mismatch."""
        own = int(point.before) if point.before.isdigit() else point.infer
        return (before, point.before, point.infer), (after, point.after, point.infer), (before, point.before, own)

    def trained(self, conditions: Iterable[tuple[str, str, int]]) -> list[stats.Trained]:
        """Return of which trainings each (method, train degree, inference degree) is."""
        by = [(self.study.tuned_as(method), train) for method, train, _ in conditions]
        shared = {key for key, (method, *_) in zip(by, conditions, strict=True) if self.study.learns(method)}
        return [stats.Trained(key, key in shared) for key in by]

    def values(self, backbone: str, tasks: Iterable[str], conditions: Iterable[tuple[str, str, int]]) -> list[NDArray]:
        """Return values [conditions, seeds, images] of every task, under the seeds that all have; none without one.

        Raises:
            TocomError: conditions were evaluated on different images.
        """
        runs = [[self.records.get((backbone, m, task, train, n), {}) for m, train, n in conditions] for task in tasks]
        seeds = sorted(set.intersection(*(set(run) for of_task in runs for run in of_task)))
        found = []
        for task, of_task in zip(tasks, runs, strict=True) if seeds else ():
            stacked = [np.stack([run[seed] for seed in seeds]) for run in of_task]
            if len({array.shape for array in stacked}) > 1:
                raise TocomError(f"predictions of {task} are of different images; evaluate its models again")
            found.append(np.stack([self.metric.values(array) for array in stacked]))
        return found
