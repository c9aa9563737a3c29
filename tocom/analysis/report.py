"""Write a study's tables and figures, and say what came out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tocom.analysis import headline as figures_to_reach
from tocom.analysis.cells import read_cells
from tocom.analysis.significance import scopes
from tocom.analysis.tables import METHOD, Table, degree_table, significance_table, throughput_table
from tocom.data.registry import kinds_of
from tocom.errors import TocomError
from tocom.files import atomic, write_text

#: What makes an HTML table readable in Snakemake's report.
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {font: 14px sans-serif; margin: 1em} table {border-collapse: collapse; white-space: nowrap}
th, td {padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right}
th:nth-child(-n+2), td:nth-child(-n+2) {text-align: left} p {max-width: 60em; color: #444}
</style>
"""


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise TocomError(f"no such file: {path}; run the study first (snakemake --cores all)")
    return pd.read_csv(path, dtype={"train_degree": str}, keep_default_na=name != "transfer")


def _models(cells: pd.DataFrame) -> list[tuple[str, str]]:
    return sorted(cells[["backbone", "compressor"]].drop_duplicates().itertuples(index=False, name=None))


def _of(frame: pd.DataFrame, backbone: str, compressor: str) -> pd.DataFrame:
    return frame[(frame.backbone == backbone) & (frame.compressor == compressor)]


def make_tables(folder: Path) -> dict[str, list[Table]]:
    """Return the tables of a study by file name; each holds a table for every backbone and compressor."""
    cells, significance = read_cells(folder / "cells.csv"), _read(folder, "significance")
    throughput = _read(folder, "throughput")
    kinds = kinds_of(cells.task.unique())
    made: dict[str, list[Table]] = {"main": [], "tasks": [], "significance": [], "throughput": []}
    for backbone, compressor in _models(cells):
        mine, tests = _of(cells, backbone, compressor), _of(significance, backbone, compressor)
        where = f"{backbone}, {METHOD.get(compressor, compressor)}"
        for scope in scopes(kinds):
            label = f"{backbone}-{compressor}-{scope.name.replace(' ', '-')}"
            table = degree_table(mine, tests, scope.name, kinds, f"{scope.name.capitalize()} ({where})", label)
            made["main" if scope.is_group else "tasks"].append(table)
        made["significance"].append(significance_table(tests, f"{backbone}-{compressor}-significance"))
        speed = _of(throughput, backbone, compressor)
        made["throughput"].append(throughput_table(speed, f"{backbone}-{compressor}-throughput"))
    return made


def write_tables(folder: Path, output: Path) -> None:
    """Write every table of the study in ``folder`` to ``output`` as Markdown, LaTeX and HTML."""
    for name, tables in make_tables(folder).items():
        write_text(output / f"{name}.md", "\n".join(table.markdown() for table in tables))
        write_text(output / f"{name}.html", PAGE + "\n".join(table.html() for table in tables))
        write_text(output / f"{name}.tex", "\n".join(table.latex() for table in tables))


def write_figures(folder: Path, output: Path) -> None:
    """Draw every figure of the study in ``folder`` to ``output`` as PNG and PDF.

    With several backbones or compressors, the first pair by name gets the plain names and the others a
    suffix, as :attr:`tocom.config.Study.figure_kinds` says.
    """
    from matplotlib import pyplot

    from tocom.analysis import figures

    cells, significance = read_cells(folder / "cells.csv"), _read(folder, "significance")
    kinds = kinds_of(cells.task.unique())
    gaps = _read(folder, "transfer") if (folder / "transfer.csv").exists() else None
    for number, (backbone, compressor) in enumerate(_models(cells)):
        drawn = {
            "accuracy_vs_gflops": figures.accuracy_vs_gflops(_of(cells, backbone, compressor), kinds),
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


def headline(folder: Path) -> list[figures_to_reach.Figure]:
    """Return the figures that the demo has to reach, as measured."""
    cells, significance = read_cells(folder / "cells.csv"), _read(folder, "significance")
    return [
        *figures_to_reach.effect(significance),
        figures_to_reach.cost_where_not_needed(cells),
        figures_to_reach.cost_of_folding(_read(folder, "throughput")),
    ]
