"""The figures that the demo has to reach, computed from its tables."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from tocom.analysis.significance import TOCOM_VS_PLAIN
from tocom.data.registry import REAL
from tocom.errors import TocomError
from tocom.settings import RANDOM

#: A mismatch that costs less than so many points is too small to hurt.
HARMLESS = 1.0


@dataclass(frozen=True)
class Figure:
    """One figure: what it is, what was measured, what was aimed at, and whether it was reached."""

    what: str
    measured: str
    target: str
    reached: bool


def effect(significance: pd.DataFrame) -> list[Figure]:
    """Return the gain on real tasks, trained at the lowest degree and run at the highest, and the gap it closes."""
    chosen = significance[(significance.comparison == TOCOM_VS_PLAIN) & (significance.scope == REAL)]
    if chosen.empty or len(chosen[["backbone", "compressor"]].drop_duplicates()) > 1:
        raise TocomError("the figures to reach are those of the demo: one model, and at least one real task")
    train = chosen.train_degree.astype(int)
    row = chosen[(train == train.min()) & (chosen.infer_degree == chosen.infer_degree.max())].iloc[0]
    where = f"real tasks, trained at {row.train_degree}, run at {row.infer_degree}"
    gain = f"{row.gain:+.2f} points, 95 % interval [{row.low:+.2f}, {row.high:+.2f}]"
    closed = f"{100 * row.gap_closed:.0f} %, 95 % interval [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"
    return [
        Figure(f"gain of ToCom ({where})", gain, "at least +2", row.gain >= 2),
        Figure("its corrected p-value (images)", f"{row.p_images_holm:.2g}", "below 0.01", row.p_images_holm < 0.01),
        Figure("share of the gap to the matched degree closed", closed, "at least 40 %", row.gap_closed >= 0.4),
    ]


def cost_where_not_needed(cells: pd.DataFrame) -> Figure:
    """Return what ToCom costs where the mismatch costs a model less than one point of its accuracy."""
    keys = ["backbone", "compressor", "task", "train_degree", "infer_degree"]
    mean = cells[cells.train_degree != RANDOM].groupby([*keys, "compensated"]).accuracy.mean().unstack() * 100
    mean = mean.rename(columns={False: "plain", True: "tocom"}).reset_index()
    own = mean[mean.train_degree == mean.infer_degree.astype(str)].set_index(keys[:4]).plain
    mean["own"] = own.reindex(pd.MultiIndex.from_frame(mean[keys[:4]])).to_numpy()
    off = mean[mean.train_degree != mean.infer_degree.astype(str)]
    harmless = off[off.own - off.plain < HARMLESS]
    cost = float((harmless.plain - harmless.tocom).mean())
    what = f"mean cost of ToCom where a mismatch costs less than {HARMLESS:g} point ({len(harmless)} conditions)"
    return Figure(what, f"{cost:+.2f} points", "below 0.3", cost < 0.3)


def cost_of_folding(throughput: pd.DataFrame) -> Figure:
    """Return how much longer a forward pass takes with ToCom folded in: the degree that is furthest from 1."""
    ratio = throughput[throughput.compensated].set_index("infer_degree").ratio
    worst = (ratio - 1).abs().idxmax()
    what = "time with ToCom folded in over time without (worst degree, median over rounds)"
    return Figure(what, f"{ratio[worst]:.4f} at degree {worst}", "within 2 % of 1", abs(ratio[worst] - 1) <= 0.02)
