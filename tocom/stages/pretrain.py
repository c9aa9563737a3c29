"""Pre-train a backbone on what is bundled: procedural letters, or text."""

from __future__ import annotations

import os

import torch

from tocom import distributed
from tocom.jobs import PretrainJob
from tocom.made import made
from tocom.models import create, family_of, pick_device, save_model
from tocom.parts import describe, draw_degree
from tocom.seeds import derive_seed
from tocom.stages.sources import SOURCES
from tocom.training import explained, fit, forget, make_deterministic, resume_path


@explained()
def pretrain(job: PretrainJob, output: str | os.PathLike) -> dict:
    """Train a timm ViT on letters, or a language model on text, and write it as a checkpoint.

    Under torchrun, all processes train one model.

    With random degrees, every step runs at one that is drawn for it, behind the job's compressor (the idea of
    stochastic wav2vec 2.0, arXiv 2204.11934), and the best epoch is that of the highest mean accuracy at the degrees
    that :meth:`tocom.settings.DegreeSettings.scored` names; else nothing is compressed.

    Returns:
        The metadata: held-out ``accuracy``, or ``bits_saved``, at every degree of the job, off the shelf; ``figure``,
        which of them; best epoch, minutes; with random degrees, ``pretrained_behind``: compressor and highest degree.
    """
    settings, kwargs = job.settings, job.kwargs
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        torch.manual_seed(derive_seed(job.seed, "initial weights"))
        model = create(job.architecture, kwargs | {"drop_path_rate": settings.drop_path}).to(device)
        family = family_of(model)
        source, wrapped = SOURCES[family.reads], family(model, job.compressor, max_degree=job.max_degree)
        wrapped.compressor.requires_grad_(False)  # a backbone's checkpoint would not keep what it trains
        items, wanted = source.draw(settings.images)
        held_out = source.draw(settings.held_out, held_out=True)
        drawn = settings.degree == "random"
        scored = settings.scored(job.max_degree) if drawn else (0,)
        behind = {"compressor": describe(wrapped.compressor), "max_degree": job.max_degree} if drawn else {}

        def begin():
            if drawn:
                wrapped.set_degree(draw_degree(settings, job.max_degree))

        def score():
            return (sum(source.score(wrapped.set_degree(degree), *held_out) for degree in scored) / len(scored),)

        def step(indices):
            return source.loss(wrapped, items[indices].to(device), wanted[indices].to(device), settings.label_smoothing)

        record = fit(
            step,
            wrapped,
            len(items),
            settings,
            job.seed,
            score,
            f"pretrain seed {job.seed}",
            {"architecture": job.architecture, "kwargs": kwargs} | behind,
            resume_path(output),
            begin,
        )
        trained = family(model, job.compressor)  # anew: a compressor may take what it needs from the weights
        by_degree = {str(degree): source.score(trained.set_degree(degree), *held_out) for degree in job.degrees}
        metadata = {
            "seed": job.seed,
            "recipe": settings.recipe(),
            **({"pretrained_behind": behind} if drawn else {}),
            "best_epoch": record["best_epoch"],
            "losses": record["losses"],
            source.figure: by_degree,
            "figure": source.figure,
            "data": source.name,
            "made": made(job, output, {}, [wrapped.compressor]),
        }
        if distributed.is_main():
            save_model(output, model, job.architecture, kwargs, **metadata)
        distributed.wait_for_all()
        forget(output)
        return metadata | {"minutes": round(record["seconds"] / 60, 1)}  # not in the file: no run takes as long again
