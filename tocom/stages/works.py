"""A step of each stage of a study, on a ViT with random weights (speed does not depend on them), and its time.

What is done at degree d:

- fine-tuning: a step that changes all weights: forward at degree d, loss, backward, optimizer;
- distillation: a step that changes the compensator alone: the teacher's forward pass at degree 0, forward and backward
  of the student at degree d with P_0->d beside its weights, optimizer. A step always draws two degrees that differ
  (method: arXiv 2408.06798, section 4.2), so that at d = 0 the teacher runs at degree 1, the nearest to it;
- evaluation: a forward pass at degree d of a model that was trained at degree 0, with P_0->d folded in.

Recipes are the defaults of the stages, but for ``deterministic``: GPU operations may vary from run to run. The images
are random and lie on the device: reading and augmenting them is left out, and so is what a study does between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tocom.data.scenes import IGNORED
from tocom.methods import COMPENSATORS, DEFAULTS
from tocom.models import BUILDERS, compress, create
from tocom.parts import Compensator, make_part
from tocom.settings import BenchmarkSettings, FinetuneSettings, LearnSettings
from tocom.stages.throughput import inference_work, side_by_side, step_work
from tocom.tasks.segment import Segmenter, make_head, pixel_loss
from tocom.training import make_optimizer
from tocom.vit import CompressedViT


@dataclass(frozen=True)
class Subject:
    """A ViT with random weights.

    Attributes:
        architecture, kwargs: what timm builds. compressor: see :func:`tocom.parts.make_part`.
        head: kind and classes of a head that labels pixels; None: it classifies images.
    """

    architecture: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    compressor: str | dict[str, Any] = DEFAULTS["compressor"]
    proportional_attention: bool = True
    head: tuple[str, int] | None = None

    def vit(self, device: torch.device) -> CompressedViT:
        """Return a new one."""
        # Weights that were trained without labels have no classifier, which a study gives them.
        kwargs = {"num_classes": 1000} | self.kwargs if self.head is None else self.kwargs | {"num_classes": 0}
        if self.architecture in BUILDERS:
            kwargs = self.kwargs
        model = create(self.architecture, kwargs).to(device)
        return compress(model, {"proportional_attention": self.proportional_attention}, self.compressor)

    @property
    def pixels(self) -> int:
        """Pixels of one of its images; a token of a text counts as a patch of 8 x 8."""
        if self.architecture in BUILDERS:
            return 8**2 * self.kwargs.get("max_position_embeddings", 2048)
        return self.kwargs["img_size"] ** 2

    @property
    def parameters(self) -> int:
        """How many numbers its weights are, head included."""
        with torch.device("meta"):  # no weights are made
            module = _with_head(self, self.vit(torch.device("meta")))
        return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Work:
    """The work of one stage on one model, which can be set to any degree.

    Attributes:
        module: the model, or what holds models and compensator. run: one step or forward pass.
        held: what else it keeps in memory from one step to the next: optimizer, images.
    """

    module: nn.Module
    set_degree: Callable[[int], object]
    run: Callable[[], object]
    held: tuple[torch.optim.Optimizer | torch.Tensor, ...]


def teacher_degree(degree: int) -> int:
    """Return the degree of the teacher while the student runs at ``degree``: 0, or the nearest that differs."""
    return 0 if degree else 1


def finetuning(subject: Subject, max_degree: int, settings: BenchmarkSettings, device: torch.device) -> Work:
    """Return a fine-tuning step: forward, cross-entropy, backward and optimizer, of all weights."""
    recipe, vit = FinetuneSettings(), subject.vit(device)
    module, images = _with_head(subject, vit), vit.example(settings.batch_size)
    optimizer = make_optimizer(module.train(), recipe)
    shape = (len(images), *(images.shape[-2:] if subject.head else images.shape[1:] if vit.reads == "text" else ()))
    classes = subject.head[1] if subject.head else vit.outputs(vit.model)
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def loss() -> torch.Tensor:
        if subject.head is not None:
            return pixel_loss(module(images), labels, IGNORED)
        logits = module(images).flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), label_smoothing=recipe.label_smoothing)

    work = step_work(module, loss, settings.precision, device, optimizer)
    return Work(module, vit.set_degree, work, (optimizer, images))


def distillation(subject: Subject, max_degree: int, settings: BenchmarkSettings, device: torch.device) -> Work:
    """Return a distillation step: teacher, student with the compensator, backward and optimizer of the latter."""
    teacher, student = (subject.vit(device) for _ in range(2))
    objective = _compensator(teacher, max_degree).objective(teacher, student, whole=False).to(device).train()
    images = student.example(settings.batch_size)
    optimizer = make_optimizer(objective, LearnSettings())
    work = step_work(objective, lambda: objective(images), settings.precision, device, optimizer)
    return Work(objective, lambda degree: objective.set((teacher_degree(degree), degree)), work, (optimizer, images))


def evaluation(subject: Subject, max_degree: int, settings: BenchmarkSettings, device: torch.device) -> Work:
    """Return a forward pass of a model trained at degree 0, with the compensator folded in."""
    vit = subject.vit(device)
    module = _with_head(subject, vit).eval()
    vit.attach(_compensator(vit, max_degree).to(device))
    images = vit.example(settings.batch_size)
    return Work(module, vit.set_degree, inference_work(module, images, settings.precision), (images,))


#: Stage -> what makes its work.
STAGES: dict[str, Callable[[Subject, int, BenchmarkSettings, torch.device], Work]] = {
    "fine-tuning": finetuning,
    "distillation": distillation,
    "evaluation": evaluation,
}


def _with_head(subject: Subject, vit: CompressedViT) -> nn.Module:
    if subject.head is None:
        return vit
    head = make_head(subject.head[0], vit.model.embed_dim, subject.head[1])
    return Segmenter(vit, head).to(next(vit.parameters()).device)


def _compensator(vit: CompressedViT, max_degree: int) -> Compensator:
    """Return a compensator whose update is not zero, as a learned one's is."""
    result = make_part("compensator", COMPENSATORS[vit.reads], vit.shape, max_degree)
    for parameter in result.parameters():
        nn.init.normal_(parameter, std=0.01)
    return result


def round_seconds(
    subject: Subject, stage: str, degrees: Sequence[int], settings: BenchmarkSettings, device: torch.device
) -> dict[int, np.ndarray]:
    """Return the seconds of every round [repeats] by degree; nothing if the device's memory does not suffice.

    The degrees share one model, as they do in a study.
    """

    def times() -> dict[int, np.ndarray]:
        work = STAGES[stage](subject, max(1, *degrees), settings, device)
        return side_by_side(dict.fromkeys(degrees, work.run), settings, device, work.set_degree)

    return (within_memory(device, times) if degrees else None) or {}


def within_memory(device: torch.device, function: Callable, *arguments) -> Any:
    """Return what a function returns, or None if the device's memory did not suffice; leave nothing in it."""
    try:
        result = function(*arguments)
    except torch.OutOfMemoryError:
        result = None
    if device.type == "cuda":
        gc.collect()  # models may hang in cycles
        torch.cuda.empty_cache()
    return result
