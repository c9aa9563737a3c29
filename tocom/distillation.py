"""Distillation between two degrees of one frozen backbone (ToCom, arXiv 2408.06798, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tocom.compressed import Compressed
from tocom.parts import Compensator, Objective


def draw_pair(
    highest: int, source: int | None = None, need: float = 0.0, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Draw two different degrees (source, target) from 0..highest.

    Args:
        source: the source degree; None: any. need: a pair's probability is in proportion to its distance to this power.
    """
    sources = range(highest + 1) if source is None else (source,)
    pairs = [(m, n) for m in sources for n in range(highest + 1) if m != n]
    weights = torch.tensor([float(abs(m - n)) ** need for m, n in pairs])
    return pairs[int(torch.multinomial(weights, 1, generator=generator))]


def distillation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits [B, ..., classes] at temperature 1 in nats: the mean over all of them."""
    teacher, student = teacher.flatten(0, -2), student.flatten(0, -2)
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def feature_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean square error of features [B, D] over the teacher's variance in each image, averaged over them."""
    error = (student - teacher).square().mean(-1)
    return (error / teacher.var(-1, correction=0).clamp(min=1e-6)).mean()


class _View(nn.Module):
    """A model whose results are those of a function of it."""

    def __init__(self, vit: Compressed, view: Callable[[Compressed, Tensor], Any]):
        super().__init__()
        self.vit, self.view = vit, view

    def forward(self, images: Tensor) -> Any:
        return self.view(self.vit, images)


class Distillation(Objective):
    """The backbone as teacher at one degree, and as student at another with the compensator beside its weights.

    Args:
        teacher, student: the same model twice, behind the same compressor; neither is trained.
        whole: see :meth:`tocom.parts.Part.objective`.

    Attributes:
        source: the degree that the teacher always runs at; None: it is drawn, too.
    """

    def __init__(self, teacher: Compressed, student: Compressed, compensator: Compensator, whole: bool = False):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.requires_grad_(False)
        self.compensator, self.whole = compensator, whole
        self.source: int | None = compensator.source  # of every pair of degrees; None: any
        # In tuples, so that they are no modules of this one a second time.
        self._views = _View(self.teacher, self.view), _View(self.student, self.view)
        self._forward: tuple[Callable, Callable] = (self._views[0], self.changed)
        for name, branch in compensator.branches().items():
            module = student.model.get_submodule(name)
            module.register_forward_hook(lambda _, inputs, output, branch=branch: branch(inputs[0], output))
        self.set((0, compensator.max_degree))

    @staticmethod
    def view(vit: Compressed, images: Tensor) -> Any:
        """Return the results of a model that are compared."""
        return vit(images)

    def changed(self, images: Tensor) -> Any:
        """Return the student's results with the compensator's changes of its parameters."""
        student = self._views[1]
        changes = {f"vit.model.{name}": change for name, change in self.compensator.changes().items()}
        if not changes:
            return student(images)
        weights = {name: student.get_parameter(name) for name in changes}
        changed = {name: weights[name] + change.to(weights[name].dtype) for name, change in changes.items()}
        return functional_call(student, changed, (images,))

    def compiled(self, wrap: Callable) -> Self:
        """Compile both forward passes by ``wrap``."""
        self._forward = wrap(self._views[0]), wrap(self.changed)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of student and compensator; the teacher always stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def draw(self, generator: torch.Generator | None = None) -> tuple[int, int]:
        """Draw a source and a target degree."""
        return draw_pair(self.compensator.max_degree, self.source, self.compensator.need, generator)

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

    @staticmethod
    def view(vit: Compressed, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is classified, and the logits."""
        return vit.pooled_and_logits(images)

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
