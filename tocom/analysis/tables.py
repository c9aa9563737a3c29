"""Paper-style tables, in Markdown and in LaTeX (booktabs), from cells.csv and significance.csv alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import pandas as pd
from tabulate import tabulate

from tocom.analysis.grid import Grid
from tocom.analysis.significance import TOCOM_VS_PLAIN, VTAB, Scope
from tocom.analysis.stats import stars
from tocom.settings import RANDOM

METHOD = {"tome": "ToMe", "tome_mlp": "ToMe before the MLP", "evit": "EViT", "evit_fuse": "EViT (fused)"}
#: Optional columns of throughput.csv -> their heading and how their numbers are written.
TRAINING = {
    "train_images_per_second": ("training images/s", "{:.0f}"),
    "train_speedup": ("training speed-up", "{:.2f}×"),
}
#: A cell that the study did not run.
NOT_RUN = "not run"
#: What captions say of the average over VTAB-1k.
VTAB_NOTE = f"{VTAB} is the mean of its tasks, 19 in all; other papers average the means of its three groups"


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
        rows = [[f"<b>{escape(c.text)}</b>" if c.bold else escape(c.text) for c in row] for row in self.rows]
        body = tabulate(rows, map(escape, self.header), tablefmt="unsafehtml", disable_numparse=True)
        return f"<h3>{escape(self.title)}</h3>\n{body}\n<p>{escape(self.caption)}</p>\n"

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
            f"\\caption{{{_tex(self.title)}. {_tex(self.caption)}}}\n\\label{{tab:{_name(self.label)}}}\n"
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


def _name(label: str) -> str:
    """Return a label without what LaTeX minds in one."""
    return re.sub(r"[^\w.:-]+", "-", label, flags=re.ASCII)


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


def partly(n_seeds: int, planned: int) -> str:
    """Return, to go behind a figure, how many seeds it is of, if not of all that were planned."""
    return f" ({n_seeds} of {planned} seeds)" if n_seeds < planned else ""


def accuracy_text(
    by_seed: pd.Series, planned: int, bold: bool = False, show: Callable[[float], str] = "{:.1f}".format
) -> Text:
    """Return mean ± standard deviation over seeds, with the number of seeds if not all that were planned were run.

    Args:
        show: how the mean is written; of a change, with its sign.
    """
    if by_seed.empty:
        return Text(NOT_RUN)
    spread = f" ± {by_seed.std(ddof=1):.1f}" if len(by_seed) > 1 else ""
    return Text(f"{show(by_seed.mean())}{spread}{partly(len(by_seed), planned)}", bold)


@dataclass(frozen=True)
class Pair:
    """The same models at one pair of degrees, with and without the compensator.

    Attributes:
        plain, ours: accuracy in percent by seed; empty where it was not run.
        test: the row of significance.csv that compares them, or None if there is none.
    """

    train: str
    infer: int
    plain: pd.Series
    ours: pd.Series
    test: pd.Series | None

    @property
    def is_run(self) -> bool:
        """Whether both were evaluated for a common seed."""
        return not self.plain.index.intersection(self.ours.index).empty

    def gain(self) -> Text:
        """Return the gain with interval and stars if it was tested, and a dash where the degrees are the same."""
        if not self.is_run:
            return Text(NOT_RUN)
        if self.train == str(self.infer):
            return Text("–")
        return Text(signed((self.ours - self.plain).mean()) if self.test is None else gain_text(self.test))


@dataclass(frozen=True)
class Results:
    """What was measured for one scope with one backbone, one compressor and at most one compensator.

    Attributes:
        accuracies: (train degree, inference degree, compensated) -> percent, averaged over tasks, by seed.
        tests: (train degree, inference degree) -> row of significance.csv.
    """

    accuracies: dict[tuple[str, int, bool], pd.Series]
    tests: dict[tuple[str, int], pd.Series]

    @classmethod
    def of(cls, cells: pd.DataFrame, significance: pd.DataFrame, scope: Scope) -> Results:
        """Average over the tasks of a scope; a seed that lacks a task does not count.

        Args:
            cells, significance: the rows of that backbone, compressor and compensator.
        """
        condition = ["train_degree", "infer_degree", "compensated"]
        mine = cells[cells.task.isin(scope.tasks)]
        by_task = mine.pivot(index=[*condition, "seed"], columns="task", values="accuracy")
        mean = 100 * by_task.reindex(columns=list(scope.tasks)).astype(float).dropna().mean(axis=1)
        tests = significance[
            (significance.comparison == TOCOM_VS_PLAIN)
            & (significance.scope == scope.name)
            & (significance.group == scope.is_group)
        ]
        return cls(
            {key: by_seed.droplevel(condition) for key, by_seed in mean.groupby(level=condition)},
            {(row.train_degree, row.infer_degree): row for _, row in tests.iterrows()},
        )

    def accuracy(self, train: str, infer: int, compensated: bool = False) -> pd.Series:
        """Return the accuracy in percent by seed, empty where it was not run."""
        return self.accuracies.get((train, infer, compensated), pd.Series(dtype=float))

    def pair(self, train: str, infer: int) -> Pair:
        """Return what one pair of degrees gave, with and without the compensator."""
        plain, ours = (self.accuracy(train, infer, compensated) for compensated in (False, True))
        return Pair(train, infer, plain, ours, self.tests.get((train, infer)))


def pair_rows(pairs: Sequence[Pair], method: str, seeds: int, first: str) -> list[list[Text]]:
    """Return three lines, a column a pair: plain accuracy, that with the compensator, and the gain.

    Args:
        method: name of the compressor. seeds: how many were planned. first: what the first column says.
    """
    plain = [accuracy_text(p.plain, seeds, p.is_run and p.plain.mean() > p.ours.mean()) for p in pairs]
    ours = [accuracy_text(p.ours, seeds, p.is_run and p.plain.mean() < p.ours.mean()) for p in pairs]
    return [
        [Text(first), Text(method), *plain],
        [Text(""), Text(f"{method} + ToCom"), *ours],
        [Text(""), Text("gain"), *[p.gain() for p in pairs]],
    ]


#: What the captions of all tables with gains say of them.
GAIN_CAPTION = (
    "Gain: points with a 95 % bootstrap interval over images and seeds; * p < 0.05, ** p < 0.01, *** p < 0.001, paired "
    "sign-flip test on images, Holm-corrected."
)

#: What the captions of tables with :func:`degree_rows` say of the last lines.
LINES_CAPTION = (
    "random: a degree drawn for every training step. matched: trained at the degree it runs at, the ceiling."
)


def averages(scope: Scope, seeds: int) -> str:
    """Return what the numbers of a table average over, for its caption."""
    over_tasks = f" of the mean over {', '.join(scope.tasks)}" if len(scope.tasks) > 1 else ""
    vtab = f" ({VTAB_NOTE})" if scope.name == VTAB else ""
    return f"mean ± standard deviation over {seeds} seeds{over_tasks}{vtab}"


def degree_rows(results: Results, grid: Grid, compressor: str) -> tuple[list[list[Text]], list[int]]:
    """Return three lines a fixed train degree, one of the random degrees, and one of the matched models.

    Returns:
        The rows: train degree, method and a cell for each inference degree; and the rows before which a rule goes.
    """
    infer = sorted(grid.infer_degrees)
    method = METHOD.get(compressor, compressor)
    n_seeds = len(grid.seeds)
    rows, rules = [], []
    for train in grid.fixed_train_degrees:
        if rows:
            rules.append(len(rows))
        pairs = [results.pair(train, n) for n in infer]
        rows += pair_rows(pairs, method, n_seeds, train)
    rules.append(len(rows))

    def plain(trains: Sequence[str]) -> list[Text]:
        found = [results.accuracy(train, n) for train, n in zip(trains, infer, strict=True)]
        return [accuracy_text(by_seed, n_seeds) for by_seed in found]

    if RANDOM in grid.train_degrees:
        rows.append([Text(RANDOM), Text(method), *plain([RANDOM] * len(infer))])
    rows.append([Text("matched"), Text(method), *plain([str(n) for n in infer])])
    return rows, rules


def degree_table(
    cells: pd.DataFrame,
    significance: pd.DataFrame,
    scope: Scope,
    grid: Grid,
    compressor: str,
    title: str,
    label: str,
) -> Table:
    """Return the paper's table for one task or group: train degrees down, inference degrees across.

    Args:
        cells, significance: the rows of one backbone, one compressor and at most one compensator.
        grid: the degrees and seeds to show; what the cells lack of them is "not run".
    """
    infer, n_seeds = sorted(grid.infer_degrees), len(grid.seeds)
    rows, rules = degree_rows(Results.of(cells, significance, scope), grid, compressor)
    costs = cells[cells.task.isin(scope.tasks)].groupby("infer_degree").gflops.mean()
    header = [f"{n} ({costs[n]:.3g} GFLOPs)" if n in costs.index else str(n) for n in infer]
    caption = (
        f"Test accuracy in % at each inference degree, {averages(scope, n_seeds)}. "
        f"Bold: the better of the pair with and without ToCom. {GAIN_CAPTION} {LINES_CAPTION}"
    )
    return Table(title, caption, ["train degree", "method", *header], rows, label, tuple(rules))


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
            *[Text(p_text(getattr(row, f"p_{unit}_holm"))) for unit in ("images", "seeds", "tasks")],
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
    return Table("Tests at the largest mismatch", caption, header, rows or [[Text(NOT_RUN)] * len(header)], label)


def p_text(p: float) -> str:
    """Return a p-value, or a dash where it is undefined."""
    return "–" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _share_text(row: pd.Series) -> str:
    if np.isnan(row.gap_closed):
        return "–"
    interval = "" if np.isnan(row.gap_low) else f" [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"
    return f"{100 * row.gap_closed:.0f} %{interval}"


def throughput_table(throughput: pd.DataFrame, label: str = "throughput") -> Table:
    """Return images a second, speed-up, memory and the cost of ToCom once it is folded in.

    Args:
        throughput: the rows of one backbone and compressor; the columns train_images_per_second and train_speedup may
            be absent or empty.
    """
    header = ["degree", "method", "GFLOPs", "images/s", "speed-up", "time ratio", "memory (MB)"]
    if throughput.empty:
        return Table("Throughput", "Nothing was measured.", header, [[Text(NOT_RUN)] * len(header)], label)
    trained = [name for name in TRAINING if name in throughput.columns and throughput[name].notna().any()]
    rows = []
    for _, row in throughput.iterrows():
        method = METHOD.get(row.compressor, row.compressor)
        ratio = f"{row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]" if row.compensated else "–"
        measured = [
            str(row.infer_degree),
            f"{method} + ToCom" if row.compensated else method,
            f"{row.gflops:.4f}",
            f"{row.images_per_second:.0f}",
            f"{row.speedup:.2f}×",
            ratio,
            f"{row.memory_mb:.1f}",
            *["–" if pd.isna(row[name]) else TRAINING[name][1].format(row[name]) for name in trained],
        ]
        rows.append([Text(text) for text in measured])
    first = throughput.iloc[0]
    caption = (
        f"Batches of {first.batch_size} on {first.device}, {first.threads} thread(s), {first.repeats} rounds in which "
        "all models take turns. Speed-up: over the uncompressed model. Ratio: time with ToCom folded in over time "
        "without, median and quartiles over rounds. Memory: peak of one forward pass."
        + (" Training: forward and backward pass at that degree, without the optimiser." if trained else "")
    )
    return Table("Throughput", caption, [*header, *[TRAINING[name][0] for name in trained]], rows, label)
