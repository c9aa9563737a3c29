"""From predictions to cells, statistics, tables and figures: `tocom analyse ...`.

All commands take the folder of a study, and learn from its study.json what was planned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.cli_common import Output, say, table
from tocom.errors import TocomError

app = typer.Typer(no_args_is_help=True, help="From predictions to cells, statistics, tables and figures.")

FolderArgument = Annotated[Path, typer.Argument(help="A study's folder, such as results/demo.")]
FolderOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
PredictionsArgument = Annotated[
    Optional[list[Path]], typer.Argument(help="Predictions files; by default all of the study that are there.")
]


@app.command()
def cells(folder: FolderArgument, output: Output, predictions: PredictionsArgument = None) -> None:
    """Gather predictions into one tidy table, a row for each cell, and say how much of the study is there."""
    from tocom.analysis import planned
    from tocom.analysis.cells import KEYS, check_config, gather
    from tocom.files import write_rows
    from tocom.made import seal
    from tocom.study import read_study

    study = read_study(folder / "study.json")
    files = predictions or planned.prediction_files(study, folder)
    check_config(study, folder / "predictions", files)
    rows = gather(study.study, files)
    write_rows(rows, output)
    seal(output, [folder / "study.json", *files])
    wanted = planned.cells(study)
    say(f"{len(wanted & {tuple(row[key] for key in KEYS) for row in rows})} of {len(wanted)} planned cells are there")


@app.command()
def compare(folder: FolderArgument, output: FolderOption, predictions: PredictionsArgument = None) -> None:
    """Compare methods pair by pair (significance.csv, pairwise.csv), and say what costs (harm.csv, mismatch.csv)."""
    from tocom.analysis import compare as stage
    from tocom.analysis.cells import check_config, records
    from tocom.analysis.planned import prediction_files
    from tocom.files import write_text
    from tocom.made import seal
    from tocom.study import read_study

    study = read_study(folder / "study.json")
    files = predictions or prediction_files(study, folder)
    check_config(study, folder / "predictions", files)
    there = records(files)
    made = {"significance": stage.compare, "harm": stage.harm, "mismatch": stage.mismatch, "pairwise": stage.pairwise}
    for name, frame in {name: make(study, there) for name, make in made.items()}.items():
        write_text(output / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n", float_format="%.10g"))
        seal(output / f"{name}.csv", [folder / "study.json", *files])


@app.command()
def concat(
    tables: Annotated[list[Path], typer.Argument(help="CSV files with the same columns.")], output: Output
) -> None:
    """Put CSV files one below the other."""
    from tocom.analysis.cells import concatenate

    concatenate(tables, output)


@app.command()
def costs(folder: FolderArgument, output: Output) -> None:
    """Gather what every method needs into one tidy table: images, labels, steps, minutes and bytes of its trainings."""
    from tocom.analysis.costs import gather
    from tocom.analysis.run import Run
    from tocom.files import write_rows
    from tocom.made import seal

    rows = gather(Run.read(folder))
    if not rows:
        raise TocomError(f"no training of this study in {folder}; run some of it first")
    write_rows(rows, output)
    seal(output, [folder / "study.json"])


@app.command()
def tables(folder: FolderArgument, output: FolderOption) -> None:
    """Write main, tasks, significance, mismatch, methods, variance, costs and throughput, each in three forms."""
    from tocom.analysis.report import write_tables

    write_tables(folder, output)


@app.command()
def paper(folder: FolderArgument, output: FolderOption) -> None:
    """Write the table in the paper's form that the study names, the published figures beside ours."""
    from tocom.analysis.report import write_paper

    write_paper(folder, output)


@app.command()
def figures(folder: FolderArgument, output: FolderOption) -> None:
    """Draw every figure as PNG and as PDF."""
    from tocom.analysis.report import write_figures

    write_figures(folder, output)


@app.command()
def overview(
    studies: Annotated[list[Path], typer.Argument(help="Folders of studies, or configs of studies, run or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Files to write, less .md, .tex and .html.")],
) -> None:
    """Write one table of all studies: the published figure, ours, and how much of each study was run."""
    from tocom.analysis.overview import write_overview

    write_overview(studies, output)


@app.command()
def verify(folders: Annotated[list[Path], typer.Argument(help="Folders of studies.")]) -> None:
    """Compare cells.csv with reference/cells.csv within the study's tolerances; exit status 1 beyond them."""
    from tocom.analysis.verify import verify as verdict

    for folder in folders:
        typer.echo(f"{folder}: {verdict(folder)}")


@app.command()
def show(folder: FolderArgument) -> None:
    """Print the main table and where to look next."""
    from tocom.analysis.report import show as text

    typer.echo(text(folder))


@app.command()
def convergence(
    study: Annotated[Path, typer.Argument(help="A study's config or folder.")],
    longer: Annotated[Path, typer.Argument(help="That of the same study with more epochs of fine-tuning.")],
    within: Annotated[float, typer.Option(help="Points that more epochs may move a mean by.")] = 1.0,
) -> None:
    """Print by how much more epochs move the mean validation scores; exit status 1 if by too much."""
    from tocom.analysis.curves import convergence as moved
    from tocom.analysis.run import Run

    frame = moved(Run.find(study), Run.find(longer))
    rows = [
        (
            *(
                one.backbone,
                one.method,
                one.train_degree,
                str(one.trainings),
                f"{one.epochs:g} → {one.epochs_longer:g}",
            ),
            *(f"{one.score:.1f}", f"{one.score_longer:.1f}", f"{one.change:+.2f}"),
        )
        for one in frame.itertuples()
    ]
    table(("backbone", "method", "train degree", "trainings", "epochs", "score (%)", "with more", "change"), rows)
    if (frame.change.abs() > within).any():
        raise TocomError(f"more epochs move a mean by more than {within:g} points; fine-tune longer")


@app.command()
def headline(folder: FolderArgument) -> None:
    """Print the figures that the demo has to reach, measured; exit status 1 if one is missed."""
    from tocom.analysis.headline import headline as figures_to_reach

    found = figures_to_reach(folder)
    rows = [(one.what, one.measured, one.target, "yes" if one.reached else "NO") for one in found]
    table(("figure", "measured", "target", "reached"), rows)
    if not all(one.reached for one in found):
        raise TocomError("a figure was missed; see the table above")


@app.command()
def simulate(
    output: FolderOption,
    repeats: Annotated[int, typer.Option(min=8, help="Made-up studies of a case; costly ones take fewer.")] = 2_000,
    processes: Annotated[int, typer.Option(min=1, help="How many at a time; the figures do not depend on it.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Make up studies with a known truth and say how often tests, intervals and tables are wrong."""
    from tocom.analysis import simulate as simulation
    from tocom.files import write_rows, write_text

    found = simulation.simulate(simulation.grid(), repeats, processes, seed)
    write_rows(found, output / "simulation.csv")
    write_text(output / "simulation.md", "\n".join(table.markdown() for table in simulation.report(found)))
    beyond = simulation.bounded(found)
    say(
        f"{(beyond.beyond > 0).sum()} of {len(beyond)} figures are beyond their bounds, {(beyond.beyond > 3).sum()} by"
        " more than 3 Monte Carlo errors"
    )
