"""Throughput and memory of a study's three stages at several degrees, as a table (`tocom benchmark`).

What is measured, :mod:`tocom.stages.works` and the caption of the table say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch

from tocom.analysis.tables import NOT_RUN, Table, Text
from tocom.errors import TocomError
from tocom.files import atomic
from tocom.models import check_patches, default_proportional_attention
from tocom.settings import BenchmarkSettings
from tocom.stages.throughput import device_if_present, device_name, peak_memory_mb
from tocom.stages.works import STAGES, Subject, Work, round_seconds, teacher_degree, within_memory
from tocom.training import bar, make_deterministic

#: What is measured by default: the sizes of DeiT in the paper, no, middle and the strongest compression.
BACKBONES, DEGREES = ("deit_small_patch16_224", "deit_base_patch16_224"), (0, 8, 16)
#: What a row's status says if it holds figures, or if the device's memory did not suffice.
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
#: Columns of benchmark.csv. teacher_degree: of distillation only; low and high: quartiles over rounds; speedup: over
#: degree 0 of the same stage in the same round; memory_mb: peak, in MB (10^6 bytes).
COLUMNS = (
    *("backbone", "image_size", "stage", "degree", "teacher_degree", "status"),
    *(f"{name}{end}" for name in ("images_per_second", "speedup") for end in ("", "_low", "_high")),
    *("memory_mb", "batch_size", "precision", "repeats", "device", "torch", "timm"),
)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(
    subject: Subject, stage: str, degrees: Sequence[int], settings: BenchmarkSettings, device: torch.device
) -> list[dict]:
    """Measure one stage of one backbone: memory at each degree by itself, then time, all degrees in turns.

    Returns:
        The columns ``status`` to ``memory_mb`` of every degree; of one that does not fit into the device's memory, the
        status alone.
    """
    make = partial(STAGES[stage], subject, max(1, *degrees), settings, device)
    memory = {degree: within_memory(device, _memory_mb, make, degree, device) for degree in degrees}
    fitting = [degree for degree in degrees if memory[degree] is not None]
    times = round_seconds(subject, stage, fitting, settings, device)
    return [
        {"status": MEASURED, **_figures(times, degree, settings), "memory_mb": memory[degree]}
        if degree in times
        else {"status": OUT_OF_MEMORY}
        for degree in degrees
    ]


def _memory_mb(make: Callable[[], Work], degree: int, device: torch.device) -> float:
    work = make()
    work.set_degree(degree)
    work.run()  # makes the optimizer's state
    work.module.zero_grad()
    return peak_memory_mb(work.run, device, work.module, *work.held)


def _figures(times: dict[int, np.ndarray], degree: int, settings: BenchmarkSettings) -> dict[str, float]:
    found = {"images_per_second": settings.batch_size / times[degree]}
    found |= {"speedup": times[0] / times[degree]} if 0 in times else {}
    ends = {"": 0.5, "_low": 0.25, "_high": 0.75}
    return {f"{name}{end}": np.quantile(values, q) for name, values in found.items() for end, q in ends.items()}


def _image_size(subject: Subject, degrees: Sequence[int]) -> int:
    """Return the side of the images in pixels; refuse, before anything is run, what cannot be run."""
    with torch.device("meta"):  # no weights are made
        vit = subject.vit(torch.device("meta"))
    for degree in degrees:
        vit.set_degree(degree)
    side = vit.model.patch_embed.img_size[0]
    check_patches(side, vit.model.patch_embed.patch_size[0])
    return side


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
    size = {} if settings.image_size is None else {"img_size": settings.image_size}
    subjects = [Subject(name, size, proportional_attention=default_proportional_attention(name)) for name in backbones]
    sizes = {subject.architecture: _image_size(subject, degrees) for subject in subjects}
    device = device_if_present(settings.device)
    named = {} if device is None else {"device": device_name(device)}
    _check_replaceable(Path(output), named.get("device"))
    planned = {name: getattr(settings, name) for name in ("batch_size", "precision", "repeats")}
    if named:
        planned |= named | {"torch": torch.__version__, "timm": timm.__version__}
    grid = [(subject, stage) for subject in subjects for stage in STAGES]
    rows = []
    for subject, stage in bar(grid, "benchmark") if named else grid:
        found = measure(subject, stage, degrees, settings, device) if named else [{"status": NOT_RUN}] * len(degrees)
        name = subject.architecture
        for degree, figures in zip(degrees, found, strict=True):
            teacher = {"teacher_degree": teacher_degree(degree)} if stage == "distillation" else {}
            point = {"backbone": name, "image_size": sizes[name], "stage": stage, "degree": degree}
            rows.append(point | teacher | figures | planned)
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"teacher_degree": "Int64"})
    _write(frame, Path(output))
    return frame


# --- output ---------------------------------------------------------------------------------------------------------


def _check_replaceable(folder: Path, device: str | None) -> None:
    """Refuse to replace measured figures by those of another device, or (``device`` None) by none."""
    path = folder / "benchmark.csv"
    if not path.is_file():
        return
    there = read_csv(path)
    if others := set(there["device"][there["status"] != NOT_RUN]) - {device}:
        instead = "torch sees no GPU here" if device is None else f"this is {device}"
        raise TocomError(
            f"{path} holds figures measured on {', '.join(sorted(others))}, and {instead};"
            " move them away or give another --output"
        )


def read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """Read a benchmark.csv.

    Raises:
        TocomError: it is missing, or something else.
    """
    try:
        return pd.read_csv(path, keep_default_na=False, na_values={"images_per_second": [""]})[list(COLUMNS)]
    except FileNotFoundError:
        raise TocomError(f"no such file: {path}; `tocom benchmark` writes one") from None
    except (ValueError, KeyError):
        raise TocomError(f"{path} is no table of `tocom benchmark`; move it away or give another --output") from None


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
    rows = []
    for _, row in frame.iterrows():
        texts = _texts(row) if row.status == MEASURED else (row.status,) * 3
        rows.append([Text(text) for text in (row.backbone, row.stage, str(row.degree), *texts)])
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
    sizes = " or ".join(f"{size} × {size}" for size in frame.image_size.unique())
    batches = f"batches of {first.batch_size} random images of {sizes} pixels, {first.precision}, random weights"
    begin = f"Measured on {first.device} with torch {first.torch} and timm {first.timm}: {batches},"
    begin += f" {first.repeats} rounds."
    if (frame.status == NOT_RUN).all():
        begin = (
            "Not run: torch saw no GPU on the machine where this table was written. `tocom benchmark` on a machine with"
            f" one writes it anew, with the device named. Planned: {batches}, {first.repeats} rounds."
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
