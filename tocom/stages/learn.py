"""Learn a part of a method (a compensator, a compressor) for a backbone, on what that was pre-trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tocom import distributed
from tocom.bundled import resolve
from tocom.data.glyphs import SIZE
from tocom.data.images import decode
from tocom.data.loading import TrainImages, feed, mixer, train_transform
from tocom.data.registry import pack_paths, pretraining_files, split_files
from tocom.errors import TocomError
from tocom.files import digest, sha256, write_rows
from tocom.jobs import LearnJob
from tocom.made import made, seal
from tocom.models import check_classifier, compress, family_of, load_model, pick_device
from tocom.parts import Objective, Part, check_backbone, describe, load_part, make_part, save_part
from tocom.seeds import derive_seed
from tocom.settings import AdaptSettings, LearnSettings
from tocom.stages.sources import SOURCES
from tocom.training import (
    autocast,
    check_pairs,
    compiled,
    explained,
    fit,
    forget,
    make_deterministic,
    random_shift,
    resume_path,
)


def _pretraining_text(settings: LearnSettings) -> tuple[Tensor, Tensor]:
    """Return the sequences to train on, and the held-out ones [n, T] uint8."""
    if settings.source is not None or settings.augmentation != "none" or settings.mixes:
        raise TocomError("text is learned on as it is bundled: leave learn.source, augmentation, mixup and cutmix out")
    if settings.images is None:
        raise TocomError("say how many sequences to learn on (learn.images)")
    source = SOURCES["text"]
    return source.draw(settings.images)[0], source.draw(settings.held_out, held_out=True)[0]


def _pretraining_images(
    model: nn.Module, files: Sequence[Path] | None, settings: LearnSettings
) -> tuple[Tensor | list[Path], Tensor]:
    """Return the images to train on, decoded [n, 3, H, W] uint8 or as paths, and the held-out ones, decoded."""
    height, width = model.patch_embed.img_size
    if files is not None:
        train, held_out = split_files(list(files), settings.held_out)
        train = train[: settings.images]
        decoded = torch.from_numpy(decode(held_out, height, title="held-out images"))
        if settings.augmentation == "timm":
            return train, decoded
        return torch.from_numpy(decode(train, height, title="images to learn on")), decoded
    if (height, width) != (SIZE, SIZE):
        raise TocomError(
            f"the backbone takes {height} x {width} images, the bundled letters have {SIZE} x {SIZE} pixels;"
            " give its pre-training images (settings.source of the job, or images of the backbone in a config)"
        )
    if settings.images is None:
        raise TocomError("there is no end of letters; say how many to learn on (learn.images)")
    source = SOURCES["images"]
    return source.draw(settings.images)[0], source.draw(settings.held_out, held_out=True)[0]


def _identity(images: Tensor | list[Path], held_out: Tensor) -> str:
    """Return a hash of the images; of those that are not decoded, of their paths."""
    if isinstance(images, Tensor):
        return digest({"pixels": images, "held_out": held_out})
    return hashlib.sha256(pack_paths(images).tobytes()).hexdigest() + digest({"held_out": held_out})


def _training_step(
    objective: Objective,
    model: nn.Module,
    images: Tensor | Sequence[Path],
    settings: LearnSettings | AdaptSettings,
    seed: int,
    workers: int,
) -> tuple[Callable, Callable | None]:
    """Return the loss of a micro-batch, and what feeds it images; without augmentation by timm, indices are enough."""
    device = next(model.parameters()).device
    family = family_of(model)
    mix = mixer(settings, family.outputs(model), 0.0)

    def loss(batch: Tensor) -> Tensor:
        unused = torch.zeros(len(batch), dtype=torch.long, device=device)  # timm's mixup wants labels
        return objective(batch if mix is None else mix(batch, unused)[0])

    def from_memory(indices: Tensor) -> Tensor:
        batch = images[indices.to(images.device)]
        if settings.augmentation == "shift":
            batch = random_shift(batch, settings.shift)
        return loss(family.inputs(batch.to(device), model))

    def from_loader(batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(batch[0].to(device, non_blocking=True))

    if family.reads == "text" and (settings.augmentation != "none" or settings.mixes):
        raise TocomError("text is not augmented: set augmentation: none, and leave mixup and cutmix out")
    check_pairs(settings)
    if settings.augmentation == "timm":
        data = TrainImages(images, torch.zeros(len(images)), train_transform(model, settings), seed)
        return from_loader, feed(data, workers, pin=device.type == "cuda")
    return from_memory, None


@explained()
def learn(
    job: LearnJob,
    backbone: str | os.PathLike,
    output: str | os.PathLike,
    learned: str | os.PathLike | None = None,
    workers: int = 0,
) -> dict:
    """Learn a part on the backbone's pre-training images, or text; labels are not used.

    Under torchrun, all processes train one part, with the same draw (a pair of degrees) in every step.

    Args:
        backbone: a bundled name or a checkpoint.
        output: the part to write; the curve of its training goes beside it, with the ending .csv.
        learned: of a compensator: the compressor's parameters, if it is one that is learned itself, with this seed.
        workers: processes that decode and augment images; they change no result.

    Returns:
        What is stored with the part: hashes, seed, recipe, held-out loss with and without it (nats).

    Raises:
        TocomError: an input is missing or corrupt, the backbone has no classifier, the loss turns NaN, or an
            operation's results vary from run to run and ``deterministic`` is set.
    """
    settings = job.settings
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        teacher, about = load_model(backbone)
        check_classifier(teacher, backbone)
        student, _ = load_model(backbone, drop_path_rate=settings.drop_path)
        family = family_of(teacher)
        shape = family.shape_of(teacher)
        torch.manual_seed(derive_seed(job.seed, "compensator"))
        if learned is None:
            compressor = make_part("compressor", job.compressor, shape, job.max_degree)
        else:
            compressor = load_part(learned, "compressor")
            check_backbone(compressor, learned, about["sha256"])
        behind = [compress(model, about, compressor) for model in (teacher, student)]
        part: Part = compressor
        if job.compensator is not None:
            part = make_part("compensator", job.compensator, shape, job.max_degree)
            part.compressor = describe(compressor)
        objective = part.objective(*behind, settings.compile is not None).to(device)
        objective.compiled(lambda vit: compiled(vit, settings))
        if family.reads == "text":
            images, held_out = _pretraining_text(settings)
        else:
            files = None if settings.source is None else pretraining_files(settings.source, job.data_root)
            images, held_out = _pretraining_images(teacher, files, settings)
        identity = {
            "backbone": sha256(resolve(backbone)),
            "learned": None if learned is None else sha256(learned),
            "job": job.recipe(),
            "images": _identity(images, held_out),
        }
        title = f"learn {describe(part)['kind']} seed {job.seed}"
        trained = train(objective, teacher, images, held_out, settings, job.seed, title, identity, output, workers)
        described = {
            "backbone": about["architecture"],
            "backbone_sha256": about["sha256"],
            **family.how(about),
            **family.run_as(teacher),
            "seed": job.seed,
            "recipe": settings.recipe(),
            "made": made(job, output, {"backbone": backbone, "compressor": learned}, [compressor, part]),
        }
        kept = keep(part, Path(output), described, trained)
        if distributed.is_main():
            seal([output, Path(output).with_suffix(".csv")])
        forget(output)
        return kept


def keep(part: Part, output: Path, about: dict, trained: dict) -> dict:
    """Write a part that was trained, and its curve beside it with the ending .csv.

    Args:
        trained: what :func:`train` returned.

    Returns:
        What is stored with the part.
    """
    epochs = trained.pop("epochs")
    if distributed.is_main():
        write_rows(epochs, output.with_suffix(".csv"))
        part.metadata = about | trained
        save_part(output, part)
    distributed.wait_for_all()
    return about | trained


def train(
    objective: Objective,
    model: nn.Module,
    images: Tensor | Sequence[Path],
    held_out: Tensor,
    settings: LearnSettings | AdaptSettings,
    seed: int,
    title: str,
    identity: dict,
    output: str | os.PathLike,
    workers: int,
) -> dict:
    """Minimise an objective on inputs without labels.

    Args:
        model: the model whose inputs these are. identity: see :func:`tocom.training.fit`.
        output: beside it an interrupted run keeps its state.

    Returns:
        The best epoch, the held-out loss before and after (nats), and the rows of its curve.
    """
    device, family = next(model.parameters()).device, family_of(model)
    held_out = held_out.to(device)
    generator = torch.Generator().manual_seed(derive_seed(seed, "held-out pairs"))
    trials = [objective.draw(generator) for _ in range(settings.pairs)]
    chunks = held_out.split(-(-len(held_out) // len(trials)))  # a part of the images for every trial

    @torch.no_grad()
    def score() -> tuple[float]:
        objective.eval()
        mine = distributed.share(list(zip(chunks, trials, strict=False)))
        with autocast(settings.precision, device):
            losses = [objective.set(trial).held_out(family.inputs(chunk, model)).cpu() for chunk, trial in mine]
        return (-float(torch.stack(distributed.gather(losses)).mean()),)

    before = -score()[0]
    step, loader = _training_step(objective, model, images, settings, seed, workers)
    record = fit(
        step,
        objective,
        len(images),
        settings,
        seed,
        score,
        title,
        identity,
        resume_path(output),
        lambda: objective.set(objective.draw()),
        loader,
    )
    best = -record["score"][0]
    kept = {"best_epoch": record["best_epoch"], "epochs": record["epochs"]}
    return kept | {"held_out_kl": best, "held_out_kl_without": before}
