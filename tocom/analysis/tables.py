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

from tocom.analysis import compare
from tocom.analysis.planned import (
    VTAB,
    Scope,
    is_compensated,
    mismatches,
    plain_methods,
    task_scopes,
    train_degrees,
)
from tocom.analysis.run import Pair, Run
from tocom.analysis.stats import holm, stars

#: Optional columns of throughput.csv -> their heading and how their numbers are written.
TRAINING = {
    "train_images_per_second": ("training images/s", "{:.0f}"),
    "train_speedup": ("training speed-up", "{:.2f}×"),
}
#: A cell that the study did not run, one that it does not plan, and the gain of what added nothing to any model.
NOT_RUN, NOT_PLANNED, DECLINED = "not run", "–", "declined"
#: What captions say of such a gain.
DECLINED_NOTE = f"{DECLINED}: nothing was added, scale 0 was the best on the validation images of every seed and task."
#: Marks the primary endpoint of a study.
PRIMARY = "†"
#: What a star means, in one sentence.
STARS_CAPTION = (
    "A star says that other trainings, evaluated on other images of these tasks, would differ in the same direction "
    "(* p < 0.05, ** p < 0.01, *** p < 0.001, corrected for all gains that are shown here)."
)
#: The same where losses are shown.
LOSS_STARS_CAPTION = STARS_CAPTION.replace("all gains", "all losses")
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
        """Return a table that needs the packages booktabs and graphicx, or longtable where a page cannot hold it."""
        rows = [[_tex(cell.text, cell.bold) for cell in row] for row in self.rows]
        frame = pd.DataFrame(rows, columns=[_tex(name) for name in self.header])
        caption, label = f"{_tex(self.title)}. {_tex(self.caption)}", f"tab:{_name(self.label)}"
        numbers = "r" * (len(self.header) - 2)
        if len(rows) > PAGE:
            wide = (max(len(row[column].text) for row in self.rows) > 24 for column in (0, 1))
            words = "".join(r"p{.19\linewidth}" if it else "l" for it in wide)
            form = {"longtable": True, "caption": caption, "label": label}
            body = frame.to_latex(index=False, escape=False, column_format=words + numbers, **form)
            body = body.replace(rf"\caption[]{{{caption}}}", r"\caption[]{(continued)}")
            fitted = r"\tiny\setlength{\tabcolsep}{2pt}\setlength{\LTcapwidth}{\linewidth}"
            return f"{{{fitted}\n{self._ruled(body, 'endlastfoot')}}}\n"
        body = frame.to_latex(index=False, escape=False, column_format=f"ll{numbers}")
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\label{{{label}}}\n\\resizebox{{\\linewidth}}{{!}}{{%\n"
            f"{self._ruled(body, 'midrule').rstrip()}}}\n\\end{{table}}\n"
        )

    def _ruled(self, body: str, head: str) -> str:
        """Draw the rules into the body of a LaTeX table, whose rows follow on the first command ``head``."""
        lines = body.split("\n")
        start = lines.index(f"\\{head}") + 1
        for number in sorted(self.rules, reverse=True):
            lines.insert(start + number, "\\midrule")
        return "\n".join(lines)


#: Rows that a page of LaTeX holds, with a caption.
PAGE = 60
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
    "†": r"$\dagger$",
    "≥": r"$\ge$",
}


def _tex(text: str, bold: bool = False) -> str:
    escaped = "".join(_ESCAPES.get(c, c) for c in text.replace("`", ""))
    return f"\\textbf{{{escaped}}}" if bold else escaped


def _name(label: str) -> str:
    """Return a label without what LaTeX minds in one."""
    return re.sub(r"[^\w.:-]+", "-", label, flags=re.ASCII)


def signed(value: float, digits: int = 1) -> str:
    """Return a number with its sign, never "-0.0"."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def with_interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """Return a difference with its interval, an end below 0 with its sign: "[-0.0, +5.9]" holds 0."""
    ends = (f"{round(end, 9) + 0.0:+.{digits}f}" for end in (low, high))
    return f"{signed(value, digits)} [{', '.join(ends)}]"


def gain_text(pair: Pair, corrected: pd.Series) -> str:
    """Return a gain that was tested with its interval and stars.

    Args:
        corrected: what :meth:`tocom.analysis.run.Run.corrected` returns for all that is shown with it.
    """
    row = pair.test
    if pair.declined:
        return DECLINED
    mark = PRIMARY if row.primary else ""
    return f"{with_interval(row.gain, row.low, row.high)}{stars(corrected[row.name])}{mark}"


def p_text(p: float) -> str:
    """Return a p-value, or a dash where it is undefined."""
    return "–" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def p_is(p: float) -> str:
    """Return a p-value as text says it: "p = 0.0123"."""
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


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


def gain_cell(pair: Pair | None, corrected: pd.Series, with_p: bool = False) -> Text:
    """Return a gain with interval and stars if it was tested; a dash where nothing is to be compared.

    Args:
        corrected: see :func:`gain_text`. with_p: write the corrected p-value, too.
    """
    if pair is None:
        return Text(NOT_PLANNED)
    if not pair.is_run:
        return Text(NOT_RUN)
    if pair.declined:
        return Text(DECLINED)
    if pair.test is None:
        return Text(signed(pair.gain))
    return Text(gain_text(pair, corrected) + (f", {p_is(corrected[pair.test.name])}" if with_p else ""))


# --- what captions say ----------------------------------------------------------------------------------------------


def gain_caption(run: Run) -> str:
    """Return what the captions of all tables with gains say of them."""
    if run.study.most_seeds < 2:
        return (
            "Gain: points, with its 95 % interval over other test images alone: one training cannot speak for others."
        )
    return (
        f"Gain: points, with its 95 % interval. {STARS_CAPTION} {PRIMARY}: the primary endpoint, tested first; all "
        "others are exploratory, and count only where it does."
    )


def declined_note(rows: Sequence[Sequence[Text]]) -> str:
    """Return what a caption says if one of these cells is declined."""
    return f" {DECLINED_NOTE}" if any(cell.text == DECLINED for row in rows for cell in row) else ""


def learning_note(run: Run, backbones: Sequence[str], methods: Iterable[str]) -> str:
    """Return a warning to start a caption with, of each learned compensator that leaves the held-out loss no lower."""
    notes = {}
    for name, method in product(backbones, methods):
        for seed in learned_in_vain(run, name, method):
            kl, without = (run.learned(name, method, seed)[key] for key in ("held_out_kl", "held_out_kl_without"))
            notes[run.learned_file(name, method, seed)] = (
                f"WARNING: learning {run.title(method)} on {name} with seed {seed} gained nothing: its loss on held-out"
                f" images is {kl:.4g}, and {without:.4g} without it; give it more images or epochs, or another learning"
                " rate. "
            )
    return "".join(notes.values())


def learned_in_vain(run: Run, backbone: str, method: str) -> list[int]:
    """Return the seeds with whose compensators of a method the held-out loss is no lower than without them."""

    def is_so(seed: int) -> bool:
        found = run.learned(backbone, method, seed)
        kl, without = found.get("held_out_kl"), found.get("held_out_kl_without")
        return kl is not None and without is not None and kl >= without

    return list(filter(is_so, run.study.seeds_of(method)))


def averages(run: Run, scope: Scope) -> str:
    """Return what the numbers of a table average over, for its caption."""
    over_tasks = f" of the mean over {', '.join(scope.tasks)}" if len(scope.tasks) > 1 else f" on {scope.tasks[0]}"
    vtab = f" ({VTAB_NOTE})" if scope.name == VTAB else ""
    return f"mean ± standard deviation over {run.study.seeds_text} seeds{over_tasks}{vtab}"


# --- the main table -------------------------------------------------------------------------------------------------

#: Rows, and the rows before which a rule goes.
Block = tuple[list[list[Text]], list[int]]


def degree_table(run: Run, scope: Scope, backbones: Sequence[str], title: str, label: str) -> Table:
    """Return the paper's table for one task or group: methods and train degrees down, inference degrees across.

    Args:
        backbones: one, or several that the first column names.
    """
    rows, rules, corrected = [], [], run.corrected(backbones, [scope])
    for backbone in backbones:
        block, inner = _degree_rows(run, scope, backbone, f"{backbone}, " if len(backbones) > 1 else "", corrected)
        rules += [len(rows) + number for number in inner if len(rows) + number]
        rows += block
    caption = (
        f"Test {run.study.metric} in % at each inference degree, {averages(run, scope)}. Bold: the "
        "best of the lines of one model, where the intervals of the gains between them leave 0 out. "
        f"{gain_caption(run)} matched: trained at the degree it runs at, the ceiling."
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
    costs = {cost_text(run.cost(name, method, scope, infer)) for name in backbones for method in plain} - {"nan"}
    return f"{infer} ({costs.pop()} {run.cost_unit})" if len(costs) == 1 else str(infer)


def cost_text(cost: float) -> str:
    """Return a cost to three digits, or to the last one if it is large."""
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.3g}"


def _degree_rows(run: Run, scope: Scope, backbone: str, prefix: str, corrected: pd.Series) -> Block:
    """Return the lines of each family of methods at each fixed train degree, and one line of each that has none."""
    study, rows, rules = run.study, [], []
    for family in run.by_degree():
        for train in train_degrees(study, family[0]):
            rules.append(len(rows))
            trained = [method for method in family if train in study.train_degrees_of(method)]
            rows += _lines(run, scope, backbone, trained, train, prefix, corrected)
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
        score_text(run.score(backbone, method, scope, train, infer), len(run.study.seeds_of(method)))
        if infer in planned
        else Text(NOT_PLANNED)
        for train, infer in zip(trains, run.infer_degrees, strict=True)
    ]


def _lines(
    run: Run, scope: Scope, backbone: str, family: Sequence[str], train: str, prefix: str, corrected: pd.Series
) -> list[list[Text]]:
    """Return the line of every method that shares a checkpoint, each with its gains over others below it."""
    lines = {method: _line(run, scope, backbone, method, [train] * len(run.infer_degrees)) for method in family}
    for column, infer in enumerate(run.infer_degrees):
        for method in family:
            if _is_best(run, scope, backbone, family, method, (train, infer)):
                lines[method][column] = Text(lines[method][column].text, True)
    rows = []
    for method, line in lines.items():
        rows.append([Text("" if rows else f"{prefix}{train}"), Text(run.title(method)), *line])
        rows += _published_lines(run, scope, backbone, method, train)
        for before, after in run.study.compare:
            if after == method:
                pairs = run.pairs(backbone, (before, after), scope)
                over = "" if before == family[0] else f" over {run.title(before)}"
                gains = [gain_cell(pairs.get((train, infer)), corrected) for infer in run.infer_degrees]
                rows.append([Text(""), Text(f"gain{over}"), *gains])
    return rows


def _is_best(
    run: Run, scope: Scope, backbone: str, family: Sequence[str], method: str, degrees: tuple[str, int]
) -> bool:
    """Return whether a method is ahead of the others of a family by gains whose intervals leave 0 out."""
    found = {
        pair: run.pairs(backbone, pair, scope).get(degrees) for pair in run.study.compare if set(pair) <= set(family)
    }
    mine = {pair: one for pair, one in found.items() if method in pair}
    tested = mine and all(one is not None and one.test is not None for one in mine.values())
    ahead = tested and all(one.test.low > 0 if method == pair[1] else one.test.high < 0 for pair, one in mine.items())
    scores = {m: run.score(backbone, m, scope, *degrees).mean() for m in family}
    return bool(ahead) and all(scores[method] > score for m, score in scores.items() if m != method)


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
    scopes = run.scopes + task_scopes(run.study.groups)
    found = {
        (compared, scope): _most_mismatched(run.pairs(backbone, compared, scope).values())
        for scope, compared in product(scopes, run.study.compare)
    }
    shown = [(compared, scope, pair) for (compared, scope), pairs in found.items() for pair in pairs]
    corrected = compare.corrected(run.significance.loc[[pair.test.name for *_, pair in shown]])
    rows = [
        [
            Text(f"{run.title(after)} over {run.title(before)}"),
            Text(f"{scope.name}, {pair.degrees}"),
            Text(gain_text(pair, corrected)),
            Text(p_text(corrected[pair.test.name])),
            *[Text(p_text(pair.test[name])) for name in ("p", "p_images", "p_seeds", "p_tasks")],
            Text(_share_text(pair.test)),
        ]
        for (before, after), scope, pair in shown
    ]
    caption = (
        f"The largest mismatch of each pair. {gain_caption(run)} p: of the stars, and before it is corrected. The "
        "others, not corrected, each take something as given: p (images) these trained models (paired sign-flip test), "
        "p (seeds) these images (t-test), p (tasks) both (Wilcoxon signed-rank test; with n tasks it cannot fall below "
        "2^(1−n)). Gap closed: share of the distance from the second of the two methods to the same method trained at "
        "the degree that it runs at, with Fieller's 95 % interval; – where that distance cannot be told from 0."
    )
    caption += declined_note(rows)
    header = ["comparison", "tasks and degrees", "gain", "p corrected", "p", "p (images)", "p (seeds)", "p (tasks)"]
    header += ["gap closed"]
    rows = rows or [[Text(NOT_RUN)] * len(header)]
    return Table(f"Tests at the largest mismatch ({backbone})", caption, header, rows, f"{backbone}-significance")


def harm_table(run: Run, backbone: str) -> Table:
    """Return what compensators cost where they are not needed, against the margin that the study states."""
    mine, limits = run.harm[run.harm.backbone == backbone], run.study.analysis
    rows = [
        [
            Text(f"{run.title(row.after)} over {run.title(row.before)}"),
            Text(row.scope),
            Text(str(row.n_conditions)),
            Text(with_interval(row.cost, row.low, row.high, 2)),
            Text(p_text(row.p)),
        ]
        for _, row in mine.iterrows()
    ]
    caption = (
        f"What a compensator costs where a mismatch costs less than {limits.harmless:g} points: mean over conditions "
        "(task, train and inference degree), with its 95 % interval over other trainings and other images. p: of the "
        f"cost being {limits.margin:g} points or more (one-sided test of non-inferiority, corrected for nothing), "
        "small where it is surely less. Conditions are chosen on the test images by the score of the model without "
        "compensator, whose luck there counts against the compensator. –: nothing varies, or one seed."
    )
    header = ["comparison", "tasks", "conditions", "cost", f"p (cost ≥ {limits.margin:g})"]
    rows = rows or [[Text(NOT_RUN)] * len(header)]
    return Table(f"Cost where nothing is to be compensated ({backbone})", caption, header, rows, f"{backbone}-harm")


def mismatch_table(run: Run, backbone: str, scope: Scope) -> Table:
    """Return what a mismatch of degrees costs every method without a compensator, in points, beside matched models."""
    study, frame = run.study, run.mismatch
    mine = frame[(frame.backbone == backbone) & (frame.scope == scope.name) & (frame.group == scope.is_group)]
    mine = mine.assign(corrected=holm(mine.p.astype(float)))
    tested = {(row.method, row.train_degree, row.infer_degree): row for _, row in mine.iterrows()}
    planned = {method: mismatches(study, method) for method in plain_methods(study)}
    runs = sorted({at.infer for found in planned.values() for at in found})
    rows, rules = [], []
    for found in planned.values():
        rules += [len(rows)] if found else []
        lines = list(dict.fromkeys((at.method, at.train) for at in found))
        for number, (method, train) in enumerate(lines):
            cells = [
                score_text(run.score(backbone, method, scope, train, infer), len(study.seeds_of(method)))
                if train == str(infer)
                else _loss_cell(tested.get((method, train, infer)), (method, train, infer) in found)
                for infer in runs
            ]
            is_first = not number or lines[number - 1][0] != method
            rows.append([Text(run.title(method) if is_first else ""), Text(train), *cells])
    caption = (
        f"Points of test {study.metric} that are lost where a model runs at another degree than it was trained at: the "
        "score of models that were trained at that degree less its own, with the 95 % interval "
        + (
            f"over other trainings and other test images. {LOSS_STARS_CAPTION} "
            if study.most_seeds > 1
            else "over other test images alone: one training cannot speak for others. "
        )
        + f"Where both degrees are the same: the score in %, {averages(run, scope)}."
    )
    header = ["method", "trained at", *(f"run at {infer}" for infer in runs)]
    rows = rows or [[Text(NOT_PLANNED)] * len(header)]
    title = f"What a mismatch costs, {scope.name} ({backbone})"
    return Table(title, caption, header, rows, f"{backbone}-{scope.name}-mismatch", tuple(filter(None, rules)))


def _loss_cell(row: pd.Series | None, is_planned: bool) -> Text:
    if row is None:
        return Text(NOT_RUN if is_planned else NOT_PLANNED)
    return Text(with_interval(row.loss, row.low, row.high) + stars(row.corrected))


def _most_mismatched(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs that were tested at the largest distance between degrees; all, where one has no number."""
    tested = [pair for pair in pairs if pair.is_run and pair.test is not None]
    distances = [abs(int(pair.train) - pair.infer) if pair.train.isdigit() else None for pair in tested]
    largest = max((distance for distance in distances if distance is not None), default=None)
    return [pair for pair, distance in zip(tested, distances, strict=True) if distance in (None, largest)]


def _share_text(row: pd.Series) -> str:
    if np.isnan(row.gap_closed):
        return "–"
    return f"{100 * row.gap_closed:.0f} % [{100 * row.gap_low:.0f}, {100 * row.gap_high:.0f}]"


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
