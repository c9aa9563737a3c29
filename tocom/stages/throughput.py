"""Measure images a second and memory at each degree; report ratios of things measured side by side."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tocom.compressed import Compressed, gflops
from tocom.errors import TocomError
from tocom.jobs import ThroughputJob
from tocom.models import compress, load_model, pick_device, set_image_size
from tocom.parts import load_part
from tocom.settings import BenchmarkSettings, ThroughputSettings
from tocom.training import autocast, bar, make_deterministic

#: Rounds that are measured however long they take: quartiles of fewer say nothing.
LEAST_ROUNDS = 3


def device_if_present(name: str) -> torch.device | None:
    """Return the device that is asked for, or None if it is a GPU and there is none."""
    absent = re.fullmatch(r"cuda(:\d+)?", name) and not torch.cuda.is_available()
    return None if absent else pick_device(name)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", information.read_text(), re.M) if information.is_file() else []
    name, threads = (names or [platform.processor() or platform.machine()])[0], torch.get_num_threads()
    return f"{' '.join(name.split())}, {threads} thread{'s' if threads > 1 else ''}"


def peak_memory_mb(
    work: Callable[[], object], device: torch.device, *held: nn.Module | torch.optim.Optimizer | torch.Tensor
) -> float:
    """Return the most memory that tensors take during a piece of work, in MB (10^6 bytes).

    It is what torch's allocator reports, less what others hold: on a GPU, CUDA's; on a CPU, that which torch's profiler
    watches.

    Args:
        held: modules, optimizers and tensors that the work uses and that are in memory already.
    """
    own = sum(tensor.nbytes for thing in held for tensor in _tensors(thing) if tensor.device.type == device.type)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before + own) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler complains that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return float(max(np.cumsum([0, *changes])) + own) / 1e6


def _tensors(held: nn.Module | torch.optim.Optimizer | torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of a module, the state of an optimizer, or the tensor itself."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, nn.Module):
        yield from (*held.parameters(), *held.buffers())
    else:
        for state in held.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def now(device: torch.device) -> float:
    """Return the time in seconds once a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a piece of work, what a GPU still had to do included."""
    start = now(device)
    work()
    return now(device) - start


def training_work(vit: Compressed, images: torch.Tensor, precision: str) -> Callable[[], object]:
    """Return what one training step costs: forward, loss and backward, without the optimizer."""
    numbers = torch.arange(len(images), device=images.device)

    def loss() -> torch.Tensor:
        logits = vit(images)
        wanted = (numbers % logits.shape[-1]).view(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:-1])
        return F.cross_entropy(logits.flatten(0, -2), wanted.flatten())

    return step_work(vit, loss, precision, images.device)


def step_work(
    module: nn.Module,
    loss: Callable[[], torch.Tensor],
    precision: str,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], object]:
    """Return a training step of a module: the loss, its backward pass and, if one is given, the optimizer's step."""
    scaler = torch.amp.GradScaler(device.type, enabled=optimizer is not None and precision == "fp16")

    def work() -> None:
        module.zero_grad()
        with autocast(precision, device):
            value = loss()
        scaler.scale(value).backward()
        if optimizer is not None:
            scaler.step(optimizer)
            scaler.update()

    return work


def inference_work(module: nn.Module, images: torch.Tensor, precision: str) -> Callable[[], object]:
    """Return one forward pass."""

    def work() -> None:
        with torch.inference_mode(), autocast(precision, images.device):
            module(images)

    return work


def side_by_side(
    work: dict[Hashable, Callable[[], object]],
    settings: ThroughputSettings | BenchmarkSettings,
    device: torch.device,
    before: Callable[[Hashable], object] = lambda name: None,
    budget: float = math.inf,
) -> dict[Hashable, np.ndarray]:
    """Return the seconds of every piece of work in every round [rounds]; all take turns, in an order that changes.

    Args:
        before: called with the name of the piece of work that comes next; its time does not count.
        budget: seconds after which no further round begins, once there are :data:`LEAST_ROUNDS`.
    """
    generator, names = np.random.default_rng(0), list(work)
    for name in names:
        before(name)
        for _ in range(settings.warmup):
            work[name]()
    times: dict[Hashable, list[float]] = {name: [] for name in names}
    start = time.monotonic()
    for repeat in range(settings.repeats):
        if repeat >= LEAST_ROUNDS and time.monotonic() - start > budget:
            break
        for number in generator.permutation(len(names)):
            name = names[number]
            before(name)
            times[name].append(seconds(work[name], device))
    return {name: np.array(values) for name, values in times.items()}


def throughput(
    job: ThroughputJob,
    backbone: str | os.PathLike,
    compensators: Mapping[str, str | os.PathLike],
    learned: str | os.PathLike | None = None,
) -> list[dict]:
    """Time the uncompressed model, the compressed model and the compressed model with each compensator folded in.

    They take turns within each repeat, in an order that changes, so that a noisy machine treats them alike; ratios are
    medians over repeats of the ratio within a repeat.

    Args:
        compensators: method -> file, for the job's methods that add one.
        learned: the compressor's parameters, if it is one that is learned on the backbone.

    Returns:
        A row for each (degree, method): images_per_second (median), speedup (over the uncompressed model), ratio (time
        with the compensator folded in over time without, with its quartiles), memory_mb, gflops, the conditions it was
        measured under, and, if the settings say so, train_images_per_second and train_speedup of a training step
        (forward and backward) over that of the uncompressed model.

    Raises:
        TocomError: a file is missing or corrupt, or a degree is out of range.
    """
    settings = job.settings
    make_deterministic(settings.threads)
    device = pick_device(settings.device)
    added = {name: compensators.get(name) for name, compensated in job.methods.items() if compensated}
    if missing := [name for name, path in added.items() if path is None]:
        raise TocomError(f"method {missing[0]!r} adds a compensator; name its file (--compensator {missing[0]}=FILE)")
    parts = {name: load_part(path, "compensator").to(device) for name, path in added.items()}
    rows = []
    for degree in bar(job.degrees, "throughput"):
        vits = {name: _make(backbone, device, job, learned) for name in (None, "", *parts)}
        vits[""].set_degree(degree)
        for name, part in parts.items():
            vits[name].attach(part).set_degree(degree)
        images = vits[""].example(settings.batch_size)
        work = {name: inference_work(vit, images, settings.precision) for name, vit in vits.items()}
        times = side_by_side(work, settings, device)
        training = _training_columns({name: vits[name] for name in (None, "")}, images, settings)
        for method, compensated in job.methods.items():
            name = method if compensated else ""
            low, ratio, high = np.quantile(times[name] / times[""], [0.25, 0.5, 0.75])
            rows.append(
                {
                    "study": job.study,
                    "backbone": job.backbone,
                    "method": method,
                    "infer_degree": degree,
                    "compensated": compensated,
                    "gflops": round(gflops(vits[name]), 6),
                    "images_per_second": settings.batch_size / np.median(times[name]),
                    "speedup": np.median(times[None] / times[name]),
                    "ratio": ratio,
                    "ratio_low": low,
                    "ratio_high": high,
                    "memory_mb": peak_memory_mb(work[name], device, vits[name], images),
                    "image_size": images.shape[-1],
                    "batch_size": settings.batch_size,
                    "repeats": settings.repeats,
                    "threads": settings.threads,
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                }
                | training
            )
    return rows


def _training_columns(vits: dict[str | None, Compressed], images: torch.Tensor, settings: ThroughputSettings) -> dict:
    """Return the training throughput of the compressed model (""), measured beside the uncompressed one (None)."""
    if not settings.training:
        return {}
    for vit in vits.values():
        vit.train()
    work = {name: training_work(vit, images, settings.precision) for name, vit in vits.items()}
    times = side_by_side(work, settings, images.device)
    for vit in vits.values():
        vit.zero_grad()
        vit.eval()
    return {
        "train_images_per_second": settings.batch_size / np.median(times[""]),
        "train_speedup": np.median(times[None] / times[""]),
    }


def _make(
    backbone: str | os.PathLike, device: torch.device, job: ThroughputJob, learned: str | os.PathLike | None
) -> Compressed:
    model, about = load_model(backbone)
    if job.image_size is not None:
        set_image_size(model, job.image_size)
    compressor = job.compressor if learned is None else load_part(learned, "compressor")
    return compress(model.to(device), about, compressor).eval()
