"""Evaluate every cell of a checkpoint: (inference degree, with and without ToCom)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from tocom.compensator import Compensator
from tocom.errors import TocomError
from tocom.files import save_arrays
from tocom.models import load_model, pick_device
from tocom.settings import PLAIN, RANDOM, EvaluateSettings
from tocom.stages.common import Split, TaskData, compressed, load_task, predict, scored
from tocom.training import bar, make_deterministic
from tocom.vit import CompressedViT, gflops


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


def choose_scale(vit: CompressedViT, val: Split, scales: Sequence[float], settings: EvaluateSettings) -> float:
    """Return the scale with the best validation figure at the model's present degree; ties go to the smaller.

    Only the validation images are looked at.
    """
    if len(scales) == 1:
        return scales[0]
    degree = vit.degree

    def figures(scale: float) -> tuple[float, ...]:
        logits = predict(vit.set_degree(degree, scale), val.images, settings.batch_size, settings.precision)
        accuracy, loss = scored(logits, val.labels)
        return (accuracy, loss) if settings.select_by == "accuracy" else (loss,)

    return max(sorted(scales), key=figures)  # the first of equals


@dataclass(frozen=True)
class Variant:
    """A compensator under the name that tables give it, and how it is used.

    Attributes:
        scales: candidate scales, as multiples of the trained one; None: those of the settings.
    """

    name: str
    compensator: Compensator
    scales: tuple[float, ...] | None = None


def evaluate_checkpoint(
    checkpoint: str | os.PathLike,
    task: TaskData,
    variants: Sequence[Variant],
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
    for variant in variants:
        _check_backbone(checkpoint, meta, model.pretrained_cfg, variant)
    source = meta["train_degree"]
    vit = compressed(model.to(task.device), meta, meta["compressor"], 0 if source == RANDOM else source)
    cells, predictions = [], []

    def record(name: str, scale: float, known: np.ndarray | None = None) -> None:
        if known is None:
            logits = predict(vit, task.test.images, settings.batch_size, settings.precision)
            known = logits.argmax(-1).numpy().astype(np.int16)
        cells.append(Cell(vit.degree, name != PLAIN, name, scale, round(gflops(vit), 6)))
        predictions.append(known)
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
                scale = choose_scale(vit.set_degree(degree), task.val, scales, settings)
            vit.set_degree(degree, scale)
            record(variant.name, scale, known=None if scale else plain[degree])
    return cells, np.stack(predictions), meta


def _check_backbone(checkpoint: str | os.PathLike, meta: dict, cfg: dict, variant: Variant) -> None:
    """Raise TocomError if a compensator was distilled on another backbone, or on one run in another way.

    What a compensator's file does not say (a foreign one, or an old one) is not checked.
    """
    made_for = variant.compensator.metadata.get("backbone_sha256", meta["backbone_sha256"])
    if made_for != meta["backbone_sha256"]:
        raise TocomError(
            f"{checkpoint} was fine-tuned from another backbone than this compensator was distilled on"
            f" ({meta['backbone_sha256'][:12]}, {made_for[:12]}); distil one for its backbone"
        )
    run = {"proportional_attention": meta.get("proportional_attention", True)}
    run |= {name: list(cfg[name]) for name in ("mean", "std")}
    for name, value in run.items():
        distilled = variant.compensator.metadata.get(name, value)
        if distilled != value:
            raise TocomError(
                f"{checkpoint} is run with {name} {value}, this compensator was distilled with {distilled};"
                " distil one for the backbone that it was fine-tuned from"
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
