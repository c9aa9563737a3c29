"""The command line: each stage of a study as a command, and a look at what the stages made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.cli_common import BackboneArgument, Output, Sets, check_outputs, say
from tocom.cli_data import data
from tocom.cli_segment import app as segment
from tocom.errors import TocomError
from tocom.plan import plan_command
from tocom.settings import RANDOM, TOCOM, BenchmarkSettings
from tocom.timing import timed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Token compensation for Vision Transformers: fine-tune, distil ToCom, evaluate, analyse. "
    "`snakemake --cores all` runs all of it; these commands run one stage each.",
)
analyse = typer.Typer(no_args_is_help=True, help="From predictions to cells, statistics, tables and figures.")
app.add_typer(analyse, name="analyse")
app.add_typer(data, name="data")
app.add_typer(segment, name="segment")
app.command("plan")(plan_command)

DataArgument = Annotated[Path, typer.Argument(help="A prepared task (`tocom prepare`).")]
Columns = Annotated[
    Optional[list[str]], typer.Option("--column", metavar="NAME=VALUE", help="A constant first column. Repeatable.")
]
CellsArgument = Annotated[Path, typer.Argument(help="A study's cells.csv.")]
FolderArgument = Annotated[Path, typer.Argument(help="A study's folder, such as results/demo.")]
CompressorOption = Annotated[str, typer.Option(help="tome, evit, evit_fuse or tome_mlp.")]
DataRoot = Annotated[Path, typer.Option(help="Folder of the data sets that `tocom data fetch` downloads.")]
MainOption = Annotated[
    Optional[str], typer.Option("--main", help="Variant of ToCom to show; by default the first in cells.csv.")
]
Groups = Annotated[
    Optional[list[str]],
    typer.Option("--group", metavar="TASK=GROUP", help="Group of a task that is in no registry. Repeatable."),
]
#: Defaults of `tocom benchmark`.
BENCHMARK = BenchmarkSettings()


@app.command()
def prepare(
    task: Annotated[str, typer.Argument(help="A name from `tocom tasks` or `tocom data list`, or your own.")],
    output: Output,
    train: Annotated[
        Optional[int], typer.Option(help="Training images; by default 800 of a bundled task, else all.")
    ] = None,
    val: Annotated[
        Optional[float],
        typer.Option(help="Images, or share of the training images, that the epoch and the scale are chosen on."),
    ] = None,
    test: Annotated[
        Optional[int], typer.Option(help="Test images; by default 2,000 of a bundled task, or all.")
    ] = None,
    source: Annotated[
        Optional[str], typer.Option(metavar="JSON", help='Your own images, e.g. {"folder": "data/pets"}; see docs.')
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side in pixels that images are scaled to.")] = 32,
    resize: Annotated[str, typer.Option(help="crop or squash.")] = "crop",
    decode_train: Annotated[
        bool, typer.Option(help="Decode training images, too; augmentation by timm starts from the files instead.")
    ] = True,
    data_root: DataRoot = Path("data"),
) -> None:
    """Decode a task once and write its splits."""
    from tocom.data import registry

    if resize not in ("crop", "squash"):
        raise TocomError(f"--resize {resize!r}: write crop or squash")
    sizes = {"train": train, "val": val if val is None or val < 1 else int(val), "test": test}
    own = None if source is None else _source(source)
    with timed("data"):
        about = registry.prepare(task, output, sizes, image_size, own, data_root, decode_train, resize)
    say(f"{task}: {about['classes']} classes, {about['sizes']}")


@app.command()
def backbone(
    architecture: Annotated[
        str, typer.Argument(help="A timm ViT with its tag, such as deit_base_patch16_224.fb_in1k.")
    ],
    output: Output,
    weights: Annotated[
        Optional[Path], typer.Option(help="File with its weights; by default timm's, downloaded.")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Commit of the weights on the Hub.")] = None,
    sha256: Annotated[Optional[str], typer.Option(help="What the file of weights must hash to.")] = None,
    image_size: Annotated[Optional[int], typer.Option(help="Side in pixels; position embeddings are resized.")] = None,
    num_classes: Annotated[Optional[int], typer.Option(help="Classes of the weights' classifier.")] = None,
    kwargs: Annotated[str, typer.Option(help="JSON: overrides of timm's arguments.")] = "{}",
    proportional_attention: Annotated[
        Optional[bool], typer.Option(help="Add log(token size) to attention; by default unless it is an MAE model.")
    ] = None,
) -> None:
    """Turn a timm model with its public weights, or with yours, into a backbone of this project."""
    from tocom.models import import_backbone

    with timed("data"):
        about = import_backbone(
            output,
            architecture,
            weights=weights,
            revision=revision,
            sha256=sha256,
            image_size=image_size,
            num_classes=num_classes,
            kwargs=_json(kwargs, "--kwargs"),
            proportional_attention=proportional_attention,
        )
    say(f"{output}: {about['architecture']}")


@app.command()
def pretrain(
    output: Output,
    architecture: Annotated[str, typer.Option(help="A timm ViT.")] = "vit_tiny_patch16_224",
    kwargs: Annotated[str, typer.Option(help="JSON: overrides of its arguments.")] = "{}",
    seed: int = 0,
    degree: Annotated[Optional[list[int]], typer.Option(help="Degree to report accuracy at. Repeatable.")] = None,
    sets: Sets = None,
) -> None:
    """Pre-train a backbone on procedural letters (the embedded one took this command)."""
    from tocom.settings import PretrainSettings, parse
    from tocom.stages.pretrain import pretrain as run

    settings = parse(PretrainSettings, sets or [])
    with timed("pretrain", settings.threads):
        about = run(output, architecture, _json(kwargs, "--kwargs"), seed, degree or [0], settings)
    say(f"held-out accuracy by degree: {about['accuracy']} after {about['minutes']:.1f} minutes")


@app.command()
def finetune(
    backbone: BackboneArgument,
    data: DataArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Checkpoint to write; {degree} and {seed} are filled in.")
    ],
    at: Annotated[
        list[str], typer.Option(metavar="DEGREE:SEED", help="What to train, e.g. 8:0 or random:1. Repeatable.")
    ],
    compressor: CompressorOption = "tome",
    max_degree: Annotated[Optional[int], typer.Option(help="How far 'random' draws.")] = None,
    fine_tuned: Annotated[
        Optional[Path], typer.Option(help='A fine-tuned model to use as it is (--set tuning=\'{"mode": "none"}\').')
    ] = None,
    sets: Sets = None,
) -> None:
    """Fine-tune a backbone for a task, at one or more train degrees and seeds; under torchrun, on several processes."""
    from tocom.settings import FinetuneSettings, parse
    from tocom.stages.finetune import finetune as stage
    from tocom.training import forget

    settings = parse(FinetuneSettings, sets or [])
    runs = [_run(text) for text in at]
    _check_template(output, runs)
    with timed("finetune", settings.threads):
        for degree, seed in runs:
            path = output.format(degree=degree, seed=seed)
            about = stage(backbone, data, path, degree, seed, compressor, max_degree, settings, True, fine_tuned)
            say(f"{path}: best epoch {about['best_epoch']}, validation accuracy {about['val_accuracy']:.3f}")
        for degree, seed in runs:
            forget(output.format(degree=degree, seed=seed))


@app.command()
def distil(
    backbone: BackboneArgument,
    output: Output,
    max_degree: Annotated[int, typer.Option(help="Highest degree; one low-rank update for each step up to it.")],
    compressor: CompressorOption = "tome",
    seed: int = 0,
    images: Annotated[
        Optional[str], typer.Option(help="Pre-training images: a folder, or a data set; by default, letters.")
    ] = None,
    data_root: DataRoot = Path("data"),
    sets: Sets = None,
) -> None:
    """Distil ToCom on a frozen backbone, once for all tasks; under torchrun, on several processes."""
    from tocom.data.registry import pretraining_files
    from tocom.settings import DistilSettings, parse
    from tocom.stages.distil import distil as stage

    settings = parse(DistilSettings, sets or [])
    with timed("distil", settings.threads):
        files = None if images is None else pretraining_files(images, data_root)
        about = stage(backbone, output, max_degree, compressor, seed, settings, files)
    before, after = about["held_out_kl_without"], about["held_out_kl"]
    say(f"held-out KL {before:.4f} -> {after:.4f} nats (best epoch {about['best_epoch']})")


@app.command()
def evaluate(
    data: DataArgument,
    checkpoint: Annotated[list[Path], typer.Option(help="A fine-tuned model of this task. Repeatable.")],
    compensator: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE", help="What `tocom distil` or `tocom import` wrote; NAME: tocom. Repeatable."
        ),
    ],
    output: Annotated[list[Path], typer.Option("--output", "-o", help="Predictions, one file for each checkpoint.")],
    degree: Annotated[list[int], typer.Option(help="Inference degree. Repeatable.")],
    scales: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=A,B", help="Candidate scales of one compensator. Repeatable.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Evaluate every cell (inference degree, with and without ToCom) of some checkpoints of one task."""
    from tocom.settings import EvaluateSettings, parse
    from tocom.stages.evaluate import evaluate as stage

    check_outputs(checkpoint, output)
    settings = parse(EvaluateSettings, sets or [])
    with timed("evaluate", settings.threads):
        named = dict(text.split("=", 1) if "=" in text else (TOCOM, text) for text in compensator)
        stage(checkpoint, data, named, output, degree, settings, _scales(scales))


@app.command()
def transfer(
    data: Annotated[list[Path], typer.Argument(help="Prepared tasks; each is evaluated with every task's gap.")],
    output: Output,
    checkpoint: Annotated[
        list[str],
        typer.Option(metavar="TASK:SEED:LOW:HIGH", help="Checkpoints at the low and high degree. Repeatable."),
    ],
    column: Columns = None,
    sets: Sets = None,
) -> None:
    """Carry every task's gap between two degrees to other tasks, and write a CSV of what comes of it."""
    from tocom.analysis.cells import write_rows
    from tocom.settings import EvaluateSettings, parse
    from tocom.stages.transfer import transfer as stage

    settings = parse(EvaluateSettings, sets or [])
    checkpoints = {}
    for text in checkpoint:
        parts = text.split(":")
        if len(parts) != 4 or not parts[1].isdigit():
            raise TocomError(f"--checkpoint {text!r}: write TASK:SEED:LOW:HIGH")
        checkpoints[parts[0], int(parts[1])] = (parts[2], parts[3])
    with timed("evaluate", settings.threads):
        rows = [row for task in data for row in stage(checkpoints, task, settings)]
        write_rows(rows, output, _columns(column))


@app.command()
def throughput(
    backbone: BackboneArgument,
    output: Output,
    compensator: Annotated[Path, typer.Option(help="What `tocom distil` wrote.")],
    degree: Annotated[list[int], typer.Option(help="Degree. Repeatable.")],
    compressor: CompressorOption = "tome",
    image_size: Annotated[Optional[int], typer.Option(help="Side in pixels; by default the backbone's own.")] = None,
    column: Columns = None,
    sets: Sets = None,
) -> None:
    """Measure images a second and memory at each degree, with and without ToCom folded in, side by side."""
    from tocom.analysis.cells import write_rows
    from tocom.settings import ThroughputSettings, parse
    from tocom.stages.throughput import throughput as stage

    settings = parse(ThroughputSettings, sets or [])
    with timed("evaluate", settings.threads):
        write_rows(stage(backbone, compensator, degree, compressor, settings, image_size), output, _columns(column))


@app.command()
def benchmark(
    backbone: Annotated[
        Optional[list[str]],
        typer.Option(help="A timm ViT; its weights are random. Repeatable; by default DeiT-S and DeiT-B."),
    ] = None,
    degree: Annotated[
        Optional[list[int]], typer.Option(help="Degree; 0 is always among them. Repeatable; by default 0, 8 and 16.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for benchmark.{csv,md,tex}.")] = Path(
        "results/gpu"
    ),
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = BENCHMARK.precision,
    batch_size: Annotated[int, typer.Option(help="Images a step or forward pass.")] = BENCHMARK.batch_size,
    repeats: Annotated[int, typer.Option(help="Timed rounds; every degree takes a turn in each.")] = BENCHMARK.repeats,
    warmup: Annotated[int, typer.Option(help="Steps of each degree before the first round.")] = BENCHMARK.warmup,
    image_size: Annotated[
        Optional[int], typer.Option(help="Side in pixels; by default the backbone's own.")
    ] = BENCHMARK.image_size,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; without a GPU, the table says not run.")
    ] = BENCHMARK.device,
    threads: Annotated[int, typer.Option(help="Torch CPU threads.")] = BENCHMARK.threads,
) -> None:
    """Measure fine-tuning, distillation and evaluation, images a second and memory, at some degrees."""
    from tocom.analysis.tables import NOT_RUN
    from tocom.stages.benchmark import BACKBONES, DEGREES
    from tocom.stages.benchmark import benchmark as stage

    settings = _benchmark_settings(
        precision=precision,
        batch_size=batch_size,
        repeats=repeats,
        warmup=warmup,
        image_size=image_size,
        device=device,
        threads=threads,
    )
    status = stage(output, backbone or BACKBONES, degree or DEGREES, settings).status
    counts = ", ".join(f"{count} {name}" for name, count in status.value_counts().items())
    why = f"; torch sees no GPU for --device {device}" if (status == NOT_RUN).all() else ""
    say(f"{output / 'benchmark.md'}: of {len(status)} lines, {counts}{why}")


@app.command("import")
def import_public(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth or .safetensors in the public code's layout.")],
    output: Output,
    steps: Annotated[int, typer.Option(help="Number of steps of one degree in it.")] = 16,
    compressor: CompressorOption = "tome",
    trained_scale: Annotated[float, typer.Option(help="Scale it was trained at.")] = 0.1,
) -> None:
    """Turn a public ToCom checkpoint into one of ours."""
    from tocom.compensator import Compensator

    Compensator.from_public(checkpoint, steps, compressor, trained_scale).save(output)
    info(output)


@app.command()
def info(path: Annotated[str, typer.Argument(help="A checkpoint, compensator, prepared task or predictions.")]) -> None:
    """Print what a file of this project says of itself."""
    from tocom.bundled import resolve
    from tocom.files import load_arrays

    arrays, metadata = load_arrays(resolve(path))
    _table(
        ("key", "value"),
        [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in sorted(metadata.items())]
        + [("tensors", f"{len(arrays)}, {sum(a.nbytes for a in arrays.values()) / 1e6:.2f} MB")],
    )


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="Filter on timm's names, e.g. 'deit*'.")] = "*vit*") -> None:
    """List bundled backbones, and timm's models of the supported family (a few have parts that are refused)."""
    from tocom.bundled import BUNDLED
    from tocom.models import compressible

    _table(("bundled backbone", "file"), [(name, path.name) for name, path in BUNDLED.items()])
    _table(("timm model", "module"), compressible(pattern))


@app.command()
def tasks() -> None:
    """List the downstream tasks that need no download; `tocom data list` lists the others."""
    from tocom.data.registry import TASKS

    _table(("task", "classes", "group", "source"), [(n, str(t.classes), t.group, t.source) for n, t in TASKS.items()])


@app.command()
def settings() -> None:
    """List the settings of each stage, for --set and for configs."""
    from tocom import settings as module
    from tocom.segmentation.settings import SegmentationTraining

    for title, kind in (module.STAGES | {"segmentation.train": SegmentationTraining}).items():
        rows = [
            (name, json.dumps(default), kind.meaning(name)) for name, default in kind().model_dump(mode="json").items()
        ]
        typer.echo(f"\n{title}")
        _table(("setting", "default", "meaning"), rows)


@app.command()
def card(
    checkpoint: Annotated[str, typer.Argument(help="A backbone that `tocom pretrain` wrote.")], output: Output
) -> None:
    """Write the model card of a pre-trained backbone from what its file says of it."""
    from tocom.analysis.card import card as text
    from tocom.files import write_text

    write_text(output, text(checkpoint))


@app.command()
def check(config: Annotated[Path, typer.Argument(help="A study's YAML file.")]) -> None:
    """Validate a config and say how much work it stands for."""
    from tocom.config import read_study

    study = read_study(config)
    tasks = len(study.tasks) or 1  # one that is segmented
    n = len(study.backbones) * len(study.compressors) * tasks * len(study.checkpoints)
    say(f"{config}: study {study.study!r} is valid: {n} checkpoints, {len(study.infer_degrees)} inference degrees each")


@app.command()
def schema(output: Output) -> None:
    """Write the JSON schema of a config, which editors use to complete and check."""
    from tocom.config import schema as make
    from tocom.files import write_text

    write_text(output, json.dumps(make(), indent=2) + "\n")


# --- analysis ----------------------------------------------------------------------------------------------------


@analyse.command()
def cells(
    predictions: Annotated[Path, typer.Argument(help="The study's predictions/ folder.")],
    output: Output,
    study: Annotated[str, typer.Option(help="Name of the study.")],
    backbone: Annotated[list[str], typer.Option(help="Repeatable, like the options below.")],
    compressor: Annotated[list[str], typer.Option()],
    task: Annotated[list[str], typer.Option()],
    train_degree: Annotated[list[str], typer.Option()],
    seed: Annotated[list[int], typer.Option()],
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what is missing, and say how much is there.")
    ] = False,
) -> None:
    """Gather the predictions of a grid into one tidy table, a row for each cell."""
    from itertools import product

    from tocom.analysis.cells import gather, prediction_file, write_rows

    with timed("analyse"):
        grid = product(backbone, compressor, task, train_degree, seed)
        files = [(point[0], prediction_file(predictions, *point)) for point in grid]
        if partial:
            planned, files = len(files), [(name, path) for name, path in files if path.is_file()]
            say(f"{len(files)} of {planned} prediction files are there")
            if not files:
                raise TocomError(f"no predictions of this grid in {predictions}; run some of the study first")
        write_rows(gather(study, files), output)


@analyse.command()
def concat(
    tables: Annotated[list[Path], typer.Argument(help="CSV files with the same columns.")],
    output: Output,
) -> None:
    """Put CSV files one below the other."""
    from tocom.analysis.cells import concatenate

    concatenate(tables, output)


@analyse.command()
def significance(
    cells: CellsArgument,
    predictions: Annotated[Path, typer.Option(help="The study's predictions/ folder.")],
    output: Output,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    group: Groups = None,
) -> None:
    """Compare conditions pair by pair: gains, intervals, tests, Holm correction."""
    from tocom.analysis.cells import correctness, prediction_files, read_cells
    from tocom.analysis.significance import compare
    from tocom.data.registry import groups_of
    from tocom.files import write_text

    with timed("analyse"):
        frame = read_cells(cells)
        correct = correctness(prediction_files(predictions, frame))
        result = compare(correct, groups_of(frame.task.unique(), _columns(group, "--group")), resamples)
        result.insert(0, "study", frame.study.iloc[0])
        write_text(output, result.to_csv(index=False, lineterminator="\n", float_format="%.10g"))


@analyse.command()
def tables(
    folder: FolderArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tables.")],
    main: MainOption = None,
    group: Groups = None,
) -> None:
    """Write every table as Markdown and as LaTeX (booktabs)."""
    from tocom.analysis.report import write_tables

    with timed("analyse"):
        write_tables(folder, output, main, _columns(group, "--group"))


@analyse.command()
def figures(
    folder: FolderArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")],
    main: MainOption = None,
    group: Groups = None,
) -> None:
    """Draw every figure as PNG and as PDF."""
    from tocom.analysis.report import write_figures

    with timed("analyse"):
        write_figures(folder, output, main, _columns(group, "--group"))


@analyse.command("paper-table")
def paper_table(
    folder: FolderArgument,
    config: Annotated[str, typer.Option(metavar="JSON", help="The study's config.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table.")],
    compensator: Annotated[
        Optional[list[str]], typer.Option(metavar="BACKBONE:COMPRESSOR:VARIANT=FILE", help="Repeatable.")
    ] = None,
) -> None:
    """Write a study's table in the paper's form, the published figures beside ours; what was not run says so."""
    from tocom.analysis.paper import write_paper
    from tocom.config import parse_study

    study = parse_study(_json(config, "--config"), "--config")
    files = {tuple(name.split(":")): Path(path) for name, path in _columns(compensator, "--compensator").items()}
    with timed("analyse"):
        groups = study.groups
        write_paper(study.paper, folder, study.model_dump(), groups, output, study.variants[0], files)


@analyse.command()
def overview(
    configs: Annotated[list[Path], typer.Argument(help="Configs of studies, run or not.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Files to write, less .md, .tex and .html.")],
    results: Annotated[Path, typer.Option(help="Folder of the studies' results.")] = Path("results"),
) -> None:
    """Write one table of all studies: the published figure, ours, and how much of each study was run."""
    from tocom.analysis.overview import overview as lines_of
    from tocom.analysis.overview import write_joint
    from tocom.config import read_study

    studies = [read_study(path) for path in configs]
    with timed("analyse"):
        lines = [
            line
            for study in studies
            for line in lines_of(
                study.study,
                "segmentation" if study.segmentation else study.paper or "degrees",
                results / study.study,
                study.model_dump(),
                study.groups,
            )
        ]
        write_joint(lines, output)


@analyse.command()
def verify(
    cells: CellsArgument,
    reference: Annotated[Path, typer.Argument(help="The committed cells.csv to compare with.")],
    cell_points: Annotated[float, typer.Option(help="Largest difference of one cell, in points.")] = 8.0,
    mean_points: Annotated[float, typer.Option(help="Largest difference of a mean over tasks and seeds.")] = 2.0,
    gain_points: Annotated[float, typer.Option(help="Largest difference of a mean gain of ToCom.")] = 1.5,
) -> None:
    """Compare a fresh run with a reference within tolerances; exit status 1 if it differs by more."""
    from tocom.analysis.cells import read_cells
    from tocom.analysis.verify import compare, report

    verdict = compare(read_cells(cells), read_cells(reference), cell_points, mean_points, gain_points)
    typer.echo(report(verdict, cell_points, mean_points, gain_points))


@analyse.command()
def show(folder: FolderArgument) -> None:
    """Print the main table and where to look next."""
    from tocom.analysis.report import show as text

    typer.echo(text(folder))


@analyse.command()
def headline(folder: FolderArgument) -> None:
    """Print the figures that the demo has to reach, measured; exit status 1 if one is missed."""
    from tocom.analysis.report import headline as figures_to_reach

    found = figures_to_reach(folder)
    _table(
        ("figure", "measured", "target", "reached"),
        [(f.what, f.measured, f.target, "yes" if f.reached else "NO") for f in found],
    )
    if not all(f.reached for f in found):
        raise TocomError("a figure was missed; see the table above")


@analyse.command()
def split(
    folder: FolderArgument,
    since: Annotated[float, typer.Option(help="When snakemake started, in seconds since 1970 (date +%s).")],
    until: Annotated[float, typer.Option(help="When it ended, likewise.")],
    cores: Annotated[str, typer.Option(help="Cores that it was given, or all.")] = "all",
) -> None:
    """Print where the time of a run went, and how much memory it took."""
    from tocom.analysis.split import available_cores
    from tocom.analysis.split import split as account

    result = account(folder, since, until, available_cores(cores))
    if result is None:
        say("nothing had to be run: everything was up to date")
        return
    _table(
        ("what", "core-seconds", "share"),
        [(name, f"{seconds:.0f}", f"{share:.1%}") for name, seconds, share in result.rows()],
    )
    say(
        f"{result.wall:.0f} s on {result.cores} cores; {result.share_elsewhere:.1%} outside data, training and"
        f" evaluation;"
        f" the {result.cores} largest jobs together take {result.memory_mb:.0f} MB, Snakemake itself some 100 MB more"
    )


def _run(text: str) -> tuple[int | str, int]:
    degree, separator, seed = text.partition(":")
    if not separator or not seed.isdigit() or not (degree.isdigit() or degree == RANDOM):
        raise TocomError(f"--at {text!r}: write DEGREE:SEED, for example 8:0 or random:1")
    return (int(degree) if degree.isdigit() else degree), int(seed)


def _check_template(output: str, runs: list) -> None:
    try:
        paths = {output.format(degree=degree, seed=seed) for degree, seed in runs}
    except (KeyError, IndexError, ValueError) as error:
        raise TocomError(f"--output {output!r}: only {{degree}} and {{seed}} can be filled in ({error})") from None
    if len(paths) < len(runs):
        raise TocomError(f"--output {output!r} would write several runs to one file; put {{degree}} or {{seed}} in it")


def _columns(texts: list[str] | None, option: str = "--column") -> dict[str, str]:
    for text in texts or []:
        if "=" not in text:
            raise TocomError(f"{option} {text!r}: write NAME=VALUE")
    return dict(text.split("=", 1) for text in texts or [])


def _json(text: str, option: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TocomError(f"{option} {text!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TocomError(f"{option} {text!r} is no JSON object; write names and values, for example '{{\"depth\": 6}}'")
    return value


def _source(text: str):
    from pydantic import ValidationError

    from tocom.data.own import OwnSource
    from tocom.settings import explain

    try:
        return OwnSource.model_validate(_json(text, "--source"))
    except ValidationError as error:
        raise explain(error, "--source", {"": OwnSource}) from None


def _benchmark_settings(**values) -> BenchmarkSettings:
    from pydantic import ValidationError

    from tocom.settings import explain

    try:
        return BenchmarkSettings.model_validate(values)
    except ValidationError as error:
        raise explain(error, "tocom benchmark") from None


def _scales(texts: list[str] | None) -> dict[str, list[float]]:
    try:
        pairs = [text.split("=", 1) for text in texts or []]
        return {name: [float(part) for part in values.split(",")] for name, values in pairs}
    except ValueError:
        raise TocomError(f"--scales {texts}: write NAME=A,B, for example --scales half=0.5") from None


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Run the command line; a TocomError is one line on standard error and exit status 1."""
    try:
        app()
    except TocomError as error:
        print(f"tocom: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
