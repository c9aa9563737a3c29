"""The figures that the demo has to reach, computed from its tables: of its primary endpoint first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tocom.analysis.planned import Endpoint
from tocom.analysis.run import Pair, Run, primary, sources
from tocom.analysis.tables import p_is, p_text
from tocom.errors import TocomError


@dataclass(frozen=True)
class Figure:
    """One figure: what it is, what was measured, what was aimed at, and whether it was reached."""

    what: str
    measured: str
    target: str
    reached: bool


def headline(folder: Path) -> list[Figure]:
    """Return the figures that the study in ``folder`` has to reach, as measured.

    Raises:
        TocomError: it declares nothing to compare, or was not run.
    """
    sources(folder)
    run = Run.read(folder)
    needed = ("cells.csv", "significance.csv", "harm.csv", "throughput.csv")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise TocomError(f"{folder} lacks {' and '.join(missing)}; run the study first (snakemake --cores all)")
    if not run.study.compare:
        raise TocomError("the study compares no methods, so it has no figure to reach; give it compare and endpoint")
    found = primary(run)
    if found is None:
        raise TocomError("the primary endpoint was not run; run the study first (snakemake --cores all)")
    return [*_effect(run, *found), _harm(run, found[0]), _cost_of_folding(run, found[0].after)]


def _effect(run: Run, end: Endpoint, pair: Pair) -> list[Figure]:
    """Return the gain at the primary endpoint, its p-value, and the share of the gap that it closes."""
    row = pair.test
    gain = f"{row.gain:+.2f} points, 95 % interval [{row.low:+.2f}, {row.high:+.2f}]"
    closed = f"{100 * row.gap_closed:.0f} %, 95 % interval [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"
    where = f"{end.scope.name}, trained at {pair.train}, run at {pair.infer}"
    return [
        Figure(f"gain of {run.title(end.after)} over {run.title(end.before)} ({where})", gain, "≥ 2", row.gain >= 2),
        Figure("its p-value, over other trainings and other images", p_text(row.p), "< 0.01", row.p < 0.01),
        Figure("share of the gap to the matched degree closed", closed, "≥ 40 %", row.gap_closed >= 0.4),
    ]


def _harm(run: Run, end: Endpoint) -> Figure:
    """Return what the compensator costs where it is not needed, over the widest group of tasks."""
    limits, frame = run.study.analysis, run.harm
    mine = frame[(frame.backbone == end.backbone) & (frame.before == end.before) & (frame.after == end.after)]
    if mine.empty:
        raise TocomError("no mismatch of the primary endpoint's methods is harmless; there is no cost to show")
    row = mine.iloc[-1]
    what = f"its mean cost where a mismatch costs less than {limits.harmless:g} points ({row.n_conditions} conditions)"
    cost = f"{row.cost:+.2f} points, 95 % interval [{row.low:+.2f}, {row.high:+.2f}], {p_is(row.p)}"
    return Figure(what, cost, f"surely < {limits.margin:g} (p < 0.05)", row.p < 0.05)


def _cost_of_folding(run: Run, method: str) -> Figure:
    """Return how much longer a forward pass takes with it folded in: the degree that is furthest from 1."""
    ratio = run.throughput[run.throughput.method == method].set_index("infer_degree").ratio
    if ratio.empty:
        raise TocomError(f"the throughput of {method} was not measured; run the study first (snakemake --cores all)")
    worst = (ratio - 1).abs().idxmax()
    what = f"time of {run.title(method)}, folded in, over time without (worst degree, median over rounds)"
    return Figure(what, f"{ratio[worst]:.4f} at degree {worst}", "within 2 % of 1", abs(ratio[worst] - 1) <= 0.02)
