"""Paper-style tables, in Markdown, HTML and LaTeX (booktabs), from a study's tidy tables alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product

import numpy as np
import pandas as pd
from tabulate import tabulate

from tocom.analysis.planned import VTAB, Scope, is_compensated, task_scopes, train_degrees
from tocom.analysis.run import Pair, Run
from tocom.analysis.scores import METRICS
from tocom.analysis.stats import stars

#: Optional columns of throughput.csv -> their heading and how their numbers are written.
TRAINING = {
    "train_images_per_second": ("training images/s", "{:.0f}"),
    "train_speedup": ("training speed-up", "{:.2f}×"),
}
#: A cell that the study did not run, one that it does not plan, and the gain of what added nothing to any model.
NOT_RUN, NOT_PLANNED, DECLINED = "not run", "–", "declined"
#: What captions say of such a gain.
DECLINED_NOTE = f"{DECLINED}: nothing was added, scale 0 was the best on the validation images of every seed and task."
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


#: How LaTeX writes what it does not take as it is.
_ESCAPES = {character: f"\\{character}" for character in "&%#_${}"} | {
    "\\": r"\textbackslash{}",
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
    escaped = "".join(_ESCAPES.get(c, c) for c in text.replace("`", ""))
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


def gain_text(row: pd.Series, declined: bool = False) -> str:
    """Return a gain with its interval and the stars of its corrected p-value on images."""
    if declined:
        return DECLINED
    return f"{signed(row.gain)} [{signed(row.low)}, {signed(row.high)}]{stars(row.p_images_holm)}"


def p_text(p: float) -> str:
    """Return a p-value, or a dash where it is undefined."""
    return "–" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def score_text(
    by_seed: pd.Series, planned: int, bold: bool = False, show: Callable[[float], str] = "{:.1f}".format
) -> Text:
    """Return mean ± standard deviation over seeds, with the number of seeds if not all that were planned were run.

    Args:
        show: how the mean is written; of a change, with its sign.
    """
    if by_seed.empty:
        return Text(NOT_RUN)
    spread = f" ± {by_seed.std(ddof=1):.1f}" if len(by_seed) > 1 else ""
    partly = f" ({len(by_seed)} of {planned} seeds)" if len(by_seed) < planned else ""
    return Text(f"{show(by_seed.mean())}{spread}{partly}", bold)


def gain_cell(pair: Pair | None, with_p: bool = False) -> Text:
    """Return a gain with interval and stars if it was tested; a dash where nothing is to be compared.

    Args:
        with_p: write the corrected p-value, too.
    """
    if pair is None:
        return Text(NOT_PLANNED)
    if not pair.is_run:
        return Text(NOT_RUN)
    if pair.declined:
        return Text(DECLINED)
    if pair.test is None:
        return Text(signed(pair.gain))
    p = p_text(pair.test.p_images_holm)
    return Text(gain_text(pair.test) + (f", p {p if p.startswith('<') else f'= {p}'}" if with_p else ""))


# --- what captions say ----------------------------------------------------------------------------------------------


def gain_caption(run: Run) -> str:
    """Return what the captions of all tables with gains say of them."""
    return (
        "Gain: points with a 95 % bootstrap interval over images and seeds; * p < 0.05, ** p < 0.01, *** p < 0.001, "
        f"{METRICS[run.study.metric].image_test_name}, Holm-corrected."
    )


def declined_note(rows: Sequence[Sequence[Text]]) -> str:
    """Return what a caption says if one of these cells is declined."""
    return f" {DECLINED_NOTE}" if any(cell.text == DECLINED for row in rows for cell in row) else ""


def learning_note(run: Run, backbones: Sequence[str], methods: Iterable[str]) -> str:
    """Return a warning to start a caption with, of each learned compensator that leaves the held-out loss no lower."""
    notes = {}
    for name, method in product(backbones, methods):
        if learned_in_vain(run, name, method):
            kl, without = (run.learned(name, method)[key] for key in ("held_out_kl", "held_out_kl_without"))
            notes[run.learned_file(name, method)] = (
                f"WARNING: learning {run.title(method)} on {name} gained nothing: its loss on held-out images is"
                f" {kl:.4g}, and {without:.4g} without it; give it more images or epochs, or another learning rate. "
            )
    return "".join(notes.values())


def learned_in_vain(run: Run, backbone: str, method: str) -> bool:
    """Return whether the held-out loss with a method's learned compensator is no lower than without it."""
    found = run.learned(backbone, method)
    kl, without = found.get("held_out_kl"), found.get("held_out_kl_without")
    return kl is not None and without is not None and kl >= without


def averages(scope: Scope, seeds: int) -> str:
    """Return what the numbers of a table average over, for its caption."""
    over_tasks = f" of the mean over {', '.join(scope.tasks)}" if len(scope.tasks) > 1 else f" on {scope.tasks[0]}"
    vtab = f" ({VTAB_NOTE})" if scope.name == VTAB else ""
    return f"mean ± standard deviation over {seeds} seeds{over_tasks}{vtab}"


# --- the main table -------------------------------------------------------------------------------------------------

#: Rows, and the rows before which a rule goes.
Block = tuple[list[list[Text]], list[int]]


def degree_table(run: Run, scope: Scope, backbones: Sequence[str], title: str, label: str) -> Table:
    """Return the paper's table for one task or group: methods and train degrees down, inference degrees across.

    Args:
        backbones: one, or several that the first column names.
    """
    rows, rules = [], []
    for backbone in backbones:
        block, inner = _degree_rows(run, scope, backbone, f"{backbone}, " if len(backbones) > 1 else "")
        rules += [len(rows) + number for number in inner if len(rows) + number]
        rows += block
    caption = (
        f"Test {run.study.metric} in % at each inference degree, {averages(scope, len(run.study.seeds))}. Bold: the "
        f"best of the lines of one model. {gain_caption(run)} matched: trained at the degree it runs at, the ceiling."
    )
    if any(" published" in row[1].text for row in rows):
        caption += " published: arXiv 2408.06798, not made here."
    caption = learning_note(run, backbones, run.study.methods) + caption + declined_note(rows)
    first = f"{'backbone, ' * (len(backbones) > 1)}train degree"
    header = [first, "method", *(_degree_heading(run, scope, backbones, n) for n in run.infer_degrees)]
    return Table(title, caption, header, rows, label, tuple(rules))


def degree_tables(run: Run, scopes: Sequence[Scope]) -> list[Table]:
    """Return :func:`degree_table` of every backbone and scope."""
    return [
        degree_table(run, scope, [name], f"{scope.title} ({name})", f"{name}-{scope.name}")
        for name in run.backbones
        for scope in scopes
    ]


def _degree_heading(run: Run, scope: Scope, backbones: Sequence[str], infer: int) -> str:
    """Return an inference degree, and its cost if that is one for all methods."""
    plain = [method for method in run.study.methods if not is_compensated(run.study, method)]
    costs = {f"{run.cost(name, method, scope, infer):.3g}" for name in backbones for method in plain} - {"nan"}
    return f"{infer} ({costs.pop()} GFLOPs)" if len(costs) == 1 else str(infer)


def _degree_rows(run: Run, scope: Scope, backbone: str, prefix: str) -> Block:
    """Return the lines of each family of methods at each fixed train degree, and one line of each that has none."""
    study, rows, rules = run.study, [], []
    for family in run.by_degree():
        for train in train_degrees(study, family[0]):
            rules.append(len(rows))
            rows += _lines(run, scope, backbone, family, train, prefix)
        rules.append(len(rows))
        matched = _line(run, scope, backbone, family[0], [str(infer) for infer in run.infer_degrees])
        rows.append([Text(f"{prefix}matched"), Text(run.title(family[0])), *matched])
    others = [method for method in study.methods if not train_degrees(study, method)]
    rules += [len(rows)] if others else []
    for method in others:
        label = study.train_degrees_of(method)[0]
        line = _line(run, scope, backbone, method, [label] * len(run.infer_degrees))
        rows.append([Text(f"{prefix}{label}"), Text(run.title(method)), *line])
    return rows, rules


def _line(run: Run, scope: Scope, backbone: str, method: str, trains: Sequence[str]) -> list[Text]:
    """Return the scores of a method at each inference degree, from a train degree of its own each."""
    planned = run.study.infer_degrees_of(method)
    return [
        score_text(run.score(backbone, method, scope, train, infer), len(run.study.seeds))
        if infer in planned
        else Text(NOT_PLANNED)
        for train, infer in zip(trains, run.infer_degrees, strict=True)
    ]


def _lines(run: Run, scope: Scope, backbone: str, family: Sequence[str], train: str, prefix: str) -> list[list[Text]]:
    """Return the line of every method that shares a checkpoint, each with its gains over others below it."""
    lines = {method: _line(run, scope, backbone, method, [train] * len(run.infer_degrees)) for method in family}
    for column, infer in enumerate(run.infer_degrees):
        found = {m: run.score(backbone, m, scope, train, infer).mean() for m in family}
        best = max(found, key=lambda m: -np.inf if np.isnan(found[m]) else found[m])
        if len(family) > 1 and all(found[best] > value for m, value in found.items() if m != best):
            lines[best][column] = Text(lines[best][column].text, True)
    rows = []
    for method, line in lines.items():
        rows.append([Text("" if rows else f"{prefix}{train}"), Text(run.title(method)), *line])
        rows += _published_lines(run, scope, backbone, method, train)
        for before, after in run.study.compare:
            if after == method:
                pairs = run.pairs(backbone, (before, after), scope)
                over = "" if before == family[0] else f" over {run.title(before)}"
                gains = [gain_cell(pairs.get((train, infer))) for infer in run.infer_degrees]
                rows.append([Text(""), Text(f"gain{over}"), *gains])
    return rows


def _published_lines(run: Run, scope: Scope, backbone: str, method: str, train: str) -> list[list[Text]]:
    """Return the published scores and costs of a method, a line each, if there are any of the same tasks."""
    lines = []
    for of, what in (("miou", ""), ("gflops", " GFLOPs")):
        figures = run.published(of, scope, backbone, method)
        found = {figure.infer_degree: figure.text() for figure in figures if str(figure.train_degree) == train}
        if found:
            texts = [Text(found.get(infer, NOT_PLANNED)) for infer in run.infer_degrees]
            lines.append([Text(""), Text(f"{run.title(method)},{what} published"), *texts])
    return lines


# --- other tables of a study ----------------------------------------------------------------------------------------


def significance_table(run: Run, backbone: str) -> Table:
    """Return every comparison on one backbone at its largest mismatch, with all tests."""
    mine = run.significance[run.significance.backbone == backbone]
    mismatch = (pd.to_numeric(mine.train_degree, errors="coerce").astype(float) - mine.infer_degree.astype(float)).abs()
    largest = mismatch.groupby([mine.before, mine.after]).transform("max")
    scopes = {(scope.name, scope.is_group): scope for scope in run.scopes + task_scopes(run.study.groups)}

    def is_declined(row: pd.Series) -> bool:
        scope = scopes.get((row.scope, row.group))  # None of a task that the study no longer has
        pair = scope and run.pairs(backbone, (row.before, row.after), scope).get((row.train_degree, row.infer_degree))
        return bool(pair and pair.declined)

    rows = [
        [
            Text(f"{run.title(row.after)} over {run.title(row.before)}"),
            Text(f"{row.scope}, {row.train_degree} → {row.infer_degree}"),
            Text(gain_text(row, is_declined(row))),
            *[Text(p_text(getattr(row, f"p_{unit}_holm"))) for unit in ("images", "seeds", "tasks")],
            Text(_share_text(row)),
        ]
        for _, row in mine[(mismatch == largest) | mismatch.isna()].iterrows()
    ]
    caption = (
        "Holm-corrected p-values at the largest mismatch, by what is taken as the unit: images "
        f"({METRICS[run.study.metric].image_test_name}), seeds (t-test), tasks (Wilcoxon signed-rank test; with n "
        "tasks it cannot fall below 2^(1−n)). Gap closed: share of the distance from the second of the two methods to "
        "the same method trained at the degree that it runs at, with a 95 % interval."
    )
    caption += declined_note(rows)
    header = ["comparison", "tasks and degrees", "gain", "p (images)", "p (seeds)", "p (tasks)", "gap closed"]
    rows = rows or [[Text(NOT_RUN)] * len(header)]
    return Table(f"Tests at the largest mismatch ({backbone})", caption, header, rows, f"{backbone}-significance")


def _share_text(row: pd.Series) -> str:
    if np.isnan(row.gap_closed):
        return "–"
    interval = "" if np.isnan(row.gap_low) else f" [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"
    return f"{100 * row.gap_closed:.0f} %{interval}"


def throughput_table(run: Run, backbone: str) -> Table:
    """Return images a second, speed-up, memory and the cost of compensators once they are folded in.

    Columns of training speed may be absent or empty in throughput.csv.
    """
    throughput = run.throughput[run.throughput.backbone == backbone]
    title, label = f"Throughput ({backbone})", f"{backbone}-throughput"
    header = ["degree", "method", "GFLOPs", "images/s", "speed-up", "time ratio", "memory (MB)"]
    if throughput.empty:
        return Table(title, "Nothing was measured.", header, [[Text(NOT_RUN)] * len(header)], label)
    trained = [name for name in TRAINING if name in throughput.columns and throughput[name].notna().any()]
    rows = []
    for _, row in throughput.iterrows():
        ratio = f"{row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]" if row.compensated else "–"
        measured = [
            str(row.infer_degree),
            run.title(row.method),
            f"{row.gflops:.4f}",
            f"{row.images_per_second:.0f}",
            f"{row.speedup:.2f}×",
            ratio,
            f"{row.memory_mb:.1f}",
            *["–" if pd.isna(row[name]) else TRAINING[name][1].format(row[name]) for name in trained],
        ]
        rows.append(list(map(Text, measured)))
    first = throughput.iloc[0]
    caption = (
        f"Batches of {first.batch_size} on {first.device}, {first.threads} thread(s), {first.repeats} rounds in which "
        "all models take turns. Speed-up: over the uncompressed model. Ratio: time with the compensator folded in over "
        "time without, median and quartiles over rounds. Memory: peak of one forward pass."
        + (" Training: forward and backward pass at that degree, without the optimiser." if trained else "")
    )
    return Table(title, caption, [*header, *[TRAINING[name][0] for name in trained]], rows, label)
