"""The studies, and what the names of files mean."""

import re
from pathlib import Path

from tocom.checks import check_study, claim
from tocom.console import Console
from tocom.errors import TocomError
from tocom.jobs import Plan
from tocom.study import read_config

CONSOLE = Console.attach(workflow)
try:
    if {"{", "}"} & set(str(workflow.basedir)):
        raise TocomError(
            f"{workflow.basedir} has braces in its path, which Snakemake takes for wildcards; rename it"
        )
    # Snakemake's own reader keeps the last of a key that is given twice, and says nothing.
    for _path in workflow.config_settings.configfiles or []:
        read_config(_path)
    PLAN = Plan.of(config)
except TocomError as error:
    raise WorkflowError(str(error)) from None
CLAIMED = []
CONSOLE.studies = {name: study.root for name, study in PLAN.studies.items()}


onstart:
    # Not for a dry run: a study can be planned before its files are there.
    try:
        for _study in PLAN.studies.values():
            check_study(_study)
        # Where none is made, all that follows starts from what is there.
        if not CONSOLE.makes_backbones:
            PLAN.check_backbones()
        CLAIMED.append(claim(PLAN.studies.values(), CONSOLE.made_in_stores))
    except TocomError as error:
        raise WorkflowError(str(error)) from None


onsuccess:
    CONSOLE.succeed()
    while CLAIMED:
        CLAIMED.pop().close()


onerror:
    CONSOLE.fail()
    while CLAIMED:
        CLAIMED.pop().close()


ROOT = "results/{study}"
STUDY = f"{ROOT}/study.json"
FETCHED = "{data}/{dataset}/.complete.json"
DATA = f"{ROOT}/data/{{task}}.safetensors"
BACKBONE = "{store}/backbones/{backbone}.safetensors"
LEARNED = "{store}/learned/{backbone}/{part}.safetensors"
CHECKPOINTS = f"{ROOT}/checkpoints/{{backbone}}/{{tuned}}/{{task}}/{{batch}}"
ADAPTED = f"{ROOT}/adapted/{{backbone}}/{{method}}/{{task}}/{{batch}}"
PREDICTIONS = (
    f"{ROOT}/predictions/{{backbone}}/{{tuned}}/{{task}}/{{batch}}.safetensors"
)
TRANSFER = f"{ROOT}/transfer/{{backbone}}/{{tuned}}.csv"
THROUGHPUT = f"{ROOT}/throughput/{{backbone}}/{{tuned}}.csv"
TABLES = [
    "main",
    "tasks",
    "significance",
    "mismatch",
    "methods",
    "variance",
    "costs",
    "throughput",
]
try:
    ALL_CORES = workflow.cores
except (
    WorkflowError
):  # submissions and reports are planned without a number of local cores
    ALL_CORES = 1


def any_of(names):
    """Return a regular expression for a wildcard that is one of some names."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    study=any_of(PLAN.studies),
    store=any_of(PLAN.stores),
    data=any_of(PLAN.data_roots),
    dataset=r"[^/]+",
    backbone=r"[^/]+",
    part=r"[^/]+",
    tuned=r"[^/]+",
    method=r"[^/]+",
    task=r"[^/]+",
    batch=r"batch-\d+",


def growing(amount):
    """Return a resource that a job asks more of on every retry."""
    return lambda wildcards, attempt: amount * attempt


def gpus(job, settings):
    """Return the GPUs that a job asks for by itself: one if its device is cuda; profiles may set more."""
    return lambda wildcards: int(settings(job(wildcards)).device.startswith("cuda"))


def named(option, names, files):
    """Return OPTION NAME=FILE for every input file, wherever storage placed it."""
    return " ".join(f"{option} {name}={file}" for name, file in zip(names, files))


def folder_of(study):
    """Return the folder that study.json, wherever storage placed it, is in."""
    return str(Path(study).parent)


def analysed(wildcards):
    """Return the files that tables and figures are made of."""
    names = ["cells", "significance", "harm", "mismatch", "pairwise", "throughput"]
    names += ["transfer"] if PLAN.study(wildcards).transfer else []
    root = ROOT.format(study=wildcards.study)
    return {"study": f"{root}/study.json"} | {
        name: f"{root}/{name}.csv" for name in names
    }


def made_by(study):
    """Return what is not committed with results: named as inputs of the targets, because Snakemake would not make it
    again for results that exist, and a fresh clone would pass committed tables off as reproduced.
    """
    kinds = {PREDICTIONS: "checkpoints", THROUGHPUT: "speed", TRANSFER: "gaps"}
    return [
        path
        for pattern, of in kinds.items()
        for path in PLAN.per_model(PLAN.studies[study], pattern, of)
    ]


def results_of(study):
    """Return the tables and figures of a study."""
    it = PLAN.studies[study]
    names = [
        "study.json",
        "cells.csv",
        "significance.csv",
        "harm.csv",
        "costs.csv",
        "mismatch.csv",
        "pairwise.csv",
        "throughput.csv",
    ]
    names += ["figures"]
    names += [
        f"tables/{name}.md" for name in [*TABLES, *(["paper"] if it.paper else [])]
    ]
    names += ["transfer.csv"] if it.transfer else []
    return [f"results/{study}/{name}" for name in names]
