"""Write a study's tables and figures, and say what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from tocom.analysis import headline as figures_to_reach
from tocom.analysis.cells import main_compensator, only, read_cells, with_compensator
from tocom.analysis.grid import Grid
from tocom.analysis.significance import scopes
from tocom.analysis.tables import METHOD, Table, degree_table, significance_table, throughput_table
from tocom.data.registry import groups_of
from tocom.errors import TocomError
from tocom.files import atomic, write_text

#: What makes an HTML table readable in Snakemake's report.
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {font: 14px sans-serif; margin: 1em} table {border-collapse: collapse; white-space: nowrap}
th, td {padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right}
th:nth-child(-n+2), td:nth-child(-n+2) {text-align: left} p {max-width: 60em; color: #444}
</style>
"""
#: What a page says that has no table: a study of one task has no tables by task.
ELSEWHERE = "This study has one task; its table is the main one.\n"


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """Read significance.csv, throughput.csv or transfer.csv of a study, train_degree as text.

    Raises:
        TocomError: it is missing.
    """
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise TocomError(f"no such file: {path}; run the study first (snakemake --cores all)")
    frame = pd.read_csv(path, dtype={"train_degree": str}, keep_default_na=name != "transfer")
    return with_compensator(frame, after="comparison")


def read_or_empty(folder: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """Return what :func:`read_table` does, or an empty table with these columns if the file is missing."""
    return read_table(folder, name) if (folder / f"{name}.csv").is_file() else pd.DataFrame(columns=columns)


def _read_main(folder: Path, main: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return cells and significance, both of one variant of the compensator only."""
    cells, significance = read_cells(folder / "cells.csv"), read_table(folder, "significance")
    main = main_compensator(cells, main)
    return only(cells, main), only(significance, main)


def _models(cells: pd.DataFrame) -> list[tuple[str, str]]:
    return sorted(cells[["backbone", "compressor"]].drop_duplicates().itertuples(index=False, name=None))


def _of(frame: pd.DataFrame, backbone: str, compressor: str) -> pd.DataFrame:
    return frame[(frame.backbone == backbone) & (frame.compressor == compressor)]


def make_tables(
    folder: Path, main: str | None = None, groups: Mapping[str, str] | None = None
) -> dict[str, list[Table]]:
    """Return the tables of a study by file name; each holds a table for every backbone and compressor.

    Args:
        main: the variant of the compensator that they show; by default the first.
        groups: groups of the tasks that are in no registry.

    Raises:
        TocomError: cells.csv or significance.csv is missing, or ``main`` was not evaluated. Without throughput.csv
            the table of throughput says that nothing was measured.
    """
    cells, significance = _read_main(folder, main)
    throughput = read_or_empty(folder, "throughput", ("backbone", "compressor"))
    groups = groups_of(cells.task.unique(), groups)
    made: dict[str, list[Table]] = {"main": [], "tasks": [], "significance": [], "throughput": []}
    for backbone, compressor in _models(cells):
        mine, tests = _of(cells, backbone, compressor), _of(significance, backbone, compressor)
        where = f"{backbone}, {METHOD.get(compressor, compressor)}"
        for scope in scopes(groups):
            label = f"{backbone}-{compressor}-{scope.name.replace(' ', '-')}"
            title = f"{scope.title} ({where})"
            table = degree_table(mine, tests, scope, Grid.of_cells(mine), compressor, title, label)
            made["main" if scope.is_group else "tasks"].append(table)
        made["significance"].append(significance_table(tests, f"{backbone}-{compressor}-significance"))
        speed = _of(throughput, backbone, compressor)
        made["throughput"].append(throughput_table(speed, f"{backbone}-{compressor}-throughput"))
    return made


def write_tables(folder: Path, output: Path, main: str | None = None, groups: Mapping[str, str] | None = None) -> None:
    """Write every table of the study in ``folder`` to ``output`` as Markdown, LaTeX and HTML.

    Args:
        main: the variant of the compensator that they show; by default the first.
        groups: groups of the tasks that are in no registry.
    """
    for name, tables in make_tables(folder, main, groups).items():
        write_pages(tables, output / name)


def write_pages(tables: Sequence[Table], path: Path) -> None:
    """Write tables one below the other to ``path`` with the endings .md, .html and .tex."""
    write_text(path.with_name(f"{path.name}.md"), "\n".join(table.markdown() for table in tables) or ELSEWHERE)
    write_text(path.with_name(f"{path.name}.html"), PAGE + ("\n".join(t.html() for t in tables) or ELSEWHERE))
    write_text(path.with_name(f"{path.name}.tex"), "\n".join(t.latex() for t in tables) or f"% {ELSEWHERE}")


def write_figures(folder: Path, output: Path, main: str | None = None, groups: Mapping[str, str] | None = None) -> None:
    """Draw every figure of the study in ``folder`` to ``output`` as PNG and PDF.

    With several backbones or compressors, the first pair by name gets the plain names and the others a
    suffix, as :attr:`tocom.config.Study.figure_kinds` says.

    Args:
        main: the variant of the compensator that they show; by default the first.
        groups: groups of the tasks that are in no registry.
    """
    from matplotlib import pyplot

    from tocom.analysis import figures

    cells, significance = _read_main(folder, main)
    groups = groups_of(cells.task.unique(), groups)
    gaps = read_table(folder, "transfer") if (folder / "transfer.csv").exists() else None
    for number, (backbone, compressor) in enumerate(_models(cells)):
        drawn = {
            "accuracy_vs_gflops": figures.accuracy_vs_gflops(_of(cells, backbone, compressor), groups),
            "gain_heatmap": figures.gain_heatmap(_of(significance, backbone, compressor)),
        }
        if gaps is not None:
            drawn["gap_transfer"] = figures.gap_transfer(_of(gaps, backbone, compressor))
        suffix = f"_{backbone}_{compressor}" if number else ""
        for name, figure in drawn.items():
            for kind, metadata in figures.CLEAN.items():
                with atomic(output / f"{name}{suffix}.{kind}") as temporary:
                    figure.savefig(temporary, metadata=metadata)
            pyplot.close(figure)


def show(folder: Path) -> str:
    """Return the main table and where to look next."""
    main = folder / "tables" / "main.md"
    if not main.is_file():
        raise TocomError(f"no such file: {main}; run the study first (snakemake --cores all)")
    return (
        f"{main.read_text(encoding='utf-8')}\n"
        f"All tables: {folder}/tables (Markdown and LaTeX)   figures: {folder}/figures\n"
        f"One page with everything: {folder}/report.html   every cell: {folder}/cells.csv\n"
        f"Compare with the committed run: snakemake verify\n"
        f"Figures to reach: tocom analyse headline {folder}"
    )


def headline(folder: Path, main: str | None = None) -> list[figures_to_reach.Figure]:
    """Return the figures that the demo has to reach, as measured with one variant of the compensator (the first)."""
    cells, significance = _read_main(folder, main)
    return [
        *figures_to_reach.effect(significance),
        figures_to_reach.cost_where_not_needed(cells),
        figures_to_reach.cost_of_folding(read_table(folder, "throughput")),
    ]
