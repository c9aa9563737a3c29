"""Evaluate every cell of a checkpoint: (inference degree, with and without ToCom)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import numpy as np
from torch.nn import functional as F
from tqdm import tqdm

from tocom.compensator import Compensator
from tocom.errors import TocomError
from tocom.files import save_arrays
from tocom.models import load_model, pick_device
from tocom.settings import RANDOM, EvaluateSettings
from tocom.stages.common import Split, TaskData, load_task, predict
from tocom.training import bar, make_deterministic
from tocom.vit import CompressedViT, gflops


@dataclass(frozen=True)
class Cell:
    """One evaluated condition of a checkpoint.

    Attributes:
        infer_degree: tokens removed in every block.
        compensated: whether ToCom was offered; ``scale`` is the factor chosen for it (0: declined).
        gflops: billions of multiply-adds for one image.
    """

    infer_degree: int
    compensated: bool
    scale: float
    gflops: float


def choose_scale(vit: CompressedViT, val: Split, scales: list[float], settings: EvaluateSettings) -> float:
    """Return the scale with the best validation figure at the model's present degree; ties go to the smaller.

    Only the validation images are looked at.
    """
    labels, degree = val.labels.cpu(), vit.degree

    def figures(scale: float) -> tuple[float, ...]:
        logits = predict(vit.set_degree(degree, scale), val.images, settings.batch_size)
        correct, loss = int((logits.argmax(-1) == labels).sum()), float(F.cross_entropy(logits, labels))
        return (correct, -loss) if settings.select_by == "accuracy" else (-loss,)

    return max(sorted(scales), key=figures)  # the first of equals


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    task: TaskData,
    compensator: Compensator,
    infer_degrees: list[int],
    settings: EvaluateSettings,
    progress: tqdm,
) -> tuple[list[Cell], np.ndarray, dict]:
    """Return the cells of a checkpoint, their predictions [cells, test images] int16, and the checkpoint's metadata.

    A checkpoint that was trained at degrees drawn at random has no source degree, and so no compensated cells.
    """
    model, meta = load_model(checkpoint)
    if meta.get("task") != task.name:
        raise TocomError(
            f"{checkpoint} was fine-tuned for {meta.get('task')!r}, not for {task.name!r}; check the paths"
        )
    made_for = compensator.metadata.get("backbone_sha256", meta["backbone_sha256"])
    if made_for != meta["backbone_sha256"]:
        raise TocomError(
            f"{checkpoint} was fine-tuned from another backbone than this compensator was distilled on"
            f" ({meta['backbone_sha256'][:12]}, {made_for[:12]}); distil one for its backbone"
        )
    source = meta["train_degree"]
    device = task.test.images.device
    vit = CompressedViT(model.to(device), meta["compressor"], 0 if source == RANDOM else source)
    cells, predictions = [], []

    def record(compensated: bool, scale: float, known: np.ndarray | None = None) -> None:
        if known is None:
            known = predict(vit, task.test.images, settings.batch_size).argmax(-1).numpy().astype(np.int16)
        cells.append(Cell(vit.degree, compensated, scale, round(gflops(vit), 6)))
        predictions.append(known)
        progress.update()

    for degree in infer_degrees:
        vit.set_degree(degree)
        record(compensated=False, scale=0.0)
    if source != RANDOM:
        scales = [multiple * compensator.trained_scale for multiple in settings.scales]
        plain = dict(zip(infer_degrees, predictions, strict=True))
        vit.set_degree(source).attach(compensator)
        for degree in infer_degrees:
            scale = 0.0
            if degree != source:  # P(m->m) is zero, whatever the scale
                scale = choose_scale(vit.set_degree(degree), task.val, scales, settings)
            vit.set_degree(degree, scale)
            record(compensated=True, scale=scale, known=None if scale else plain[degree])
    return cells, np.stack(predictions), meta


def evaluate(
    checkpoints: list[str | os.PathLike],
    data: str | os.PathLike,
    compensator: str | os.PathLike,
    outputs: list[str | os.PathLike],
    infer_degrees: list[int],
    settings: EvaluateSettings | None = None,
) -> list[list[Cell]]:
    """Evaluate all cells of some checkpoints of one task and keep every prediction.

    Args:
        data: the prepared task. outputs: a file for each checkpoint, with ``predictions`` [cells, images] int16,
            ``labels`` [images] and the cells in its metadata.

    Returns:
        The cells of each checkpoint.

    Raises:
        TocomError: an input is missing, corrupt or of another task, or a degree is out of range.
    """
    settings = settings or EvaluateSettings()
    make_deterministic(settings.threads)
    task = load_task(data, pick_device(settings.device))
    loaded = Compensator.load(compensator)
    results = []
    with bar(None, f"evaluate {task.name}", total=len(checkpoints) * len(infer_degrees) * 2) as progress:
        for checkpoint, output in zip(checkpoints, outputs, strict=True):
            cells, predictions, meta = evaluate_checkpoint(checkpoint, task, loaded, infer_degrees, settings, progress)
            described = {key: meta[key] for key in ("task", "train_degree", "seed", "compressor", "val_accuracy")}
            arrays = {"predictions": predictions, "labels": task.test.labels.cpu().numpy()}
            save_arrays(output, arrays, described | {"cells": [asdict(cell) for cell in cells]})
            results.append(cells)
    return results
