"""The command line: each stage of a study as a command, and a look at what there is to study."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from tocom.cli_analyse import app as analyse
from tocom.cli_common import BackboneOption, JobArgument, Output, Sets, grouped, pairs, say, table
from tocom.cli_data import data
from tocom.errors import TocomError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Token compression of Vision Transformers and its compensation: learn, fine-tune, evaluate, analyse. "
    "`snakemake --cores all` runs all of it; these commands run one stage each.",
)
app.add_typer(analyse, name="analyse")
app.add_typer(data, name="data")

DataOption = Annotated[Path, typer.Option("--data", help="A prepared task (`tocom prepare`).")]
Compensators = Annotated[
    Optional[list[str]],
    typer.Option("--compensator", metavar="METHOD=FILE", help="A method's compensator. Repeatable."),
]
CompensatorsBySeed = Annotated[
    Optional[list[str]],
    typer.Option(
        "--compensator",
        metavar="METHOD=FILE",
        help="A method's compensator. Repeatable, for a method too: a model gets the one learned with its seed.",
    ),
]
CheckpointOption = Annotated[
    list[Path], typer.Option("--checkpoint", help="A fine-tuned model, or a folder of them. Repeatable.")
]
Learned = Annotated[Optional[Path], typer.Option(help="File of the compressor, if it is one that is learned.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode and augment images.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes on each node that train one model together.")]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes that train one model together (under Slurm).")]


# --- stages -----------------------------------------------------------------------------------------------------------


@app.command()
def prepare(job: JobArgument, output: Output, sets: Sets = None) -> None:
    """Decode a task once and write its splits."""
    from tocom.data.glyphs import SIZE
    from tocom.data.registry import prepare as stage
    from tocom.jobs import PrepareJob, read_job

    it = read_job(PrepareJob, job, sets or ())
    sizes = {"train": it.data.train, "val": it.data.val, "test": it.data.test}
    options = {"source": it.source or None, "root": it.data.root, "decode_train": it.decode_train, "job": it}
    about = stage(it.task, output, sizes, it.data.image_size or SIZE, resize=it.data.resize, **options)
    say(f"{it.task}: {about['classes']} classes, {about['sizes']}, {about['source']}")


@app.command()
def backbone(job: JobArgument, output: Output, sets: Sets = None) -> None:
    """Turn a timm model with its public weights, or with yours, into a backbone of this project."""
    from tocom.jobs import ImportJob, read_job
    from tocom.models import import_backbone

    about = import_backbone(output, **read_job(ImportJob, job, sets or ()).model_dump())
    say(f"{output}: {about['architecture']}")


@app.command()
def pretrain(
    output: Output, job: JobArgument = "{}", sets: Sets = None, processes: Processes = 1, nodes: Nodes = 1
) -> None:
    """Pre-train a backbone on procedural letters (the bundled one took this command), or a language model on text."""
    from tocom.distributed import launch
    from tocom.jobs import PretrainJob, read_job
    from tocom.stages.pretrain import pretrain as stage

    it = read_job(PretrainJob, job, sets or ())
    launch(processes, nodes, it.settings.device)
    about = stage(it, output)
    figure = about["figure"]
    say(f"held-out {figure.replace('_', ' ')} by degree: {about[figure]} after {about['minutes']:.1f} minutes")


def _held_out(about: dict) -> str:
    before, after = about["held_out_kl_without"], about["held_out_kl"]
    return f"held-out loss {before:.4f} -> {after:.4f} nats (best epoch {about['best_epoch']})"


@app.command()
def learn(
    job: JobArgument,
    backbone: BackboneOption,
    output: Output,
    learned: Learned = None,
    sets: Sets = None,
    workers: Workers = 0,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Learn a compensator (or a compressor) on a frozen backbone with one seed, for all tasks."""
    from tocom.distributed import launch
    from tocom.jobs import LearnJob, read_job
    from tocom.stages.learn import learn as stage

    it = read_job(LearnJob, job, sets or ())
    launch(processes, nodes, it.settings.device)
    about = stage(it, backbone, output, learned, workers)
    say(_held_out(about))
    if about["held_out_kl"] >= about["held_out_kl_without"]:
        say("WARNING: it is no better than without; every model will do best to decline it. Change the learn section")


@app.command()
def finetune(
    job: JobArgument,
    backbone: BackboneOption,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoints.")],
    learned: Annotated[
        Optional[list[Path]],
        typer.Option(help="File of the compressor, if it is one that is learned. Repeatable: one of each seed."),
    ] = None,
    sets: Sets = None,
    workers: Workers = 0,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Fine-tune a backbone for a task, at one or more train degrees and seeds."""
    from tocom.distributed import launch
    from tocom.jobs import FinetuneJob, read_job
    from tocom.stages.finetune import finetune as stage

    it = read_job(FinetuneJob, job, sets or ())
    launch(processes, nodes, it.training.device)
    for about in stage(it, backbone, data, output, learned, workers):
        say(
            f"train degree {about['train_degree']}, seed {about['seed']}: best epoch {about['best_epoch']}, validation"
            f" score {about['val_score']:.3f}"
        )


@app.command()
def adapt(
    job: JobArgument,
    checkpoint: CheckpointOption,
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the adapted compensators.")],
    learned: Annotated[
        Optional[list[Path]], typer.Option(help="Compensator to start from. Repeatable: one of each seed.")
    ] = None,
    sets: Sets = None,
    workers: Workers = 0,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Adapt a compensator to fine-tuned models, on images of their task without labels."""
    from tocom.distributed import launch
    from tocom.jobs import AdaptJob, read_job
    from tocom.stages.adapt import adapt as stage

    it = read_job(AdaptJob, job, sets or ())
    launch(processes, nodes, it.settings.device)
    for about in stage(it, checkpoint, data, output, learned, workers):
        say(f"train degree {about['train_degree']}, seed {about['seed']}: {_held_out(about)}")


@app.command()
def evaluate(
    job: JobArgument,
    checkpoint: CheckpointOption,
    data: DataOption,
    output: Output,
    compensator: CompensatorsBySeed = None,
    sets: Sets = None,
) -> None:
    """Evaluate every cell (method, inference degree) of some checkpoints of one task."""
    from tocom.jobs import EvaluateJob, read_job
    from tocom.stages.evaluate import evaluate as stage

    it = read_job(EvaluateJob, job, sets or ())
    stage(it, checkpoint, data, grouped(compensator, "--compensator"), output)


@app.command()
def transfer(
    job: JobArgument,
    data: Annotated[list[str], typer.Option(metavar="TASK=FILE", help="A prepared task. Repeatable.")],
    checkpoints: Annotated[list[str], typer.Option(metavar="TASK=FOLDER", help="Its checkpoints. Repeatable.")],
    output: Output,
    sets: Sets = None,
) -> None:
    """Carry every task's gap between two degrees to other tasks, and write a CSV of what comes of it."""
    from tocom.files import checkpoint_files, write_rows
    from tocom.jobs import TransferJob, read_job
    from tocom.made import seal
    from tocom.stages.transfer import transfer as stage

    tasks, folders = pairs(data, "--data"), grouped(checkpoints, "--checkpoints")
    write_rows(stage(read_job(TransferJob, job, sets or ()), tasks, folders), output)
    models = [file for names in folders.values() for name in names for file in checkpoint_files(name)]
    seal(output, [*tasks.values(), *models])


@app.command()
def throughput(
    job: JobArgument,
    backbone: BackboneOption,
    output: Output,
    compensator: Compensators = None,
    learned: Learned = None,
    sets: Sets = None,
) -> None:
    """Measure images a second and memory at each degree, with and without compensators, side by side."""
    from tocom.files import write_rows
    from tocom.hub import locate
    from tocom.jobs import ThroughputJob, read_job
    from tocom.made import seal
    from tocom.stages.throughput import throughput as stage

    it, added = read_job(ThroughputJob, job, sets or ()), pairs(compensator, "--compensator")
    files = [locate(place)[0] for place in added.values()]
    write_rows(stage(it, backbone, added, learned), output)
    seal(output, [*files, *([] if learned is None else [learned])])


@app.command()
def benchmark(
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    backbone: Annotated[
        Optional[list[str]],
        typer.Option(help="A timm ViT; its weights are random. Repeatable; by default DeiT-Ti, S and B."),
    ] = None,
    degree: Annotated[
        Optional[list[int]],
        typer.Option(help="Degree; 0 is always among them. Repeatable; by default 0, 8, 13 and 16."),
    ] = None,
    precision: Annotated[
        Optional[list[str]], typer.Option(help="Repeatable; by default fp32 and bf16.", metavar="[fp32|bf16|fp16]")
    ] = None,
    training: Annotated[
        Optional[list[str]],
        typer.Option(help="A backbone whose training is measured, too. Repeatable; by default all."),
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder of the tables; by default results/gpu or /cpu.")
    ] = None,
    sets: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting; see `tocom settings benchmark`. Repeatable."
        ),
    ] = None,
) -> None:
    """Measure each stage beside an eager reference, time and memory, and what a study takes beside its stages."""
    from tocom.jobs import read_job
    from tocom.settings import BenchmarkSettings
    from tocom.stages.benchmark import BACKBONES, DEGREES, PRECISIONS
    from tocom.stages.benchmark import benchmark as stage

    output = output or Path("results", "cpu" if device == "cpu" else "gpu")
    settings = read_job(BenchmarkSettings, "{}", [f"device={device}", *(sets or ())])
    chosen = backbone or BACKBONES, degree or DEGREES, precision or PRECISIONS
    status = stage(output, *chosen, settings, training).status
    typer.echo((output / "benchmark.md").read_text() + "\n" + (output / "overheads.md").read_text())
    counts = ", ".join(f"{count} {name}" for name, count in status.value_counts().items())
    say(f"{output / 'benchmark.md'}: of {len(status)} lines, {counts}")


@app.command("serve-bench")
def serve_bench(
    checkpoint: Annotated[Path, typer.Option(help="A fine-tuned model.")],
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for CSV files, a table and a figure.")],
    job: JobArgument = "{}",
    compensator: Compensators = None,
    curve: Annotated[
        Optional[Path], typer.Option(help="What batches take (a curve.csv); nothing is timed then.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Replay a changing load against fixed degrees and the adaptive choice: deadlines met, accuracy kept."""
    from tocom.jobs import ServeJob, read_job
    from tocom.stages.serve import serve_bench as stage

    it = read_job(ServeJob, job, sets or ())
    stage(it, checkpoint, data, pairs(compensator, "--compensator"), output, curve)
    typer.echo((output / "serving.md").read_text(encoding="utf-8"))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A fine-tuned model, or a backbone.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .onnx, or .pt2 for torch.export.")],
    degree: Annotated[Optional[int], typer.Option(help="Degree; by default the one it was trained at.")] = None,
    compensator: Annotated[Optional[str], typer.Option(help="A compensator's file, which is folded in.")] = None,
    scale: Annotated[Optional[float], typer.Option(help="Factor on its update; by default as it was learned.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="The only size of a batch; else any.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest difference from the model, of the largest logit, to keep the file.")
    ] = 1e-4,
) -> None:
    """Write a model at one degree as a program for ONNX runtimes or torch.export, and compare it with the model."""
    from tocom.exports import export as written
    from tocom.serving import load_compressed

    model = load_compressed(checkpoint, compensator, "cpu")
    model.set_degree(model.degree if degree is None else degree, scale)
    found = written(model, output, batch_size, tolerance)
    say(
        f"{output}: degree {model.degree}, largest difference {found.largest:.2g}, {found.relative:.1g} of the largest"
        " logit"
    )


@app.command("import")
def import_public(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth or .safetensors in the layout of a method's public code.")],
    output: Output,
    steps: Annotated[int, typer.Option(help="Number of steps of one degree in it.")] = 16,
    trained_scale: Annotated[float, typer.Option(help="Scale it was trained at.")] = 0.1,
    kind: Annotated[Optional[str], typer.Option(help="The compensator; by default that of the paper.")] = None,
) -> None:
    """Turn a compensator of its public code into one of ours."""
    from tocom.methods import DEFAULTS
    from tocom.parts import part_class, save_part

    kind = kind or DEFAULTS["compensator"]
    part = part_class("compensator", kind)
    if not hasattr(part, "from_public"):
        raise TocomError(f"{kind} has no public files to import; learn one (`tocom learn`)")
    save_part(output, part.from_public(checkpoint, steps, trained_scale))
    info(output)


# --- what there is ----------------------------------------------------------------------------------------------------


@app.command()
def methods() -> None:
    """List the parts that methods are made of: reference, degree axis and what falls, what they train and need."""
    from tocom.methods import PARTS
    from tocom.parts import part_class

    for role, names in PARTS.items():
        classes = {name: part_class(role, name) for name in names}
        degree = {"degree": "axis", "saves": "saves"} if role == "compressor" else {}
        said = {"title": "title", "reference": "reference"} | degree | {"trains": "trains", "needs": "needs"}
        rows = [(name, *(getattr(cls, what) for what in said.values())) for name, cls in classes.items()]
        table((role, *said), rows)


@app.command()
def settings(
    section: Annotated[
        Optional[str], typer.Argument(help="One of them, such as finetune or compensator.tocom.")
    ] = None,
) -> None:
    """List the settings of each stage and the options of each part, for --set and for configs."""
    from tocom import settings as module
    from tocom.errors import suggest
    from tocom.methods import PARTS
    from tocom.parts import part_class

    kinds = dict(module.STAGES)
    kinds |= {f"{role}.{name}": part_class(role, name).Options for role, names in PARTS.items() for name in names}
    if section is not None and section not in kinds:
        raise TocomError(f"there are no settings {section!r}{suggest(section, kinds)}; there are: {', '.join(kinds)}")
    for title, kind in kinds.items() if section is None else [(section, kinds[section])]:
        rows = [(name, json.dumps(default), kind.meaning(name)) for name, default in kind().recipe().items()]
        if rows or section:
            typer.echo(f"\n{title}")
            table(("setting", "default", "meaning"), rows)


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="Filter on timm's names, e.g. 'deit*'.")] = "*vit*") -> None:
    """List bundled backbones, and timm's models of the supported family (a few have parts that are refused)."""
    from tocom.bundled import BUNDLED
    from tocom.models import compressible

    table(("bundled backbone", "file"), [(name, path.name) for name, path in BUNDLED.items()])
    table(("timm model", "module"), compressible(pattern))


@app.command()
def tasks() -> None:
    """List the downstream tasks that need no download; `tocom data list` lists the others."""
    from tocom.data.registry import TASKS

    rows = [(name, str(task.classes), task.kind, task.group, task.source) for name, task in TASKS.items()]
    table(("task", "classes", "kind", "group", "source"), rows)


@app.command()
def info(path: Annotated[str, typer.Argument(help="A checkpoint, compensator, prepared task or predictions.")]) -> None:
    """Print what a file of this project says of itself."""
    from tocom.bundled import resolve
    from tocom.files import load_arrays

    arrays, metadata = load_arrays(resolve(path))
    rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in sorted(metadata.items())]
    size = f"{len(arrays)}, {sum(array.nbytes for array in arrays.values()) / 1e6:.2f} MB"
    table(("key", "value"), [*rows, ("tensors", size)])


@app.command()
def trace(
    path: Annotated[Path, typer.Argument(help="A table, figure, CSV, predictions, a checkpoint; or a study's folder.")],
) -> None:
    """Walk from a file back to checkpoints, backbone and images, and hash each; exit status 1 at the first change."""
    from rich.console import Console

    from tocom.trace import trace as walk

    traced = walk(path)
    Console(soft_wrap=True).print(traced.tree)
    if traced.error is not None:
        raise traced.error
    gone = f"; {len(traced.gone)} are not here to be looked at" if traced.gone else ""
    say(f"{len(traced.here)} files are what they were when they were made{gone}")


@app.command()
def init(
    config: Annotated[Path, typer.Argument(help="The YAML file to write; its name becomes the study's.")],
    folder: Annotated[Optional[str], typer.Option(help="Your images, a subfolder a class; else bundled ones.")] = None,
    model: Annotated[Optional[str], typer.Option(help="A timm ViT; else the bundled one.")] = None,
) -> None:
    """Write a commented config to start from, for a folder of images or a model of yours."""
    from tocom.files import write_text
    from tocom.starting import first_config

    if config.exists():
        raise TocomError(f"{config} is there already; name another file, or remove it")
    write_text(config, first_config(config, folder, model))
    say(f"{config} is written; now: tocom check {config}")


@app.command()
def check(config: Annotated[list[Path], typer.Argument(help="Studies' YAML files.")]) -> None:
    """Validate configs, look at every file and folder that they name, and say how much work they stand for."""
    from tocom.checks import check_study
    from tocom.jobs import read_studies
    from tocom.plan import checkpoints_of

    for study in read_studies(config):
        check_study(study)
        n = checkpoints_of(study)
        say(f"study {study.study!r} is valid: {len(study.methods)} methods, {n} checkpoints")


@app.command()
def plan(
    configs: Annotated[list[Path], typer.Argument(help="Configs of studies, which share what they can.")],
    rates: Annotated[Optional[Path], typer.Option(help="A benchmark.csv of the machine that will run them.")] = None,
    device: Annotated[Optional[str], typer.Option(help="Device to measure on; by default the first study's.")] = None,
) -> None:
    """Print the jobs, images, hours and disk space that some studies will take, and which gain each can detect."""
    from tocom.plan import show_plan

    show_plan(configs, rates, device)


@app.command()
def schema(output: Output) -> None:
    """Write the JSON schema of a config, which editors use to complete and check."""
    from tocom.files import write_text
    from tocom.study import Study

    write_text(output, json.dumps(Study.model_json_schema(), indent=2) + "\n")


@app.command()
def study(job: Annotated[str, typer.Argument(help="A config, as JSON or a YAML file.")], output: Output) -> None:
    """Write a validated config as study.json, from which all analysis starts."""
    from tocom.files import write_text
    from tocom.made import seal
    from tocom.study import parse_study, read_mapping

    write_text(output, parse_study(read_mapping(job)).as_json() + "\n")
    seal(output)


def main() -> None:
    """Run the command line; a TocomError is one line on standard error and exit status 1."""
    try:
        app()
    except TocomError as error:
        print(f"tocom: error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # such as a path that is too long, or one that may not be read
        if error.filename is None:
            raise
        print(f"tocom: error: {TocomError(f'{error.filename}: {error.strerror}; check the path')}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
