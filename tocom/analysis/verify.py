"""Compare a fresh run with a committed reference, within the tolerances that the study's config states."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tocom.analysis.cells import KEYS, read_cells
from tocom.analysis.planned import same_models
from tocom.errors import TocomError

_KEYS = list(KEYS)


def verify(folder: Path) -> str:
    """Compare ``folder``/cells.csv with ``folder``/reference/cells.csv, and say what came of it in one line.

    The same machine and versions give identical cells. Another processor rounds differently, and training then
    takes another path, as with another seed: so one cell may differ by ``verify.cell_points``, while the mean of a
    condition (backbone, method, train and inference degree) over tasks and seeds may by ``mean_points``, and the mean
    gain of a compensator, which is paired and so less noisy, by ``gain_points``.

    Raises:
        TocomError: a cell is in one table only, or something differs by more than it may.
    """
    from tocom.study import read_study

    study = read_study(folder / "study.json")
    fresh, reference = (
        read_cells(path).sort_values(_KEYS, ignore_index=True)
        for path in (folder / "cells.csv", folder / "reference" / "cells.csv")
    )
    points = _points(fresh, reference)
    if fresh.equals(reference):
        return f"verified: all {len(fresh)} cells are identical to the reference"
    condition = ["backbone", "method", "train_degree", "infer_degree"]
    means = points.groupby(condition).mean()
    by_method = means.unstack("method")
    pairs = [pair for pair in same_models(study) if set(pair) <= set(by_method.columns)]
    gains = pd.Series(
        {(pair, *key): gain for pair in pairs for key, gain in (by_method[pair[1]] - by_method[pair[0]]).items()},
        dtype=float,
    )
    limits = study.verify
    checks = {
        "cell": (points, limits.cell_points),
        "mean": (means, limits.mean_points),
        "mean gain": (gains.dropna(), limits.gain_points),
    }
    wrong = [
        f"{what} of {', '.join(map(str, key))}: {value:+.2f} points"
        for what, (values, limit) in checks.items()
        for key, value in values[values.abs() > limit].items()
    ]
    allowed = ", ".join(f"{limit:g} points a {what}" for what, (_, limit) in checks.items())
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise TocomError(f"the fresh run differs from the reference: {wrong[0]}{more}; allowed are {allowed}")
    worst = ", ".join(f"{values.abs().max():.2f} in a {what}" for what, (values, _) in checks.items() if len(values))
    return f"verified: {len(fresh)} cells; the largest difference in points is {worst} (allowed are {allowed})"


def _points(fresh: pd.DataFrame, reference: pd.DataFrame) -> pd.Series:
    """Return by how many points each cell of a fresh run differs."""
    joined = fresh.merge(reference, on=_KEYS, how="outer", suffixes=("", "_reference"), indicator=True)
    alone = joined[joined._merge != "both"]
    if len(alone):
        where = "the reference" if alone.iloc[0]._merge == "right_only" else "the fresh run"
        key = ", ".join(f"{name}={alone.iloc[0][name]}" for name in _KEYS)
        raise TocomError(f"{len(alone)} cells are in one table only; the first is in {where} alone: {key}")
    return 100 * (joined.set_index(_KEYS).score - joined.set_index(_KEYS).score_reference)
