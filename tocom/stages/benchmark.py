"""Throughput and memory of a study's three stages at several degrees, as a table (`tocom benchmark`).

What is measured at degree d, on a backbone with random weights (speed does not depend on them):

- fine-tuning: a step that changes all weights: forward at degree d, loss, backward, optimizer;
- distillation: a step that changes the compensator alone: the teacher's forward pass at degree 0, forward and backward
  of the student at degree d with P_0->d beside its weights, optimizer. A step always draws two degrees that differ
  (method: arXiv 2408.06798, section 4.2), so that at d = 0 the teacher runs at degree 1, the nearest to it;
- evaluation: a forward pass at degree d of a model that was trained at degree 0, with P_0->d folded in.

Recipes are the defaults of the stages, but for ``deterministic``: GPU operations may vary from run to run. The images
are random and lie on the device: reading and augmenting them is left out, and so is what a study does between steps.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tocom.analysis.tables import NOT_RUN, Table, Text
from tocom.compensator import Compensator
from tocom.errors import TocomError
from tocom.files import atomic
from tocom.models import check_patches, create, default_proportional_attention, pick_device
from tocom.rates import device_name
from tocom.settings import BenchmarkSettings, DistilSettings, FinetuneSettings
from tocom.stages.common import compressed
from tocom.stages.distil import Distiller, new_compensator
from tocom.stages.throughput import inference_work, peak_memory_mb_of, random_images, side_by_side, step_work
from tocom.training import bar, make_deterministic, make_optimizer
from tocom.vit import CompressedViT

#: What is measured by default: the sizes of DeiT in the paper, no, middle and the strongest compression.
BACKBONES, DEGREES = ("deit_small_patch16_224", "deit_base_patch16_224"), (0, 8, 16)
#: The compressor that is measured.
COMPRESSOR = "tome"
#: What a row's status says if it holds figures, or if the device's memory did not suffice.
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
#: Columns of benchmark.csv. teacher_degree: of distillation only; low and high: quartiles over rounds; speedup: over
#: degree 0 of the same stage in the same round; memory_mb: peak, in MB (10^6 bytes).
COLUMNS = (
    "backbone",
    "image_size",
    "stage",
    "degree",
    "teacher_degree",
    "status",
    "images_per_second",
    "images_per_second_low",
    "images_per_second_high",
    "speedup",
    "speedup_low",
    "speedup_high",
    "memory_mb",
    "batch_size",
    "precision",
    "repeats",
    "device",
    "torch",
    "timm",
)


@dataclass(frozen=True)
class Job:
    """The work of one stage on one backbone, which can be set to any degree.

    Attributes:
        module: the model, or what holds models and compensator. work: one step or forward pass.
        held: what else it keeps in memory from one step to the next: optimizer, images.
    """

    module: nn.Module
    set_degree: Callable[[int], object]
    work: Callable[[], object]
    held: tuple[torch.optim.Optimizer | torch.Tensor, ...]


def teacher_degree(degree: int) -> int:
    """Return the degree of the teacher while the student runs at ``degree``: 0, or the nearest that differs."""
    return 0 if degree else 1


def finetuning(architecture: str, max_degree: int, settings: BenchmarkSettings, device: torch.device) -> Job:
    """Return a fine-tuning step: forward, cross-entropy, backward and optimizer, of all weights."""
    recipe, vit = FinetuneSettings(), _vit(architecture, settings, device).train()
    images = random_images(vit, settings.batch_size, device)
    labels = torch.arange(len(images), device=device) % vit.model.num_classes
    optimizer = make_optimizer(vit.model, recipe)

    def loss() -> torch.Tensor:
        return F.cross_entropy(vit(images), labels, label_smoothing=recipe.label_smoothing)

    work = step_work(vit, loss, settings.precision, device, optimizer)
    return Job(vit, vit.set_degree, work, (optimizer, images))


def distillation(architecture: str, max_degree: int, settings: BenchmarkSettings, device: torch.device) -> Job:
    """Return a distillation step: teacher, student with the compensator, backward and optimizer of the latter."""
    recipe, (teacher, student) = DistilSettings(), (_model(architecture, settings) for _ in range(2))
    compensator = _compensator(teacher, max_degree, recipe)
    about = {"proportional_attention": default_proportional_attention(architecture)}
    distiller = Distiller(teacher, student, compensator, about).to(device).train()
    images = random_images(distiller.student, settings.batch_size, device)
    optimizer = make_optimizer(distiller, recipe)
    work = step_work(distiller, lambda: distiller(images), settings.precision, device, optimizer)
    return Job(
        distiller, lambda degree: distiller.set_degrees(teacher_degree(degree), degree), work, (optimizer, images)
    )


def evaluation(architecture: str, max_degree: int, settings: BenchmarkSettings, device: torch.device) -> Job:
    """Return a forward pass of a model trained at degree 0, with the compensator folded in."""
    vit = _vit(architecture, settings, device).eval()
    vit.attach(_compensator(vit.model, max_degree, DistilSettings()).to(device))
    images = random_images(vit, settings.batch_size, device)
    return Job(vit, vit.set_degree, inference_work(vit, images, settings.precision), (images,))


#: Stage -> what makes its work.
STAGES: dict[str, Callable[[str, int, BenchmarkSettings, torch.device], Job]] = {
    "fine-tuning": finetuning,
    "distillation": distillation,
    "evaluation": evaluation,
}


def _model(architecture: str, settings: BenchmarkSettings) -> nn.Module:
    size = {} if settings.image_size is None else {"img_size": settings.image_size}
    # Weights that were trained without labels have no classifier, which a study gives them.
    return create(architecture, {"num_classes": 1000} | size)


def _vit(architecture: str, settings: BenchmarkSettings, device: torch.device) -> CompressedViT:
    about = {"proportional_attention": default_proportional_attention(architecture)}
    return compressed(_model(architecture, settings).to(device), about, COMPRESSOR)


def _compensator(model: nn.Module, max_degree: int, recipe: DistilSettings) -> Compensator:
    """Return a compensator whose update is not zero, as a trained one's is."""
    result = new_compensator(model, max_degree, COMPRESSOR, recipe)
    nn.init.normal_(result.up, std=0.01)
    return result


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(
    architecture: str, stage: str, degrees: Sequence[int], settings: BenchmarkSettings, device: torch.device
) -> list[dict]:
    """Measure one stage of one backbone: memory at each degree by itself, then time, all degrees in turns.

    Returns:
        The columns ``status`` to ``memory_mb`` of every degree; of one that does not fit into the device's memory, the
        status alone.
    """
    make = partial(STAGES[stage], architecture, max(1, *degrees), settings, device)
    memory = {degree: _within_memory(device, _memory_mb, make, degree, device) for degree in degrees}
    fitting = [degree for degree in degrees if memory[degree] is not None]
    times = _within_memory(device, _times, make, fitting, settings, device) or {}
    return [
        _figures(times, degree, settings) | {"memory_mb": memory[degree]}
        if degree in times
        else {"status": OUT_OF_MEMORY}
        for degree in degrees
    ]


def _within_memory(device: torch.device, function: Callable, *arguments) -> Any:
    """Return what a function returns, or None if the device's memory did not suffice; leave nothing in it."""
    try:
        result = function(*arguments)
    except torch.OutOfMemoryError:
        result = None
    if device.type == "cuda":
        gc.collect()  # models may hang in cycles
        torch.cuda.empty_cache()
    return result


def _memory_mb(make: Callable[[], Job], degree: int, device: torch.device) -> float:
    job = make()
    job.set_degree(degree)
    job.work()  # makes the optimizer's state
    job.module.zero_grad()
    return peak_memory_mb_of(job.work, device, job.module, *job.held)


def _times(
    make: Callable[[], Job], degrees: Sequence[int], settings: BenchmarkSettings, device: torch.device
) -> dict[int, np.ndarray]:
    """Return the seconds of every round [repeats] by degree; the degrees share one model, as they do in a study."""
    job = make()
    return side_by_side(dict.fromkeys(degrees, job.work), settings, device, job.set_degree)


def _figures(times: dict[int, np.ndarray], degree: int, settings: BenchmarkSettings) -> dict:
    speedup = _quartiles("speedup", times[0] / times[degree]) if 0 in times else {}
    return {"status": MEASURED, **_quartiles("images_per_second", settings.batch_size / times[degree]), **speedup}


def _quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def _image_size(architecture: str, degrees: Sequence[int], settings: BenchmarkSettings) -> int:
    """Return the side of the images in pixels; refuse, before anything is run, what cannot be run."""
    with torch.device("meta"):  # no weights are made
        model = _model(architecture, settings)
        vit = CompressedViT(model)
    for degree in degrees:
        vit.set_degree(degree)
    side = model.patch_embed.img_size[0]
    check_patches(side, model.patch_embed.patch_size[0])
    return side


def _device(name: str) -> torch.device | None:
    """Return the device that is asked for, or None if it is a GPU and there is none."""
    if re.fullmatch(r"cuda(:\d+)?", name) and not torch.cuda.is_available():
        return None
    return pick_device(name)


def benchmark(
    output: str | os.PathLike,
    backbones: Sequence[str] = BACKBONES,
    degrees: Sequence[int] = DEGREES,
    settings: BenchmarkSettings | None = None,
) -> pd.DataFrame:
    """Measure fine-tuning, distillation and evaluation of some backbones, and write benchmark.{csv,md,tex}.

    Without the GPU that is asked for, every line of the table says "not run"; a line for which the device's memory
    does not suffice says so. Measured figures are replaced by those of the same device alone.

    Args:
        output: folder of the three files. backbones: names in timm; the weights are random.
        degrees: tokens removed in every block; 0, which the others are compared with, is always among them.

    Returns:
        A row for each backbone, stage and degree, as :data:`COLUMNS` says.

    Raises:
        TocomError: a backbone, a degree or the device is unknown, or other figures would be lost.
    """
    settings, degrees = settings or BenchmarkSettings(), sorted({0, *degrees})
    make_deterministic(settings.threads)
    sizes = {name: _image_size(name, degrees, settings) for name in backbones}
    device = _device(settings.device)
    _check_replaceable(Path(output), None if device is None else device_name(device))
    grid = [(name, stage) for name in sizes for stage in STAGES]
    rows = []
    for name, stage in grid if device is None else bar(grid, "benchmark"):
        if device is None:
            found = [{"status": NOT_RUN}] * len(degrees)
        else:
            found = measure(name, stage, degrees, settings, device)
        for degree, figures in zip(degrees, found, strict=True):
            teacher = {"teacher_degree": teacher_degree(degree)} if stage == "distillation" else {}
            point = {"backbone": name, "image_size": sizes[name], "stage": stage, "degree": degree}
            rows.append(point | teacher | figures | _conditions(settings, device))
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"teacher_degree": "Int64"})
    _write(frame, Path(output))
    return frame


def _conditions(settings: BenchmarkSettings, device: torch.device | None) -> dict:
    planned = {name: getattr(settings, name) for name in ("batch_size", "precision", "repeats")}
    if device is None:
        return planned
    return planned | {"device": device_name(device), "torch": torch.__version__, "timm": timm.__version__}


# --- output ---------------------------------------------------------------------------------------------------------


def _check_replaceable(folder: Path, device: str | None) -> None:
    """Refuse to replace measured figures by those of another device, or (``device`` None) by none."""
    path = folder / "benchmark.csv"
    if not path.is_file():
        return
    try:
        there = pd.read_csv(path, keep_default_na=False)
        others = set(there["device"][there["status"] != NOT_RUN]) - {device}
    except (ValueError, KeyError):
        raise TocomError(f"{path} is no table of `tocom benchmark`; move it away or give another --output") from None
    if others:
        instead = "torch sees no GPU here" if device is None else f"this is {device}"
        raise TocomError(
            f"{path} holds figures measured on {', '.join(sorted(others))}, and {instead};"
            " move them away or give another --output"
        )


def _write(frame: pd.DataFrame, folder: Path) -> None:
    """Write the rows and their table; the files are replaced one right after the other, once all are whole."""
    made = table(frame)
    csv, md, tex = (folder / f"benchmark.{kind}" for kind in ("csv", "md", "tex"))
    with atomic(csv) as rows, atomic(md) as markdown, atomic(tex) as latex:
        rows.write_text(frame.to_csv(index=False, lineterminator="\n"), encoding="utf-8")
        markdown.write_text(made.markdown(), encoding="utf-8")
        latex.write_text(made.latex(), encoding="utf-8")


def table(frame: pd.DataFrame) -> Table:
    """Return the table of what :func:`benchmark` found: a line for each backbone, stage and degree."""
    rows = [
        [
            Text(row.backbone),
            Text(row.stage),
            Text(str(row.degree)),
            *(Text(row.status if row.status != MEASURED else text) for text in _texts(row)),
        ]
        for _, row in frame.iterrows()
    ]
    firsts = frame.groupby(["backbone", "stage"], sort=False).head(1).index
    header = ["backbone", "stage", "degree", "images/s", "speed-up", "peak memory (MB)"]
    title = "Throughput and memory of fine-tuning, distillation and evaluation"
    return Table(title, _caption(frame), header, rows, "benchmark", tuple(firsts[1:]))


def _texts(row: pd.Series) -> tuple[str, str, str]:
    """Return a measured row's images a second, speed-up and memory; a dash where there is nothing to compare with."""
    rate, low, high = (_number(row[f"images_per_second{end}"]) for end in ("", "_low", "_high"))
    speedup = "–" if pd.isna(row.speedup) else f"{row.speedup:.2f}×"
    if row.degree and not pd.isna(row.speedup):
        speedup += f" [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    return f"{rate} [{low}, {high}]", speedup, f"{row.memory_mb:.0f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _caption(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    sizes = _listed(f"{size} × {size}" for size in frame.image_size.unique())
    batches = f"batches of {first.batch_size} random images of {sizes} pixels, {first.precision}, random weights"
    if (frame.status == NOT_RUN).all():
        begin = (
            "Not run: torch saw no GPU on the machine where this table was written. `tocom benchmark` on a machine with"
            f" one writes it anew, with the device named. Planned: {batches}, {first.repeats} rounds."
        )
    else:
        begin = (
            f"Measured on {first.device} with torch {first.torch} and timm {first.timm}: {batches},"
            f" {first.repeats} rounds."
        )
    return (
        f"{begin} Images/s: median and quartiles over the rounds, in each of which all degrees of a stage take turns."
        " Speed-up: over degree 0 of the same stage in the same round, likewise. Peak memory: of that work alone, with"
        " weights, optimizer state and batch. Fine-tuning: forward, loss, backward and AdamW step of all weights."
        " Distillation: the student at that degree with ToCom beside its weights, the teacher at degree 0 (at degree 1"
        " where the student is at 0, since two degrees that differ are always drawn), AdamW step of ToCom alone."
        " Evaluation: a forward pass with ToCom folded in, of a model trained at degree 0. Reading and augmenting"
        " images is left out."
    )


def _listed(words: Iterable[str]) -> str:
    return " or ".join(words)
