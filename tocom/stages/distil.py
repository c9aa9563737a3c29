"""Distil ToCom once for a backbone and a compressor (arXiv 2408.06798, section 4.2)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom import distributed
from tocom.bundled import resolve
from tocom.compensator import Compensator
from tocom.data.glyphs import SIZE
from tocom.data.images import decode
from tocom.data.loading import TrainImages, feed, mixer, train_transform
from tocom.data.registry import pack_paths, split_files
from tocom.errors import TocomError
from tocom.files import digest, sha256
from tocom.models import check_classifier, load_model, pick_device
from tocom.seeds import derive_seed
from tocom.settings import DistilSettings
from tocom.stages.common import compressed
from tocom.stages.pretrain import letters
from tocom.training import (
    autocast,
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


def draw_pair(steps: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw two different degrees (source, target) uniformly from 0..steps."""
    source, target = (int(torch.randint(high, (), generator=generator)) for high in (steps + 1, steps))
    return source, target + (target >= source)


def distillation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits [B, classes] at temperature 1, averaged over images, in nats."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


class Distiller(nn.Module):
    """The frozen backbone as teacher and student, and the compensator that is trained between them.

    Args:
        teacher, student: the same backbone twice. about: its checkpoint's metadata.
        wrap: applied to the forward pass of each (torch.compile). whole: compute all steps of the update, also those
            that a pair of degrees leaves out, so that each degree, not each pair, is compiled.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        compensator: Compensator,
        about: dict | None = None,
        wrap: Callable = lambda module: module,
        whole: bool = False,
    ):
        super().__init__()
        for model in (teacher, student):
            model.requires_grad_(False)
        self.teacher = compressed(teacher.eval(), about or {}, compensator.compressor)
        self.student = compressed(student, about or {}, compensator.compressor)
        self.compensator, self.whole = compensator, whole
        # In a tuple, so that compiled copies are no modules of this one.
        self._forward = tuple(wrap(vit) for vit in (self.teacher, self.student))
        self.set_degrees(0, compensator.max_degree)

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of student and compensator; the teacher always stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def set_degrees(self, source: int, target: int) -> Distiller:
        """From now on, the teacher runs at ``source``, the student at ``target`` with the update between them."""
        self.teacher.set_degree(source)
        self.student.set_degree(target)
        self.student.set_live_update(self.compensator, self.compensator.coefficients(source, target), self.whole)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss on images [B, 3, H, W]."""
        teacher, student = self._forward
        with torch.no_grad():
            expected = teacher(images)
        return distillation_loss(expected.float(), student(images).float())


def new_compensator(model: nn.Module, max_degree: int, compressor: str, settings: DistilSettings) -> Compensator:
    """Return the compensator that a recipe trains, as it is before training."""
    return Compensator.for_model(
        model,
        max_degree,
        rank=settings.rank,
        compressor=compressor,
        trained_scale=settings.trained_scale,
        dropout=settings.dropout,
        projections=settings.projections,
        step=settings.step,
    )


def _pretraining_images(
    model: nn.Module, files: Sequence[Path] | None, settings: DistilSettings
) -> tuple[Tensor | list[Path], Tensor]:
    """Return the images to train on, decoded [n, 3, H, W] uint8 or as paths, and the held-out ones, decoded."""
    height, width = model.patch_embed.img_size
    if files is not None:
        train, held_out = split_files(list(files), settings.held_out)
        train = train[: settings.images]
        decoded = torch.from_numpy(decode(held_out, height, title="held-out images"))
        if settings.augmentation == "timm":
            return train, decoded
        return torch.from_numpy(decode(train, height, title="images to distil on")), decoded
    if (height, width) != (SIZE, SIZE):
        raise TocomError(
            f"the backbone takes {height} x {width} images, the bundled letters have {SIZE} x {SIZE} pixels;"
            " give its pre-training images (--images, or distil_images in a config)"
        )
    if settings.images is None:
        raise TocomError("there is no end of letters; say how many to distil on (distil.images)")
    return letters(settings.images)[0], letters(settings.held_out, held_out=True)[0]


def _identity(images: Tensor | list[Path], held_out: Tensor) -> str:
    """Return a hash of the images; of those that are not decoded, of their paths."""
    if isinstance(images, Tensor):
        return digest({"pixels": images, "held_out": held_out})
    return hashlib.sha256(pack_paths(images).tobytes()).hexdigest() + digest({"held_out": held_out})


def _training_step(
    distiller: Distiller, images: Tensor | list[Path], settings: DistilSettings, seed: int
) -> tuple[Callable, Callable | None]:
    """Return the loss of a micro-batch, and what feeds it images; without augmentation by timm, indices are enough."""
    teacher = distiller.teacher.model
    device = next(teacher.parameters()).device
    mix = mixer(settings, teacher.num_classes, 0.0)

    def loss(batch: Tensor) -> Tensor:
        unused = torch.zeros(len(batch), dtype=torch.long, device=device)  # timm's mixup wants labels
        return distiller(batch if mix is None else mix(batch, unused)[0])

    def from_memory(indices: Tensor) -> Tensor:
        batch = images[indices.to(images.device)]
        if settings.augmentation == "shift":
            batch = random_shift(batch, settings.shift)
        return loss(normalise(batch.to(device), teacher))

    def from_loader(batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(batch[0].to(device, non_blocking=True))

    check_pairs(settings)
    if settings.augmentation == "timm":
        data = TrainImages(images, torch.zeros(len(images)), train_transform(teacher, settings), seed)
        return from_loader, feed(data, settings.workers, pin=device.type == "cuda")
    return from_memory, None


@explained()
def distil(
    backbone: str | os.PathLike,
    output: str | os.PathLike,
    max_degree: int,
    compressor: str = "tome",
    seed: int = 0,
    settings: DistilSettings | None = None,
    files: Sequence[Path] | None = None,
) -> dict:
    """Train a compensator for degrees 0..max_degree on the backbone's pre-training images; labels are not used.

    Under torchrun, all processes train one compensator, at the same pair of degrees in every step.

    Args:
        backbone: a bundled name or a checkpoint. output: the compensator to write.
        files: images to distil on (see :func:`tocom.data.registry.pretraining_files`), of which a tenth is held out;
            by default the letters of the bundled backbone.

    Returns:
        What is stored with the compensator: hashes, recipe, held-out KL with and without it (nats).

    Raises:
        TocomError: an input is missing or corrupt, the backbone has no classifier, the loss turns NaN, or an
            operation's results vary from run to run and ``deterministic`` is set.
    """
    settings = settings or DistilSettings()
    make_deterministic(settings.threads, settings.deterministic)
    device = distributed.own_device(pick_device(settings.device))
    with distributed.processes(device):
        teacher, about = load_model(backbone)
        check_classifier(teacher, backbone)
        student, _ = load_model(backbone, drop_path_rate=settings.drop_path)
        torch.manual_seed(derive_seed(seed, "compensator"))
        compensator = new_compensator(teacher, max_degree, compressor, settings)
        distiller = Distiller(
            teacher, student, compensator, about, lambda vit: compiled(vit, settings), settings.compile is not None
        ).to(device)
        images, held_out = _pretraining_images(teacher, files, settings)
        record, before = _train(distiller, images, held_out, seed, settings, sha256(resolve(backbone)), output)
        compensator.metadata = {
            "backbone": about["architecture"],
            "backbone_sha256": about["sha256"],
            "proportional_attention": about.get("proportional_attention", True),
            "mean": list(teacher.pretrained_cfg["mean"]),
            "std": list(teacher.pretrained_cfg["std"]),
            "seed": seed,
            "recipe": settings.recipe(),
            "best_epoch": record["best_epoch"],
            "held_out_kl": -record["score"][0],
            "held_out_kl_without": before,
        }
        if distributed.is_main():
            compensator.save(output)
        distributed.wait_for_all()
        forget(output)
        return compensator.metadata


def _train(
    distiller: Distiller,
    images: Tensor | list[Path],
    held_out: Tensor,
    seed: int,
    settings: DistilSettings,
    backbone_sha256: str,
    output: str | os.PathLike,
) -> tuple[dict, float]:
    """Train the compensator; return the record of the run and the held-out loss before it."""
    teacher, compensator = distiller.teacher.model, distiller.compensator
    device, max_degree = compensator.down.device, compensator.max_degree
    held_out = held_out.to(device)
    generator = torch.Generator().manual_seed(derive_seed(seed, "held-out pairs"))
    pairs = [draw_pair(max_degree, generator) for _ in range(settings.pairs)]
    chunks = held_out.split(-(-len(held_out) // len(pairs)))  # a part of the images for every pair

    @torch.no_grad()
    def score() -> tuple[float]:
        distiller.eval()
        mine = distributed.share(list(zip(chunks, pairs, strict=False)))
        with autocast(settings.precision, device):
            losses = [distiller.set_degrees(*pair)(normalise(chunk, teacher)).cpu() for chunk, pair in mine]
        return (-float(torch.stack(distributed.gather(losses)).mean()),)

    before = -score()[0]
    step, loader = _training_step(distiller, images, settings, seed)
    record = fit(
        step,
        distiller,
        len(images),
        settings,
        seed,
        score,
        f"distil {compensator.compressor} seed {seed}",
        {"backbone": backbone_sha256, "max_degree": max_degree, "images": _identity(images, held_out)},
        resume_path(output),
        lambda: distiller.set_degrees(*draw_pair(max_degree)),
        loader,
        drop_last=settings.mixes,
    )
    return record, before
