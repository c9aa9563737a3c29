"""From predictions to one tidy table of cells, which all tables, figures and tests start from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tocom.errors import TocomError
from tocom.files import load_arrays, write_text

#: Columns of cells.csv. scale: the factor chosen for ToCom (0: declined); gflops: of one image.
COLUMNS = (
    "study",
    "backbone",
    "compressor",
    "task",
    "seed",
    "train_degree",
    "infer_degree",
    "compensated",
    "scale",
    "n",
    "correct",
    "accuracy",
    "gflops",
)
KEYS = COLUMNS[:8]


def prediction_file(root: os.PathLike, backbone: str, compressor: str, task: str, train_degree, seed: int) -> Path:
    """Return where the workflow keeps the predictions of a checkpoint."""
    return Path(root) / backbone / compressor / task / f"train-{train_degree}_seed-{seed}.safetensors"


def prediction_files(root: os.PathLike, cells: pd.DataFrame) -> list[tuple[str, Path]]:
    """Return the (backbone, predictions file) pairs behind a table of cells."""
    grid = cells[["backbone", "compressor", "task", "train_degree", "seed"]].drop_duplicates()
    return [(point[0], prediction_file(root, *point)) for point in grid.itertuples(index=False)]


def gather(study: str, files: Sequence[tuple[str, os.PathLike]]) -> list[dict]:
    """Return a row for each cell of the given (backbone, predictions file) pairs, sorted by the key columns."""
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
                    "scale": cell["scale"],
                    "n": len(labels),
                    "correct": correct,
                    "accuracy": correct / len(labels),
                    "gflops": cell["gflops"],
                }
            )
    return sorted(rows, key=lambda row: tuple(str(row[key]).zfill(6) for key in KEYS))


def write_rows(rows: Sequence[dict], path: str | os.PathLike, first_columns: dict[str, str] | None = None) -> None:
    """Write rows as CSV behind some constant columns; floats read back exactly, the same rows give the same bytes."""
    rows = [{**(first_columns or {}), **row} for row in rows]
    write_text(path, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))


def concatenate(tables: Sequence[os.PathLike], path: str | os.PathLike) -> None:
    """Put CSV files one below the other."""
    frame = pd.concat([pd.read_csv(table, keep_default_na=False) for table in tables], ignore_index=True)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def read_cells(path: str | os.PathLike) -> pd.DataFrame:
    """Read cells.csv, train_degree as text (it may be "random").

    Raises:
        TocomError: it is missing or lacks a column.
    """
    if not Path(path).is_file():
        raise TocomError(f"no such file: {path}; run the study first (snakemake --cores all)")
    frame = pd.read_csv(path, dtype={"train_degree": str})
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise TocomError(f"{path} lacks the column {missing[0]!r}; make it again with this version")
    return frame


Condition = tuple[str, str, str, str, int, bool]  # backbone, compressor, task, train degree, infer degree, compensated


def correctness(files: Sequence[tuple[str, os.PathLike]]) -> dict[Condition, np.ndarray]:
    """Return, for every condition, which test images were classified right [seeds, images] bool; seeds ascend."""
    by_seed: dict[Condition, dict[int, np.ndarray]] = {}
    for backbone, path in files:
        arrays, meta = load_arrays(path)
        for cell, predicted in zip(meta["cells"], arrays["predictions"], strict=True):
            key = (
                backbone,
                meta["compressor"],
                meta["task"],
                str(meta["train_degree"]),
                cell["infer_degree"],
                cell["compensated"],
            )
            by_seed.setdefault(key, {})[meta["seed"]] = predicted == arrays["labels"]
    return {key: np.stack([runs[seed] for seed in sorted(runs)]) for key, runs in by_seed.items()}
