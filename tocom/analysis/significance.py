"""Compare conditions pair by pair: gains, intervals, tests, and their correction for many comparisons.

Two comparisons are made at every (train degree, inference degree) with a mismatch:

- ``tocom_vs_plain``: the same models, at the same cost, with and without ToCom;
- ``random_vs_tocom``: models fine-tuned at degrees drawn at random (which each fine-tuning has to pay for) against
  models fine-tuned at one degree with ToCom added.

Each is made for every task and for groups of tasks (``real tasks``, ``generated tasks``, ``all tasks``). See
docs/statistics.md for the question that each test answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tocom.analysis import stats
from tocom.analysis.cells import Condition
from tocom.settings import RANDOM

TOCOM_VS_PLAIN, RANDOM_VS_TOCOM = "tocom_vs_plain", "random_vs_tocom"
REAL, GENERATED, ALL = "real tasks", "generated tasks", "all tasks"
#: p-value column -> which observations are the exchangeable units of the test.
TESTS = {"p_images": "images", "p_seeds": "seeds", "p_tasks": "tasks"}


@dataclass(frozen=True)
class Scope:
    """A task or a group of tasks: its name in tables and its members."""

    name: str
    tasks: tuple[str, ...]

    @property
    def is_group(self) -> bool:
        """Whether it averages over tasks."""
        return self.name in (REAL, GENERATED, ALL)


def scopes(kinds: dict[str, str]) -> list[Scope]:
    """Return every group of tasks, then every task.

    Args:
        kinds: task -> "real" or "generated", in the order of the tables.
    """
    groups = {REAL: "real", GENERATED: "generated"}
    members = {name: tuple(task for task, kind in kinds.items() if kind == wanted) for name, wanted in groups.items()}
    result = [Scope(name, tasks) for name, tasks in members.items() if tasks]
    if len(result) > 1:
        result.append(Scope(ALL, tuple(kinds)))
    return result + [Scope(task, (task,)) for task in kinds]


def compare(
    correct: dict[Condition, np.ndarray],
    kinds: dict[str, str],
    resamples: int = 2_000,
) -> pd.DataFrame:
    """Make every comparison and correct each family of p-values by Holm's method.

    A family is a backbone and compressor, one comparison, and either all groups of tasks (the main table) or all single
    tasks (the table of tasks).

    Args:
        correct: condition -> which images were right [seeds, images] bool.
        kinds: task -> "real" or "generated".

    Returns:
        A row a comparison: accuracies in percent; gain, low and high in points; the share of the gap to the
        matched-degree model that is closed; p-values, raw and corrected.
    """
    rows = []
    for backbone, compressor in sorted({key[:2] for key in correct}):
        mine = {key[2:]: value for key, value in correct.items() if key[:2] == (backbone, compressor)}
        for scope in scopes(kinds):
            for comparison, before, after in _pairs(mine):
                row = _compare_one(mine, scope, before, after, resamples)
                rows.append({"backbone": backbone, "compressor": compressor, "comparison": comparison} | row)
    frame = pd.DataFrame(rows)
    family = ["backbone", "compressor", "comparison", "group"]
    for name in TESTS:
        frame[f"{name}_holm"] = frame.groupby(family)[name].transform(lambda p: stats.holm(p.to_numpy()))
    return frame


Short = tuple[str, int, bool]  # train degree, inference degree, compensated


def _pairs(mine: dict) -> list[tuple[str, Short, Short]]:
    conditions = {key[1:] for key in mine}
    mismatched = sorted(
        ((train, infer) for train, infer, compensated in conditions if compensated and train != str(infer)),
        key=lambda pair: (int(pair[0]), pair[1]),
    )
    pairs = [(TOCOM_VS_PLAIN, (train, infer, False), (train, infer, True)) for train, infer in mismatched]
    rivals = [(train, infer) for train, infer in mismatched if (RANDOM, infer, False) in conditions]
    return pairs + [(RANDOM_VS_TOCOM, (train, infer, True), (RANDOM, infer, False)) for train, infer in rivals]


def _compare_one(mine: dict, scope: Scope, before: Short, after: Short, resamples: int) -> dict:
    a, b = ([mine[(task, *condition)] for task in scope.tasks] for condition in (before, after))
    difference = [y.astype(np.int8) - x.astype(np.int8) for x, y in zip(a, b, strict=True)]
    low, high = stats.bootstrap_gain(difference, resamples=resamples)
    by_task_and_seed = np.array([100 * d.mean(axis=1) for d in difference])
    infer = before[1]
    row = {
        "scope": scope.name,
        "group": scope.is_group,
        "train_degree": before[0],
        "infer_degree": infer,
        "n_tasks": len(scope.tasks),
        "n_seeds": len(difference[0]),
        "n_images": sum(d.shape[1] for d in difference),
        "accuracy_before": _mean_percent(a),
        "accuracy_after": _mean_percent(b),
        "gain": by_task_and_seed.mean(),
        "low": low,
        "high": high,
        "p_images": stats.pooled_sign_flip_test(difference) if scope.is_group else stats.sign_flip_test(difference[0]),
        "p_seeds": stats.seed_test(by_task_and_seed.mean(axis=0)),
        "p_tasks": stats.task_test(by_task_and_seed.mean(axis=1)) if scope.is_group else np.nan,
    }
    return row | _gap(mine, scope, a, b, infer, resamples)


def _gap(mine: dict, scope: Scope, a: Sequence, b: Sequence, infer: int, resamples: int) -> dict:
    keys = [(task, str(infer), infer, False) for task in scope.tasks]
    if not all(key in mine for key in keys):
        return dict.fromkeys(("accuracy_matched", "gap_closed", "gap_low", "gap_high"), np.nan)
    matched = [mine[key] for key in keys]
    means = _mean_percent(a), _mean_percent(b), _mean_percent(matched)
    low, high = stats.bootstrap_gap_closed(a, b, matched, resamples=resamples)
    return {"accuracy_matched": means[2], "gap_closed": stats.gap_closed(*means), "gap_low": low, "gap_high": high}


def _mean_percent(conditions: Sequence[np.ndarray]) -> float:
    return float(np.mean([100 * condition.mean() for condition in conditions]))
