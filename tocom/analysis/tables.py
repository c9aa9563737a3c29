"""Paper-style tables, in Markdown and in LaTeX (booktabs), from cells.csv and significance.csv alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from tabulate import tabulate

from tocom.analysis.significance import ALL, GENERATED, REAL, TOCOM_VS_PLAIN
from tocom.analysis.stats import stars
from tocom.settings import RANDOM

METHOD = {"tome": "ToMe", "evit": "EViT", "evit_fuse": "EViT (fused)"}
#: A cell that the study did not run.
NOT_RUN = "not run"


@dataclass(frozen=True)
class Text:
    """The content of one table cell, before it becomes Markdown or LaTeX."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table: title, caption, header, rows of text, and the rows before which a rule is drawn."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Text]]
    label: str
    rules: Sequence[int] = field(default=())

    def markdown(self) -> str:
        """Return a heading, a pipe table and the caption."""
        rows = [[f"**{cell.text}**" if cell.bold else cell.text for cell in row] for row in self.rows]
        body = tabulate(rows, self.header, tablefmt="pipe", disable_numparse=True)
        return f"### {self.title}\n\n{body}\n\n{self.caption}\n"

    def html(self) -> str:
        """Return a heading, an HTML table and the caption."""
        rows = [[f"<b>{cell.text}</b>" if cell.bold else cell.text for cell in row] for row in self.rows]
        body = tabulate(rows, self.header, tablefmt="unsafehtml", disable_numparse=True)
        return f"<h3>{self.title}</h3>\n{body}\n<p>{self.caption}</p>\n"

    def latex(self) -> str:
        """Return a table environment that needs the packages booktabs and graphicx."""
        rows = [[_tex(cell.text, cell.bold) for cell in row] for row in self.rows]
        frame = pd.DataFrame(rows, columns=[_tex(name) for name in self.header])
        layout = "l" * 2 + "r" * (len(self.header) - 2)
        body = frame.to_latex(index=False, escape=False, column_format=layout)
        for number in sorted(self.rules, reverse=True):
            body = _rule_before(body, number)
        return (
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{_tex(self.title)}. {_tex(self.caption)}}}\n\\label{{tab:{self.label}}}\n"
            f"\\resizebox{{\\linewidth}}{{!}}{{%\n{body.rstrip()}}}\n\\end{{table}}\n"
        )


_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
}
_SYMBOLS = {
    "±": r"$\pm$",
    "→": r"$\to$",
    "×": r"$\times$",
    "−": r"$-$",
    "<": r"$<$",
    ">": r"$>$",
    "^": r"\^{}",
    "~": r"\textasciitilde{}",
    "–": "--",
    "Δ": r"$\Delta$",
    "≥": r"$\ge$",
}


def _tex(text: str, bold: bool = False) -> str:
    escaped = "".join(_ESCAPES.get(c, _SYMBOLS.get(c, c)) for c in text.replace("`", ""))
    return f"\\textbf{{{escaped}}}" if bold else escaped


def _rule_before(body: str, row: int) -> str:
    lines = body.split("\n")
    start = lines.index("\\midrule") + 1
    return "\n".join([*lines[: start + row], "\\midrule", *lines[start + row :]])


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign, never "-0.0"."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def gain_text(row: pd.Series) -> str:
    """Return a gain with its interval and the stars of its corrected p-value on images."""
    return f"{signed(row.gain)} [{signed(row.low)}, {signed(row.high)}]{stars(row.p_images_holm)}"


def members(scope: str, kinds: dict[str, str]) -> list[str]:
    """Return the tasks of a group, or the task itself.

    Args:
        scope: a group's or a task's name. kinds: task -> "real" or "generated".
    """
    wanted = {REAL: ("real",), GENERATED: ("generated",), ALL: ("real", "generated")}.get(scope)
    return [scope] if wanted is None else [task for task, kind in kinds.items() if kind in wanted]


def accuracy(cells: pd.DataFrame, tasks: Sequence[str], train: str, infer: int, compensated: bool) -> np.ndarray:
    """Return the accuracy in percent, averaged over tasks, for each seed; empty if it was not run."""
    chosen = cells[
        cells.task.isin(tasks)
        & (cells.train_degree == train)
        & (cells.infer_degree == infer)
        & (cells.compensated == compensated)
    ]
    return 100 * chosen.groupby("seed").accuracy.mean().to_numpy()


def _mean_text(values: np.ndarray, bold: bool = False) -> Text:
    if not len(values):
        return Text(NOT_RUN)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return Text(f"{values.mean():.1f}{spread}", bold)


def degree_table(
    cells: pd.DataFrame, significance: pd.DataFrame, scope: str, kinds: dict[str, str], title: str, label: str
) -> Table:
    """Return the paper's table for one task or group: train degrees down, inference degrees across.

    Args:
        cells, significance: the rows of one backbone and compressor.
        kinds: task -> "real" or "generated".
    """
    tasks = members(scope, kinds)
    infer = sorted(cells.infer_degree.unique())
    trains = sorted((t for t in cells.train_degree.unique() if t != RANDOM), key=int)
    compressor = cells.compressor.iloc[0]
    method = METHOD.get(compressor, compressor)
    gains = significance[(significance.scope == scope) & (significance.comparison == TOCOM_VS_PLAIN)]
    gains = gains.set_index([gains.train_degree.astype(str), "infer_degree"])
    rows, rules = [], []
    for train in trains:
        if rows:
            rules.append(len(rows))
        plain, ours = ([accuracy(cells, tasks, train, n, c) for n in infer] for c in (False, True))
        better = [len(p) and p.mean() > o.mean() for p, o in zip(plain, ours, strict=True)]
        worse = [len(p) and p.mean() < o.mean() for p, o in zip(plain, ours, strict=True)]
        rows.append([Text(train), Text(method), *map(_mean_text, plain, better)])
        rows.append([Text(""), Text(f"{method} + ToCom"), *map(_mean_text, ours, worse)])
        changes = [Text(gain_text(gains.loc[(train, n)])) if (train, n) in gains.index else Text("–") for n in infer]
        rows.append([Text(""), Text("gain"), *changes])
    rules.append(len(rows))
    if RANDOM in set(cells.train_degree):
        rival = [_mean_text(accuracy(cells, tasks, RANDOM, n, False)) for n in infer]
        rows.append([Text(RANDOM), Text(method), *rival])
    rows.append([Text("matched"), Text(method), *[_mean_text(accuracy(cells, tasks, str(n), n, False)) for n in infer]])
    costs = cells[cells.task.isin(tasks)].groupby("infer_degree").gflops.mean()
    header = ["train degree", "method", *[f"{n} ({costs[n]:.3g} GFLOPs)" for n in infer]]
    n_seeds = cells.seed.nunique()
    caption = (
        f"Test accuracy in % at each inference degree, mean ± standard deviation over {n_seeds} seeds"
        f"{' of the mean over ' + ', '.join(tasks) if len(tasks) > 1 else ''}. "
        "Bold: the better of the pair with and without ToCom. Gain: points with a 95 % bootstrap interval over images "
        "and seeds; * p < 0.05, ** p < 0.01, *** p < 0.001, paired sign-flip test on images, Holm-corrected. "
        "random: a degree drawn for every training step. matched: trained at the degree it runs at, the ceiling."
    )
    return Table(title, caption, header, rows, label, tuple(rules))


def significance_table(significance: pd.DataFrame, label: str = "significance") -> Table:
    """Return every comparison of one backbone and compressor at its largest mismatch, with all tests."""
    chosen = significance.copy()
    chosen["mismatch"] = (chosen.train_degree.astype(int) - chosen.infer_degree).abs()
    chosen = chosen[chosen.mismatch == chosen.mismatch.max()]
    names = {TOCOM_VS_PLAIN: "+ToCom over plain"}
    rows = [
        [
            Text(names.get(row.comparison, "random over +ToCom")),
            Text(f"{row.scope}, {row.train_degree} → {row.infer_degree}"),
            Text(gain_text(row)),
            *[Text(_p_text(getattr(row, f"p_{unit}_holm"))) for unit in ("images", "seeds", "tasks")],
            Text(_share_text(row) if row.comparison == TOCOM_VS_PLAIN else "–"),
        ]
        for _, row in chosen.iterrows()
    ]
    caption = (
        "Holm-corrected p-values at the largest mismatch, by what is taken as the unit: images (paired sign-flip "
        "test), seeds (t-test), tasks (Wilcoxon signed-rank test; with n tasks it cannot fall below 2^(1−n)). "
        "Gap closed: share of the distance to the matched-degree model, with a 95 % interval."
    )
    header = ["comparison", "tasks and degrees", "gain", "p (images)", "p (seeds)", "p (tasks)", "gap closed"]
    return Table("Tests at the largest mismatch", caption, header, rows, label)


def _p_text(p: float) -> str:
    return "–" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _share_text(row: pd.Series) -> str:
    if np.isnan(row.gap_closed):
        return "–"
    interval = "" if np.isnan(row.gap_low) else f" [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"
    return f"{100 * row.gap_closed:.0f} %{interval}"


def throughput_table(throughput: pd.DataFrame, label: str = "throughput") -> Table:
    """Return images a second, speed-up, memory and the cost of ToCom once it is folded in."""
    rows = []
    for _, row in throughput.iterrows():
        method = METHOD.get(row.compressor, row.compressor)
        ratio = f"{row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]" if row.compensated else "–"
        rows.append(
            [
                Text(str(row.infer_degree)),
                Text(f"{method} + ToCom" if row.compensated else method),
                Text(f"{row.gflops:.4f}"),
                Text(f"{row.images_per_second:.0f}"),
                Text(f"{row.speedup:.2f}×"),
                Text(ratio),
                Text(f"{row.memory_mb:.1f}"),
            ]
        )
    first = throughput.iloc[0]
    caption = (
        f"Batches of {first.batch_size} on {first.device}, {first.threads} thread(s), {first.repeats} rounds in which "
        "all models take turns. Speed-up: over the uncompressed model. Ratio: time with ToCom folded in over time "
        "without, median and quartiles over rounds. Memory: peak of one forward pass."
    )
    header = ["degree", "method", "GFLOPs", "images/s", "speed-up", "time ratio", "memory (MB)"]
    return Table("Throughput", caption, header, rows, label)
