"""What a study takes beside its forward passes and training steps (`tocom benchmark`), each as a ratio.

A grid of evaluations over the bare forward passes that it contains; the whole workflow over its jobs; the start of a
job over that of torch and timm, which every job needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tocom.analysis.tables import NOT_RUN, Table, Text
from tocom.jobs import EvaluateJob
from tocom.methods import DEFAULTS
from tocom.models import load_model, save_model
from tocom.parts import described, make_part, save_part
from tocom.settings import BenchmarkSettings
from tocom.stages.evaluate import evaluate_checkpoint
from tocom.stages.throughput import now, seconds
from tocom.stages.works import Subject
from tocom.tasks.classify import Classification
from tocom.training import bar, inference
from tocom.vit import CompressedViT

ROOT = Path(__file__).parents[2]
#: A study of almost no data, by whose workflow the workflow is measured; it is there in a clone.
STUDY = ROOT / "tests" / "configs" / "tiny.yaml"
GRID, WORKFLOW, IDLE, START = (
    "17 degrees with and without ToCom, over their forward passes",
    "a small study on one core, over its jobs",
    "the same with nothing to do",
    "start-up of",
)
#: What is started -> what its process runs. The first is what the others are compared with.
STARTS = {
    "import torch, timm": "import torch, timm",
    "import tocom": "import tocom",
    "tocom --help": "import tocom.cli",
    "tocom analyse tables": "import tocom.cli, tocom.analysis.tables",
    "tocom finetune": "import tocom.cli, tocom.stages.finetune",
    "tocom learn": "import tocom.cli, tocom.stages.learn",
    "tocom evaluate": "import tocom.cli, tocom.stages.evaluate",
}


def measure(settings: BenchmarkSettings, device: torch.device, rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Yield rows: ``what``, its ``ratio`` (median) with ``low`` and ``high`` (quartiles), ``seconds`` (median)."""
    yield grid(settings, device, rounds)
    yield from starts(rounds)
    if STUDY.is_file() and find_spec("snakemake"):
        yield from workflow()


def grid(
    settings: BenchmarkSettings,
    device: torch.device,
    rounds: int = 3,
    degrees: range = range(17),
    images: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Measure the evaluation of a checkpoint at some degrees, plain and compensated, candidate scales included.

    On a CPU the bundled ViT, in float32, on a GPU DeiT-S, in the settings' precision, each on random images.

    Args:
        images: numbers of validation and test images.
    """
    small = device.type == "cpu"
    precision, batch = ("fp32", 64) if small else (settings.precision, settings.batch_size)
    n_val, n_test = images or ((200, 800) if small else (2 * batch, 8 * batch))  # on a CPU the demo's
    with tempfile.TemporaryDirectory() as name:
        checkpoint, compensator = Path(name, "train-0_seed-0.safetensors"), Path(name, "tocom.safetensors")
        model, job = _grid_inputs(checkpoint, compensator, degrees, precision, batch, device, settings.threads)
        task = _random_task(n_val, n_test, model.num_classes, model.patch_embed.img_size[0], device)
        vit = CompressedViT(model.to(device)).eval()
        ratios, times = [], []
        for _ in range(rounds + 1):  # the first one warms up
            with bar(None, "grid", total=2 * len(degrees)) as progress:
                begin = now(device)
                cells = evaluate_checkpoint(checkpoint, task, job, {"added": compensator}, progress)
                times.append(now(device) - begin)
            ratios.append(times[-1] / _bare_seconds(vit, task, [cell for cell, _ in cells], job.settings, device))
    return _row(GRID, ratios[1:], times[1:])


def _grid_inputs(checkpoint, compensator, degrees, precision, batch, device, threads):
    """Write a model and a compensator of random weights; return the model and the job that evaluates them."""
    if device.type == "cpu":
        model, about = load_model("glyph_vit")
        architecture, kwargs = about["architecture"], about["kwargs"]
    else:
        architecture, kwargs = "deit_small_patch16_224", {"num_classes": 100}
        model = Subject(architecture, kwargs).vit(torch.device("cpu")).model
    made = {"task": "random", "group": "", "train_degree": "0", "seed": 0, "backbone_sha256": ""}
    save_model(
        checkpoint,
        model,
        architecture,
        kwargs,
        compressor=described("compressor", DEFAULTS["compressor"]),
        max_degree=max(degrees),
        **made,
    )
    part = make_part("compensator", DEFAULTS["compensator"], CompressedViT.shape_of(model), max(degrees))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=0.01)
    save_part(compensator, part)
    plain = {"infer_degrees": list(degrees)}
    how = {"precision": precision, "batch_size": batch, "device": str(device), "threads": threads}
    job = {"backbone": "random", "methods": {"plain": plain, "added": plain | {"compensated": True}}, "settings": how}
    return model, EvaluateJob.model_validate(job)


def _random_task(n_val: int, n_test: int, classes: int, side: int, device: torch.device) -> Classification:
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 1), ("val", n_val), ("test", n_test)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, classes, n)
    return Classification("random", arrays, {"task": "random", "group": "", "classes": classes}, device)


def _bare_seconds(vit: CompressedViT, task: Classification, cells: list[dict], settings, device) -> float:
    """Return the time of all forward passes that a grid contains: those of each cell, and of each candidate scale."""
    splits = {}
    for name, split in (("val", task.val_split), ("test", task.test_split)):
        splits[name] = [vit.inputs(batch, vit.model) for batch in split.images.split(settings.batch_size)]
    total = 0.0
    with inference(vit, settings.precision, device):
        for degree in {cell["infer_degree"] for cell in cells}:
            vit.set_degree(degree)
            once = {
                name: seconds(lambda batches=batches: [vit(batch) for batch in batches], device)
                for name, batches in splits.items()
            }
            for cell in cells:
                if cell["infer_degree"] == degree:
                    chosen = cell["compensated"] and degree != 0
                    total += once["val"] * len(settings.scales) * chosen
                    total += once["test"] * (not cell["compensated"] or cell["scale"] != 0)
    return total


def starts(rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Measure how long a process takes until a command's code is there, all commands in turns."""
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    for number in range(rounds + 1):
        for name, code in STARTS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, env=environment)
            if number:  # the first round fills the disk's cache
                times[name].append(time.perf_counter() - begin)
    base = np.array(times[next(iter(STARTS))])
    for name, took in times.items():
        yield _row(f"{START} `{name}`, over that of torch and timm", np.array(took) / base, took)


def workflow() -> Iterator[dict[str, Any]]:
    """Measure the workflow of :data:`STUDY` on one core over the sum of its jobs, and once more when all is made."""
    with tempfile.TemporaryDirectory() as name:
        for part in ("Snakefile", "workflow", "profiles", "config"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, Path(name, part))
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", str(STUDY)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        took = []
        for _ in range(2):
            begin = time.perf_counter()
            subprocess.run(
                command, cwd=name, env=os.environ | {"PATH": path}, check=True, capture_output=True, timeout=1200
            )
            took.append(time.perf_counter() - begin)
        rows = [pd.read_csv(file, sep="\t") for file in Path(name).rglob("benchmarks/**/*.tsv")]
    jobs = float(sum(row["s"].sum() for row in rows))
    yield _row(f"{WORKFLOW} ({len(rows)})", [took[0] / jobs], took[:1])
    yield _row(IDLE, [took[1] / jobs], took[1:])


def _row(what: str, ratios, times) -> dict[str, Any]:
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {"what": what, "ratio": ratio, "low": low, "high": high, "seconds": float(np.median(times))}


def tabulated(rows: list[dict[str, Any]], about: Mapping[str, Any]) -> tuple[pd.DataFrame, Table]:
    """Return the rows, with the device and versions, and their table."""
    frame = pd.DataFrame(rows, columns=["what", "ratio", "low", "high", "seconds"])
    texts = [
        [Text(row.what), Text(f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]"), Text(f"{row.seconds:.2f}")]
        for row in frame.itertuples()
    ]
    texts = texts or [[Text("all"), Text(NOT_RUN), Text(NOT_RUN)]]
    where = f"Measured on {about['device']} with torch {about['torch']}" if "device" in about else "Not run"
    caption = (
        f"{where}. Medians and quartiles over rounds; ratios are of times within a round. The grid: a checkpoint is"
        " loaded and evaluated at each degree plainly and with ToCom, at each candidate scale on validation images; its"
        " forward passes are those alone, on images that are ready. The workflow: its jobs' own times are added up, the"
        " start of each process included. Start-up: until the code of a command is imported."
    )
    frame = frame.assign(device=about.get("device"), torch=about.get("torch"))
    return frame, Table(
        "What a study takes beside its passes", caption, ["what", "ratio", "seconds"], texts, "overheads"
    )
