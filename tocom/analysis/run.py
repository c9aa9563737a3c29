"""A study as it was planned, and what of it is there: the common ground of all tables in the paper's form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tocom.analysis.cells import COLUMNS, main_compensator, only, read_cells
from tocom.analysis.grid import Grid
from tocom.analysis.published import Published, largest_gain
from tocom.analysis.report import read_or_empty
from tocom.analysis.significance import Scope, group_scopes
from tocom.analysis.tables import Pair, Results
from tocom.settings import NO_GAP

_SIGNIFICANCE = (
    *("backbone", "compressor", "comparison", "compensator", "scope", "group", "train_degree", "infer_degree"),
    *("gain", "low", "high", "p_images_holm"),
)
_THROUGHPUT = ("backbone", "compressor", "infer_degree", "compensated")
_TRANSFER = ("backbone", "compressor", "source_task", "target_task", "seed", "accuracy")
#: Backbone, compressor, compensator -> its file.
CompensatorFiles = Mapping[tuple[str, str, str], str | os.PathLike]


@dataclass(frozen=True)
class Run:
    """A study: what was planned, and what of it is there.

    Attributes:
        grid: the planned cells. groups: task -> its group's name, in the order of the tables.
        cells, significance, throughput, transfer: the tidy tables; empty where the study was not run.
        main: the compensator that all tables but the ablation show.
        compensators: files whose metadata tell the held-out KL; may be empty.
    """

    grid: Grid
    groups: dict[str, str]
    cells: pd.DataFrame
    significance: pd.DataFrame
    throughput: pd.DataFrame
    transfer: pd.DataFrame
    main: str
    compensators: CompensatorFiles = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        groups: Mapping[str, str],
        main: str | None = None,
        compensators: CompensatorFiles | None = None,
    ) -> Run:
        """Read a study's folder, which may be incomplete or missing, against its config.

        Args:
            config: see :meth:`Grid.of_config`. groups: :attr:`tocom.config.Study.groups`.
            main: the main compensator; by default the first of the config.
            compensators: (backbone, compressor, compensator) -> its file.

        Raises:
            TocomError: the config lacks a part of the grid, a table is not what this version writes, or there is no
                compensator ``main``.
        """
        grid = Grid.of_config(config)
        cells = read_cells(folder / "cells.csv") if (folder / "cells.csv").is_file() else pd.DataFrame(columns=COLUMNS)
        return cls(
            grid,
            dict(groups),
            cells,
            read_or_empty(folder, "significance", _SIGNIFICANCE),
            read_or_empty(folder, "throughput", _THROUGHPUT),
            read_or_empty(folder, "transfer", _TRANSFER),
            main_compensator(grid.cells(), main),
            compensators or {},
        )

    @property
    def scopes(self) -> list[Scope]:
        """The groups of tasks; the last one is the widest."""
        return group_scopes(self.groups)

    def of(self, backbone: str, compressor: str, compensator: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the cells and tests of one model with one compensator, by default the main one."""
        return tuple(
            only(frame[(frame.backbone == backbone) & (frame.compressor == compressor)], compensator or self.main)
            for frame in (self.cells, self.significance)
        )

    def published(self, scope: Scope, backbone: str, compressor: str) -> Published | None:
        """Return the published largest gain that may stand beside a model's, or None if there is none."""
        return largest_gain(scope.name, len(scope.tasks), compressor, self.grid.timm.get(backbone))


def largest(run: Run, backbone: str, compressor: str, scope: Scope, infer: int | None = None) -> Pair | None:
    """Return the pair of degrees at which the main compensator gains most, or None if no pair was run and tested.

    Args:
        infer: only pairs that run at this degree.
    """
    results = Results.of(*run.of(backbone, compressor), scope)
    wanted = [degrees for degrees in run.grid.mismatches if infer in (None, degrees[1])]
    pairs = [results.pair(*degrees) for degrees in wanted]
    tested = [found for found in pairs if found.is_run and found.test is not None]
    return max(tested, key=lambda found: found.test.gain, default=None)


def best_mean(run: Run, backbone: str, compressor: str, scope: Scope) -> tuple[str, pd.Series] | None:
    """Return the train degree with the largest mean gain over the inference degrees other than itself, and that gain.

    A train degree counts if all its planned pairs were run under a common seed.

    Returns:
        The train degree and its mean gain in points by seed, or None if no train degree counts.
    """
    results = Results.of(*run.of(backbone, compressor), scope)
    means = {}
    for train in run.grid.fixed_train_degrees:
        pairs = [results.pair(*degrees) for degrees in run.grid.mismatches if degrees[0] == train]
        if pairs:
            by_seed = pd.concat([found.ours - found.plain for found in pairs], axis=1).dropna().mean(axis=1)
            means |= {} if by_seed.empty else {train: by_seed}
    return max(means.items(), key=lambda found: found[1].mean(), default=None)


def transfer_without(run: Run, backbone: str, compressor: str) -> pd.DataFrame:
    """Return target_task, seed and the accuracy (a share) with no gap added; planned ones only."""
    mine = _transfer_of(run, backbone, compressor)
    return mine[mine.source_task == NO_GAP][["target_task", "seed", "accuracy"]].astype({"accuracy": float})


def transfer_change(run: Run, backbone: str, compressor: str) -> pd.DataFrame:
    """Return source_task, target_task, seed and the change in points over adding no gap; planned pairs only."""
    mine, without = _transfer_of(run, backbone, compressor), transfer_without(run, backbone, compressor)
    gaps = mine[mine.source_task.isin(run.grid.tasks)]
    both = gaps.merge(without, on=["target_task", "seed"], suffixes=("", "_without"))
    both["points"] = 100 * (both.accuracy - both.accuracy_without).astype(float)
    return both[["source_task", "target_task", "seed", "points"]]


def _transfer_of(run: Run, backbone: str, compressor: str) -> pd.DataFrame:
    frame = run.transfer
    return frame[
        (frame.backbone == backbone)
        & (frame.compressor == compressor)
        & frame.target_task.isin(run.grid.tasks)
        & frame.seed.isin(run.grid.seeds)
    ]
