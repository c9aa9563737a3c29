"""A study as it was planned, and what of it is there: the common ground of all tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tocom.analysis import compare
from tocom.analysis.cells import COLUMNS, KEYS, TEXT, checked, read_cells
from tocom.analysis.planned import (
    Endpoint,
    Point,
    Scope,
    cells,
    endpoint,
    families,
    group_scopes,
    is_compensated,
    points,
    train_degrees,
)
from tocom.analysis.published import Published, read_published
from tocom.files import load_metadata, read_rows
from tocom.made import check, check_together
from tocom.settings import GFLOPS, PLAIN

if TYPE_CHECKING:
    from tocom.study import Checkpoint

_THROUGHPUT = ("backbone", "method", "infer_degree", "compensated", "ratio")
_COSTS = (
    *("study", "backbone", "method", "what", "made_for", "task", "train_degree", "seeds"),
    *("images", "labels", "steps", "minutes", "bytes"),
)
#: What of it may not be known.
_UNKNOWN = ("images", "labels", "steps")
_TRANSFER = ("backbone", "method", "source_task", "target_task", "seed", "train_degree", "infer_degree", "accuracy")
#: Columns of numbers that tables and figures need.
_NUMBERS = (
    "score",
    "score_before",
    "score_after",
    "score_matched",
    "gain",
    "loss",
    "cost",
    "low",
    "high",
    "p",
    "ratio",
)
#: Two methods that are compared: before and after.
Compared = tuple[str, str]


@dataclass(frozen=True)
class Pair:
    """Two methods under one pair of degrees.

    Attributes:
        before, after: score in percent by seed; empty where it was not run.
        test: the row of significance.csv that compares them, or None if there is none.
        declined: whether both are the same, because no seed and task had a use for what is added to the models.
    """

    train: str
    infer: int
    before: pd.Series
    after: pd.Series
    test: pd.Series | None
    declined: bool = False

    @property
    def is_run(self) -> bool:
        """Whether both were evaluated for a common seed."""
        return not self.before.index.intersection(self.after.index).empty

    @property
    def degrees(self) -> str:
        """From which degree to which, as text."""
        return f"{self.train} → {self.infer}"

    @property
    def gain(self) -> float:
        """The gain in points: that which was tested, if it was."""
        return float((self.after - self.before).mean()) if self.test is None else self.test.gain


@dataclass(frozen=True, eq=False)
class Run:
    """A study, its folder, and its tidy tables; these are empty where it was not run."""

    study: object
    folder: Path
    _found: dict[tuple, dict[tuple, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read the folder of a study, which may be incomplete, against the declaration in its study.json."""
        from tocom.study import read_study

        return cls(read_study(folder / "study.json"), folder)

    @classmethod
    def find(cls, path: Path) -> Run:
        """Read the folder of a study, or what is there of the one that a config declares."""
        from tocom.study import read_study

        if path.is_dir():
            return cls.read(path)
        study = read_study(path)
        return cls(study, study.root)

    # Each is read when it is first asked for: a job does not fail for a table that another is about to replace.

    @cached_property
    def cells(self) -> pd.DataFrame:
        """Every cell that was run."""
        path = self.folder / "cells.csv"
        return read_cells(path) if path.is_file() else pd.DataFrame(columns=COLUMNS)

    @cached_property
    def significance(self) -> pd.DataFrame:
        """The declared comparisons."""
        return _read(self.folder / "significance.csv", compare.COLUMNS)

    @cached_property
    def harm(self) -> pd.DataFrame:
        """What compensators cost where a mismatch costs little."""
        return _read(self.folder / "harm.csv", compare.HARM_COLUMNS)

    @cached_property
    def mismatch(self) -> pd.DataFrame:
        """What mismatches cost."""
        return _read(self.folder / "mismatch.csv", compare.MISMATCH_COLUMNS)

    @cached_property
    def pairwise(self) -> pd.DataFrame:
        """Every two methods at the degrees of the endpoint."""
        return _read(self.folder / "pairwise.csv", compare.PAIRWISE_COLUMNS)

    @cached_property
    def throughput(self) -> pd.DataFrame:
        """Images a second."""
        return _read(self.folder / "throughput.csv", _THROUGHPUT)

    @cached_property
    def transfer(self) -> pd.DataFrame:
        """What the gaps of tasks do to other tasks."""
        return _read(self.folder / "transfer.csv", _TRANSFER, keep_default_na=False)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """What every training takes."""
        unknown = dict.fromkeys(_UNKNOWN, "")
        return _read(self.folder / "costs.csv", _COSTS, keep_default_na=False, na_values=unknown)

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones."""
        return tuple(backbone.name for backbone in self.study.backbones)

    @property
    def scopes(self) -> list[Scope]:
        """The groups of tasks; the last one is the widest."""
        return group_scopes(self.study.groups)

    @property
    def infer_degrees(self) -> list[int]:
        """Every inference degree of any method, ascending."""
        return sorted({degree for method in self.study.methods for degree in self.study.infer_degrees_of(method)})

    def title(self, method: str) -> str:
        """Return what tables call a method; with its name where methods of the study share a title."""
        titles = [entry.title for entry in self.study.methods.values()]
        title = self.study.methods[method].title
        return title if titles.count(title) == 1 else f"{title} ({method})"

    def by_degree(self) -> list[tuple[str, ...]]:
        """Return the families of methods that train at fixed degrees."""
        return [family for family in families(self.study) if train_degrees(self.study, family[0])]

    def with_compensators(self) -> list[tuple[str, list[str]]]:
        """Return every plain method that trains at fixed degrees and its compensated ones, if it has any."""
        found = [(first, [m for m in others if is_compensated(self.study, m)]) for first, *others in self.by_degree()]
        return [(plain, ours) for plain, ours in found if ours]

    def score(self, backbone: str, method: str, scope: Scope, train: str, infer: int) -> pd.Series:
        """Return the score in percent by seed, averaged over a scope's tasks; a seed that lacks one is left out."""
        if ("scores", scope) not in self._found:
            keys = [key for key in KEYS if key != "task"]
            by_task = self._of(scope).pivot(index=keys, columns="task", values="score")
            mean = 100 * by_task.reindex(columns=list(scope.tasks)).astype(float).dropna().mean(axis=1)
            levels = [key for key in keys if key != "seed"]
            found = {key: by_seed.droplevel(levels) for key, by_seed in mean.groupby(level=levels)}
            self._found["scores", scope] = found
        return self._found["scores", scope].get((backbone, method, train, infer), pd.Series(dtype=float))

    @property
    def cost_unit(self) -> str:
        """What a method's cost is in: bytes of cache where cells tell them, else GFLOPs of one image."""
        return "bytes of cache" if "cache_bytes" in self.cells.columns else GFLOPS

    def cost(self, backbone: str, method: str, scope: Scope, infer: int) -> float:
        """Return the cost of one image, or context, in :attr:`cost_unit`; NaN where that was not run."""
        if ("cost", scope) not in self._found:
            column = "cache_bytes" if "cache_bytes" in self.cells.columns else "gflops"
            costs = self._of(scope).astype({column: float}).groupby(["backbone", "method", "infer_degree"])[column]
            self._found["cost", scope] = costs.mean().to_dict()
        return self._found["cost", scope].get((backbone, method, infer), float("nan"))

    def share(self, backbone: str, method: str, scope: Scope, infer: int) -> float:
        """Return the cost in percent of the uncompressed model's, NaN where either is not known."""
        return 100 * self.cost(backbone, method, scope, infer) / self.uncompressed(backbone, scope)

    def uncompressed(self, backbone: str, scope: Scope) -> float:
        """Return the cost at degree 0, NaN where no method was run there."""
        costs = [self.cost(backbone, method, scope, 0) for method in self.study.methods]
        return next((cost for cost in costs if cost > 0), float("nan"))

    def is_declined(self, backbone: str, compared: Compared, scope: Scope, point: Point) -> bool:
        """Return whether two methods are the same models, to which the scale 0 adds nothing under any seed and task."""
        if len(set(map(self.study.tuned_as, compared))) > 1:
            return False
        if ("scales", scope) not in self._found:
            sizes = self._of(scope).astype({"scale": float}).assign(scale=lambda frame: frame.scale.abs())
            largest = sizes.groupby(["backbone", "method", "train_degree", "infer_degree"]).scale.max()
            self._found["scales", scope] = largest.to_dict()
        trains = zip(compared, (point.before, point.after), strict=True)
        keys = [(backbone, m, train, point.infer) for m, train in trains if is_compensated(self.study, m)]
        return bool(keys) and all(self._found["scales", scope].get(key) == 0 for key in keys)

    def model_files(self, stage: str, backbone: str, method: str, task: str) -> Iterator[tuple[Checkpoint, Path]]:
        """Yield the planned checkpoints of a method on a task, with the files that are, or would be, theirs.

        Args:
            stage: the folder: "checkpoints", by the name that they are kept under; "adapted", what is adapted to them.
        """
        root = self.folder / stage / backbone / method / task
        for batch, checkpoints in self.study.batches(self.study.tuned_as(method)).items():
            for checkpoint in checkpoints:
                yield checkpoint, root / batch / checkpoint.file

    def learned_file(self, backbone: str, method: str, seed: int, role: str = "compensator") -> Path | None:
        """Return the file of what a method learned with a seed, in the study's folder wherever that is, or None."""
        file = self.study.learned_file(backbone, method, seed, role)
        within = file is not None and file.is_relative_to(self.study.root)
        return self.folder / file.relative_to(self.study.root) if within else file

    def learned(self, backbone: str, method: str, seed: int, role: str = "compensator") -> dict[str, Any]:
        """Return what stands beside what a method learned with a seed; nothing where there is none, or not yet."""
        file = self.learned_file(backbone, method, seed, role)
        if file not in self._found:
            self._found[file] = load_metadata(file) if file is not None and file.is_file() else {}
        return self._found[file]

    def _of(self, scope: Scope) -> pd.DataFrame:
        return self.cells[self.cells.task.isin(scope.tasks)]

    def pairs(self, backbone: str, compared: Compared, scope: Scope) -> dict[tuple[str, int], Pair]:
        """Return what was measured of two methods, by train and inference degree, wherever they are to be compared."""
        if (compared, scope, backbone) not in self._found:
            self._found[compared, scope, backbone] = self._pairs(backbone, *compared, scope)
        return self._found[compared, scope, backbone]

    def _pairs(self, backbone: str, before: str, after: str, scope: Scope) -> dict[tuple[str, int], Pair]:
        frame = self.significance
        same = (frame.backbone == backbone) & (frame.before == before) & (frame.after == after)
        mine = frame[same & (frame.scope == scope.name) & (frame.group == scope.is_group)]
        tests = {(row.train_degree, row.infer_degree): row for _, row in mine.iterrows()}
        return {
            (p.train, p.infer): Pair(
                p.train,
                p.infer,
                self.score(backbone, before, scope, p.before, p.infer),
                self.score(backbone, after, scope, p.after, p.infer),
                tests.get((p.train, p.infer)),
                self.is_declined(backbone, (before, after), scope, p),
            )
            for p in points(self.study, before, after)
        }

    def corrected(
        self, backbones: Iterable[str], scopes: Iterable[Scope], compared: Iterable[Compared] | None = None
    ) -> pd.Series:
        """Return the p-values of the comparisons that are shown together, by their row in significance.csv.

        See :func:`tocom.analysis.compare.corrected`.

        Args:
            compared: pairs of methods; None: all that are declared.
        """
        wanted = self.study.compare if compared is None else compared
        rows = [
            pair.test.name
            for backbone, scope, methods in product(backbones, scopes, wanted)
            for pair in self.pairs(backbone, methods, scope).values()
            if pair.test is not None
        ]
        return compare.corrected(self.significance.loc[rows])

    def progress(self, tasks: Sequence[str] | None = None) -> tuple[int, int]:
        """Return how many planned cells of some tasks there are, and how many are planned."""
        planned = cells(self.study, tasks)
        return len(planned & set(self.cells[list(KEYS)].itertuples(index=False, name=None))), len(planned)

    def published(self, of: str, scope: Scope, backbone: str, method: str) -> list[Published]:
        """Return the published figures that may stand beside those of a method."""
        timm = next(entry.timm for entry in self.study.backbones if entry.name == backbone)
        method = self.study.methods[method]
        parts = method.compressor.name, method.compensator.name if method.compensator else None
        figures = [figure for figure in read_published() if figure.of == of]
        return [figure for figure in figures if figure.is_of(scope, timm, *parts)]


def sources(folder: Path, *further: str) -> list[Path]:
    """Return the declaration of a study and those of its tidy tables that are there, which figures are made of.

    Args:
        further: names of others that are to be among them.

    Raises:
        TocomError: one is not what its job left, or they were not made from the same inputs.
    """
    names = ("cells", "significance", "harm", "mismatch", "pairwise", "throughput", "transfer", *further)
    found = [path for path in (folder / "study.json", *(folder / f"{name}.csv" for name in names)) if path.is_file()]
    check_together(found)
    return found


def _read(path: Path, columns: Sequence[str], **options) -> pd.DataFrame:
    """Return a tidy table, or an empty one with these columns if the file is missing."""
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    check(path)
    numbers = [name for name in columns if name in _NUMBERS]
    return checked(read_rows(path, numbers, dtype=TEXT, **options), columns, path)


def primary(run: Run, backbone: str | None = None) -> tuple[Endpoint, Pair] | None:
    """Return the comparison that the study is made for, and what was measured of it; None if that was not run.

    Args:
        backbone: to see the same of another backbone.
    """
    end = endpoint(run.study)
    pairs = run.pairs(backbone or end.backbone, (end.before, end.after), end.scope) if end else {}
    pair = pairs.get((end.point.train, end.point.infer)) if end else None
    return (end, pair) if pair and pair.is_run and pair.test is not None else None


def largest(run: Run, backbone: str, compared: Compared, scope: Scope, infer: int | None = None) -> Pair | None:
    """Return the pair of degrees at which two methods differ most, or None if no pair was run and tested.

    Args:
        infer: only pairs that run at this degree.
    """
    pairs = [pair for pair in run.pairs(backbone, compared, scope).values() if infer in (None, pair.infer)]
    tested = [pair for pair in pairs if pair.is_run and pair.test is not None]
    return max(tested, key=lambda pair: pair.test.gain, default=None)


def best_mean(run: Run, backbone: str, compared: Compared, scope: Scope) -> tuple[str, pd.Series] | None:
    """Return the train degree with the largest mean gain over inference degrees other than itself, and that gain.

    A train degree counts if all its planned pairs were run under a common seed.

    Returns:
        The train degree and its mean gain in points by seed, or None if no train degree counts.
    """
    pairs = [pair for pair in run.pairs(backbone, compared, scope).values() if pair.train != str(pair.infer)]
    means = {}
    for train in dict.fromkeys(pair.train for pair in pairs):
        gains = [pair.after - pair.before for pair in pairs if pair.train == train]
        by_seed = pd.concat(gains, axis=1).dropna().mean(axis=1)
        means |= {} if by_seed.empty else {train: by_seed}
    return max(means.items(), key=lambda found: found[1].mean(), default=None)


def published_gain(run: Run, scope: Scope, backbone: str, compared: Compared) -> str | None:
    """Return the largest gain that the paper gives for two methods, or that its scores of both imply, as text."""
    before, after = compared
    given = run.published("largest gain", scope, backbone, after)
    first, second = (
        {
            (figure.train_degree, figure.infer_degree): figure.value
            for figure in run.published("miou", scope, backbone, m)
        }
        for m in (before, after)
    )
    gains = {key: second[key] - first[key] for key in second if key in first}
    if given or not gains:
        return given[0].text() if given else None
    train, infer = max(gains, key=gains.get)
    return f"{gains[train, infer]:+.1f} ({train} → {infer})"


def transfer_methods(study) -> list[str]:
    """Return the methods whose gap between the lowest and the highest train degree can be carried between tasks."""
    return [tuned for tuned in study.tuned if study.gap_degrees(tuned)]


def transferred(run: Run, backbone: str, method: str) -> pd.DataFrame:
    """Return source_task, target_task, seed, accuracy (%) and the change in points over adding no gap; planned ones."""
    frame, study = run.transfer, run.study
    planned = frame.source_task.isin([PLAIN, *study.task_names]) & frame.target_task.isin(study.task_names)
    planned &= frame.seed.isin(study.seeds_of(method)) & (frame.backbone == backbone) & (frame.method == method)
    mine = frame[planned].drop_duplicates(["source_task", "target_task", "seed"])
    mine = mine.assign(accuracy=100 * mine.accuracy.astype(float))
    without = mine[mine.source_task == PLAIN].set_index(["target_task", "seed"]).accuracy
    own = without.reindex(pd.MultiIndex.from_frame(mine[["target_task", "seed"]])).to_numpy(dtype=float)
    return mine.assign(change=np.where(mine.source_task == PLAIN, np.nan, mine.accuracy - own))
