"""The validated study, the folders, and what several rules ask of them."""

import re
from pathlib import Path

from tocom.bundled import resolve
from tocom.config import parse_study
from tocom.data.catalogue import owner_of, read_catalogue
from tocom.errors import TocomError

try:
    STUDY = parse_study(config, "config")
except TocomError as error:
    raise WorkflowError(str(error)) from None

ROOT = f"results/{STUDY.study}"
LOGS = f"{ROOT}/logs"
BENCHMARKS = f"{ROOT}/benchmarks"
CHECKPOINT = f"{ROOT}/checkpoints/{{backbone}}/{{compressor}}/{{task}}/train-{{train_degree}}_seed-{{seed}}.safetensors"
PREDICTIONS = f"{ROOT}/predictions/{{backbone}}/{{compressor}}/{{task}}/train-{{train_degree}}_seed-{{seed}}.safetensors"
# Studies may share backbones and compensators, which are the same for all of them.
STORE = STUDY.store or ROOT
BACKBONE = f"{STORE}/backbones/{{backbone}}.safetensors"
COMPENSATOR = (
    f"{STORE}/compensators/{{backbone}}/{{compressor}}/{{variant}}.safetensors"
)
DATA = f"{ROOT}/data/{{task}}.safetensors"
# Written last by `tocom data fetch`.
FETCHED = f"{STUDY.data.root}/{{dataset}}/.complete.json"
try:
    ALL_CORES = workflow.cores
except (
    WorkflowError
):  # reports and cluster submissions are planned without a number of local cores
    ALL_CORES = STUDY.throughput.threads


wildcard_constraints:
    backbone=r"[^/]+",
    compressor=r"[^/]+",
    task=r"[^/]+",
    variant=r"[^/]+",
    dataset=r"[^/]+",
    train_degree=r"\d+|random",
    seed=r"\d+",


def over(pattern, checkpoints):
    """Fill in the train degree and seed of some checkpoints; other wildcards stay."""
    return [
        pattern.replace("{train_degree}", str(c.train_degree)).replace(
            "{seed}", str(c.seed)
        )
        for c in checkpoints
    ]


def options(name, values):
    """Repeat a command-line option for every value."""
    return " ".join(f"--{name} {value}" for value in values)


def placed(path, known):
    """Return where a job finds a path of the study, as it does an input or output of its own: storage has copies."""
    return known.partition(ROOT)[0] + path


def memory(stage):
    """Return the memory (MB) that a job of a stage asks for, more on every retry."""
    return lambda wildcards, attempt: getattr(STUDY.resources, stage).mem_mb * attempt


def minutes(stage):
    """Return the minutes that a job of a stage asks for, more on every retry."""
    return lambda wildcards, attempt: getattr(STUDY.resources, stage).runtime * attempt


def cores(stage, training):
    """Return the CPU cores that a training job asks for; ``training`` gives its settings."""
    return lambda wildcards: STUDY.threads(stage, training(wildcards))


def any_of(names):
    """Return a regular expression for a wildcard that is one of some names."""
    return "|".join(map(re.escape, names)) or "(?!)"


def fetched(name):
    """Return the mark that a data set of the catalogue was downloaded; other names need none."""
    catalogue = read_catalogue()
    return (
        [FETCHED.format(dataset=owner_of(name, catalogue))] if name in catalogue else []
    )


def backbone_file(wildcards):
    """Return the bundled or given checkpoint of a backbone, or the one that this workflow makes."""
    backbone = STUDY.backbone(wildcards.backbone)
    return (
        BACKBONE.format(backbone=backbone.name)
        if backbone.is_made
        else str(resolve(backbone.checkpoint))
    )


def compensator_files(wildcards):
    """Return the file of every variant of ToCom; variants that differ in scales alone share one."""
    return [
        COMPENSATOR.format(
            backbone=wildcards.backbone,
            compressor=wildcards.compressor,
            variant=STUDY.distilled_as(variant),
        )
        for variant in STUDY.variants
    ]


def per_model(pattern, **wildcards):
    """Expand a pattern over backbones and compressors."""
    return expand(
        pattern,
        backbone=[b.name for b in STUDY.backbones],
        compressor=STUDY.compressors,
        **wildcards,
    )


def grid_options():
    """Name every point of the study's grid."""
    return " ".join(
        [
            options("backbone", [b.name for b in STUDY.backbones]),
            options("compressor", STUDY.compressors),
            options("task", STUDY.task_names),
            options("train-degree", STUDY.train_degrees),
            options("seed", STUDY.seeds),
        ]
    )


def gap_checkpoints(wildcards):
    """Return every task's checkpoints at the lowest and at the highest train degree."""
    model = {"backbone": wildcards.backbone, "compressor": wildcards.compressor}
    return expand(
        CHECKPOINT,
        task=STUDY.task_names,
        seed=STUDY.seeds,
        train_degree=STUDY.gap_degrees,
        **model,
    )


ALL_PREDICTIONS = [
    path
    for checkpoint in over(PREDICTIONS, STUDY.checkpoints)
    for path in per_model(checkpoint, task=STUDY.task_names)
]
# The one of the main tables and figures.
MAIN = STUDY.distilled_as(STUDY.variants[0])
TABLES = [
    f"{ROOT}/tables/{name}.{kind}"
    for name in STUDY.table_names
    for kind in ("md", "tex")
]
FIGURES = [
    f"{ROOT}/figures/{name}.{kind}"
    for name in STUDY.figure_names
    for kind in ("png", "pdf")
]
# Not committed with the demo's results. They are named as inputs of the targets, because Snakemake would not make them
# again for results that exist, and a fresh clone would pass the committed tables off as reproduced.
ALL_COMPENSATORS = [
    (
        f"{b.name}:{compressor}:{variant}",
        COMPENSATOR.format(
            backbone=b.name,
            compressor=compressor,
            variant=STUDY.distilled_as(variant),
        ),
    )
    for b in STUDY.backbones
    for compressor in STUDY.compressors
    for variant in STUDY.variants
]
THROUGHPUT = per_model(f"{ROOT}/throughput/{{backbone}}/{{compressor}}.csv")
TRANSFER = (
    per_model(f"{ROOT}/transfer/{{backbone}}/{{compressor}}.csv")
    if STUDY.gap_degrees
    else []
)
INTERMEDIATE = [*ALL_PREDICTIONS, *THROUGHPUT, *TRANSFER]
RESULTS = [f"{ROOT}/{name}.csv" for name in STUDY.csv_names] + TABLES + FIGURES
