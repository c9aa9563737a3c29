"""Figures from the tidy tables: accuracy against cost, gain by degrees, and the transfer of the gap."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tocom.analysis.significance import ALL, TOCOM_VS_PLAIN, scopes
from tocom.analysis.stats import stars
from tocom.analysis.tables import signed
from tocom.settings import NO_GAP, RANDOM

#: Metadata without dates, so that the same numbers give the same bytes.
CLEAN = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}


def style() -> None:
    """Set the look of all figures."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.05)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "pdf.fonttype": 42, "font.family": "DejaVu Sans"})


def accuracy_vs_gflops(cells: pd.DataFrame, groups: dict[str, str]) -> Figure:
    """Draw accuracy against cost for each train degree, with and without ToCom; bands are one sd over seeds.

    Args:
        cells: the rows of one backbone, one compressor and one compensator. groups: task -> its group's name.
    """
    style()
    panels = [scope for scope in scopes(groups) if scope.name != ALL]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.0 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    trains = sorted((t for t in cells.train_degree.unique() if t != RANDOM), key=int)
    colours = dict(zip(trains, sns.color_palette("viridis", len(trains) + 1), strict=False))
    for axis, scope in zip(axes.flat, panels, strict=False):
        mine = cells[cells.task.isin(scope.tasks)]
        mean = mine.groupby(["train_degree", "infer_degree", "compensated", "seed"], as_index=False)[
            ["accuracy", "gflops"]
        ].mean()
        for train in trains:
            for compensated, line in ((False, "--"), (True, "-")):
                label = f"trained at {train}" + (" + ToCom" if compensated else "")
                _line(axis, mean, train, compensated, label, color=colours[train], linestyle=line, marker="o")
        if RANDOM in set(mean.train_degree):
            _line(axis, mean, RANDOM, False, "trained at random degrees", color="0.35", linestyle=":", marker="s")
        matched = mean[(mean.train_degree == mean.infer_degree.astype(str)) & ~mean.compensated]
        matched = matched.groupby("infer_degree")[["accuracy", "gflops"]].mean()
        axis.scatter(
            matched.gflops, 100 * matched.accuracy, marker="*", s=90, color="crimson", zorder=5, label="matched"
        )
        axis.set(title=scope.name, xlabel="GFLOPs", ylabel="test accuracy (%)")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _line(axis, mean: pd.DataFrame, train: str, compensated: bool, label: str, **look) -> None:
    chosen = mean[(mean.train_degree == train) & (mean.compensated == compensated)]
    if chosen.empty:
        return
    by_degree = chosen.groupby("infer_degree").agg(
        gflops=("gflops", "mean"), accuracy=("accuracy", "mean"), sd=("accuracy", "std")
    )
    x, y, sd = by_degree.gflops, 100 * by_degree.accuracy, 100 * by_degree.sd.fillna(0.0)
    axis.plot(x, y, label=label, markersize=3.5, linewidth=1.4, **look)
    axis.fill_between(x, y - sd, y + sd, color=look["color"], alpha=0.12, linewidth=0)


def gain_heatmap(significance: pd.DataFrame) -> Figure:
    """Draw the gain of ToCom over train and inference degrees, for each group of tasks; stars are corrected.

    Args:
        significance: the rows of one backbone, one compressor and one compensator.
    """
    style()
    chosen = significance[(significance.comparison == TOCOM_VS_PLAIN) & significance.group]
    scopes = list(dict.fromkeys(chosen.scope))
    largest = max(chosen.gain.abs().max(), 0.1)
    width = 3.9 * len(scopes) + 0.6
    figure, axes = plt.subplots(1, len(scopes), figsize=(width, 3.0), squeeze=False, layout="constrained")
    for axis, scope in zip(axes.flat, scopes, strict=True):
        mine = chosen[chosen.scope == scope].assign(
            train_degree=lambda f: f.train_degree.astype(int),
            text=lambda f: [signed(g) + stars(p) for g, p in zip(f.gain, f.p_images_holm, strict=True)],
        )
        gain = mine.pivot(index="train_degree", columns="infer_degree", values="gain")
        text = mine.pivot(index="train_degree", columns="infer_degree", values="text").fillna("")
        sns.heatmap(
            gain, annot=text, fmt="", cmap="RdBu", center=0, vmin=-largest, vmax=largest, ax=axis,
            cbar=scope == scopes[-1], cbar_kws={"label": "gain of ToCom (points)"}, linewidths=0.5,
            annot_kws={"size": 8},
        )  # fmt: skip
        axis.grid(False)
        axis.set(title=scope, xlabel="inference degree", ylabel="train degree")
    return figure


def gap_transfer(transfer: pd.DataFrame) -> Figure:
    """Draw what each task's gap between two degrees does for each task, in points over adding none."""
    style()
    mean = transfer.groupby(["source_task", "target_task"]).accuracy.mean().unstack() * 100
    tasks = list(dict.fromkeys(transfer.target_task))
    gain = (mean - mean.loc[NO_GAP]).loc[tasks, tasks]
    largest = max(np.abs(gain.to_numpy()).max(), 0.1)
    figure, axis = plt.subplots(figsize=(1.1 * len(tasks) + 2.2, 0.8 * len(tasks) + 1.6), layout="constrained")
    sns.heatmap(
        gain, annot=True, fmt="+.1f", cmap="RdBu", center=0, vmin=-largest, vmax=largest, ax=axis, linewidths=0.5,
        cbar_kws={"label": "gain over adding no gap (points)"},
    )  # fmt: skip
    first = transfer.iloc[0]
    axis.set(
        title=f"Gap {first.train_degree} → {first.infer_degree} of one task, added to another",
        xlabel="task that is evaluated",
        ylabel="task whose gap is added",
    )
    return figure
