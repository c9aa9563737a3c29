"""Measure images a second and memory at each degree; report ratios of things measured side by side."""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from tocom.compensator import Compensator
from tocom.models import load_model, pick_device
from tocom.settings import ThroughputSettings
from tocom.training import bar, make_deterministic
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


def seconds(vit: CompressedViT, images: torch.Tensor) -> float:
    """Return the wall time of one forward pass."""
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    vit(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


@torch.inference_mode()
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
        ratio (time with ToCom folded in over time without, with its quartiles), memory_mb, gflops, and the
        conditions it was measured under.
    """
    settings = settings or ThroughputSettings()
    make_deterministic(settings.threads)
    device = pick_device(settings.device)
    generator = np.random.default_rng(0)
    rows = []
    for degree in bar(degrees, "throughput"):
        vits = {name: _make(backbone, device, compressor) for name in ("uncompressed", "plain", "folded")}
        vits["plain"].set_degree(degree)
        vits["folded"].attach(Compensator.load(compensator).to(device)).set_degree(degree)
        images = _random_images(vits["plain"], settings.batch_size, device)
        for vit in vits.values():
            for _ in range(settings.warmup):
                vit(images)
        times = {name: np.empty(settings.repeats) for name in vits}
        for repeat in range(settings.repeats):
            for name in generator.permutation(list(vits)):
                times[name][repeat] = seconds(vits[name], images)
        low, ratio, high = np.quantile(times["folded"] / times["plain"], [0.25, 0.5, 0.75])
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
                    "memory_mb": peak_memory_mb(vits[name], images),
                    "batch_size": settings.batch_size,
                    "repeats": settings.repeats,
                    "threads": settings.threads,
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                }
            )
    return rows


def _make(backbone: str | os.PathLike, device: torch.device, compressor: str) -> CompressedViT:
    return CompressedViT(load_model(backbone)[0].to(device), compressor).eval()


def _random_images(vit: CompressedViT, batch_size: int, device: torch.device) -> torch.Tensor:
    patch = vit.model.patch_embed
    shape = (batch_size, patch.proj.in_channels, *patch.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
