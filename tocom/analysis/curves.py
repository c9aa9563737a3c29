"""The curves of trainings: where a study's fine-tunings and learned parts keep theirs, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd

from tocom.analysis.cells import checked
from tocom.analysis.run import Run
from tocom.errors import TocomError
from tocom.files import read_rows
from tocom.made import check
from tocom.methods import ROLES

#: Columns of such a file, a row an epoch: loss of the training, held_out: what the best epoch is chosen by.
COLUMNS = ("epoch", "loss", "held_out")


@dataclass(frozen=True)
class Curve:
    """One training of a study.

    Attributes:
        file: a CSV with :data:`COLUMNS` and more.
        task: that it was fine-tuned on; None: it is a part that was learned.
        method: under whose name its checkpoints are kept, or for which the part was learned first.
        train: the label of the train degree; of a part, "".
        seed: with which it was done.
        without: of a part, the held-out loss without it, where that is known.
    """

    file: Path
    task: str | None
    method: str
    train: str = ""
    seed: int = 0
    without: float | None = None

    def read(self) -> pd.DataFrame:
        """Return its columns by epoch."""
        check(self.file)
        return checked(read_rows(self.file), COLUMNS, self.file).set_index("epoch")


def curves(run: Run, backbone: str) -> list[Curve]:
    """Return every training of a backbone whose curve is there, fine-tunings first; no file appears twice."""
    there = (curve for curve in (*_tuned(run, backbone), *_learned(run, backbone)) if curve.file.is_file())
    return list({curve.file: curve for curve in reversed([*there])}.values())[::-1]


def unit_of(run: Run) -> int:
    """Return what turns the held-out scores of fine-tunings into percent: accuracy is kept as a share, mIoU is not."""
    return 100 if run.study.metric == "accuracy" else 1


def kept(run: Run) -> pd.DataFrame:
    """Return the validation score in percent of the epoch that every fine-tuning of a study kept, and the last one."""
    unit = unit_of(run)
    rows = [
        (backbone, curve.method, curve.train, curve.task, curve.seed, unit * frame.held_out.max(), frame.index.max())
        for backbone in run.backbones
        for curve in _tuned(run, backbone)
        if curve.file.is_file()
        for frame in [curve.read()]
    ]
    return pd.DataFrame(rows, columns=["backbone", "method", "train_degree", "task", "seed", "score", "epochs"])


def convergence(run: Run, longer: Run) -> pd.DataFrame:
    """Return by how much longer trainings move the mean validation score of every method and train degree.

    Args:
        run, longer: two studies that differ in their epochs of fine-tuning; the trainings that both have count.

    Returns:
        backbone, method, train_degree, trainings, epochs, epochs_longer, score, score_longer, change (points).

    Raises:
        TocomError: they have no training in common.
    """
    keys = ["backbone", "method", "train_degree", "task", "seed"]
    both = kept(run).merge(kept(longer), on=keys, suffixes=("", "_longer"))
    if both.empty:
        raise TocomError(
            f"{run.folder} and {longer.folder} have no training in common; run both (snakemake --until finetune)"
        )
    columns = ["epochs", "epochs_longer", "score", "score_longer"]
    groups = both.groupby(keys[:3], sort=False)
    means = groups[columns].mean().assign(trainings=groups.size()).reset_index()
    means["change"] = means.score_longer - means.score
    return means[[*keys[:3], "trainings", *columns, "change"]]


def _tuned(run: Run, backbone: str) -> Iterator[Curve]:
    for tuned, task in product(run.study.tuned, run.study.task_names):
        for checkpoint, file in run.model_files("checkpoints", backbone, tuned, task):
            yield Curve(file.with_suffix(".csv"), task, tuned, checkpoint.train_degree, checkpoint.seed)


def _learned(run: Run, backbone: str) -> Iterator[Curve]:
    pairs = [(method, seed) for method in run.study.methods for seed in run.study.seeds_of(method)]
    for (method, seed), role in product(pairs, ROLES):
        file = run.learned_file(backbone, method, seed, role)
        if file is not None:
            without = run.learned(backbone, method, seed, role).get("held_out_kl_without")
            yield Curve(file.with_suffix(".csv"), None, method, seed=seed, without=without)
