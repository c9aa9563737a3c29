"""Adapt a compensator to fine-tuned models, on the training images of their task and without its labels.

A model teaches itself: at its train degree it is the teacher, at the degree drawn for a step the student, with the
compensator beside its weights. At its train degree it stays, bit for bit, what it was.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tocom import distributed
from tocom.errors import TocomError
from tocom.files import Paths, checkpoint_files, load_metadata, sha256
from tocom.jobs import AdaptJob
from tocom.made import made, seal
from tocom.models import compress, family_of, load_model, pick_device
from tocom.parts import Compensator, Shape, check_backbone, describe, file_of_seed, load_part, make_part, source_degree
from tocom.seeds import derive_seed
from tocom.stages.learn import keep, train
from tocom.tasks import Task, load_task
from tocom.training import compiled, explained, forget, make_deterministic


@explained()
def adapt(
    job: AdaptJob,
    checkpoints: Paths,
    data: str | os.PathLike,
    output: str | os.PathLike,
    learned: Paths | None = None,
    workers: int = 0,
) -> list[dict]:
    """Adapt a compensator to each of some checkpoints of one task that was trained at one degree.

    The best epoch is the one with the lowest divergence of the logits on validation images, of which, too, no label is
    used.

    Args:
        checkpoints: files, or a folder of them. data: the prepared task.
        output: folder of the adapted compensators, each named as its checkpoint, beside its curve.
        learned: the compensator to start from; of several files, the one that was learned with a model's seed. None:
            from no change.
        workers: processes that decode and augment images; they change no result.

    Returns:
        What is stored with each compensator.

    Raises:
        TocomError: an input is missing, corrupt or does not fit the others, or the loss turns NaN.
    """
    settings, output = job.settings, Path(output)
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    if (learned is None) != (settings.start == "zero"):
        raise TocomError("give the learned compensator to start from (--learned), or set start: zero, not both")
    with distributed.processes(device):
        task, written = load_task(data, device), []
        files = [path for path in checkpoint_files(checkpoints) if _is_meant(job, path)]
        output.mkdir(parents=True, exist_ok=True)  # also where none of the checkpoints is meant
        for path in files:
            written.append(_adapt(job, path, task, output / path.name, data, learned, workers))
        for path in files:
            forget(_state(output / path.name))
        if files and distributed.is_main():
            ours = [output / path.name for path in files]
            seal([file for path in ours for file in (path, path.with_suffix(".csv"))], folder=True)
    return written


def _is_meant(job: AdaptJob, path: Path) -> bool:
    meta = load_metadata(path)
    label = str(meta["train_degree"])
    return source_degree(label) is not None and job.concerns(label, meta["seed"])


def _state(output: Path) -> Path:
    """Return beside what an interrupted training keeps its state: not in a folder that is made anew."""
    return output.parent.with_name(f"{output.parent.name}.{output.name}")


def _start(job: AdaptJob, learned: Path | None, seed: int, source: int, shape: Shape) -> Compensator:
    """Return what is adapted; what was learned for another source degree than the model's is no help to start from."""
    torch.manual_seed(derive_seed(seed, "compensator"))
    fresh = make_part("compensator", job.compensator, shape, job.max_degree)
    if learned is None:
        return fresh
    part = load_part(learned, "compensator")
    if describe(part) != describe(fresh):
        raise TocomError(f"{learned} holds {describe(part)}, the job is about {job.compensator}; give one of that kind")
    return part if part.source in (None, source) else fresh


def _adapt(
    job: AdaptJob, checkpoint: Path, task: Task, output: Path, data: str | os.PathLike, learned: Paths | None, workers
) -> dict:
    """Adapt a compensator to one checkpoint and write it."""
    settings = job.settings
    teacher, meta = load_model(checkpoint)
    student, _ = load_model(checkpoint, drop_path_rate=settings.drop_path)
    source, seed = source_degree(meta["train_degree"]), meta["seed"]
    family = family_of(teacher)
    start = None if learned is None else file_of_seed(learned, seed)
    part = _start(job, start, seed, source, family.shape_of(teacher))
    check_backbone(part, start, meta["backbone_sha256"])
    both = [compress(model.to(task.device), meta, meta["compressor"], source) for model in (teacher, student)]
    part.compressor = describe(both[0].compressor)
    objective = part.objective(*both, settings.compile is not None).to(task.device)
    objective.compiled(lambda vit: compiled(vit, settings))
    objective.source = source
    inputs = {"checkpoint": sha256(checkpoint), "data": sha256(data)}
    inputs["learned"] = None if start is None else sha256(start)
    images, held_out = task.unlabelled(teacher)
    title = f"adapt {describe(part)['kind']} to {task.name} degree {source} seed {seed}"
    of_run = derive_seed(seed, task.name, str(source))
    identity = inputs | {"job": job.recipe()}
    trained = train(objective, teacher, images, held_out, settings, of_run, title, identity, _state(output), workers)
    about = {name: meta[name] for name in ("backbone_sha256", "train_degree", "task")}
    about |= family.how(meta) | family.run_as(teacher)
    about |= {"seed": seed, "recipe": settings.recipe(), "adapted_to": inputs["checkpoint"]}
    named = {"checkpoint": checkpoint, "data": data, "compensator": start}
    about["made"] = made(job, output, named, [part, both[0].compressor])
    return keep(part, output, about, trained)
