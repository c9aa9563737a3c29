"""Fine-tune a backbone for one task at one train degree."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from tocom import distributed
from tocom.bundled import resolve
from tocom.data.loading import TrainImages, feed, mixer, train_transform
from tocom.errors import TocomError
from tocom.files import sha256
from tocom.models import load_fine_tuned, load_model, pick_device, save_model
from tocom.seeds import derive_seed
from tocom.settings import RANDOM, FinetuneSettings
from tocom.stages.common import TaskData, check_size, compressed, load_task, predict, scored
from tocom.training import (
    check_pairs,
    compiled,
    explained,
    fit,
    forget,
    make_deterministic,
    normalise,
    random_shift,
    resume_path,
)
from tocom.tuning import apply_tuning, merge_tuning
from tocom.vit import CompressedViT

#: Images a forward pass when validation images are classified.
SCORE_BATCH = 250


@dataclass(frozen=True)
class Run:
    """What is trained: degree (or "random", up to ``max_degree``), seed and compressor."""

    train_degree: int | str
    seed: int
    compressor: str
    max_degree: int | None

    @property
    def start_degree(self) -> int:
        """The degree to build the model at."""
        return 0 if self.train_degree == RANDOM else self.train_degree

    @property
    def score_degrees(self) -> list[int]:
        """The degrees at which validation images are classified."""
        return [0, self.max_degree // 2, self.max_degree] if self.train_degree == RANDOM else [self.train_degree]


@explained()
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
    fine_tuned: str | os.PathLike | None = None,
) -> dict:
    """Fine-tune a backbone and write the best epoch as a checkpoint.

    The best epoch is the one with the highest validation accuracy (ties: the lowest validation loss) at the train
    degree; the test images are not looked at. Under torchrun, all processes train one model.

    Args:
        backbone: a bundled name or a checkpoint. data: a prepared task. output: the checkpoint to write.
        train_degree: tokens removed in every block while training, or "random" to draw it uniformly from
            0..max_degree for every step, the rival that pays for its flexibility in every fine-tuning.
        max_degree: needed for "random" only.
        keep_state: leave the finished run's state beside the output until :func:`tocom.training.forget` is called,
            so that a caller which is killed before it has made all of its outputs makes this one again at once.
        fine_tuned: with ``tuning.mode`` "none": a model fine-tuned elsewhere, by default the backbone itself; it is
            only scored and written with what evaluation needs to know of it.

    Returns:
        What is stored with the checkpoint.

    Raises:
        TocomError: an input is missing or corrupt, the degree is out of range, the loss turns NaN, or an operation's
            results vary from run to run and ``deterministic`` is set.
    """
    settings = settings or FinetuneSettings()
    check_degree(train_degree, max_degree)
    run = Run(train_degree, seed, compressor, max_degree)
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        task = load_task(data, device)
        if settings.tuning.mode == "none":
            return _keep_as_it_is(fine_tuned or backbone, backbone, task, output, run, settings)
        if fine_tuned is not None:
            raise TocomError("a fine-tuned model was given, but tuning.mode is not 'none'; set finetune.tuning.mode")
        about = _train(backbone, data, task, output, run, settings)
        if not keep_state:
            forget(output)
        return about


def _train(backbone, data, task: TaskData, output, run: Run, settings: FinetuneSettings) -> dict:
    model, about = load_model(backbone, num_classes=task.classes, drop_path_rate=settings.drop_path)
    check_size(task, model)
    run_seed = derive_seed(run.seed, task.name, str(run.train_degree))
    torch.manual_seed(derive_seed(run_seed, "initial weights"))
    model = apply_tuning(model, settings.tuning).to(task.device)
    vit = compressed(model, about, run.compressor, run.start_degree)

    def begin() -> None:
        if run.train_degree == RANDOM:
            vit.set_degree(int(torch.randint(run.max_degree + 1, ())))

    def score() -> tuple[float, float]:
        results = [
            scored(predict(vit.set_degree(degree), task.val.images, SCORE_BATCH, settings.precision), task.val.labels)
            for degree in run.score_degrees
        ]
        return tuple(sum(values) / len(values) for values in zip(*results, strict=True))

    step, loader = _training_step(vit, task, settings, run_seed)
    identity = {
        "backbone": sha256(resolve(backbone)),  # its metadata, too, decide how it is run
        "data": sha256(data),
        "compressor": run.compressor,
        "max_degree": run.max_degree if run.train_degree == RANDOM else None,
    }
    title = f"finetune {task.name} degree {run.train_degree} seed {run.seed}"
    record = fit(
        step,
        model,
        len(task.train.labels),
        settings,
        run_seed,
        score,
        title,
        identity,
        resume_path(output),
        begin,
        loader,
        drop_last=settings.mixes,
    )
    merge_tuning(model)
    described = _describe(task, run, settings, about)
    described |= {"best_epoch": record["best_epoch"], "val_accuracy": record["score"][0]}
    _write(output, model, about, task.classes, described)
    return described


def _training_step(
    vit: CompressedViT, task: TaskData, settings: FinetuneSettings, seed: int
) -> tuple[Callable, Callable | None]:
    """Return the loss of a micro-batch, and what feeds it images; without augmentation by timm, indices are enough."""
    classify = compiled(vit, settings)
    mix = mixer(settings, task.classes, settings.label_smoothing)
    soft = SoftTargetCrossEntropy()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        if mix is None:
            return F.cross_entropy(classify(images), labels, label_smoothing=settings.label_smoothing)
        images, targets = mix(images, labels)
        return soft(classify(images), targets)

    def from_memory(indices: Tensor) -> Tensor:
        images = task.train.images[indices].to(task.device)
        if settings.augmentation == "shift":
            images = random_shift(images, settings.shift)
        return loss(normalise(images, vit.model), task.train.labels[indices])

    def from_loader(batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(*(part.to(task.device, non_blocking=True) for part in batch))

    check_pairs(settings)
    if settings.augmentation == "timm":
        transform = train_transform(vit.model, settings)
        images = task.train.images
        images = images.cpu() if isinstance(images, Tensor) else images  # loading processes must not touch a GPU
        images = TrainImages(images, task.train.labels.cpu(), transform, seed)
        return from_loader, feed(images, settings.workers, pin=task.device.type == "cuda")
    if not isinstance(task.train.images, Tensor) or task.train.images.shape[-2:] != task.val.images.shape[-2:]:
        raise TocomError(
            f"the training images of {task.name} are not decoded, which augmentation {settings.augmentation!r} needs;"
            " prepare the task with --decode-train, or use augmentation 'timm'"
        )
    return from_memory, None


def _keep_as_it_is(fine_tuned, backbone, task: TaskData, output, run: Run, settings: FinetuneSettings) -> dict:
    """Write a model that was fine-tuned elsewhere with what evaluation needs to know of it."""
    model, about = load_fine_tuned(fine_tuned, backbone, task.classes, run.train_degree, run.compressor)
    check_size(task, model)
    if run.train_degree == RANDOM:
        raise TocomError("a model that is used as it is was trained at one degree; leave 'random' out of train_degrees")
    vit = compressed(model.to(task.device), about, run.compressor, run.train_degree)
    accuracy, _ = scored(predict(vit, task.val.images, SCORE_BATCH, settings.precision), task.val.labels)
    described = _describe(task, run, settings, about) | {"best_epoch": 0, "val_accuracy": accuracy}
    _write(output, model, about, task.classes, described)
    return described


def _describe(task: TaskData, run: Run, settings: FinetuneSettings, about: dict) -> dict:
    return {
        "task": task.name,
        "group": task.group,
        "train_degree": run.train_degree,
        "seed": run.seed,
        "compressor": run.compressor,
        "backbone_sha256": about["sha256"],
        "proportional_attention": about.get("proportional_attention", True),
        "recipe": settings.recipe(),
    }


def _write(output, model: nn.Module, about: dict, classes: int, described: dict) -> None:
    """Write a fine-tuned model, once for all processes."""
    if distributed.is_main():
        kwargs = about["kwargs"] | {"num_classes": classes}
        save_model(output, model, about["architecture"], kwargs, **described)
    distributed.wait_for_all()


def check_degree(degree: int | str, max_degree: int | None) -> None:
    """Raise TocomError unless ``degree`` is a whole number that is not negative, or "random" up to some degree."""
    if degree == RANDOM and max_degree is None:
        raise TocomError("train degree 'random' needs to know how far to draw; give max_degree (--max-degree)")
    if degree != RANDOM and (not isinstance(degree, int) or degree < 0):
        raise TocomError(f"train degree {degree!r} is out of range: give 0 or more tokens a block, or {RANDOM!r}")
