"""Compare conditions pair by pair: gains, intervals, tests, and their correction for many comparisons.

Two comparisons are made at every (train degree, inference degree) with a mismatch:

- ``tocom_vs_plain``: the same models, at the same cost, with and without ToCom;
- ``random_vs_tocom``: models fine-tuned at degrees drawn at random (which each fine-tuning has to pay for) against
  models fine-tuned at one degree with ToCom added.

Each is made for every variant of the compensator, for every task and for groups of tasks (such as ``real tasks``,
``FGVC`` or ``all tasks``). See docs/statistics.md for the question that each test answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tocom.analysis import stats
from tocom.analysis.cells import BySeed, Condition
from tocom.errors import TocomError
from tocom.settings import PLAIN, RANDOM

TOCOM_VS_PLAIN, RANDOM_VS_TOCOM = "tocom_vs_plain", "random_vs_tocom"
#: The group of all tasks, and that of the 19 tasks whose three parts are groups of their own.
ALL, VTAB = "all tasks", "VTAB-1k"
#: p-value column -> which observations are the exchangeable units of the test.
TESTS = {"p_images": "images", "p_seeds": "seeds", "p_tasks": "tasks"}


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


def scopes(groups: dict[str, str]) -> list[Scope]:
    """Return every group of tasks, then every task; a task that is the whole study is its group alone."""
    tasks = [Scope(task, (task,), False) for task in groups]
    return group_scopes(groups) + (tasks if len(tasks) > 1 else [])


def compare(
    correct: dict[Condition, BySeed],
    groups: dict[str, str],
    resamples: int = 2_000,
) -> pd.DataFrame:
    """Make every comparison and correct each family of p-values by Holm's method.

    A family is a backbone and compressor, a compensator, one comparison, and either all groups of tasks (the main
    table) or all single tasks (the table of tasks). A comparison takes the seeds that all its tasks and conditions
    have; it is left out if there is none.

    Args:
        correct: condition -> seed -> which images were right [images] bool; variants in the order of the tables.
        groups: task -> its group's name, in the order of the tables.

    Returns:
        A row a comparison: accuracies in percent; gain, low and high in points; the share of the gap to the
        matched-degree model that is closed; p-values, raw and corrected.

    Raises:
        TocomError: no model was evaluated with a compensator at another degree than its own.
    """
    rows = []
    for backbone, compressor in sorted({key[:2] for key in correct}):
        mine = {key[2:]: value for key, value in correct.items() if key[:2] == (backbone, compressor)}
        model = {"backbone": backbone, "compressor": compressor}
        for scope in scopes(groups):
            for about, before, after in _pairs(mine):
                if _aligned(mine, scope, before, after):
                    rows.append(model | about | _compare_one(mine, scope, before, after, resamples))
    if not rows:
        raise TocomError("nothing to compare: no task has a model with a compensator at another degree than its own")
    frame = pd.DataFrame(rows)
    family = ["backbone", "compressor", "comparison", "compensator", "group"]
    for name in TESTS:
        frame[f"{name}_holm"] = frame.groupby(family)[name].transform(lambda p: stats.holm(p.to_numpy()))
    return frame


Short = tuple[str, int, str]  # train degree, inference degree, compensator


def _pairs(mine: dict) -> list[tuple[dict[str, str], Short, Short]]:
    conditions = dict.fromkeys(key[1:] for key in mine)
    variants = dict.fromkeys(compensator for _, _, compensator in conditions if compensator != PLAIN)
    return [pair for variant in variants for pair in _pairs_of(variant, conditions)]


def _pairs_of(variant: str, conditions: dict[Short, None]) -> list[tuple[dict[str, str], Short, Short]]:
    mismatched = sorted(
        ((train, infer) for train, infer, compensator in conditions if compensator == variant and train != str(infer)),
        key=lambda pair: (int(pair[0]), pair[1]),
    )
    about = {"comparison": TOCOM_VS_PLAIN, "compensator": variant}
    pairs = [(about, (train, infer, PLAIN), (train, infer, variant)) for train, infer in mismatched]
    about = {"comparison": RANDOM_VS_TOCOM, "compensator": variant}
    rivals = [(train, infer) for train, infer in mismatched if (RANDOM, infer, PLAIN) in conditions]
    return pairs + [(about, (train, infer, variant), (RANDOM, infer, PLAIN)) for train, infer in rivals]


def _aligned(mine: dict, scope: Scope, *conditions: Short) -> list[list[np.ndarray]]:
    """Return, for each condition and task, [seeds, images] of the seeds that all of them have; empty without one."""
    runs = [[mine.get((task, *condition), {}) for task in scope.tasks] for condition in conditions]
    seeds = sorted(set.intersection(*(set(run) for of_tasks in runs for run in of_tasks)))
    return [[np.stack([run[seed] for seed in seeds]) for run in of_tasks] for of_tasks in runs if seeds]


def _compare_one(mine: dict, scope: Scope, before: Short, after: Short, resamples: int) -> dict:
    a, b = _aligned(mine, scope, before, after)
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
        "p_images": _image_test(difference),
        "p_seeds": stats.seed_test(by_task_and_seed.mean(axis=0)),
        "p_tasks": stats.task_test(by_task_and_seed.mean(axis=1)) if scope.is_group else np.nan,
    }
    return row | _gap(mine, scope, before, after, resamples)


def _image_test(difference: Sequence[np.ndarray]) -> float:
    """Return the exact p-value for one task, the Monte Carlo one for the mean over several."""
    return stats.sign_flip_test(difference[0]) if len(difference) == 1 else stats.pooled_sign_flip_test(difference)


def _gap(mine: dict, scope: Scope, before: Short, after: Short, resamples: int) -> dict:
    found = _aligned(mine, scope, before, after, (str(before[1]), before[1], PLAIN))
    if not found:
        return dict.fromkeys(("accuracy_matched", "gap_closed", "gap_low", "gap_high"), np.nan)
    a, b, matched = found
    means = _mean_percent(a), _mean_percent(b), _mean_percent(matched)
    low, high = stats.bootstrap_gap_closed(a, b, matched, resamples=resamples)
    return {"accuracy_matched": means[2], "gap_closed": stats.gap_closed(*means), "gap_low": low, "gap_high": high}


def _mean_percent(conditions: Sequence[np.ndarray]) -> float:
    return float(np.mean([100 * condition.mean() for condition in conditions]))
