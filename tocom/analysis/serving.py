"""What `tocom serve-bench` found, as a table and a figure: deadlines met and accuracy kept under a changing load."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tocom.analysis.figures import CLEAN
from tocom.analysis.tables import Table, Text
from tocom.files import atomic, write_text
from tocom.settings import PLAIN

#: How the figures of a replay are headed, and written in the table.
_COLUMNS = {
    "met": ("in time (%)", 100),
    "accuracy": ("right (%)", 100),
    "right_in_time": ("right and in time (%)", 100),
    "mean_degree": ("mean degree", 1),
    "p50_ms": ("median (ms)", 1),
    "p99_ms": ("99 % within (ms)", 1),
    "busy": ("busy (%)", 100),
}
#: Those whose spread over seeds is told, too.
_WITH_SPREAD = ("met", "accuracy", "right_in_time")
#: Where the seconds of batches come from -> what the caption says of it.
_HOW = {
    "computed": "Every batch was computed, and what it took moved the clock.",
    "curve": "What batches take was measured beforehand, side by side (curve.csv), and does not vary in a replay.",
    "given": "What batches take was read off a given curve; nothing was timed.",
}
#: The policy that chooses a degree for each batch; others are named by their degree.
ADAPTIVE = "adaptive"


def write_report(folder: Path) -> None:
    """Write serving.md, serving.png and serving.pdf from the CSV files beside them."""
    rows, lines = (_read(folder / f"{name}.csv") for name in ("serving", "timeline"))
    write_text(folder / "serving.md", table(rows).markdown())
    figure = draw(rows, lines)
    for kind, metadata in CLEAN.items():
        with atomic(folder / f"serving.{kind}") as temporary:
            figure.savefig(temporary, metadata=metadata, bbox_inches="tight")
    plt.close(figure)


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"policy": str}, keep_default_na=False)


def _named(compensator: str) -> str:
    return "no compensator" if compensator == PLAIN else f"with {compensator}"


def table(rows: pd.DataFrame) -> Table:
    """Return means over seeds, a line for each policy and compensator; the most that are right and in time is bold."""
    runs = rows.groupby(["compensator", "policy"], sort=False)[list(_COLUMNS)]
    means, spread = runs.mean(), runs.std()
    best, several, body = means.right_in_time.max(), rows.seed.nunique() > 1, []
    for compensator in rows.compensator.unique():
        for policy in rows.policy.unique():
            of_it, sd = means.loc[compensator, policy], spread.loc[compensator, policy]
            cells = [Text(_named(compensator)), Text(policy)]
            for name, (_, factor) in _COLUMNS.items():
                about = f" ± {factor * sd[name]:.1f}" if several and name in _WITH_SPREAD else ""
                bold = name == "right_in_time" and of_it[name] == best
                cells.append(Text(f"{factor * of_it[name]:.1f}{about}", bold))
            body.append(cells)
    one, requests = rows.iloc[0], rows.requests
    caption = (
        f"{one.task}, one model, {requests.min()} to {requests.max()} requests of one image in a replay. Load:"
        f" {one.phases} times {one.capacity:.0f} images/s, which is what full batches of {one.batch_size} at the lowest"
        f" degree keep up with. In time: answered within {one.deadline_ms:.1f} ms of arrival. {ADAPTIVE}: for each"
        " batch the degree with the best validation accuracy at which all that waits is answered in time, by curve.csv."
        f" {_HOW[one.times]} Means{' ± standard deviations' if several else ''} over {rows.seed.nunique()} seeds of"
        f" arrivals, the same for all lines. {_costs(rows)}{one.device}."
    )
    header = ["compensator", "degree", *(title for title, _ in _COLUMNS.values())]
    count = rows.policy.nunique()
    return Table("Serving a changing load", caption, header, body, "serving", tuple(range(count, len(body), count)))


def _costs(rows: pd.DataFrame) -> str:
    """Return what the caption says of holding and switching degrees, of the last compensator."""
    if "prepare_ms" not in rows:
        return ""
    last = rows.iloc[-1]
    return (
        f"{_named(last.compensator).capitalize()}, a degree is prepared in {last.prepare_ms:.1f} ms and holds"
        f" {last.degree_mb:.2f} MB beside the {last.model_mb:.2f} MB of the model; to switch to it takes"
        f" {last.switch_us:.0f} µs. "
    )


def draw(rows: pd.DataFrame, lines: pd.DataFrame) -> Figure:
    """Draw accuracy against deadlines met; and over time what arrives, the degree chosen, and what is in time."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.05)
    plt.rcParams.update({"savefig.dpi": 160, "pdf.fonttype": 42, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    colours = dict(zip(rows.compensator.unique(), sns.color_palette("colorblind"), strict=False))
    _trade_off(axes[0], rows, colours)
    last = list(colours)[-1]
    _over_time(axes[1], axes[2], lines[lines.compensator == last])
    axes[1].set_title(f"One replay, {_named(last)}")
    return figure


def _trade_off(axis, rows: pd.DataFrame, colours: dict) -> None:
    """Draw what fixed degrees and the adaptive choice make of accuracy and deadlines."""
    for compensator, colour in colours.items():
        of_it = rows[rows.compensator == compensator].groupby("policy", sort=False)[["met", "accuracy"]].mean() * 100
        fixed, name = of_it.drop(ADAPTIVE), _named(compensator)
        axis.plot(fixed.met, fixed.accuracy, "o:", color=colour, markersize=4.5, label=f"{name}, fixed degrees")
        for policy, point in fixed.iterrows():
            axis.annotate(policy, point, xytext=(4, 4), textcoords="offset points", color=colour, fontsize=8)
        star = {"color": colour, "markersize": 13, "markeredgecolor": "black", "label": f"{name}, {ADAPTIVE}"}
        axis.plot(*of_it.loc[ADAPTIVE], "*", **star)
    axis.set(xlabel="requests answered in time (%)", ylabel="requests answered rightly (%)")
    axis.set_title("Fixed degrees and the adaptive choice")
    axis.legend(fontsize=8)


def _over_time(load, met, lines: pd.DataFrame) -> None:
    """Draw what arrives and which degree is chosen for it; and what is in time, of the first and last fixed degree."""
    policies = list(lines.policy.unique())
    chosen = lines[lines.policy == ADAPTIVE]
    load.fill_between(chosen.time, chosen.rate, step="post", color="0.85")
    load.set(xlabel="time of arrival (s)", ylabel="images a second arriving (grey)")
    degree = load.twinx()
    degree.step(chosen.time, chosen.degree, where="post", color="black")
    degree.set(ylabel="mean degree chosen (black)", ylim=(-0.5, max(map(int, policies[:-1])) + 0.5))
    degree.grid(False)
    for policy, look in zip((policies[0], policies[-2], ADAPTIVE), (":", "--", "-"), strict=True):
        of_it, label = lines[lines.policy == policy], policy if policy == ADAPTIVE else f"degree {policy}"
        met.step(of_it.time, 100 * of_it.met, where="post", color="black", linestyle=look, label=label)
    met.set(xlabel="time of arrival (s)", ylabel="answered in time (%)", title="Deadlines", ylim=(-3, 103))
    met.legend(fontsize=8)
