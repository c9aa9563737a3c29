"""From predictions to one tidy table of cells, which all tables, figures and tests start from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
from numpy.typing import NDArray

from tocom.analysis.scores import METRICS, read_predictions
from tocom.errors import TocomError
from tocom.files import again, load_metadata, read_rows, write_text
from tocom.made import Agreed, check, check_together, difference, how, job_hash, located, seal

#: What tells the cells of a study apart.
KEYS = ("backbone", "method", "task", "seed", "train_degree", "infer_degree")
#: Columns of cells.csv. scale: the factor chosen for the compensator (0: declined, or none); n: images, or labelled
#: pixels; correct and accuracy: of these; gflops: of one image; score: in the metric of the study, a share.
COLUMNS = (
    *("study", "backbone", "method", "compressor", "task", "seed", "train_degree", "infer_degree"),
    *("compensated", "compensator", "scale", "n", "correct", "accuracy", "gflops", "metric", "score"),
)
#: Those of them that hold numbers.
NUMBERS = ("seed", "infer_degree", "scale", "n", "correct", "accuracy", "gflops", "score")
#: Further columns, where cells have them. cache_bytes: of keys and values that reading a full context keeps.
FURTHER = ("cache_bytes",)
#: What rows are sorted by; rows that are equal in it keep the order of the files.
_ORDER = ("backbone", "compressor", "task", "seed", "train_degree", "infer_degree", "compensated")
#: Columns that stay text even where they look like numbers.
TEXT = dict.fromkeys(
    ("study", "backbone", "method", "made_for", "compressor", "task", "train_degree", "compensator"), str
)


def _read_all(files: Iterable[os.PathLike]) -> Iterable[tuple[tuple, str, dict, NDArray]]:
    """Yield the values of :data:`KEYS`, the metric, the cell and the record of every cell."""
    found: dict[tuple, os.PathLike] = {}
    agreed = Agreed()
    for path in files:
        meta, cells = read_predictions(path)
        if "made" in meta:
            compare_made(Path(path), meta, agreed)
        for cell, record in cells:
            where = cell["seed"], str(cell["train_degree"]), cell["infer_degree"]
            key = (meta["backbone"], cell["method"], meta["task"], *where)
            if key in found:
                raise TocomError(f"{path} and {found[key]} hold the same cell {key}; delete the older of the two")
            found[key] = path
            yield key, meta["metric"], cell, record
    agreed.check()


def compare_made(path: Path, meta: dict, agreed: Agreed) -> None:
    """Tell ``agreed`` what predictions say of themselves that has to be the same in all of a study.

    Nothing may be made by two versions of the code, evaluated with two settings, on two preparations of a task, or from
    two backbones of one name.
    """
    about = meta["made"]
    agreed.same_code("predictions", about["code"], [path])
    agreed.same("settings", about["job"]["settings"], [path], "with two settings of evaluation")
    task, backbone = meta["task"], meta["backbone"]
    for item in about["inputs"]:
        role, files = item["role"], [located(path, item["file"]), path]
        agreed.same_code(role, item.get("code", {}), files)
        own = item.get("from", {})
        if data := item["sha256"] if role == "data" else own.get("data"):
            agreed.same(("data", task), data, files, f"from two preparations of {task}")
        if "backbone" in own:
            agreed.same(("backbone", backbone), own["backbone"], files, f"from two backbones {backbone}")


def check_config(study, root: Path, files: Iterable[os.PathLike]) -> None:
    """Raise TocomError if predictions, or what they were made from, are of another config than a study's.

    Args:
        root: folder of its predictions; files that lie elsewhere are not checked.
    """
    from tocom.jobs import Plan

    plan = Plan({study.study: json.loads(study.as_json())})
    plan.check_backbones()
    learned = {job_hash(job) for job in plan.learned.values()}
    for path in map(Path, files):
        about = load_metadata(path).get("made")
        if about is None or not path.is_relative_to(root):
            continue
        parts = zip(("backbone", "tuned", "task", "batch"), path.relative_to(root).with_suffix("").parts, strict=True)
        where = SimpleNamespace(study=study.study, **dict(parts))
        if changed := difference(about["job"], how(plan.evaluate(where))):
            raise TocomError(f"{path} is of another config than {study.study}'s: {changed}; {again(path)}")
        adapted = [SimpleNamespace(**vars(where), method=name) for name, _ in plan.adapted(where, "")]
        wanted = {
            "data": {job_hash(plan.prepare(where))},
            "checkpoint": {job_hash(plan.finetune(where))},
            "compensator": learned | {job_hash(plan.adapt(it)) for it in adapted},
        }
        for item in about["inputs"]:
            if "job" in item and item["job"] not in wanted[item["role"]]:
                file = located(path, item["file"])
                raise TocomError(
                    f"{path} was made from {file}, which is of another config than {study.study}'s (job {item['job']},"
                    f" not {' or '.join(sorted(wanted[item['role']]))}); {again(file, path)}"
                )


def gather(study: str, files: Iterable[os.PathLike]) -> list[dict]:
    """Return a row with :data:`COLUMNS` for each cell of some predictions files, sorted.

    Raises:
        TocomError: a file holds no predictions, or two hold the same cell.
    """
    rows, further = [], {}
    for key, metric, cell, record in _read_all(files):
        about = {name: cell[name] for name in ("compressor", "compensated", "compensator", "scale", "gflops")}
        further |= dict.fromkeys(name for name in FURTHER if name in cell)
        about |= {name: cell.get(name) for name in FURTHER}
        row = dict(zip(KEYS, key, strict=True)) | about | METRICS[metric].row(record) | {"metric": metric}
        rows.append({name: study if name == "study" else row[name] for name in (*COLUMNS, *further)})
    return sorted(rows, key=lambda row: tuple(str(row[key]).zfill(6) for key in _ORDER))


#: Backbone, method, task, train degree, inference degree.
Condition = tuple[str, str, str, str, int]
#: Seed -> record of every test image [images, ...].
BySeed = dict[int, NDArray]


def records(files: Iterable[os.PathLike]) -> dict[Condition, BySeed]:
    """Return the records of every condition and seed in some predictions files."""
    found: dict[Condition, BySeed] = {}
    for (*model, seed, train, infer), _, _, record in _read_all(files):
        found.setdefault((*model, train, infer), {})[seed] = record
    return found


def concatenate(tables: Sequence[os.PathLike], path: str | os.PathLike) -> None:
    """Put CSV files one below the other."""
    check_together(tables)
    frames = [read_rows(table, keep_default_na=False) for table in tables]
    for table, frame in zip(tables, frames, strict=True):
        if list(frame.columns) != list(frames[0].columns):
            raise TocomError(f"{table} has other columns than {tables[0]}; make them with one version")
    frame = pd.concat(frames, ignore_index=True)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    seal(path, tables)


def read_cells(path: str | os.PathLike) -> pd.DataFrame:
    """Read cells.csv, train_degree as text (it may be no number)."""
    if not Path(path).is_file():
        raise TocomError(f"no such file: {path}; run the study first (snakemake --cores all)")
    check(path)
    return checked(read_rows(path, NUMBERS, dtype=TEXT, keep_default_na=False), COLUMNS, path)


def checked(frame: pd.DataFrame, columns: Iterable[str], path: str | os.PathLike) -> pd.DataFrame:
    """Return a table that was read from ``path``."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise TocomError(f"{path} lacks the column {missing[0]!r}; make it again with this version")
    return frame
