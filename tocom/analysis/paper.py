"""Tables in the paper's form (arXiv 2408.06798): one form for each kind of study.

What they show is what the study asks for, not what happens to be there: a planned cell that is missing from cells.csv
is "not run", and so is a whole study without a folder. Published figures stand beside ours, marked as such, where ours
are of the same model and tasks; of the paper's tables nothing else is at hand, which a dash stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any

from tocom.analysis.planned import VTAB, same_models, train_degrees
from tocom.analysis.run import Compared, Run, best_mean, largest, published_gain, transfer_methods, transferred
from tocom.analysis.tables import (
    NOT_PLANNED,
    NOT_RUN,
    VTAB_NOTE,
    Table,
    Text,
    averages,
    declined_note,
    degree_table,
    degree_tables,
    gain_caption,
    gain_cell,
    gain_text,
    learned_in_vain,
    learning_note,
    score_text,
    signed,
)
from tocom.errors import TocomError
from tocom.settings import PLAIN

#: Stands for a figure of the paper that is not at hand.
NOT_AT_HAND = "—"
#: What a caption says where nothing published can stand beside ours.
MISSING_CAPTION = "Published figures: none, the full tables of the paper (arXiv 2408.06798) are not at hand."
#: What a caption says of the published largest gain, and of our interval beside it.
LARGEST_CAPTION = "The interval is that of the pair, not corrected for having been picked."
READING_CAPTION = (
    "The published figure is the maximum improvement of the average performance (abstract of arXiv 2408.06798), with "
    "DeiT-B and ToMe; whether that is the gain of a pair of degrees or the mean over inference degrees is uncertain."
)


# --- the forms ----------------------------------------------------------------------------------------------------


def _degrees(run: Run) -> list[Table]:
    """A table a backbone: every train degree against every inference degree; then the largest gains."""
    return [*degree_tables(run, run.scopes), largest_gains(run)]


def _backbones(run: Run) -> list[Table]:
    """One table with a block a backbone; then the largest gains."""
    tables = [
        degree_table(run, scope, run.backbones, f"{scope.title} by backbone", f"paper-backbone-{scope.name}")
        for scope in run.scopes
    ]
    return [*tables, largest_gains(run)]


def largest_gains(run: Run) -> Table:
    """Return the largest gain of every pair of methods that share models, beside the published one."""
    rows = []
    corrected = run.corrected(run.backbones, run.scopes, same_models(run.study))
    for scope, backbone, pair in product(run.scopes, run.backbones, same_models(run.study)):
        best, mean = largest(run, backbone, pair, scope), best_mean(run, backbone, pair, scope)
        texts = [scope.name, where(run, backbone, pair), gain_text(best, corrected) if best else NOT_RUN]
        texts += [best.degrees if best else NOT_RUN]
        texts += [
            score_text(mean[1], len(run.study.seeds_of(pair[1])), show=signed).text if mean else NOT_RUN,
            mean[0] if mean else NOT_RUN,
        ]
        rows.append([Text(text) for text in (*texts, published_gain(run, scope, backbone, pair) or NOT_AT_HAND)])
    caption = (
        "The largest gain among all pairs of a train and another inference degree, averaged over the group's tasks and "
        f"{run.study.seeds_text} seeds. {gain_caption(run)} {LARGEST_CAPTION} Mean gain: over all inference degrees "
        "but the train degree, in points, ± standard deviation over seeds, from the train degree where it is largest. "
        f"{READING_CAPTION} {NOT_AT_HAND}: none is at hand."
    )
    caption += f" {VTAB_NOTE}." if any(scope.name == VTAB for scope in run.scopes) else ""
    caption += declined_note(rows)
    header = ["tasks", "model", "largest gain of a pair (ours)", "train → inference"]
    header += ["largest mean gain (ours)", "train degree", "published"]
    rows = rows or [[Text(NOT_PLANNED)] * len(header)]
    return Table("Largest average gain", caption, header, rows, "paper-largest")


def where(run: Run, backbone: str, pair: Compared) -> str:
    """Return what tables call a backbone with two methods."""
    return f"{backbone}, {run.title(pair[1])} over {run.title(pair[0])}"


def _speedup(run: Run) -> list[Table]:
    """Trained compressed, run at the lowest inference degree: what training gains in speed and loses in score."""
    methods = {run.title(family[0]): family[0] for family in run.by_degree()}
    tables = []
    for backbone, scope in product(run.backbones, run.scopes):
        title = f"{scope.title}: trained compressed, run at degree {run.infer_degrees[0]} ({backbone})"
        table = degree_table(run, scope, [backbone], title, f"paper-{backbone}-{scope.name}-speedup")
        rows = []
        for train, method, score, *_ in table.rows:
            speed = ("", "")
            if train.text.isdigit():
                speed = _training_speed(run, backbone, methods[method.text], int(train.text))
            rows.append([train, method, score, *map(Text, speed)])
        header = [*table.header[:3], "training images/s", "training speed-up"]
        caption = (
            f"{table.caption} Training speed: images a second in a training step compressed to the train degree, and "
            f"that over the speed without compression. {MISSING_CAPTION}"
        )
        tables.append(replace(table, header=header, rows=rows, caption=caption))
    return tables


def _training_speed(run: Run, backbone: str, method: str, degree: int) -> tuple[str, str]:
    frame = run.throughput
    same = (frame.backbone == backbone) & (frame.method == method) & (frame.infer_degree == degree)
    chosen = frame[same].reindex(columns=["train_images_per_second", "train_speedup"])
    if chosen.empty or chosen.iloc[0].isna().any():
        return NOT_RUN, NOT_RUN
    images, ratio = chosen.iloc[0].astype(float)
    return f"{images:.0f}", f"{ratio:.2f}×"


def _ablation(run: Run) -> list[Table]:
    """A block a compensated method: score and gain at every mismatch, and how well its compensator was learned."""
    scope, tables = run.scopes[-1], []
    for backbone, (plain, ours) in product(run.backbones, run.with_compensators()):
        pairs = {method: run.pairs(backbone, (plain, method), scope) for method in ours}
        corrected = run.corrected([backbone], [scope], [(plain, method) for method in ours])
        degrees = sorted({key for found in pairs.values() for key in found}, key=lambda key: (int(key[0]), key[1]))
        files = [run.learned_file(backbone, method, run.study.seeds_of(method)[0]) for method in ours]
        scores = [
            score_text(run.score(backbone, plain, scope, *key), len(run.study.seeds_of(plain))) for key in degrees
        ]
        without = _held_out_kl(run, backbone, ours[0], "held_out_kl_without")
        rows = [[Text(run.title(plain)), Text("plain"), *scores, Text(without)]]
        rules = []
        for number, method in enumerate(ours):
            planned = len(run.study.seeds_of(method))
            scores = [score_text(run.score(backbone, method, scope, *key), planned) for key in degrees]
            # A file that a method before has was not learned for this one.
            kl = "–" if files[number] in files[:number] else _held_out_kl(run, backbone, method, "held_out_kl")
            rules.append(len(rows))
            changes = _changes_text(run.study.methods[method].changes)
            rows.append([Text(run.title(method)), Text(changes or "as configured"), *scores, Text(kl)])
            gains = [gain_cell(pairs[method].get(key), corrected, with_p=True) for key in degrees]
            rows.append([Text(""), Text("gain"), *gains, Text("")])
        caption = (
            f"{learning_note(run, [backbone], ours)}Test {run.study.metric} in % at each train → inference degree, "
            f"{averages(run, scope)}. {gain_caption(run)} p: of "
            "that test, corrected. KL: of the student from the teacher on held-out images "
            "(nats), at the scale that the compensator was learned at, mean over seeds; – where nothing was learned "
            "for it alone. "
            f"{MISSING_CAPTION}{declined_note(rows)}"
        )
        header = ["method", "changes", *(f"{train} → {infer}" for train, infer in degrees), "KL"]
        title = f"{scope.title} by compensator ({backbone}, {run.title(plain)})"
        tables.append(Table(title, caption, header, rows, f"paper-{backbone}-{plain}-ablation", tuple(rules)))
    return tables


def _changes_text(changes: Mapping[str, Any]) -> str:
    parts = [
        _changes_text(value) if isinstance(value, Mapping) else f"{key} = {_plain(value)}"
        for key, value in changes.items()
        if key != "kind"
    ]
    return ", ".join(part for part in parts if part)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _held_out_kl(run: Run, backbone: str, method: str, key: str) -> str:
    """Return the mean of what the files of what was learned say, one a seed; a dash where that is nothing."""
    files = [run.learned_file(backbone, method, seed) for seed in run.study.seeds_of(method)]
    if not any(file.is_file() for file in files):
        return NOT_RUN
    found = [run.learned(backbone, method, seed).get(key) for seed in run.study.seeds_of(method)]
    known = [kl for kl in found if kl is not None]
    in_vain = key == "held_out_kl" and learned_in_vain(run, backbone, method)
    note = f" (no better than without, with {_seeds(in_vain)})" if in_vain else ""
    return f"{round(fmean(known), 4) + 0.0:.4f}{note}" if known else "–"  # never "-0.0000"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _transfer(run: Run) -> list[Table]:
    """Which task's gap does what to which task, in points over adding none."""
    methods, tables = transfer_methods(run.study), []
    if not methods:
        raise TocomError("the transfer of a gap needs a method with two train degrees; give them in train_degrees")
    for backbone, method in product(run.backbones, methods):
        degrees, seeds = train_degrees(run.study, method), len(run.study.seeds_of(method))
        found = transferred(run, backbone, method).set_index("seed")

        rows = []
        for source in (PLAIN, *run.study.groups):
            column, how = ("accuracy", {}) if source == PLAIN else ("change", {"show": signed})
            mine = found[found.source_task == source]
            of_tasks = [mine[mine.target_task == target][column].dropna() for target in run.study.groups]
            rows.append([Text(source), Text(column), *(score_text(by_seed, seeds, **how) for by_seed in of_tasks)])
        caption = (
            "Change of test accuracy in points when the difference of one task's weights (row) between "
            f"degrees {degrees[0]} and {degrees[-1]} is added to another's model (column), trained at {degrees[0]} and "
            f"run at {degrees[-1]}; mean ± standard deviation over {seeds} seeds. {PLAIN}: in % without it. "
            f"{MISSING_CAPTION}"
        )
        title = f"Gap {degrees[0]} → {degrees[-1]} of one task, added to another ({backbone}, {run.title(method)})"
        header = ["gap of", "", *run.study.groups]
        tables.append(Table(title, caption, header, rows, f"paper-{backbone}-{method}-transfer", (1,)))
    return tables


#: Key ``paper`` of a study's config -> how its tables are made. Compressors stand below each other in any table,
#: and the published scores of a segmentation below ours.
FORMS: dict[str, Callable[[Run], list[Table]]] = {
    "degrees": _degrees,
    "methods": _degrees,
    "backbones": _backbones,
    "speedup": _speedup,
    "ablation": _ablation,
    "transfer": _transfer,
    "segmentation": _degrees,
}


def paper_tables(run: Run) -> list[Table]:
    """Return the tables of a study in the paper's form that it names.

    Raises:
        TocomError: it names none, or lacks what the form needs.
    """
    if run.study.paper is None:
        raise TocomError(f"study {run.study.study} names no form of table; write paper: {' | '.join(FORMS)}")
    tables = FORMS[run.study.paper](run)
    if not tables:
        raise TocomError(
            f"paper: {run.study.paper} needs a method with a compensator and fixed train degrees; add one to methods,"
            " or leave paper out"
        )
    return tables
