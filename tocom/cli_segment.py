"""The commands of the segmentation study: `tocom segment ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.cli_common import BackboneArgument, Output, Sets, check_outputs, say
from tocom.settings import TOCOM
from tocom.timing import timed

app = typer.Typer(
    no_args_is_help=True,
    help="Segmentation: tokens merge before each MLP and come back after it (the paper's ADE20k experiment).",
)

DataArgument = Annotated[Path, typer.Argument(help="What `tocom segment prepare` wrote.")]


@app.command()
def prepare(
    data: Annotated[str, typer.Argument(help="scenes (generated), ade20k, or a name of your own with --folder.")],
    output: Output,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the square images, in pixels.")] = 512,
    classes: Annotated[Optional[int], typer.Option(min=2, max=255, help="Classes of a folder of your own.")] = None,
    train: Annotated[int, typer.Option(min=1, help="Training scenes.")] = 400,
    val: Annotated[int, typer.Option(min=1, help="Validation images; drawn from a folder's training images.")] = 100,
    test: Annotated[int, typer.Option(min=1, help="Test scenes.")] = 200,
    folder: Annotated[Optional[Path], typer.Option(help="Holds ADE20k, or your data in its layout.")] = None,
) -> None:
    """Generate scenes, or list and check the files of ADE20k."""
    from tocom.segmentation.data import prepare as run
    from tocom.segmentation.settings import SegmentationSizes

    with timed("data"):
        about = run(data, output, image_size, SegmentationSizes(train=train, val=val, test=test), folder, classes)
    say(f"{data}: {about['classes']} classes, {about['sizes']}")


@app.command()
def train(
    backbone: BackboneArgument,
    data: DataArgument,
    output: Output,
    degree: Annotated[int, typer.Option(min=0, help="Train degree.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    compressor: Annotated[str, typer.Option(help="One that gives every token back.")] = "tome_mlp",
    sets: Sets = None,
) -> None:
    """Train a backbone and a head to segment; under torchrun, on several processes."""
    from tocom.segmentation.settings import SegmentationTraining
    from tocom.segmentation.stage import train as stage
    from tocom.settings import parse

    settings = parse(SegmentationTraining, sets or [])
    with timed("finetune", settings.threads):
        about = stage(backbone, data, output, degree, seed, compressor, settings)
    say(f"{output}: best epoch {about['best_epoch']}, validation mIoU {about['val_miou']:.1f} %")


@app.command()
def evaluate(
    data: DataArgument,
    checkpoint: Annotated[list[Path], typer.Option(help="A model that `tocom segment train` wrote. Repeatable.")],
    compensator: Annotated[Path, typer.Option(help="What `tocom distil --compressor tome_mlp` wrote.")],
    output: Annotated[list[Path], typer.Option("--output", "-o", help="Counts, one file for each checkpoint.")],
    degree: Annotated[list[int], typer.Option(min=0, help="Inference degree. Repeatable.")],
    variant: Annotated[str, typer.Option(help="What tables call the compensator.")] = TOCOM,
    sets: Sets = None,
) -> None:
    """Evaluate every cell (inference degree, with and without ToCom) of some checkpoints."""
    from tocom.segmentation.stage import evaluate as stage
    from tocom.settings import EvaluateSettings, parse

    check_outputs(checkpoint, output)
    settings = parse(EvaluateSettings, sets or [])
    with timed("evaluate", settings.threads):
        stage(checkpoint, data, compensator, output, degree, settings, variant)


@app.command()
def table(
    predictions: Annotated[Path, typer.Argument(help="The study's segmentation/predictions/ folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The CSV file to write.")],
    tables: Annotated[Path, typer.Option(help="Folder for the tables.")],
    study: Annotated[str, typer.Option(help="Name of the study.")],
    task: Annotated[str, typer.Option(help="Name of the data set.")],
    backbone: Annotated[list[str], typer.Option(help="Repeatable, like the options below.")],
    compressor: Annotated[list[str], typer.Option()],
    train_degree: Annotated[list[int], typer.Option()],
    infer_degree: Annotated[list[int], typer.Option()],
    seed: Annotated[list[int], typer.Option()],
    variant: Annotated[str, typer.Option(help="The compensator to show.")] = TOCOM,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = 2000,
) -> None:
    """Gather the counts of a grid into one CSV file and a table; what was not evaluated is shown as not run."""
    from itertools import product

    from tocom.analysis.cells import prediction_file
    from tocom.files import write_text
    from tocom.segmentation.tables import gather, make_tables, write_tables

    with timed("analyse"):
        grid = [
            (point[0], prediction_file(predictions, *point))
            for point in product(backbone, compressor, [task], train_degree, seed)
        ]
        frame, conditions = gather(study, [(name, path) for name, path in grid if path.is_file()], resamples)
        models = list(product(backbone, compressor))
        degrees = train_degree, infer_degree
        made = make_tables(conditions, task, models, *degrees, variant, resamples, n_seeds=len(seed))
        write_tables(made, tables)
        write_text(output, frame.to_csv(index=False, lineterminator="\n"))
