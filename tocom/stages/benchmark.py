"""Speed and memory of a study's stages, side by side with an eager reference, as tables (`tocom benchmark`).

What is measured, :mod:`tocom.stages.works`, :mod:`tocom.stages.overheads` and the captions of the tables say.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch

from tocom.analysis.tables import NOT_RUN, Table, Text
from tocom.compressed import gflops
from tocom.errors import TocomError, suggest
from tocom.files import atomic
from tocom.models import check_patches, default_proportional_attention
from tocom.settings import BenchmarkSettings
from tocom.stages import overheads
from tocom.stages.throughput import device_if_present, device_name, peak_memory_mb, seconds, side_by_side
from tocom.stages.works import (
    COMPILED,
    EAGER,
    EAGER_FP32,
    OWN,
    STAGES,
    TIMM,
    UNFOLDED,
    VARIANTS,
    Subject,
    Work,
    captured,
    make,
    teacher_degree,
    within_memory,
)
from tocom.training import DTYPES, bar

#: What is measured by default: ViT-Ti, S and B at no, middle and strong compression, in both precisions.
BACKBONES = tuple(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
DEGREES, PRECISIONS = (0, 8, 13, 16), ("fp32", "bf16")
#: The degree at which what torch.compile makes is measured: it takes a minute for each.
COMPILED_DEGREE = 13
#: What a row's status says if it holds figures, or if the device's memory did not suffice.
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
CAPTURED = "captured"
#: Ratio of times -> the two variants. The timed pair is of the same degree (timm: of none) and the same round.
RATIOS = {
    "over_eager": (OWN, EAGER),
    "over_eager_fp32": (OWN, EAGER_FP32),
    "over_timm": (OWN, TIMM),
    "folding": (OWN, UNFOLDED),
    "captured_over_eager": (CAPTURED, EAGER),
    "compiled_over_eager": (COMPILED, EAGER),
}
#: Columns of benchmark.csv. teacher_degree: of distillation only; _low and _high: quartiles over rounds; speedup: over
#: degree 0 of the same stage in the same round; realised: its share of what the FLOPs promise; then :data:`RATIOS`;
#: matrix_share: of the operations a second of one large matrix product; memory: peak, in MB (10^6 bytes).
QUANTITIES = ("images_per_second", "speedup", *RATIOS)
COLUMNS = (
    *("backbone", "image_size", "precision", "stage", "degree", "teacher_degree", "status"),
    *(f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")),
    *("realised", "matrix_share", "gflops", "memory_mb", "eager_memory_mb"),
    *("batch_size", "rounds", "device", "torch", "timm"),
)


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(
    subject: Subject, stage: str, degrees: Sequence[int], settings: BenchmarkSettings, device: torch.device
) -> list[dict]:
    """Measure one stage of one backbone: memory at each degree by itself, then time, all variants and degrees in turns.

    Returns:
        The measured columns of every degree; of one that does not fit into the device's memory, the status alone.
    """
    works = within_memory(device, _works, subject, stage, max(1, *degrees), settings, device)
    memory = {
        (name, degree): within_memory(device, _memory_mb, works[name], degree, device) if works else None
        for name in (OWN, EAGER)
        for degree in degrees
    }
    fitting = [degree for degree in degrees if None not in (memory[OWN, degree], memory[EAGER, degree])]
    times = (within_memory(device, _times, works, stage, fitting, settings, device) if fitting else None) or {}
    costs = _gflops(subject, degrees)
    peak = None if settings.precision == "fp16" else matrix_rate(settings.precision, device)
    found = []
    for degree in degrees:
        if (OWN, degree) not in times:
            found.append({"status": OUT_OF_MEMORY})
            continue
        row = {"status": MEASURED, "rounds": len(times[OWN, degree]), "gflops": costs[degree]}
        row |= _figures(times, degree, settings)
        row |= {"memory_mb": memory[OWN, degree], "eager_memory_mb": memory[EAGER, degree]}
        if "speedup" in row:
            row["realised"] = row["speedup"] * costs[degree] / costs[0]
        if stage == "evaluation" and peak:
            fastest = min(np.median(times[name, degree]) for name in (OWN, CAPTURED) if (name, degree) in times)
            row["matrix_share"] = 2e9 * costs[degree] * settings.batch_size / fastest / peak
        found.append(row)
    return found


def _variants(stage: str, settings: BenchmarkSettings) -> tuple[str, ...]:
    """Return the variants of a stage; in float32 the reference in float32 is the reference."""
    return tuple(name for name in VARIANTS[stage] if settings.precision != "fp32" or name != EAGER_FP32)


def _works(
    subject: Subject, stage: str, highest: int, settings: BenchmarkSettings, device: torch.device
) -> dict[str, Work]:
    return {name: make(subject, stage, name, highest, settings, device) for name in _variants(stage, settings)}


def _times(
    works: dict[str, Work], stage: str, degrees: Sequence[int], settings: BenchmarkSettings, device: torch.device
) -> dict[tuple[str, int | None], np.ndarray]:
    """Return the seconds of every round [rounds] by (variant, degree); timm's degree is None."""
    if stage == "evaluation" and device.type == "cuda":
        with _reported("CUDA graphs"):
            works = works | {CAPTURED: captured(works[UNFOLDED], degrees, device)}
    keys = [(name, degree) for name in works for degree in ((None,) if name == TIMM else degrees)]

    def prepare(key: tuple[str, int | None]) -> None:
        if key[1] is not None:
            works[key[0]].set_degree(key[1])

    return side_by_side({key: works[key[0]].run for key in keys}, settings, device, prepare, settings.seconds)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Go on without what a version of torch or a device cannot do, and say so."""
    try:
        yield
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"tocom benchmark: without {what}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)


def measure_compiled(
    subject: Subject, stage: str, degree: int, settings: BenchmarkSettings, device: torch.device
) -> dict:
    """Measure what torch.compile makes of one stage at one degree beside the eager reference; forward passes captured.

    Returns:
        The columns of compiled_over_eager.
    """
    works = {EAGER: make(subject, stage, EAGER, degree, settings, device)}
    compiled = make(subject, stage, COMPILED, degree, settings, device)
    compiled.set_degree(degree)
    for _ in range(3):
        compiled.run()
    works[COMPILED] = captured(compiled, [degree], device) if stage == "evaluation" else compiled
    times = _times(works, "", [degree], settings, device)
    return _spread("compiled_over_eager", times[COMPILED, degree] / times[EAGER, degree])


def _add_compiled(rows: dict, subject: Subject, settings: BenchmarkSettings, device, write: Callable) -> None:
    """Add what :func:`measure_compiled` finds to the rows of a backbone in bfloat16."""
    chosen = settings.model_copy(update={"precision": "bf16"})
    for stage in ("evaluation", "fine-tuning"):
        row = rows.get(("bf16", subject.architecture, stage, COMPILED_DEGREE), {})
        if row.get("status") == MEASURED:
            with _reported(f"torch.compile of {stage}"):
                row |= measure_compiled(subject, stage, COMPILED_DEGREE, chosen, device)
                write()


def _memory_mb(work: Work, degree: int, device: torch.device) -> float:
    work.set_degree(degree)
    work.run()  # makes the optimizer's state
    work.module.zero_grad()
    return peak_memory_mb(work.run, device, work.module, *work.held)


def _figures(
    times: dict[tuple[str, int | None], np.ndarray], degree: int, settings: BenchmarkSettings
) -> dict[str, float]:
    own = times[OWN, degree]
    result = _spread("images_per_second", settings.batch_size / own)
    if (OWN, 0) in times:
        result |= _spread("speedup", times[OWN, 0] / own)
    for ratio, (above, below) in RATIOS.items():
        pair = times.get((above, degree)), times.get((below, None if below == TIMM else degree))
        if pair[0] is not None and pair[1] is not None:
            result |= _spread(ratio, pair[0] / pair[1])
    return result


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}{end}": np.quantile(values, q) for end, q in {"": 0.5, "_low": 0.25, "_high": 0.75}.items()}


def _gflops(subject: Subject, degrees: Sequence[int]) -> dict[int, float]:
    with torch.device("meta"):
        vit = subject.vit(torch.device("meta")).eval()
    return {degree: gflops(vit.set_degree(degree)) for degree in {0, *degrees}}


@cache
def matrix_rate(precision: str, device: torch.device) -> float:
    """Return the operations a second (two a multiply-add) of one large matrix product in a precision."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(DTYPES.get(precision, torch.float32))
    a @ b
    return 2 * size**3 / float(np.median([seconds(lambda: a @ b, device) for _ in range(5)]))


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
    precisions: Sequence[str] = PRECISIONS,
    settings: BenchmarkSettings | None = None,
    training: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Measure fine-tuning, distillation and evaluation of some backbones, and what a study takes beside them.

    Writes benchmark.{csv,md,tex} and overheads.{csv,md,tex}, anew after every group of figures, so that a run that is
    stopped leaves what it has measured. What it did not measure, or all of it without the GPU that is asked for, says
    "not run"; a line for which the device's memory does not suffice says so. Measured figures are replaced by those of
    the same device alone.

    Args:
        output: folder of the files. backbones: names in timm; the weights are random.
        degrees: tokens removed in every block; 0, which the others are compared with, is always among them.
        training: backbones whose training is measured, too; None: all.

    Returns:
        A row for each backbone, precision, stage and degree, as :data:`COLUMNS` says.

    Raises:
        TocomError: a backbone, a degree or the device is unknown, or other figures would be lost.
    """
    settings, degrees = settings or BenchmarkSettings(), sorted({0, *degrees})
    given = {"precision": (precisions, ["fp32", *DTYPES]), "training": (training or (), backbones)}
    for what, (names, known) in given.items():
        if unknown := [name for name in names if name not in known]:
            raise TocomError(f"{what} {unknown[0]!r} is none of {', '.join(known)}{suggest(unknown[0], known)}")
    torch.set_num_threads(settings.threads)
    size = {} if settings.image_size is None else {"img_size": settings.image_size}
    subjects = {
        name: Subject(name, size, proportional_attention=default_proportional_attention(name)) for name in backbones
    }
    sizes = {name: _image_size(subject, degrees) for name, subject in subjects.items()}
    device = device_if_present(settings.device)
    named = {} if device is None else {"device": device_name(device)}
    _check_replaceable(Path(output), named.get("device"))
    about = {"batch_size": settings.batch_size} | named
    if named:
        about |= {"torch": torch.__version__, "timm": timm.__version__}
    groups = [
        (precision, name, stage)
        for precision in precisions
        for stage in STAGES
        for name in backbones
        if stage == "evaluation" or training is None or name in training
    ]
    rows = {
        (*group, degree): {"backbone": group[1], "image_size": sizes[group[1]], "precision": group[0]}
        | {"stage": group[2], "degree": degree, "status": NOT_RUN}
        | ({"teacher_degree": teacher_degree(degree)} if group[2] == "distillation" else {})
        | about
        for group in groups
        for degree in degrees
    }
    found: list[dict] = []

    def write() -> pd.DataFrame:
        frame = pd.DataFrame(rows.values(), columns=COLUMNS).astype({"teacher_degree": "Int64"})
        _write(Path(output), "benchmark", frame, table(frame))
        _write(Path(output), "overheads", *overheads.tabulated(found, about))
        return frame

    if device is None:
        return write()
    # Half precision, evaluation and the largest backbone first: a machine may be lent for minutes.
    ordered = sorted(groups, key=lambda it: (it[0] == "fp32", it[2] != "evaluation", -backbones.index(it[1])))
    halves = [[group for group in ordered if (group[0] == "fp32") == last] for last in (False, True)]
    with bar(None, "benchmark", total=len(groups)) as progress:
        for half in halves:
            for group in half:
                precision, name, stage = group
                chosen = settings.model_copy(update={"precision": precision})
                for degree, figures in zip(
                    degrees, measure(subjects[name], stage, degrees, chosen, device), strict=True
                ):
                    rows[(*group, degree)] |= figures
                write()
                progress.update()
            if device.type == "cuda" and half is halves[0]:
                _add_compiled(rows, subjects[backbones[-1]], settings, device, write)
    with _reported("what a study takes beside its passes"):
        for figures in overheads.measure(settings, device):
            found.append(figures)
            write()
    return write()


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


def _write(folder: Path, name: str, frame: pd.DataFrame, made: Table) -> None:
    """Write rows and their table; the files are replaced one right after the other, once all are whole."""
    csv, md, tex = (folder / f"{name}.{kind}" for kind in ("csv", "md", "tex"))
    with atomic(csv) as rows, atomic(md) as markdown, atomic(tex) as latex:
        rows.write_text(frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"), encoding="utf-8")
        markdown.write_text(made.markdown(), encoding="utf-8")
        latex.write_text(made.latex(), encoding="utf-8")


#: Heading of a table's column -> the quantity it shows with its quartiles.
SHOWN = {
    "time over eager": "over_eager",
    "over eager fp32": "over_eager_fp32",
    "over timm": "over_timm",
    "folded over unfolded": "folding",
    "captured over eager": "captured_over_eager",
    "compiled over eager": "compiled_over_eager",
}


def table(frame: pd.DataFrame) -> Table:
    """Return the table of what :func:`benchmark` found: a line for each backbone, precision, stage and degree."""
    shown = {heading: name for heading, name in SHOWN.items() if frame[name].notna().any() or name == "over_eager"}
    header = ["backbone", "precision", "stage", "degree", "images/s", "speed-up", "of the FLOPs'", *shown]
    header += ["of the matrix rate", "peak memory (MB)", "eager's"]
    rows = []
    for _, row in frame.iterrows():
        texts = _texts(row, shown.values()) if row.status == MEASURED else (row.status,) * (len(header) - 4)
        rows.append([Text(text) for text in (row.backbone, row.precision, row.stage, str(row.degree), *texts)])
    firsts = frame.groupby(["backbone", "precision", "stage"], sort=False).head(1).index
    return Table("Speed and memory of a study's stages", _caption(frame), header, rows, "benchmark", tuple(firsts[1:]))


def _texts(row: pd.Series, shown: Sequence[str]) -> list[str]:
    """Return the measured figures of a row; a dash where there is nothing to compare with."""

    def spread(name: str, show: Callable[[float], str]) -> str:
        if pd.isna(row[name]):
            return "–"
        middle, low, high = (show(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        return middle if low == middle == high else f"{middle} [{low}, {high}]"

    def share(name: str) -> str:
        return "–" if pd.isna(row[name]) else f"{100 * row[name]:.0f} %"

    texts = [spread("images_per_second", _number), spread("speedup", "{:.2f}".format), share("realised")]
    texts += [spread(name, "{:.3f}".format) for name in shown]
    return [*texts, share("matrix_share"), f"{row.memory_mb:.0f}", f"{row.eager_memory_mb:.0f}"]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _caption(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    sizes = " or ".join(f"{size} × {size}" for size in frame.image_size.unique())
    batches = f"batches of {first.batch_size} random images of {sizes} pixels, random weights"
    begin = f"Measured on {first.device} with torch {first.torch} and timm {first.timm}: {batches}."
    if pd.isna(first.device):
        begin = (
            "Not run: torch saw no GPU on the machine where this table was written. `tocom benchmark` on a machine with"
            f" one writes it anew, with the device named. Planned: {batches}."
        )
    return (
        f"{begin} Medians and quartiles over rounds, in each of which all degrees and variants of a stage take turns;"
        " ratios are of times within a round. Eager: the same method with attention written out, merged in the type of"
        " the tokens (tocom/stages/eager.py), under autocast in the same precision, or in float32; timm: its own"
        " forward pass, in the same precision. Speed-up: over degree 0 of the same stage; beside it, its share of what"
        " the FLOPs promise. Captured: as CUDA graphs; compiled: by torch.compile (forward passes captured, too)."
        " Matrix rate: of one large product in the same precision. Peak memory: of that work alone, with weights,"
        " optimizer state and batch. Evaluation: a forward pass with ToCom folded in, of a model trained at degree 0."
        " Fine-tuning: forward, loss, backward and AdamW step of all weights. Distillation: the student at that degree"
        " with ToCom beside its weights, the teacher at degree 0 (at degree 1 where the student is at 0, since two"
        " degrees that differ are always drawn), AdamW step of ToCom alone. Reading and augmenting images is left out."
    )
