"""Compare methods pair by pair: gains, intervals, tests, and their correction for many comparisons.

Which pairs is declared by the study (``compare``). Each is compared on every backbone, for every task and group of
tasks, at every pair of a train and an inference degree; see docs/statistics.md for the question of each test.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from tocom.analysis import stats
from tocom.analysis.cells import BySeed, Condition
from tocom.analysis.planned import Point, Scope, group_scopes, points, task_scopes
from tocom.analysis.scores import METRICS
from tocom.errors import TocomError

#: p-value columns; each names which observations are the exchangeable units of the test.
TESTS = ("p_images", "p_seeds", "p_tasks")
_GAP = ("score_matched", "gap_closed", "gap_low", "gap_high")
#: Columns of significance.csv: scores in percent, gains in points; group tells whether the scope is a group of tasks.
COLUMNS = (
    *("study", "backbone", "before", "after", "scope", "group", "train_degree", "infer_degree"),
    *("n_tasks", "n_seeds", "n_images", "score_before", "score_after", "gain", "low", "high"),
    *(*TESTS, *_GAP, *(f"{name}_holm" for name in TESTS)),
)


def compare(study, records: dict[Condition, BySeed]) -> pd.DataFrame:
    """Make every declared comparison and correct each family of p-values by Holm's method.

    A family is a backbone, a pair of methods, and either all groups of tasks (the main table) or all single tasks (the
    table of tasks). A comparison takes the seeds that all its tasks and conditions have; it is left out without one.

    Args:
        records: what :func:`tocom.analysis.cells.records` returns; conditions may be missing.

    Returns:
        A row with :data:`COLUMNS` for each comparison.
    """
    scopes = group_scopes(study.groups) + task_scopes(study.groups)
    rows = [
        {"study": study.study, "backbone": backbone.name, "before": before, "after": after, **found}
        for backbone in study.backbones
        for scope in scopes
        for before, after in study.compare
        for point in points(study, before, after)
        if (found := _Comparison(study, records, backbone.name, before, after).row(scope, point))
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in TESTS if rows else ():
        p_values = frame.groupby(["backbone", "before", "after", "group"])[name]
        frame[f"{name}_holm"] = p_values.transform(lambda p: stats.holm(p.to_numpy()))
    return frame


class _Comparison:
    """Two methods on one backbone."""

    def __init__(self, study, records: dict[Condition, BySeed], backbone: str, before: str, after: str):
        self.metric = METRICS[study.metric]
        self.resamples = study.analysis.resamples
        self.records, self.backbone, self.before, self.after = records, backbone, before, after

    def row(self, scope: Scope, point: Point) -> dict:
        """Return the columns of a comparison, or none of them where no seed has all it takes."""
        both = (self.before, point.before, point.infer), (self.after, point.after, point.infer)
        found = self._aligned(scope, *both)
        if not found:
            return {}
        a, b = found
        gains = np.array([self.metric.gains(x, y) for x, y in zip(a, b, strict=True)])  # [tasks, seeds]
        low, high = self.metric.gain_interval(a, b, self.resamples)
        return {
            "scope": scope.name,
            "group": scope.is_group,
            "train_degree": point.train,
            "infer_degree": point.infer,
            "n_tasks": len(scope.tasks),
            "n_seeds": gains.shape[1],
            "n_images": sum(runs.shape[1] for runs in a),
            "score_before": self._percent(a),
            "score_after": self._percent(b),
            "gain": gains.mean(),
            "low": low,
            "high": high,
            "p_images": self.metric.image_test(a, b),
            "p_seeds": stats.seed_test(gains.mean(axis=0)),
            "p_tasks": stats.task_test(gains.mean(axis=1)) if scope.is_group else np.nan,
            **self._gap(scope, *both, (self.before, str(point.infer), point.infer)),
        }

    def _gap(self, scope: Scope, *three: tuple[str, str, int]) -> dict:
        """Return which share of the gap to the models trained at the degree that they run at is closed."""
        found = self._aligned(scope, *three)
        if not found:
            return dict.fromkeys(_GAP, np.nan)
        means = [self._percent(runs) for runs in found]
        interval = self.metric.gap_interval(*found, self.resamples)
        return dict(zip(_GAP, (means[2], stats.gap_closed(*means), *interval), strict=True))

    def _aligned(self, scope: Scope, *conditions: tuple[str, str, int]) -> list[list[np.ndarray]]:
        """Return, for each (method, train, infer) and task, runs of the seeds that all have; empty without one."""
        runs = [
            [self.records.get((self.backbone, method, task, train, infer), {}) for task in scope.tasks]
            for method, train, infer in conditions
        ]
        seeds = sorted(set.intersection(*(set(run) for of_tasks in runs for run in of_tasks)))
        found = [[np.stack([run[seed] for seed in seeds]) for run in of_tasks] for of_tasks in runs if seeds]
        for task, stacked in zip(scope.tasks, zip(*found, strict=True), strict=False):
            if len({array.shape for array in stacked}) > 1:
                raise TocomError(f"predictions of {task} are of different images; evaluate its models again")
        return found

    def _percent(self, tasks: list[np.ndarray]) -> float:
        return float(np.mean([self.metric.percent(runs) for runs in tasks]))
