"""Compare a fresh run with a committed reference, within the tolerances that the study's config states."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from tocom.analysis.cells import KEYS, with_compensator
from tocom.errors import TocomError
from tocom.settings import PLAIN

_KEYS = list(KEYS)


@dataclass(frozen=True)
class Verdict:
    """What differs between two runs, in points of accuracy; identical says that the tables are equal."""

    identical: bool
    cells: int
    worst_cell: float
    worst_mean: float
    worst_gain: float
    problems: tuple[str, ...]


def compare(
    fresh: pd.DataFrame, reference: pd.DataFrame, cell_points: float, mean_points: float, gain_points: float
) -> Verdict:
    """Compare two tables of cells.

    The same machine and versions give identical cells. Another processor rounds differently, and training then
    takes another path, as with another seed: so one cell may differ by ``cell_points``, while the mean of a
    condition (train degree, inference degree, compensator) over tasks and seeds may by ``mean_points``,
    and the mean gain of ToCom, which is paired and so less noisy, by ``gain_points``. Identical are tables that are
    equal in all columns that both have: a reference may be older than a column.

    Raises:
        TocomError: a cell is in one table only.
    """
    fresh, reference = (with_compensator(frame, after="compensated") for frame in (fresh, reference))
    joined = fresh.merge(reference, on=_KEYS, how="outer", suffixes=("", "_reference"), indicator=True)
    alone = joined[joined._merge != "both"]
    if len(alone):
        where = "the reference" if alone.iloc[0]._merge == "right_only" else "the fresh run"
        raise TocomError(
            f"{len(alone)} cells are in one table only; the first is in {where} alone: {_key_text(alone.iloc[0])}"
        )
    joined["points"] = 100 * (joined.accuracy - joined.accuracy_reference)
    condition = ["backbone", "compressor", "train_degree", "infer_degree", "compensator"]
    means = joined.groupby(condition).points.mean().abs()
    by_variant = joined.groupby(condition).points.mean().unstack()
    gains = by_variant.drop(columns=PLAIN).sub(by_variant[PLAIN], axis=0).stack().dropna().abs()
    worst_cell = joined.points.abs()
    problems = [
        f"cell {_key_text(joined.loc[i])}: {joined.loc[i, 'points']:+.2f} points"
        for i in worst_cell.index[worst_cell > cell_points]
    ]
    problems += [f"mean of {key}: {value:.2f} points" for key, value in means[means > mean_points].items()]
    problems += [f"mean gain at {key}: {value:.2f} points" for key, value in gains[gains > gain_points].items()]
    worst = [float(values.max()) for values in (worst_cell, means, gains)]
    return Verdict(_same(fresh, reference), len(joined), *worst, tuple(problems))


def _same(fresh: pd.DataFrame, reference: pd.DataFrame) -> bool:
    common = [name for name in fresh.columns if name in reference.columns]
    ordered = [frame[common].sort_values(_KEYS).reset_index(drop=True) for frame in (fresh, reference)]
    return ordered[0].equals(ordered[1])


def _key_text(row: pd.Series) -> str:
    return ", ".join(f"{name}={row[name]}" for name in _KEYS[3:])


def report(verdict: Verdict, cell_points: float, mean_points: float, gain_points: float) -> str:
    """Return what a verdict means, in one line.

    Raises:
        TocomError: something differs by more than it may.
    """
    if verdict.problems:
        more = f" (and {len(verdict.problems) - 1} more)" if len(verdict.problems) > 1 else ""
        raise TocomError(
            f"the fresh run differs from the reference: {verdict.problems[0]}{more}; allowed are"
            f" {cell_points} points a cell, {mean_points} a mean and {gain_points} a mean gain"
        )
    if verdict.identical:
        return f"verified: all {verdict.cells} cells are identical to the reference"
    return (
        f"verified: {verdict.cells} cells; the largest difference is {verdict.worst_cell:.2f} points in a cell (allowed"
        f" {cell_points}), {verdict.worst_mean:.2f} in a mean over tasks and seeds (allowed {mean_points}) and"
        f" {verdict.worst_gain:.2f} in a mean gain (allowed {gain_points})"
    )
