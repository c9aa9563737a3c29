"""The cells that a study stands for: what its config asks for, or what its table of cells has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pandas as pd

from tocom.errors import TocomError
from tocom.settings import PLAIN, RANDOM, TOCOM


@dataclass(frozen=True)
class Grid:
    """What is crossed with what.

    Attributes:
        train_degrees: as text, since one of them may be "random".
        compensators: variant -> what it changes; the first is the one of main tables.
        timm: backbone -> timm's name of it, of those that the config takes from timm.
    """

    backbones: tuple[str, ...]
    compressors: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    train_degrees: tuple[str, ...]
    infer_degrees: tuple[int, ...]
    compensators: dict[str, dict[str, Any]]
    timm: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Grid:
        """Return the grid of a study's config: the mapping in its YAML file, or a study's ``model_dump()``.

        What is segmented counts as a task.

        Raises:
            TocomError: a part of the grid is missing.
        """
        try:
            return cls(
                backbones=_names(config["backbones"]),
                compressors=_names(config.get("compressors", ("tome",))),
                tasks=_tasks(config),
                seeds=tuple(config.get("seeds", (0, 1, 2))),
                train_degrees=tuple(str(degree) for degree in config["train_degrees"]),
                infer_degrees=tuple(config["infer_degrees"]),
                compensators={name: dict(changes or {}) for name, changes in _variants(config).items()},
                timm={
                    entry["name"]: entry["timm"]
                    for entry in config["backbones"]
                    if isinstance(entry, Mapping) and entry.get("timm")
                },
            )
        except KeyError as error:
            raise TocomError(f"the config of a study lacks the key {error.args[0]!r}; see config/demo.yaml") from None

    @classmethod
    def of_cells(cls, cells: pd.DataFrame) -> Grid:
        """Return the smallest grid that holds every cell of a table."""
        distinct = {name: tuple(cells[name].unique().tolist()) for name in cells.columns}
        return cls(
            backbones=distinct["backbone"],
            compressors=distinct["compressor"],
            tasks=distinct["task"],
            seeds=tuple(sorted(distinct["seed"])),
            train_degrees=distinct["train_degree"],
            infer_degrees=tuple(sorted(distinct["infer_degree"])),
            compensators={name: {} for name in distinct["compensator"] if name != PLAIN},
        )

    @property
    def fixed_train_degrees(self) -> tuple[str, ...]:
        """Train degrees in ascending order, less the rival that draws them at random."""
        return tuple(sorted((degree for degree in self.train_degrees if degree != RANDOM), key=int))

    @property
    def models(self) -> tuple[tuple[str, str], ...]:
        """Every backbone with every compressor."""
        return tuple(product(self.backbones, self.compressors))

    @property
    def main(self) -> str:
        """The compensator of main tables; "none" where there is none."""
        return next(iter(self.compensators), PLAIN)

    @property
    def mismatches(self) -> tuple[tuple[str, int], ...]:
        """Every (train degree, inference degree) at which a compensator has a gap to close."""
        pairs = product(self.fixed_train_degrees, sorted(self.infer_degrees))
        return tuple((train, infer) for train, infer in pairs if train != str(infer))

    def cells(self) -> pd.DataFrame:
        """Return a row for every planned cell: the key columns of cells.csv, less study and compensated."""
        rows = [
            (backbone, compressor, task, seed, train, infer, compensator)
            for backbone, compressor, task, seed, train, infer in product(
                self.backbones, self.compressors, self.tasks, self.seeds, self.train_degrees, self.infer_degrees
            )
            for compensator in (PLAIN, *(self.compensators if train != RANDOM else ()))
        ]
        names = ("backbone", "compressor", "task", "seed", "train_degree", "infer_degree", "compensator")
        return pd.DataFrame(rows, columns=names)

    def progress(self, cells: pd.DataFrame) -> tuple[int, int]:
        """Return how many planned cells a table of cells has, and how many there are."""
        planned = self.cells()
        keys = list(planned.columns)
        there = planned.merge(cells[keys].drop_duplicates(), on=keys) if len(cells) else planned.iloc[:0]
        return len(there), len(planned)


def _names(entries) -> tuple[str, ...]:
    return tuple(entry["name"] if isinstance(entry, Mapping) else entry for entry in entries)


def _tasks(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("segmentation") is None:
        return _names(config["tasks"])
    from tocom.segmentation.settings import SegmentationSettings

    return (SegmentationSettings.model_validate(config["segmentation"]).name,)


def _variants(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("compensators") or {TOCOM: {}}
