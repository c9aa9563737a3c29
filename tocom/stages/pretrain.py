"""Pre-train the embedded backbone on procedural letters."""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F

from tocom import distributed
from tocom.data import glyphs
from tocom.jobs import PretrainJob
from tocom.models import create, pick_device, save_model
from tocom.seeds import derive_seed
from tocom.tasks.classify import predict
from tocom.training import explained, fit, forget, make_deterministic, normalise, resume_path
from tocom.vit import CompressedViT

#: Seeds of the letters; the held-out ones are never trained on, by any stage.
TRAIN_IMAGES_SEED, HELD_OUT_SEED = 0, 1


def letters(n: int, held_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Regenerate pre-training images [n, 3, 32, 32] uint8 and labels [n] int64."""
    images, labels = glyphs.letters(n, HELD_OUT_SEED if held_out else TRAIN_IMAGES_SEED)
    return torch.from_numpy(images), torch.from_numpy(labels)


def accuracy(vit: CompressedViT, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 250) -> float:
    """Return the share of images [n, 3, H, W] uint8 that are classified as labelled."""
    logits = predict(vit, images.to(next(vit.parameters()).device), batch_size)
    return (logits.argmax(-1) == labels).double().mean().item()


@explained()
def pretrain(job: PretrainJob, output: str | os.PathLike) -> dict:
    """Train a timm ViT on letters and write it as a checkpoint; under torchrun, all processes train one model.

    Returns:
        The metadata: held-out accuracy at every degree of the job, off the shelf; best epoch, minutes.
    """
    settings, kwargs = job.settings, job.kwargs
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        torch.manual_seed(derive_seed(job.seed, "initial weights"))
        model = create(job.architecture, kwargs | {"drop_path_rate": settings.drop_path}).to(device)
        images, labels = letters(settings.images)
        held_out = letters(settings.held_out, held_out=True)

        def step(indices):
            logits = model(normalise(images[indices].to(device), model))
            return F.cross_entropy(logits, labels[indices].to(device), label_smoothing=settings.label_smoothing)

        vit = CompressedViT(model, job.compressor)
        record = fit(
            step,
            model,
            len(images),
            settings,
            job.seed,
            lambda: (accuracy(vit, *held_out),),
            f"pretrain seed {job.seed}",
            {"architecture": job.architecture, "kwargs": kwargs},
            resume_path(output),
        )
        by_degree = {str(degree): accuracy(vit.set_degree(degree), *held_out) for degree in job.degrees}
        metadata = {
            "seed": job.seed,
            "recipe": settings.recipe(),
            "best_epoch": record["best_epoch"],
            "losses": record["losses"],
            "accuracy": by_degree,
            "data": "glyph letters",
            "minutes": round(record["seconds"] / 60, 1),
        }
        if distributed.is_main():
            save_model(output, model, job.architecture, kwargs, **metadata)
        distributed.wait_for_all()
        forget(output)
        return metadata
