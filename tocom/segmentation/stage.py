"""Train segmenters and evaluate their cells: (inference degree, with and without ToCom).

Images are scaled and cut to the square input size, in testing too; there is no sliding window, so figures on ADE20k
are of the centre of each image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from tocom import distributed
from tocom.bundled import resolve
from tocom.compensator import Compensator
from tocom.data.loading import feed, in_one_line
from tocom.errors import TocomError
from tocom.files import save_arrays, sha256
from tocom.models import pick_device
from tocom.seeds import derive_seed
from tocom.segmentation.data import SegmentationData, Split, TrainViews
from tocom.segmentation.data import load as load_data
from tocom.segmentation.metrics import Counts, count, miou
from tocom.segmentation.model import Segmenter, build, pixel_loss
from tocom.segmentation.model import load as load_segmenter
from tocom.segmentation.model import save as save_segmenter
from tocom.segmentation.scenes import IGNORED
from tocom.segmentation.settings import SegmentationTraining
from tocom.settings import TOCOM, EvaluateSettings
from tocom.stages.evaluate import Cell, Variant, check_compensator, evaluate_cells
from tocom.training import autocast, bar, compiled, explained, fit, forget, make_deterministic, normalise, resume_path

#: Images of a forward pass on the validation split while training.
_SCORED_AT_ONCE = 16


@torch.inference_mode()
def segment(
    segmenter: Segmenter, split: Split, batch_size: int, precision: str = "fp32", workers: int = 0
) -> tuple[Counts, float]:
    """Label every image of a split; several processes share the work.

    Args:
        workers: processes that decode images ahead.

    Returns:
        Counts [images, classes] int32, and the cross-entropy of all labelled pixels (nats).
    """
    segmenter.eval()
    device = next(segmenter.parameters()).device
    batches = distributed.share([batch.tolist() for batch in torch.arange(len(split)).split(batch_size)])
    # A generator of its own: the loader must not draw from the training's random stream.
    loader = DataLoader(split, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    results = []
    for item in in_one_line(iter(loader)):
        images, labels = (part.to(device) for part in item)
        labels = labels.long()
        with autocast(precision, device):
            scores = segmenter(normalise(images, segmenter.vit.model))
        # A sum over one image's pixels does not depend on what else is in the batch.
        losses = F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none").double().sum(dim=(1, 2))
        results.append((count(scores.argmax(1).cpu(), labels.cpu(), split.classes), losses.cpu().numpy()))
    results = distributed.gather(results)
    counts = Counts(*(np.concatenate(parts) for parts in zip(*(c for c, _ in results), strict=True)))
    labelled = int(counts.tp.sum(dtype=np.int64) + counts.fn.sum(dtype=np.int64))
    return counts, float(np.concatenate([loss for _, loss in results]).sum()) / max(labelled, 1)


def validated(
    segmenter: Segmenter, val: Split, batch_size: int, precision: str, workers: int = 0
) -> tuple[float, float]:
    """Return what epochs and scales are chosen by: mIoU in percent, and minus the cross-entropy; larger is better."""
    counts, loss = segment(segmenter, val, batch_size, precision, workers)
    return float(miou(counts)), -loss


@explained()
def train(
    backbone: str | os.PathLike,
    data: str | os.PathLike,
    output: str | os.PathLike,
    train_degree: int = 0,
    seed: int = 0,
    compressor: str = "tome_mlp",
    settings: SegmentationTraining | None = None,
) -> dict:
    """Train a backbone and a new head to segment, and write the best epoch as a checkpoint.

    The best epoch is the one with the highest validation mIoU (ties: the lowest validation loss) at the train degree;
    the test images are not looked at.

    Args:
        backbone: a bundled name or a classifier's checkpoint. data: what `tocom segment prepare` wrote.
        output: the checkpoint to write.
        train_degree: share of the patches that merge before each MLP while training, in 1/32.

    Returns:
        What is stored with the checkpoint.

    Raises:
        TocomError: an input is missing or corrupt, the degree is out of range, the loss turns NaN, or an operation's
            results vary from run to run and ``deterministic`` is set.
    """
    settings = settings or SegmentationTraining()
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        task = load_data(data)
        run_seed = derive_seed(seed, task.name, str(train_degree))
        torch.manual_seed(derive_seed(run_seed, "head"))
        segmenter, about = build(
            backbone,
            task.classes,
            task.size,
            settings.head,
            compressor,
            train_degree,
            drop_path_rate=settings.drop_path,
        )
        segmenter.to(device)
        run = compiled(segmenter, settings)
        views = TrainViews(task.splits["train"], settings, run_seed)

        def step(item: Sequence[Tensor]) -> Tensor:
            images, labels = (part.to(device, non_blocking=True) for part in item)
            return pixel_loss(run(normalise(images, segmenter.vit.model)), labels, IGNORED)

        def score() -> tuple[float, float]:
            return validated(segmenter, task.splits["val"], _SCORED_AT_ONCE, settings.precision, settings.workers)

        title = f"segment {task.name} degree {train_degree} seed {seed}"
        # The backbone's metadata, too, decide how it is run.
        identity = {"backbone": sha256(resolve(backbone)), "data": sha256(data), "compressor": compressor}
        loader = feed(views, settings.workers, pin=device.type == "cuda")
        record = fit(
            step, segmenter, len(views), settings, run_seed, score, title, identity, resume_path(output), feed=loader
        )
        about |= {
            "task": task.name,
            "seed": seed,
            "recipe": settings.recipe(),
            "best_epoch": record["best_epoch"],
            "val_miou": record["score"][0],
        }
        if distributed.is_main():
            save_segmenter(output, segmenter, about)
            forget(output)
        distributed.wait_for_all()
    return about


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    task: SegmentationData,
    variant: Variant,
    infer_degrees: list[int],
    settings: EvaluateSettings,
    progress: tqdm,
) -> tuple[list[Cell], Counts, dict]:
    """Return the cells of a checkpoint, their counts [cells, images, classes], and the checkpoint's metadata."""
    segmenter, about = load_segmenter(checkpoint)
    for key, want, what in (("task", task.name, "task"), ("classes", task.classes, "number of classes")):
        if about[key] != want:
            raise TocomError(f"{checkpoint} was trained for another {what} ({about[key]}, not {want}); check the paths")
    vit = segmenter.to(pick_device(settings.device)).vit
    check_compensator(checkpoint, about, vit.model, variant.compensator)

    def predicted() -> Counts:
        return segment(segmenter, task.splits["test"], settings.batch_size, settings.precision)[0]

    def figures() -> tuple[float, float]:
        return validated(segmenter, task.splits["val"], settings.batch_size, settings.precision)

    source = about["train_degree"]
    cells, counts = evaluate_cells(vit, source, [variant], infer_degrees, settings, predicted, figures, progress)
    return cells, Counts(*(np.stack(parts) for parts in zip(*counts, strict=True))), about


def evaluate(
    checkpoints: Sequence[str | os.PathLike],
    data: str | os.PathLike,
    compensator: str | os.PathLike,
    outputs: Sequence[str | os.PathLike],
    infer_degrees: list[int],
    settings: EvaluateSettings | None = None,
    variant: str = TOCOM,
) -> list[list[dict]]:
    """Evaluate all cells of some segmenters and keep the counts of every test image.

    Args:
        data: what `tocom segment prepare` wrote. variant: what tables call the compensator.
        outputs: a file for each checkpoint, with ``tp``, ``fp`` and ``fn`` [cells, images, classes] int32 and the
            cells in its metadata. GFLOPs are of the backbone; the head, equal at all degrees, is not counted.

    Returns:
        The cells of each checkpoint.

    Raises:
        TocomError: an input is missing, corrupt or of another task, or a degree is out of range.
    """
    settings = settings or EvaluateSettings()
    make_deterministic(settings.threads)
    task, named = load_data(data), Variant(variant, Compensator.load(compensator))
    results = []
    with bar(None, f"segment {task.name}", total=len(checkpoints) * len(infer_degrees) * 2) as progress:
        for checkpoint, output in zip(checkpoints, outputs, strict=True):
            found, counts, about = evaluate_checkpoint(checkpoint, task, named, infer_degrees, settings, progress)
            cells = [asdict(cell) for cell in found]
            kept = {key: about[key] for key in ("task", "classes", "train_degree", "seed", "compressor", "val_miou")}
            save_arrays(output, counts._asdict(), kept | {"kind": "segmentation counts", "cells": cells})
            results.append(cells)
    return results
