"""Fine-tune a backbone for one task at one train degree."""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F

from tocom.errors import TocomError
from tocom.files import sha256
from tocom.models import load_model, pick_device, save_model
from tocom.settings import RANDOM, FinetuneSettings
from tocom.stages.common import check_size, load_task, predict
from tocom.training import derive_seed, fit, forget, make_deterministic, normalise, random_shift, resume_path
from tocom.vit import CompressedViT


def finetune(
    backbone: str | os.PathLike,
    data: str | os.PathLike,
    output: str | os.PathLike,
    train_degree: int | str,
    seed: int,
    compressor: str = "tome",
    max_degree: int | None = None,
    settings: FinetuneSettings | None = None,
    keep_state: bool = False,
) -> dict:
    """Fine-tune all parameters of a backbone and write the best epoch as a checkpoint.

    The best epoch is the one with the highest validation accuracy (ties: the lowest validation loss) at the train
    degree; the test images are not looked at.

    Args:
        backbone: a bundled name or a checkpoint. data: a prepared task. output: the checkpoint to write.
        train_degree: tokens removed in every block while training, or "random" to draw it uniformly from
            0..max_degree for every step, the rival that pays for its flexibility in every fine-tuning.
        max_degree: needed for "random" only.
        keep_state: leave the finished run's state beside the output until :func:`tocom.training.forget` is called,
            so that a caller which is killed before it has made all of its outputs makes this one again at once.

    Returns:
        What is stored with the checkpoint.

    Raises:
        TocomError: an input is missing or corrupt, the degree is out of range, or the loss turns NaN.
    """
    settings = settings or FinetuneSettings()
    check_degree(train_degree, max_degree)
    make_deterministic(settings.threads)
    device = pick_device(settings.device)
    task = load_task(data, device)
    model, described = load_model(backbone, num_classes=task.classes, drop_path_rate=settings.drop_path)
    check_size(task, model)
    vit = CompressedViT(model.to(device), compressor, 0 if train_degree == RANDOM else train_degree)

    def step(indices):
        if train_degree == RANDOM:
            vit.set_degree(int(torch.randint(max_degree + 1, ())))
        images = random_shift(task.train.images[indices], settings.shift)
        logits = vit(normalise(images, model))
        return F.cross_entropy(logits, task.train.labels[indices], label_smoothing=settings.label_smoothing)

    def score():
        degrees = [0, max_degree // 2, max_degree] if train_degree == RANDOM else [train_degree]
        results = []
        for degree in degrees:
            logits = predict(vit.set_degree(degree), task.val.images, 250)
            labels = task.val.labels.cpu()
            results.append(((logits.argmax(-1) == labels).double().mean(), -F.cross_entropy(logits, labels)))
        return tuple(float(torch.stack(values).mean()) for values in zip(*results, strict=True))

    title = f"finetune {task.name} degree {train_degree} seed {seed}"
    run_seed = derive_seed(seed, task.name, str(train_degree))
    identity = {
        "backbone": described["sha256"],
        "data": sha256(data),
        "compressor": compressor,
        "max_degree": max_degree if train_degree == RANDOM else None,
    }
    record = fit(step, model, len(task.train.labels), settings, run_seed, score, title, identity, resume_path(output))
    metadata = {
        "task": task.name,
        "train_degree": train_degree,
        "seed": seed,
        "compressor": compressor,
        "backbone_sha256": described["sha256"],
        "recipe": settings.model_dump(mode="json"),
        "best_epoch": record["best_epoch"],
        "val_accuracy": record["score"][0],
    }
    save_model(
        output, model, described["architecture"], described["kwargs"] | {"num_classes": task.classes}, **metadata
    )
    if not keep_state:
        forget(output)
    return metadata


def check_degree(degree: int | str, max_degree: int | None) -> None:
    """Raise TocomError unless ``degree`` is a whole number that is not negative, or "random" up to some degree."""
    if degree == RANDOM and max_degree is None:
        raise TocomError("train degree 'random' needs to know how far to draw; give max_degree (--max-degree)")
    if degree != RANDOM and (not isinstance(degree, int) or degree < 0):
        raise TocomError(f"train degree {degree!r} is out of range: give 0 or more tokens a block, or {RANDOM!r}")
