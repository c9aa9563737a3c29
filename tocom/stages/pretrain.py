"""Pre-train a backbone on what is bundled: procedural letters, or text."""

from __future__ import annotations

import os

import torch

from tocom import distributed
from tocom.jobs import PretrainJob
from tocom.models import create, family_of, pick_device, save_model
from tocom.seeds import derive_seed
from tocom.stages.sources import SOURCES
from tocom.training import explained, fit, forget, make_deterministic, resume_path


@explained()
def pretrain(job: PretrainJob, output: str | os.PathLike) -> dict:
    """Train a timm ViT on letters, or a language model on text, and write it as a checkpoint.

    Under torchrun, all processes train one model.

    Returns:
        The metadata: held-out ``accuracy``, or ``bits_saved``, at every degree of the job, off the shelf; ``figure``,
        which of them; best epoch, minutes.
    """
    settings, kwargs = job.settings, job.kwargs
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        torch.manual_seed(derive_seed(job.seed, "initial weights"))
        model = create(job.architecture, kwargs | {"drop_path_rate": settings.drop_path}).to(device)
        family = family_of(model)
        source, wrapped = SOURCES[family.reads], family(model, job.compressor)
        items, wanted = source.draw(settings.images)
        held_out = source.draw(settings.held_out, held_out=True)

        def step(indices):
            return source.loss(wrapped, items[indices].to(device), wanted[indices].to(device), settings.label_smoothing)

        record = fit(
            step,
            model,
            len(items),
            settings,
            job.seed,
            lambda: (source.score(wrapped, *held_out),),
            f"pretrain seed {job.seed}",
            {"architecture": job.architecture, "kwargs": kwargs},
            resume_path(output),
        )
        trained = family(model, job.compressor)  # anew: a compressor may take what it needs from the weights
        by_degree = {str(degree): source.score(trained.set_degree(degree), *held_out) for degree in job.degrees}
        metadata = {
            "seed": job.seed,
            "recipe": settings.recipe(),
            "best_epoch": record["best_epoch"],
            "losses": record["losses"],
            source.figure: by_degree,
            "figure": source.figure,
            "data": source.name,
            "minutes": round(record["seconds"] / 60, 1),
        }
        if distributed.is_main():
            save_model(output, model, job.architecture, kwargs, **metadata)
        distributed.wait_for_all()
        forget(output)
        return metadata
