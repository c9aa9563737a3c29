"""Distillation between two degrees of one frozen backbone (ToCom, arXiv 2408.06798, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tocom.compressed import Compressed
from tocom.parts import Compensator, Objective


def draw_pair(highest: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw two different degrees (source, target) uniformly from 0..highest."""
    source, target = (int(torch.randint(high, (), generator=generator)) for high in (highest + 1, highest))
    return source, target + (target >= source)


def distillation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits [B, ..., classes] at temperature 1 in nats: the mean over all of them."""
    teacher, student = teacher.flatten(0, -2), student.flatten(0, -2)
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def feature_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean square error of features [B, D] over the teacher's variance in each image, averaged over them."""
    error = (student - teacher).square().mean(-1)
    return (error / teacher.var(-1, correction=0).clamp(min=1e-6)).mean()


class Distillation(Objective):
    """The backbone as teacher at one degree, and as student at another with the compensator beside its weights.

    Args:
        teacher, student: the same backbone twice, behind the same compressor; neither is trained.
        whole: see :meth:`tocom.parts.Part.objective`.
    """

    def __init__(self, teacher: Compressed, student: Compressed, compensator: Compensator, whole: bool = False):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.requires_grad_(False)
        self.compensator, self.whole = compensator, whole
        self._forward: tuple[Callable, Callable] = (self._view(self.teacher), self._view(self.student))
        for name, branch in compensator.branches().items():
            module = student.model.get_submodule(name)
            module.register_forward_hook(lambda _, inputs, output, branch=branch: branch(inputs[0], output))
        self.set((0, compensator.max_degree))

    def _view(self, vit: Compressed) -> Callable:
        """Return the forward pass of a model whose results are compared."""
        return vit

    def compiled(self, wrap: Callable) -> Self:
        """Compile both forward passes by ``wrap``; in a tuple, so that they are no modules of this one."""
        self._forward = wrap(self._view(self.teacher)), wrap(self._view(self.student))
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of student and compensator; the teacher always stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def draw(self, generator: torch.Generator | None = None) -> tuple[int, int]:
        """Draw a source and a target degree."""
        return draw_pair(self.compensator.max_degree, generator)

    def set(self, drawn: tuple[int, int]) -> Self:
        """From now on, run the teacher at the source degree, the student at the target with the change between them."""
        source, target = drawn
        self.teacher.set_degree(source)
        self.student.set_degree(target)
        self.compensator.between(source, target, self.whole)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss on what the models take."""
        teacher, student = self._forward
        with torch.no_grad():
            expected = teacher(images)
        return distillation_loss(expected.float(), student(images).float())


class FeatureMatching(Distillation):
    """The same, but the student is also to have the teacher's features: what is classified, such as the class token.

    A task's own classifier sees nothing else, and they say more than logits of the classes of pre-training. Held-out
    images are still scored by the divergence of the logits, in nats, as those of every other compensator.

    Args:
        feature, kl: weights of :func:`feature_loss` and :func:`distillation_loss`.
    """

    def __init__(
        self,
        teacher: Compressed,
        student: Compressed,
        compensator: Compensator,
        whole: bool = False,
        feature: float = 1.0,
        kl: float = 0.0,
    ):
        super().__init__(teacher, student, compensator, whole)
        self.weights = feature, kl

    def _view(self, vit: Compressed) -> Callable:
        return vit.pooled_and_logits

    def _losses(self, images: Tensor) -> tuple[Tensor, Tensor]:
        teacher, student = self._forward
        with torch.no_grad():
            expected, expected_logits = teacher(images)
        features, logits = student(images)
        kl = distillation_loss(expected_logits.float(), logits.float())
        return feature_loss(expected.float(), features.float()), kl

    def forward(self, images: Tensor) -> Tensor:
        """Return the weighted sum of both losses on images [B, 3, H, W]."""
        return sum(weight * loss for weight, loss in zip(self.weights, self._losses(images), strict=True) if weight)

    def held_out(self, images: Tensor) -> Tensor:
        """Return the divergence of the logits on images [B, 3, H, W]."""
        return self._losses(images)[1]
