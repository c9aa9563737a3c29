"""Evaluate every cell of a checkpoint: (inference degree, with and without ToCom)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from tocom.compensator import Compensator
from tocom.errors import TocomError
from tocom.files import save_arrays
from tocom.models import load_model, pick_device
from tocom.settings import PLAIN, RANDOM, EvaluateSettings
from tocom.stages.common import Split, TaskData, compressed, load_task, predict, scored
from tocom.training import bar, make_deterministic
from tocom.vit import CompressedViT, gflops

#: What a stage keeps of a model's predictions.
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """One evaluated condition of a checkpoint.

    Attributes:
        infer_degree: tokens removed in every block.
        compensated: whether ToCom was offered; ``scale`` is the factor chosen for it (0: declined).
        compensator: the variant of ToCom, or "none".
        gflops: billions of multiply-adds for one image.
    """

    infer_degree: int
    compensated: bool
    compensator: str
    scale: float
    gflops: float


def choose_scale(
    vit: CompressedViT, scales: Sequence[float], figures: Callable[[], tuple[float, float]], settings: EvaluateSettings
) -> float:
    """Return the scale with the best validation figure at the model's present degree; ties go to the smaller.

    Args:
        figures: returns the accuracy (or mIoU) of the model as it is on the validation images, and minus its loss.
    """
    if len(scales) == 1:
        return scales[0]
    degree = vit.degree

    def rank(scale: float) -> tuple[float, ...]:
        vit.set_degree(degree, scale)
        accuracy, loss = figures()
        return (accuracy, loss) if settings.select_by == "accuracy" else (loss,)

    return max(sorted(scales), key=rank)  # the first of equals


@dataclass(frozen=True)
class Variant:
    """A compensator under the name that tables give it, and how it is used.

    Attributes:
        scales: candidate scales, as multiples of the trained one; None: those of the settings.
    """

    name: str
    compensator: Compensator
    scales: tuple[float, ...] | None = None


def evaluate_cells(
    vit: CompressedViT,
    source: int | str,
    variants: Sequence[Variant],
    infer_degrees: Sequence[int],
    settings: EvaluateSettings,
    predicted: Callable[[], T],
    figures: Callable[[], tuple[float, float]],
    progress: tqdm,
) -> tuple[list[Cell], list[T]]:
    """Return the cells of a model, plain ones first, and what it predicts in each.

    Args:
        source: the degree it was trained at; a model that was trained at degrees drawn at random has none, and so no
            compensated cells.
        predicted: returns what the model predicts, as it is, for the test images.
        figures: see :func:`choose_scale`; only these decide on the scale.
    """
    cells, predictions = [], []

    def record(name: str, scale: float, known: T | None = None) -> None:
        predictions.append(predicted() if known is None else known)
        cells.append(Cell(vit.degree, name != PLAIN, name, scale, round(gflops(vit), 6)))
        progress.update()

    for degree in infer_degrees:
        vit.set_degree(degree)
        record(PLAIN, scale=0.0)
    plain = dict(zip(infer_degrees, predictions, strict=True))
    for variant in variants if source != RANDOM else ():
        scales = [s * variant.compensator.trained_scale for s in variant.scales or settings.scales]
        vit.detach().set_degree(source)
        vit.attach(variant.compensator)
        for degree in infer_degrees:
            scale = 0.0
            if degree != source:  # P(m->m) is zero, whatever the scale
                scale = choose_scale(vit.set_degree(degree), scales, figures, settings)
            vit.set_degree(degree, scale)
            record(variant.name, scale, known=None if scale else plain[degree])
    return cells, predictions


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    task: TaskData,
    variants: Sequence[Variant],
    infer_degrees: list[int],
    settings: EvaluateSettings,
    progress: tqdm,
) -> tuple[list[Cell], np.ndarray, dict]:
    """Return the cells of a checkpoint, their predictions [cells, test images] int16, and the checkpoint's metadata."""
    model, meta = load_model(checkpoint)
    if meta.get("task") != task.name:
        raise TocomError(
            f"{checkpoint} was fine-tuned for {meta.get('task')!r}, not for {task.name!r}; check the paths"
        )
    for variant in variants:
        check_compensator(checkpoint, meta, model, variant.compensator)
    source = meta["train_degree"]
    vit = compressed(model.to(task.device), meta, meta["compressor"], 0 if source == RANDOM else source)

    def logits(split: Split) -> Tensor:
        return predict(vit, split.images, settings.batch_size, settings.precision)

    def predicted() -> np.ndarray:
        return logits(task.test).argmax(-1).numpy().astype(np.int16)

    def figures() -> tuple[float, float]:
        return scored(logits(task.val), task.val.labels)

    cells, predictions = evaluate_cells(vit, source, variants, infer_degrees, settings, predicted, figures, progress)
    return cells, np.stack(predictions), meta


def check_compensator(checkpoint: str | os.PathLike, meta: dict, model: nn.Module, compensator: Compensator) -> None:
    """Raise TocomError if a compensator was distilled on another backbone, or on one run in another way.

    What a compensator's file does not say (a foreign one, or an old one) is not checked.

    Args:
        meta: what the checkpoint says of itself. model: what was built from it.
    """
    made_for = compensator.metadata.get("backbone_sha256", meta["backbone_sha256"])
    if made_for != meta["backbone_sha256"]:
        raise TocomError(
            f"{checkpoint} was trained from another backbone than this compensator was distilled on"
            f" ({meta['backbone_sha256'][:12]}, {made_for[:12]}); distil one for its backbone"
        )
    run = {"proportional_attention": meta.get("proportional_attention", True)}
    run |= {name: list(model.pretrained_cfg[name]) for name in ("mean", "std")}
    for name, value in run.items():
        distilled = compensator.metadata.get(name, value)
        if distilled != value:
            raise TocomError(
                f"{checkpoint} is run with {name} {value}, this compensator was distilled with {distilled};"
                " distil one for the backbone that it was trained from"
            )


def evaluate(
    checkpoints: list[str | os.PathLike],
    data: str | os.PathLike,
    compensators: Mapping[str, str | os.PathLike],
    outputs: list[str | os.PathLike],
    infer_degrees: list[int],
    settings: EvaluateSettings | None = None,
    scales: Mapping[str, Sequence[float]] | None = None,
) -> list[list[Cell]]:
    """Evaluate all cells of some checkpoints of one task and keep every prediction.

    Args:
        data: the prepared task. outputs: a file for each checkpoint, with ``predictions`` [cells, images] int16,
            ``labels`` [images] and the cells in its metadata.
        compensators: variant -> file. scales: candidates for variants that have their own.

    Returns:
        The cells of each checkpoint.

    Raises:
        TocomError: an input is missing, corrupt or of another task, or a degree is out of range.
    """
    settings = settings or EvaluateSettings()
    make_deterministic(settings.threads)
    task = load_task(data, pick_device(settings.device))
    own = {name: tuple(values) for name, values in (scales or {}).items()}
    variants = [Variant(name, Compensator.load(path), own.get(name)) for name, path in compensators.items()]
    results = []
    total = len(checkpoints) * len(infer_degrees) * (1 + len(variants))
    with bar(None, f"evaluate {task.name}", total=total) as progress:
        for checkpoint, output in zip(checkpoints, outputs, strict=True):
            cells, predictions, meta = evaluate_checkpoint(
                checkpoint, task, variants, infer_degrees, settings, progress
            )
            kept = ("task", "train_degree", "seed", "compressor", "val_accuracy")
            arrays = {"predictions": predictions, "labels": task.test.labels.cpu().numpy()}
            described = {key: meta[key] for key in kept} | {"kind": "predictions"}
            save_arrays(output, arrays, described | {"cells": [asdict(cell) for cell in cells]})
            results.append(cells)
    return results
