"""The figures that the demo has to reach, computed from its tables: of the pair of methods that it declares first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tocom.analysis.run import Compared, Run, strongest
from tocom.errors import TocomError

#: A mismatch that costs less than so many points is too small to hurt.
HARMLESS = 1.0


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
        TocomError: it declares nothing to compare, has several backbones, or was not run.
    """
    run = Run.read(folder)
    needed = ("cells.csv", "significance.csv", "throughput.csv")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise TocomError(f"{folder} lacks {' and '.join(missing)}; run the study first (snakemake --cores all)")
    if not run.study.compare or len(run.backbones) > 1:
        raise TocomError("the figures to reach are those of the demo: one backbone, and two methods to compare")
    pair = run.study.compare[0]
    return [*_effect(run, pair), _cost_where_not_needed(run, pair), _cost_of_folding(run, pair[1])]


def _effect(run: Run, pair: Compared) -> list[Figure]:
    """Return the gain over the first group, trained at the lowest degree, run at the highest; the gap it closes."""
    scope = run.scopes[0]
    found = strongest(run, run.backbones[0], pair, scope)
    if found is None:
        raise TocomError(f"{' and '.join(pair)} were not compared; run the study first (snakemake --cores all)")
    row = found.test
    where = f"{scope.name}, trained at {row.train_degree}, run at {row.infer_degree}"
    gain = f"{row.gain:+.2f} points, 95 % interval [{row.low:+.2f}, {row.high:+.2f}]"
    closed = f"{100 * row.gap_closed:.0f} %, 95 % interval [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"
    what = f"gain of {run.title(pair[1])} over {run.title(pair[0])} ({where})"
    return [
        Figure(what, gain, "at least +2", row.gain >= 2),
        Figure("its corrected p-value (images)", f"{row.p_images_holm:.2g}", "below 0.01", row.p_images_holm < 0.01),
        Figure("share of the gap to the matched degree closed", closed, "at least 40 %", row.gap_closed >= 0.4),
    ]


def _cost_where_not_needed(run: Run, pair: Compared) -> Figure:
    """Return what it costs where the mismatch costs a model less than one point of its score."""
    keys = ["task", "train_degree", "infer_degree"]
    mean = 100 * run.cells[run.cells.method.isin(pair)].groupby([*keys, "method"]).score.mean().unstack()
    train, infer = (mean.index.get_level_values(key) for key in keys[1:])
    plain = mean[pair[0]]
    own = plain[train == infer.astype(str)].droplevel("infer_degree")
    lost = own.reindex(mean.index.droplevel("infer_degree")).to_numpy() - plain
    harmless = mean[(train != infer.astype(str)) & (lost < HARMLESS)]
    cost = float((harmless[pair[0]] - harmless[pair[1]]).mean())
    where = f"a mismatch costs less than {HARMLESS:g} point ({len(harmless)} conditions)"
    return Figure(f"mean cost of {run.title(pair[1])} where {where}", f"{cost:+.2f} points", "below 0.3", cost < 0.3)


def _cost_of_folding(run: Run, method: str) -> Figure:
    """Return how much longer a forward pass takes with it folded in: the degree that is furthest from 1."""
    ratio = run.throughput[run.throughput.method == method].set_index("infer_degree").ratio
    if ratio.empty:
        raise TocomError(f"the throughput of {method} was not measured; run the study first (snakemake --cores all)")
    worst = (ratio - 1).abs().idxmax()
    what = f"time of {run.title(method)}, folded in, over time without (worst degree, median over rounds)"
    return Figure(what, f"{ratio[worst]:.4f} at degree {worst}", "within 2 % of 1", abs(ratio[worst] - 1) <= 0.02)
