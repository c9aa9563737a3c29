"""Distil ToCom once for a backbone and a compressor (arXiv 2408.06798, section 4.2)."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.compensator import Compensator
from tocom.data.glyphs import SIZE
from tocom.data.registry import unlabelled
from tocom.errors import TocomError
from tocom.files import digest
from tocom.models import load_model, pick_device
from tocom.settings import DistilSettings
from tocom.stages.pretrain import letters
from tocom.training import derive_seed, fit, forget, make_deterministic, normalise, resume_path
from tocom.vit import CompressedViT


def draw_pair(steps: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw two different degrees (source, target) uniformly from 0..steps."""
    source, target = (int(torch.randint(high, (), generator=generator)) for high in (steps + 1, steps))
    return source, target + (target >= source)


def distillation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits [B, classes] at temperature 1, averaged over images, in nats."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


class Distiller(nn.Module):
    """The frozen backbone as teacher and student, and the compensator that is trained between them."""

    def __init__(self, teacher: nn.Module, student: nn.Module, compensator: Compensator):
        super().__init__()
        for model in (teacher, student):
            model.requires_grad_(False)
        self.teacher = CompressedViT(teacher.eval(), compensator.compressor)
        self.student = CompressedViT(student, compensator.compressor)
        self.compensator = compensator

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of student and compensator; the teacher always stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, source: int, target: int) -> Tensor:
        """Return the loss on images [B, 3, H, W]: the teacher runs at ``source``, the student at ``target``."""
        with torch.no_grad():
            expected = self.teacher.set_degree(source)(images)
        self.student.set_live_update(self.compensator, self.compensator.coefficients(source, target))
        return distillation_loss(expected, self.student.set_degree(target)(images))


def _images(model: nn.Module, folder: str | os.PathLike | None, n: int, held_out: bool) -> Tensor:
    """Return pre-training images [n, 3, H, W] uint8 of the size that the model takes."""
    height, width = model.patch_embed.img_size
    if folder is not None:
        return torch.from_numpy(unlabelled(folder, n, held_out, height))
    if (height, width) != (SIZE, SIZE):
        raise TocomError(
            f"the backbone takes {height} x {width} images, the bundled letters have {SIZE} x {SIZE} pixels;"
            " give a folder of its pre-training images (--images, or distil_images in a config)"
        )
    return letters(n, held_out)[0]


def distil(
    backbone: str | os.PathLike,
    output: str | os.PathLike,
    max_degree: int,
    compressor: str = "tome",
    seed: int = 0,
    settings: DistilSettings | None = None,
    folder: str | os.PathLike | None = None,
) -> dict:
    """Train a compensator for degrees 0..max_degree on the backbone's pre-training images; labels are not used.

    Args:
        backbone: a bundled name or a checkpoint. output: the compensator to write.
        folder: images to distil on, anywhere below it; by default the letters of the bundled backbone.

    Returns:
        What is stored with the compensator: hashes, recipe, held-out KL with and without it (nats).

    Raises:
        TocomError: an input is missing or corrupt, or the loss turns NaN.
    """
    settings = settings or DistilSettings()
    make_deterministic(settings.threads)
    device = pick_device(settings.device)
    teacher, described = load_model(backbone)
    student, _ = load_model(backbone, drop_path_rate=settings.drop_path)
    torch.manual_seed(derive_seed(seed, "compensator"))
    compensator = Compensator.for_model(
        teacher,
        max_degree,
        rank=settings.rank,
        compressor=compressor,
        trained_scale=settings.trained_scale,
        dropout=settings.dropout,
    )
    distiller = Distiller(teacher, student, compensator).to(device)
    pixels, held_out = (
        _images(teacher, folder, n, kept_apart).to(device)
        for n, kept_apart in ((settings.images, False), (settings.held_out, True))
    )
    generator = torch.Generator().manual_seed(derive_seed(seed, "held-out pairs"))
    pairs = [draw_pair(max_degree, generator) for _ in range(settings.pairs)]

    def step(indices: Tensor) -> Tensor:
        source, target = draw_pair(max_degree)
        return distiller(normalise(pixels[indices], teacher), source, target)

    @torch.no_grad()
    def score() -> tuple[float]:
        distiller.eval()
        chunks = held_out.split(-(-len(held_out) // len(pairs)))  # a part of the images for every pair
        losses = [distiller(normalise(chunk, teacher), *pair) for chunk, pair in zip(chunks, pairs, strict=False)]
        return (-float(torch.stack(losses).mean()),)

    before = -score()[0]
    title = f"distil {compressor} seed {seed}"
    identity = {
        "backbone": described["sha256"],
        "max_degree": max_degree,
        "images": digest({"pixels": pixels, "held_out": held_out}),
    }
    record = fit(step, distiller, len(pixels), settings, seed, score, title, identity, resume_path(output))
    compensator.metadata = {
        "backbone": described["architecture"],
        "backbone_sha256": described["sha256"],
        "seed": seed,
        "recipe": settings.model_dump(mode="json"),
        "best_epoch": record["best_epoch"],
        "held_out_kl": -record["score"][0],
        "held_out_kl_without": before,
    }
    compensator.save(output)
    forget(output)
    return compensator.metadata
