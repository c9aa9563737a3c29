"""What language models' scores mean: perplexity against bytes of cache, a table a compressor and group of tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tocom.analysis.planned import Scope, is_compensated, train_degrees
from tocom.analysis.run import Run
from tocom.analysis.scores import BitsSaved, bits_per_byte
from tocom.analysis.tables import NOT_PLANNED, NOT_RUN, Table, Text, averages, cost_text
from tocom.errors import TocomError
from tocom.files import load_metadata


def perplexity_tables(run: Run, scopes: Sequence[Scope]) -> list[Table]:
    """Return the tables of a study of language models; none of any other."""
    if run.study.metric != BitsSaved.name:
        return []
    by_compressor: dict[str, list[str]] = {}
    for method, entry in run.study.methods.items():
        by_compressor.setdefault(entry.compressor.name, []).append(method)
    return [
        _table(run, backbone, scope, methods)
        for backbone in run.backbones
        for scope in scopes
        for methods in by_compressor.values()
    ]


def _table(run: Run, backbone: str, scope: Scope, methods: Sequence[str]) -> Table:
    """Return methods and train degrees down, inference degrees with their bytes across."""
    degrees = sorted({degree for method in methods for degree in run.study.infer_degrees_of(method)})
    rows, rules = [], []
    for method in methods:
        # A compensated method goes with the plain one that it starts from.
        rules += [] if is_compensated(run.study, method) else [len(rows)]
        for train in train_degrees(run.study, method) or run.study.train_degrees_of(method):
            cells = [_cell(run, backbone, method, scope, train, degree) for degree in degrees]
            rows.append([Text(run.title(method)), Text(train), *cells])
    header = ["method", "train degree", *(_heading(run, backbone, scope, methods, degree) for degree in degrees)]
    caption = (
        f"Perplexity of a byte, and in brackets bits a byte: {averages(run, scope)}; the perplexity is"
        " 2 to the mean of the bits. Columns: inference degree, bytes of keys and values that are kept at most while a"
        f" full context is read, and their share of all. {_texts(run, scope)}"
    )
    name = run.study.methods[methods[0]].compressor
    title = f"Perplexity against bytes of cache, {name.part.title}: {scope.name} ({backbone})"
    return Table(title, caption, header, rows, f"{backbone}-{scope.name}-{name.name}-perplexity", tuple(rules[1:]))


def _heading(run: Run, backbone: str, scope: Scope, methods: Sequence[str], degree: int) -> str:
    costs = {cost_text(run.cost(backbone, method, scope, degree)) for method in methods} - {"nan"}
    if len(costs) != 1:
        return str(degree)
    share = next(share for m in methods if not np.isnan(share := run.share(backbone, m, scope, degree)))
    return f"{degree}: {costs.pop()} ({share:.0f} %)"


def _cell(run: Run, backbone: str, method: str, scope: Scope, train: str, degree: int) -> Text:
    if degree not in run.study.infer_degrees_of(method):
        return Text(NOT_PLANNED)
    saved = run.score(backbone, method, scope, train, degree)
    return Text(NOT_RUN) if saved.empty else Text(perplexity_text(saved))


def perplexity_text(saved: pd.Series) -> str:
    """Return the perplexity and the bits of a byte, with their deviation over seeds, of scores in percent by seed."""
    bits = pd.Series(bits_per_byte(saved))
    deviation = f" ± {bits.std():.3f}" if len(bits) > 1 else ""
    return f"{2 ** bits.mean():.3f} ({bits.mean():.3f}{deviation})"


def _texts(run: Run, scope: Scope) -> str:
    """Return what the texts of a scope are, with their hashes, where they were prepared."""
    found = []
    for task in scope.tasks:
        try:
            found.append(f"{task}: {load_metadata(run.folder / 'data' / f'{task}.safetensors')['source']}.")
        except TocomError:
            continue
    return " ".join(found)
