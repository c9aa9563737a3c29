"""Measure images a second and memory at each degree; report ratios of things measured side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from tocom.compensator import Compensator
from tocom.models import load_model, pick_device
from tocom.settings import ThroughputSettings
from tocom.stages.common import compressed
from tocom.training import autocast, bar, make_deterministic
from tocom.vit import CompressedViT, gflops


def peak_memory_mb(vit: CompressedViT, images: torch.Tensor) -> float:
    """Return the most memory that tensors take during one forward pass, weights included, in MB (10^6 bytes).

    On a GPU it is what CUDA's allocator reports, less what other models on it hold; on a CPU, what torch's tensors
    hold.
    """
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        vit(images)
        own = sum(tensor.nbytes for tensor in (*vit.parameters(), *vit.buffers(), images))
        return (torch.cuda.max_memory_allocated(images.device) - before + own) / 1e6
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(vit, images)
    with tracker:
        vit(images)
    snapshot = tracker.get_tracker_snapshot("peak")[images.device]
    return snapshot["Total"] / 1e6


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a piece of work, what a GPU still had to do included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def training_work(vit: CompressedViT, images: torch.Tensor, precision: str) -> Callable[[], object]:
    """Return what one training step costs: forward, loss and backward, without the optimizer."""
    numbers = torch.arange(len(images), device=images.device)

    def work() -> None:
        with autocast(precision, images.device):
            logits = vit(images)
            loss = F.cross_entropy(logits, numbers % logits.shape[1])
        vit.zero_grad()
        loss.backward()

    return work


def inference_work(vit: CompressedViT, images: torch.Tensor, precision: str) -> Callable[[], object]:
    """Return one forward pass."""

    def work() -> None:
        with torch.inference_mode(), autocast(precision, images.device):
            vit(images)

    return work


def side_by_side(
    work: dict[str, Callable[[], object]], settings: ThroughputSettings, device: torch.device
) -> dict[str, np.ndarray]:
    """Return the seconds of every piece of work in every round [repeats]; all take turns, in an order that changes."""
    generator = np.random.default_rng(0)
    for do in work.values():
        for _ in range(settings.warmup):
            do()
    times = {name: np.empty(settings.repeats) for name in work}
    for repeat in range(settings.repeats):
        for name in generator.permutation(list(work)):
            times[name][repeat] = seconds(work[name], device)
    return times


def throughput(
    backbone: str | os.PathLike,
    compensator: str | os.PathLike,
    degrees: list[int],
    compressor: str = "tome",
    settings: ThroughputSettings | None = None,
) -> list[dict]:
    """Time the uncompressed model, the compressed model and the compressed model with ToCom folded in.

    The three take turns within each repeat, in an order that changes, so that a noisy machine treats them alike;
    ratios are medians over repeats of the ratio within a repeat.

    Returns:
        A row for each (degree, compensated): images_per_second (median), speedup (over the uncompressed model),
        ratio (time with ToCom folded in over time without, with its quartiles), memory_mb, gflops, the conditions it
        was measured under, and, if the settings say so, train_images_per_second and train_speedup of a training step
        (forward and backward) over that of the uncompressed model.
    """
    settings = settings or ThroughputSettings()
    make_deterministic(settings.threads)
    device = pick_device(settings.device)
    rows = []
    for degree in bar(degrees, "throughput"):
        vits = {name: _make(backbone, device, compressor) for name in ("uncompressed", "plain", "folded")}
        vits["plain"].set_degree(degree)
        vits["folded"].attach(Compensator.load(compensator).to(device)).set_degree(degree)
        images = _random_images(vits["plain"], settings.batch_size, device)
        work = {name: inference_work(vit, images, settings.precision) for name, vit in vits.items()}
        times = side_by_side(work, settings, device)
        low, ratio, high = np.quantile(times["folded"] / times["plain"], [0.25, 0.5, 0.75])
        training = _training_columns(vits, images, settings) if settings.training else {}
        for compensated, name in ((False, "plain"), (True, "folded")):
            rows.append(
                {
                    "compressor": compressor,
                    "infer_degree": degree,
                    "compensated": compensated,
                    "gflops": round(gflops(vits[name]), 6),
                    "images_per_second": settings.batch_size / np.median(times[name]),
                    "speedup": np.median(times["uncompressed"] / times[name]),
                    "ratio": ratio if compensated else 1.0,
                    "ratio_low": low if compensated else 1.0,
                    "ratio_high": high if compensated else 1.0,
                    "memory_mb": _peak_memory_mb(vits[name], images, settings.precision),
                    "batch_size": settings.batch_size,
                    "repeats": settings.repeats,
                    "threads": settings.threads,
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                }
                | training
            )
    return rows


def _training_columns(vits: dict[str, CompressedViT], images: torch.Tensor, settings: ThroughputSettings) -> dict:
    """Return the training throughput of the compressed model, measured beside the uncompressed one."""
    vits = {name: vits[name].train() for name in ("uncompressed", "plain")}
    work = {name: training_work(vit, images, settings.precision) for name, vit in vits.items()}
    times = side_by_side(work, settings, images.device)
    for vit in vits.values():
        vit.zero_grad()
        vit.eval()
    return {
        "train_images_per_second": settings.batch_size / np.median(times["plain"]),
        "train_speedup": np.median(times["uncompressed"] / times["plain"]),
    }


@torch.inference_mode()
def _peak_memory_mb(vit: CompressedViT, images: torch.Tensor, precision: str) -> float:
    with autocast(precision, images.device):
        return peak_memory_mb(vit, images)


def _make(backbone: str | os.PathLike, device: torch.device, compressor: str) -> CompressedViT:
    model, about = load_model(backbone)
    return compressed(model.to(device), about, compressor).eval()


def _random_images(vit: CompressedViT, batch_size: int, device: torch.device) -> torch.Tensor:
    patch = vit.model.patch_embed
    shape = (batch_size, patch.proj.in_channels, *patch.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
