"""From predictions to one tidy table of cells, which all tables, figures and tests start from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tocom.errors import TocomError, suggest
from tocom.files import load_arrays, write_text
from tocom.settings import PLAIN, TOCOM

#: Columns of cells.csv. compensator: "none", or the name of the variant that was offered; scale: the factor chosen
#: for it (0: declined); gflops: of one image.
COLUMNS = (
    "study",
    "backbone",
    "compressor",
    "task",
    "seed",
    "train_degree",
    "infer_degree",
    "compensated",
    "compensator",
    "scale",
    "n",
    "correct",
    "accuracy",
    "gflops",
)
KEYS = COLUMNS[:9]
#: Columns that stay text even where they look like numbers.
TEXT = dict.fromkeys(("study", "backbone", "compressor", "task", "train_degree", "compensator"), str)


def prediction_file(root: os.PathLike, backbone: str, compressor: str, task: str, train_degree, seed: int) -> Path:
    """Return where the workflow keeps the predictions of a checkpoint."""
    return Path(root) / backbone / compressor / task / f"train-{train_degree}_seed-{seed}.safetensors"


def prediction_files(root: os.PathLike, cells: pd.DataFrame) -> list[tuple[str, Path]]:
    """Return the (backbone, predictions file) pairs behind a table of cells."""
    grid = cells[["backbone", "compressor", "task", "train_degree", "seed"]].drop_duplicates()
    return [(point[0], prediction_file(root, *point)) for point in grid.itertuples(index=False)]


def compensator_of(cell: dict) -> str:
    """Return the compensator of a cell as predictions files describe it; old ones know of one variant only."""
    return cell.get("compensator", TOCOM if cell["compensated"] else PLAIN)


def gather(study: str, files: Sequence[tuple[str, os.PathLike]]) -> list[dict]:
    """Return a row for each cell of the given (backbone, predictions file) pairs, sorted by the key columns.

    Variants of the compensator keep the order in which they were evaluated: the first is the main one.
    """
    rows = []
    for backbone, path in files:
        arrays, meta = load_arrays(path)
        if "cells" not in meta:
            raise TocomError(f"{path} holds no predictions; give files that `tocom evaluate` wrote")
        labels = arrays["labels"]
        for cell, predicted in zip(meta["cells"], arrays["predictions"], strict=True):
            correct = int((predicted == labels).sum())
            rows.append(
                {
                    "study": study,
                    "backbone": backbone,
                    "compressor": meta["compressor"],
                    "task": meta["task"],
                    "seed": meta["seed"],
                    "train_degree": meta["train_degree"],
                    "infer_degree": cell["infer_degree"],
                    "compensated": cell["compensated"],
                    "compensator": compensator_of(cell),
                    "scale": cell["scale"],
                    "n": len(labels),
                    "correct": correct,
                    "accuracy": correct / len(labels),
                    "gflops": cell["gflops"],
                }
            )
    return sorted(rows, key=lambda row: tuple(str(row[key]).zfill(6) for key in KEYS[:-1]))


def write_rows(rows: Sequence[dict], path: str | os.PathLike, first_columns: dict[str, str] | None = None) -> None:
    """Write rows as CSV behind some constant columns; floats read back exactly, the same rows give the same bytes."""
    rows = [{**(first_columns or {}), **row} for row in rows]
    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def concatenate(tables: Sequence[os.PathLike], path: str | os.PathLike) -> None:
    """Put CSV files one below the other."""
    frame = pd.concat([pd.read_csv(table, keep_default_na=False) for table in tables], ignore_index=True)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def read_cells(path: str | os.PathLike) -> pd.DataFrame:
    """Read cells.csv, train_degree as text (it may be "random"); a file without variants gets their column.

    Raises:
        TocomError: it is missing or lacks a column.
    """
    if not Path(path).is_file():
        raise TocomError(f"no such file: {path}; run the study first (snakemake --cores all)")
    frame = with_compensator(pd.read_csv(path, dtype=TEXT, keep_default_na=False), after="compensated")
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise TocomError(f"{path} lacks the column {missing[0]!r}; make it again with this version")
    return frame


def with_compensator(frame: pd.DataFrame, after: str) -> pd.DataFrame:
    """Return a table with the column compensator, put in behind the column ``after`` if a version before wrote it."""
    if "compensator" in frame.columns or after not in frame.columns:
        return frame
    frame = frame.copy()
    names = frame.compensated.map({True: TOCOM, False: PLAIN}) if "compensated" in frame.columns else TOCOM
    frame.insert(frame.columns.get_loc(after) + 1, "compensator", names)
    return frame


def main_compensator(frame: pd.DataFrame, main: str | None = None) -> str:
    """Return the variant of main tables and figures: ``main``, or else the first that the table has.

    Raises:
        TocomError: ``main`` was not evaluated.
    """
    names = [name for name in frame.compensator.unique() if name != PLAIN]
    if main is not None and main not in names:
        raise TocomError(f"no compensator {main!r} was evaluated{suggest(main, names)}; there are: {', '.join(names)}")
    return main or next(iter(names), PLAIN)


def only(frame: pd.DataFrame, compensator: str) -> pd.DataFrame:
    """Return the rows of one variant, and those without a compensator."""
    return frame[frame.compensator.isin([PLAIN, compensator])]


#: Backbone, compressor, task, train degree, inference degree, compensator ("none": plain).
Condition = tuple[str, str, str, str, int, str]
#: Seed -> which test images were classified right [images] bool.
BySeed = dict[int, np.ndarray]


def correctness(files: Sequence[tuple[str, os.PathLike]]) -> dict[Condition, BySeed]:
    """Return, for every condition and seed, which test images were classified right [images] bool."""
    correct: dict[Condition, BySeed] = {}
    for backbone, path in files:
        arrays, meta = load_arrays(path)
        model = (backbone, meta["compressor"], meta["task"], str(meta["train_degree"]))
        for cell, predicted in zip(meta["cells"], arrays["predictions"], strict=True):
            key = (*model, cell["infer_degree"], compensator_of(cell))
            correct.setdefault(key, {})[meta["seed"]] = predicted == arrays["labels"]
    return correct
