"""Write a study's tables and figures, and say what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tocom.analysis.across import methods_table, variance_table
from tocom.analysis.costs import serving_table, trainings_table
from tocom.analysis.paper import paper_tables
from tocom.analysis.perplexity import perplexity_tables
from tocom.analysis.planned import task_scopes
from tocom.analysis.run import Run, sources
from tocom.analysis.tables import (
    Table,
    degree_tables,
    harm_table,
    mismatch_table,
    significance_table,
    throughput_table,
)
from tocom.errors import TocomError
from tocom.files import atomic, write_text
from tocom.made import check, seal

#: What makes an HTML table readable in Snakemake's report.
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {font: 14px sans-serif; margin: 1em} table {border-collapse: collapse; white-space: nowrap}
th, td {padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right}
th:nth-child(-n+2), td:nth-child(-n+2) {text-align: left} p {max-width: 60em; color: #444}
</style>
"""
#: What a page says that has no table: a study of one task has no tables by task.
ELSEWHERE = "This study has one task; its table is the main one.\n"


def make_tables(run: Run) -> dict[str, list[Table]]:
    """Return the tables of a study by file name."""
    by_task = task_scopes(run.study.groups)
    return {
        "main": [*perplexity_tables(run, run.scopes), *degree_tables(run, run.scopes)],
        "tasks": [*perplexity_tables(run, by_task), *degree_tables(run, by_task)],
        "significance": [table(run, name) for name in run.backbones for table in (significance_table, harm_table)],
        "mismatch": [mismatch_table(run, name, scope) for name in run.backbones for scope in run.scopes],
        "methods": [methods_table(run, name) for name in run.backbones],
        "variance": [variance_table(run, name) for name in run.backbones],
        "costs": [table(run, name) for name in run.backbones for table in (serving_table, trainings_table)],
        "throughput": [throughput_table(run, name) for name in run.backbones],
    }


def write_tables(folder: Path, output: Path) -> None:
    """Write :func:`make_tables` of the study in ``folder`` to ``output`` as Markdown, LaTeX and HTML."""
    inputs = sources(folder, "costs")
    for name, tables in make_tables(Run.read(folder)).items():
        write_pages(tables, output / name, inputs)


def write_paper(folder: Path, output: Path) -> None:
    """Write the table in the paper's form of the study in ``folder`` to ``output``/paper.{md,tex,html}."""
    inputs = sources(folder)
    write_pages(paper_tables(Run.read(folder)), output / "paper", inputs)


def write_pages(tables: Sequence[Table], path: Path, inputs: Sequence[Path]) -> None:
    """Write tables one below the other to ``path`` with the endings .md, .html and .tex, and their sums."""
    pages = {
        "md": "\n".join(table.markdown() for table in tables) or ELSEWHERE,
        "html": PAGE + ("\n".join(t.html() for t in tables) or ELSEWHERE),
        "tex": "\n".join(t.latex() for t in tables) or f"% {ELSEWHERE}",
    }
    written = {path.with_name(f"{path.name}.{kind}"): page for kind, page in pages.items()}
    for file, page in written.items():
        write_text(file, page)
    seal([*written], inputs)


def write_figures(folder: Path, output: Path) -> None:
    """Draw every figure of the study in ``folder`` to ``output`` as PNG and PDF.

    The first backbone gets the plain names, the others have theirs at the end.
    """
    from matplotlib import pyplot

    from tocom.analysis import figures

    inputs, run, drawn = sources(folder), Run.read(folder), []
    for number, backbone in enumerate(run.backbones):
        for name, figure in figures.draw(run, backbone).items():
            for kind, metadata in figures.CLEAN.items():
                drawn.append(output / f"{name}{f'_{backbone}' if number else ''}.{kind}")
                with atomic(drawn[-1]) as temporary:
                    figure.savefig(temporary, metadata=metadata, bbox_inches="tight")
            pyplot.close(figure)
    seal(drawn, inputs, folder=True)


def show(folder: Path) -> str:
    """Return the main table and where to look next."""
    main = folder / "tables" / "main.md"
    if not main.is_file():
        raise TocomError(f"no such file: {main}; run the study first (snakemake --cores all)")
    check(main)
    page = folder / "report.html"
    how = "" if page.is_file() else f"not there yet; snakemake --report {page}"
    return (
        f"{main.read_text(encoding='utf-8')}\n"
        "Compare with the committed run: snakemake verify\n"
        f"Figures to reach: tocom analyse headline {folder}\n"
        f"Every cell: {folder / 'cells.csv'}\n\n"
        f"Main table: {main} (the others beside it, also as LaTeX and HTML)\n"
        f"Figures: {folder / 'figures'}\n"
        f"Report, one page with everything: {page}{how and f' ({how})'}"
    )
