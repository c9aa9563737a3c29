"""Pre-train the embedded backbone on procedural letters."""

from __future__ import annotations

import os

import torch
from torch.nn import functional as F

from tocom import distributed
from tocom.data import glyphs
from tocom.jobs import PretrainJob
from tocom.models import create, pick_device, save_model
from tocom.parts import describe, draw_degree
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

    With random degrees, every step runs at one that is drawn for it, behind the job's compressor (the idea of
    stochastic wav2vec 2.0, arXiv 2204.11934), and the best epoch is that of the highest mean accuracy at the degrees
    that :meth:`tocom.settings.DegreeSettings.scored` names; else nothing is compressed.

    Returns:
        The metadata: held-out accuracy at every degree of the job; best epoch, minutes; with random degrees,
        ``pretrained_behind``: compressor and highest degree.
    """
    settings, kwargs = job.settings, job.kwargs
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        torch.manual_seed(derive_seed(job.seed, "initial weights"))
        model = create(job.architecture, kwargs | {"drop_path_rate": settings.drop_path}).to(device)
        images, labels = letters(settings.images)
        held_out = letters(settings.held_out, held_out=True)
        vit = CompressedViT(model, job.compressor, max_degree=job.max_degree)
        vit.compressor.requires_grad_(False)  # a backbone's checkpoint would not keep what it trains
        drawn = settings.degree == "random"
        scored = settings.scored(job.max_degree) if drawn else (0,)
        behind = {"compressor": describe(vit.compressor), "max_degree": job.max_degree} if drawn else {}
        module = vit if drawn else model

        def begin():
            if drawn:
                vit.set_degree(draw_degree(settings, job.max_degree))

        def score():
            return (sum(accuracy(vit.set_degree(degree), *held_out) for degree in scored) / len(scored),)

        def step(indices):
            logits = module(normalise(images[indices].to(device), model))
            return F.cross_entropy(logits, labels[indices].to(device), label_smoothing=settings.label_smoothing)

        record = fit(
            step,
            module,
            len(images),
            settings,
            job.seed,
            score,
            f"pretrain seed {job.seed}",
            {"architecture": job.architecture, "kwargs": kwargs} | behind,
            resume_path(output),
            begin,
        )
        by_degree = {str(degree): accuracy(vit.set_degree(degree), *held_out) for degree in job.degrees}
        metadata = {
            "seed": job.seed,
            "recipe": settings.recipe(),
            **({"pretrained_behind": behind} if drawn else {}),
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
