"""From the counts of every image to segmentation.csv and a table in the paper's form, its own figures beside ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from tocom.analysis.cells import KEYS
from tocom.analysis.published import read_published
from tocom.analysis.report import write_pages
from tocom.analysis.tables import METHOD, NOT_RUN, Table, Text, partly, signed
from tocom.errors import TocomError
from tocom.files import load_arrays
from tocom.segmentation.metrics import Counts, difference, estimate, pixel_accuracy
from tocom.settings import PLAIN, TOCOM

#: Columns of segmentation.csv. miou and its 95 % interval over images, and pixel_accuracy, are in percent; gflops: of
#: one image through the backbone.
COLUMNS = (*KEYS, "scale", "n", "miou", "miou_low", "miou_high", "pixel_accuracy", "gflops")
HEADER = (
    "train degree",
    "r",
    "GFLOPs",
    "mIoU",
    "mIoU + ToCom",
    "gain",
    "GFLOPs (published)",
    "mIoU (published)",
    "mIoU + ToCom (published)",
)
#: The group that the paper's figures go by, and the degree that its model was trained at.
_PUBLISHED, _PUBLISHED_AT = "ADE20k", 0
_NONE = Text("–")


@dataclass
class Condition:
    """One cell under every seed that was run: counts [images, classes] and GFLOPs."""

    gflops: float
    by_seed: dict[int, Counts] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """Counts [seeds, images, classes], seeds ascending."""
        runs = [self.by_seed[seed] for seed in sorted(self.by_seed)]
        return Counts(*(np.stack(parts) for parts in zip(*runs, strict=True)))


#: train degree, inference degree, compensator ("none" for the plain model)
Key = tuple[int, int, str]
#: (backbone, compressor) -> its conditions
Conditions = dict[tuple[str, str], dict[Key, Condition]]


def _read(path: str | os.PathLike) -> tuple[list[tuple[dict, Counts]], dict]:
    """Return the cells of a file that `tocom segment evaluate` wrote, each with its counts, and the metadata."""
    arrays, meta = load_arrays(path)
    if meta.get("kind") != "segmentation counts":
        raise TocomError(f"{path} holds no counts; give files that `tocom segment evaluate` wrote")
    return list(zip(meta["cells"], map(Counts, arrays["tp"], arrays["fp"], arrays["fn"]), strict=True)), meta


def gather(
    study: str, files: Sequence[tuple[str, os.PathLike]], resamples: int = 2000
) -> tuple[pd.DataFrame, Conditions]:
    """Read all cells of (backbone, file) pairs.

    Returns:
        A row for each cell with the columns :data:`COLUMNS`, and the counts behind the rows.

    Raises:
        TocomError: a file is missing, corrupt or something else.
    """
    rows, conditions = [], {}
    for backbone, path in files:
        cells, meta = _read(path)
        run = {"study": study, "backbone": backbone} | {
            key: meta[key] for key in ("compressor", "task", "seed", "train_degree")
        }
        found = conditions.setdefault((backbone, meta["compressor"]), {})
        for cell, counts in cells:
            key = (meta["train_degree"], cell["infer_degree"], cell["compensator"])
            found.setdefault(key, Condition(cell["gflops"])).by_seed[meta["seed"]] = counts
            one = estimate(Counts(*(part[None] for part in counts)), resamples)
            figures = {"n": len(counts.tp), "miou": one.value, "miou_low": one.low, "miou_high": one.high}
            rows.append(run | cell | figures | {"pixel_accuracy": pixel_accuracy(counts)})
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values(list(KEYS), ignore_index=True), conditions


def published(of: str, infer: int, compensated: bool | None = None) -> Text:
    """Return the paper's figure for a model trained at degree 0, or a dash if there is none."""
    wanted = (of, _PUBLISHED, _PUBLISHED_AT, infer, compensated)
    for figure in read_published():
        if (figure.of, figure.group, figure.train_degree, figure.infer_degree, figure.compensated) == wanted:
            return Text(figure.text())
    return _NONE


def published_degrees() -> list[int]:
    """Return the inference degrees that the paper gives figures for."""
    return sorted({f.infer_degree for f in read_published() if f.group == _PUBLISHED and f.of == "miou"})


def _miou_text(condition: Condition, resamples: int, planned: int, bold: bool = False) -> Text:
    """Return mIoU with its interval, and the number of seeds if not all that were planned were run."""
    figure, n_seeds = estimate(condition.counts, resamples), len(condition.by_seed)
    return Text(f"{figure.value:.1f} [{figure.low:.1f}, {figure.high:.1f}]{partly(n_seeds, planned)}", bold)


def _measured(
    found: dict[Key, Condition], train: int, infer: int, variant: str, resamples: int, planned: int
) -> list[Text]:
    """Return GFLOPs, mIoU without and with ToCom, and the gain."""
    plain, ours = found.get((train, infer, PLAIN)), found.get((train, infer, variant))
    if plain is None:
        return [Text(NOT_RUN)] * 4
    cost = Text(f"{plain.gflops:.4g}")
    if train == infer:  # the compensator is zero there
        return [cost, _miou_text(plain, resamples, planned), _NONE, _NONE]
    if ours is None:
        return [cost, _miou_text(plain, resamples, planned), Text(NOT_RUN), Text(NOT_RUN)]
    gain = difference(ours.counts, plain.counts, resamples)
    texts = [
        _miou_text(plain, resamples, planned, gain.value < 0),
        _miou_text(ours, resamples, planned, gain.value > 0),
    ]
    return [cost, *texts, Text(f"{signed(gain.value)} [{signed(gain.low)}, {signed(gain.high)}]")]


def degree_table(
    found: dict[Key, Condition],
    title: str,
    label: str,
    task: str,
    train_degrees: Sequence[int],
    infer_degrees: Sequence[int],
    variant: str = TOCOM,
    resamples: int = 2000,
    n_seeds: int | None = None,
) -> Table:
    """Return the paper's table for one backbone and compressor: degrees down, the published figures at the right.

    Args:
        found: the conditions that were run; others are shown as not run.
        task: the data set, for the caption. variant: the compensator to show.
        n_seeds: how many seeds were planned; by default the most that a condition has.
    """
    planned = most_seeds(found) if n_seeds is None else n_seeds
    rows, rules = [], []
    for train in train_degrees:
        if rows:
            rules.append(len(rows))
        theirs = published_degrees() if train == _PUBLISHED_AT else []
        for infer in sorted({*infer_degrees, *theirs}):
            paper = [published("gflops", infer), published("miou", infer, False), published("miou", infer, True)]
            rows.append(
                [
                    Text(str(train)),
                    Text(str(infer)),
                    *_measured(found, train, infer, variant, resamples, planned),
                    *(paper if infer in theirs else [_NONE] * 3),
                ]
            )
    caption = (
        f"mIoU in % on the test images of {task}, mean over {planned} seed(s); gain: points. In brackets 95 % "
        "bootstrap intervals over images and seeds, paired for the gain. Bold: the better of the pair. r: r/32 of the "
        "patches merge before each MLP and come back after it. GFLOPs: of one image through the backbone. Images are "
        "scaled and cut to the square input size. Published: the paper's own figures for ADE20k at 512 pixels "
        f"(arXiv 2408.06798), not made here{'' if task == 'ade20k' else ' and of other data than ours'}."
    )
    return Table(title, caption, HEADER, rows, label, tuple(rules))


def most_seeds(found: dict[Key, Condition]) -> int:
    """Return how many seeds the condition with the most of them has."""
    return max((len(condition.by_seed) for condition in found.values()), default=0)


def make_tables(
    conditions: Conditions,
    task: str,
    models: Sequence[tuple[str, str]],
    train_degrees: Sequence[int],
    infer_degrees: Sequence[int],
    variant: str = TOCOM,
    resamples: int = 2000,
    n_seeds: int | None = None,
) -> list[Table]:
    """Return a table for each (backbone, compressor) of ``models``; what was not run is shown so.

    Args:
        n_seeds: how many seeds were planned; by default the most that a condition of any model has.
    """
    tables, planned = [], max(map(most_seeds, conditions.values()), default=0) if n_seeds is None else n_seeds
    for backbone, compressor in models:
        title = f"Segmentation of {task} ({backbone}, {METHOD.get(compressor, compressor)})"
        label = f"{backbone}-{compressor}-segmentation"
        found = conditions.get((backbone, compressor), {})
        degrees = train_degrees, infer_degrees
        tables.append(degree_table(found, title, label, task, *degrees, variant, resamples, planned))
    return tables


def write_tables(tables: Sequence[Table], folder: str | os.PathLike) -> None:
    """Write tables as segmentation.md, .tex and .html."""
    write_pages(tables, Path(folder) / "segmentation")
