"""Tables in the paper's form (arXiv 2408.06798): one form for each kind of study.

What they show is what the study's config asks for, not what happens to be there: a planned cell that is missing from
cells.csv is "not run", and so is a whole study without a folder. Published figures stand beside ours, marked as such,
where ours are of the same model and tasks; of the paper's tables nothing else is at hand, which a dash stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from tocom.analysis.grid import Grid
from tocom.analysis.report import write_pages
from tocom.analysis.run import CompensatorFiles, Run, best_mean, largest, transfer_change, transfer_without
from tocom.analysis.significance import VTAB
from tocom.analysis.tables import (
    GAIN_CAPTION,
    LINES_CAPTION,
    METHOD,
    NOT_RUN,
    VTAB_NOTE,
    Pair,
    Results,
    Table,
    Text,
    accuracy_text,
    averages,
    degree_rows,
    degree_table,
    gain_text,
    p_text,
    signed,
)
from tocom.errors import TocomError, suggest
from tocom.files import load_arrays

#: Stands for a figure of the paper that is not at hand.
NOT_AT_HAND = "—"
#: What a caption says where nothing published can stand beside ours, with a column of dashes and without.
_MISSING = "the full tables of the paper (arXiv 2408.06798) are not at hand."
DASH_CAPTION, MISSING_CAPTION = f"{NOT_AT_HAND}: {_MISSING}", f"Published figures: none, {_MISSING}"
#: What a caption says of the published largest gain, and of our interval beside it.
LARGEST_CAPTION = "The interval is that of the pair, not corrected for having been picked."
READING_CAPTION = (
    "The published figure is the maximum improvement of the average performance (abstract of arXiv 2408.06798), with "
    "DeiT-B and ToMe; whether that is the gain of a pair of degrees or the mean over inference degrees is uncertain."
)
#: What a compressor does with the tokens that it removes.
REMOVES = {"tome": "merging", "evit": "pruning", "evit_fuse": "pruning, the rest fused"}


def where(backbone: str, compressor: str) -> str:
    """Return what a title calls a model."""
    return f"{backbone}, {METHOD.get(compressor, compressor)}"


def _label(*parts: str) -> str:
    return "-".join(("paper", *parts)).replace(" ", "-")


# --- the forms ----------------------------------------------------------------------------------------------------


def _degrees(run: Run) -> list[Table]:
    """Every train degree against every inference degree, then the largest gain beside the published one."""
    tables = []
    for backbone, compressor in run.grid.models:
        for scope in run.scopes:
            title = f"{scope.title} ({where(backbone, compressor)})"
            frames = run.of(backbone, compressor)
            label = _label(backbone, compressor, scope.name)
            tables.append(degree_table(*frames, scope, run.grid, compressor, title, label))
    return [*tables, _largest_gains(run)]


def _largest_gains(run: Run) -> Table:
    rows = []
    for scope in run.scopes:
        for backbone, compressor in run.grid.models:
            best = largest(run, backbone, compressor, scope)
            mean = best_mean(run, backbone, compressor, scope)
            published = run.published(scope, backbone, compressor)
            rows.append(
                [
                    Text(scope.name),
                    Text(where(backbone, compressor)),
                    Text(gain_text(best.test) if best else NOT_RUN),
                    Text(degrees_text(best) if best else NOT_RUN),
                    accuracy_text(mean[1], len(run.grid.seeds), show=signed) if mean else Text(NOT_RUN),
                    Text(mean[0] if mean else NOT_RUN),
                    Text(published.text() if published else NOT_AT_HAND),
                ]
            )
    caption = (
        "The largest gain of +ToCom over the plain model among all pairs of a train and another inference degree, "
        f"averaged over the tasks of the group and {len(run.grid.seeds)} seeds. {GAIN_CAPTION} {LARGEST_CAPTION} "
        "Mean gain: over all inference degrees but the train degree, in points, ± standard deviation over seeds, from "
        f"the train degree where it is largest. {READING_CAPTION} {NOT_AT_HAND}: none is at hand."
    )
    caption += f" {VTAB_NOTE}." if any(scope.name == VTAB for scope in run.scopes) else ""
    header = ["tasks", "model", "largest gain of a pair (ours)", "train → inference"]
    header += ["largest mean gain (ours)", "train degree", "published"]
    return Table("Largest average gain", caption, header, rows, _label("largest"))


def degrees_text(found: Pair) -> str:
    """Return from which degree to which."""
    return f"{found.train} → {found.infer}"


def _models(run: Run, first: str) -> list[Table]:
    """A block a model: every train degree against every inference degree; then the largest gains.

    Args:
        first: what the blocks are, "backbone" or "compressor".
    """
    if not run.grid.fixed_train_degrees:
        raise TocomError("this form of table needs a fixed train degree; give one in train_degrees besides random")
    tables = []
    for scope in run.scopes:
        rows, rules = [], []
        for backbone, compressor in run.grid.models:
            block, inner = degree_rows(Results.of(*run.of(backbone, compressor), scope), run.grid, compressor)
            name = backbone if first == "backbone" else REMOVES.get(compressor, compressor)
            name += f" ({backbone})" if first == "compressor" and len(run.grid.backbones) > 1 else ""
            rules += [len(rows) + number for number in ([0] if rows else []) + inner]
            rows += [[Text(f"{name}, {line[0].text}" if line[0].text else ""), *line[1:]] for line in block]
        caption = (
            f"Test accuracy in % of each {first} by train degree, at each inference degree, "
            f"{averages(scope, len(run.grid.seeds))}. {GAIN_CAPTION} {LINES_CAPTION} Published figures: in the last "
            f"table; {_MISSING}"
        )
        header = [f"{first}, train degree", "method", *map(str, sorted(run.grid.infer_degrees))]
        title = f"{scope.title} by {first}"
        tables.append(Table(title, caption, header, rows, _label(first, scope.name), tuple(rules)))
    return [*tables, _largest_gains(run)]


def _speedup(run: Run) -> list[Table]:
    """Trained compressed, run at the lowest inference degree: what training gains in speed and loses in accuracy."""
    infer, n_seeds = min(run.grid.infer_degrees), len(run.grid.seeds)
    tables = []
    for backbone, compressor in run.grid.models:
        frames = run.of(backbone, compressor)
        for scope in run.scopes:
            results = Results.of(*frames, scope)
            own = accuracy_text(results.accuracy(str(infer), infer), n_seeds)
            rows = []
            for train in run.grid.fixed_train_degrees:
                found = results.pair(train, infer)
                speed = _training_speed(run.throughput, backbone, compressor, int(train))
                accuracies = [accuracy_text(values, n_seeds) for values in (found.plain, found.ours)]
                rows.append([Text(train), *map(Text, speed), *accuracies, found.gain(), own, Text(NOT_AT_HAND)])
            caption = (
                "Training speed: images a second in a training step compressed to the train degree, and that over the "
                f"speed without compression. Test accuracy in % at inference degree {infer}, "
                f"{averages(scope, n_seeds)}. {GAIN_CAPTION} Published: {DASH_CAPTION}"
            )
            plain = METHOD.get(compressor, compressor)
            header = ["train degree", "training images/s", "training speed-up", plain, f"{plain} + ToCom", "gain"]
            title = f"{scope.title}: trained compressed, run at degree {infer} ({where(backbone, compressor)})"
            label = _label(backbone, compressor, scope.name, "speedup")
            tables.append(Table(title, caption, [*header, f"trained at {infer}", "published"], rows, label))
    return tables


def _training_speed(throughput: pd.DataFrame, backbone: str, compressor: str, degree: int) -> tuple[str, str]:
    columns = ("train_images_per_second", "train_speedup")
    chosen = throughput[
        (throughput.backbone == backbone)
        & (throughput.compressor == compressor)
        & (throughput.infer_degree == degree)
        & ~throughput.compensated.astype(bool)
    ].reindex(columns=list(columns))
    if chosen.empty or chosen.iloc[0].isna().any():
        return NOT_RUN, NOT_RUN
    images, ratio = chosen.iloc[0].astype(float)
    return f"{images:.0f}", f"{ratio:.2f}×"


def _ablation(run: Run) -> list[Table]:
    """A block a variant of the compensator: accuracy and gain at every mismatch, and how well it was distilled."""
    n_seeds, scope = len(run.grid.seeds), run.scopes[-1]
    tables = []
    for backbone, compressor in run.grid.models:
        results = Results.of(*run.of(backbone, compressor), scope)
        plain = [results.accuracy(*degrees) for degrees in run.grid.mismatches]
        kl = _held_out_kl(run, backbone, compressor, run.grid.main, "held_out_kl_without")
        rows = [[Text("none"), Text("plain"), *[accuracy_text(values, n_seeds) for values in plain], Text(kl)]]
        rules = []
        for name, changes in run.grid.compensators.items():
            results = Results.of(*run.of(backbone, compressor, name), scope)
            pairs = [results.pair(*degrees) for degrees in run.grid.mismatches]
            accuracies = [accuracy_text(found.ours, n_seeds) for found in pairs]
            kl = "–" if _is_shared(run, backbone, compressor, name) else _held_out_kl(run, backbone, compressor, name)
            rules.append(len(rows))
            rows.append([Text(name), Text(_changes_text(changes)), *accuracies, Text(kl)])
            rows.append([Text(""), Text("gain"), *[_tested_gain(found) for found in pairs], Text("")])
        caption = (
            f"Test accuracy in % at each train → inference degree, {averages(scope, n_seeds)}. {GAIN_CAPTION} p: of "
            "that test; each variant is a family of its own. KL: of the student from the teacher on held-out images "
            "(nats), at the scale that the compensator was trained at; – where only the scale differs. "
            f"{MISSING_CAPTION}"
        )
        degrees = [f"{train} → {infer}" for train, infer in run.grid.mismatches]
        title = f"{scope.title} by compensator ({where(backbone, compressor)})"
        label = _label(backbone, compressor, "ablation")
        tables.append(Table(title, caption, ["compensator", "changes", *degrees, "KL"], rows, label, tuple(rules)))
    return tables


def _changes_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_plain(value)}" for key, value in changes.items()) or "as configured"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _tested_gain(found: Pair) -> Text:
    if not found.is_run or found.test is None:
        return found.gain()
    p = p_text(found.test.p_images_holm)
    return Text(f"{found.gain().text}, p {p if p.startswith('<') else f'= {p}'}")


def _is_shared(run: Run, backbone: str, compressor: str, name: str) -> bool:
    """Return whether a variant was not distilled for itself: its file is that of a variant before it."""
    variants = list(run.grid.compensators)
    before = [run.compensators.get((backbone, compressor, other)) for other in variants[: variants.index(name)]]
    file = run.compensators.get((backbone, compressor, name))
    return file is not None and file in before


def _held_out_kl(run: Run, backbone: str, compressor: str, name: str, key: str = "held_out_kl") -> str:
    """Return what a compensator's file says, a dash where that is unknown."""
    if not run.compensators:
        return "–"
    file = run.compensators.get((backbone, compressor, name))
    if file is None or not Path(file).is_file():
        return NOT_RUN
    kl = load_arrays(file)[1].get(key)
    return "–" if kl is None else f"{round(kl, 4) + 0.0:.4f}"  # never "-0.0000"


def _transfer(run: Run) -> list[Table]:
    """Which task's gap does what to which task, in points over adding none."""
    train, infer = _gap_degrees(run.grid)
    tables = []
    for backbone, compressor in run.grid.models:
        change, without = (find(run, backbone, compressor) for find in (transfer_change, transfer_without))
        n_seeds = len(run.grid.seeds)
        own = [100 * without[without.target_task == target].set_index("seed").accuracy for target in run.groups]
        rows = [[Text("none"), Text("accuracy"), *[accuracy_text(by_seed, n_seeds) for by_seed in own]]]
        for source in run.groups:
            found = [change[(change.source_task == source) & (change.target_task == target)] for target in run.groups]
            rows.append(
                [Text(source), Text("change"), *[accuracy_text(some.points, n_seeds, show=signed) for some in found]]
            )
        caption = (
            "Change of test accuracy in points when the difference of one task's weights (row) between degrees "
            f"{train} and {infer} is added to another's model (column), trained at {train} and run at {infer}; mean ± "
            f"standard deviation over {n_seeds} seeds. none: test accuracy in % without it. {MISSING_CAPTION}"
        )
        title = f"Gap {train} → {infer} of one task, added to another ({where(backbone, compressor)})"
        header = ["gap of", "", *run.groups]
        tables.append(Table(title, caption, header, rows, _label(backbone, compressor, "transfer"), (1,)))
    return tables


def _gap_degrees(grid: Grid) -> tuple[str, str]:
    if len(grid.fixed_train_degrees) < 2:
        raise TocomError("the transfer of a gap needs two fixed train degrees; give them in train_degrees")
    return grid.fixed_train_degrees[0], grid.fixed_train_degrees[-1]


#: Kind of a study (key ``paper`` of its config) -> how its table is made.
FORMS: dict[str, Callable[[Run], list[Table]]] = {
    "degrees": _degrees,
    "backbones": partial(_models, first="backbone"),
    "compressors": partial(_models, first="compressor"),
    "speedup": _speedup,
    "ablation": _ablation,
    "transfer": _transfer,
}


def paper_table(
    kind: str,
    folder: Path,
    config: Mapping[str, Any],
    groups: Mapping[str, str],
    main: str | None = None,
    compensators: CompensatorFiles | None = None,
) -> list[Table]:
    """Return the tables of a study in the paper's form.

    Args:
        kind: one of :data:`FORMS`. folder: the study's results; it may be incomplete or missing.
        config: the study's config, as the mapping in its YAML file or as ``Study.model_dump()``.
        groups: task -> its group's name, in the order of the tables (``Study.groups``).
        main: the compensator that all forms but the ablation show; by default the first of the config.
        compensators: (backbone, compressor, compensator) -> its file, for the KL in the ablation.

    Raises:
        TocomError: there is no such kind or compensator, or the config lacks what the form needs.
    """
    if kind not in FORMS:
        raise TocomError(f"unknown kind of study {kind!r}{suggest(kind, FORMS)}; there are: {', '.join(FORMS)}")
    return FORMS[kind](Run.read(folder, config, groups, main, compensators))


def write_paper(
    kind: str,
    folder: Path,
    config: Mapping[str, Any],
    groups: Mapping[str, str],
    output: Path,
    main: str | None = None,
    compensators: CompensatorFiles | None = None,
) -> None:
    """Write :func:`paper_table` to ``output``/paper.md, .html and .tex."""
    write_pages(paper_table(kind, folder, config, groups, main, compensators), output / "paper")
