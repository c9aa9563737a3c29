"""The validated study, the folders, and what several rules ask of them."""

from pathlib import Path

from tocom.bundled import resolve
from tocom.config import parse_study
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
COMPENSATOR = f"{ROOT}/compensators/{{backbone}}/{{compressor}}.safetensors"
DATA = f"{ROOT}/data/{{task}}.safetensors"
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


def gpus(settings):
    """Return the GPUs that a stage's job asks for: one if its device is CUDA; a profile says how to get it."""
    return int(settings.device.startswith("cuda"))


def backbone_file(wildcards):
    """Return the bundled or given checkpoint of a backbone, or the one that this workflow pre-trains."""
    backbone = STUDY.backbone(wildcards.backbone)
    return (
        str(resolve(backbone.checkpoint))
        if backbone.checkpoint
        else f"{ROOT}/backbones/{backbone.name}.safetensors"
    )


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
INTERMEDIATE = [
    *ALL_PREDICTIONS,
    *per_model(f"{ROOT}/throughput/{{backbone}}/{{compressor}}.csv"),
]
if STUDY.gap_degrees:
    INTERMEDIATE += per_model(f"{ROOT}/transfer/{{backbone}}/{{compressor}}.csv")
RESULTS = [f"{ROOT}/{name}.csv" for name in STUDY.csv_names] + TABLES + FIGURES
