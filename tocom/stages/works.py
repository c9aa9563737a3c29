"""A step of each stage of a study, on a ViT with random weights (speed does not depend on them), and its time.

What is done at degree d:

- fine-tuning: a step that changes all weights: forward at degree d, loss, backward, optimizer;
- distillation: a step that changes the compensator alone: the teacher's forward pass at degree 0, forward and backward
  of the student at degree d with P_0->d beside its weights, optimizer. A step always draws two degrees that differ
  (method: arXiv 2408.06798, section 4.2), so that at d = 0 the teacher runs at degree 1, the nearest to it;
- evaluation: a forward pass at degree d of a model that was trained at degree 0, with P_0->d folded in.

Each can be had in several variants, :data:`VARIANTS`, to be measured side by side. Recipes are the defaults of the
stages, but for ``deterministic``: GPU operations may vary from run to run. The images are random and lie on the device:
reading and augmenting them is left out, and so is what a study does between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tocom.data.scenes import IGNORED
from tocom.distillation import distillation_loss
from tocom.methods import COMPENSATORS, DEFAULTS
from tocom.models import BUILDERS, compress, create
from tocom.parts import Compensator, make_part
from tocom.settings import BenchmarkSettings, FinetuneSettings, LearnSettings
from tocom.stages.eager import EagerToMe
from tocom.stages.throughput import inference_work, side_by_side, step_work
from tocom.tasks.segment import Segmenter, make_head, pixel_loss
from tocom.training import cast_weights, make_optimizer
from tocom.vit import CompressedViT

#: Variants of a work. The project's own; without the compensator; ToMe by :mod:`tocom.stages.eager`, in the same
#: precision or in float32; timm's own forward pass, which compresses nothing; torch.compile's of the project's own.
OWN, UNFOLDED, EAGER, EAGER_FP32, TIMM, COMPILED = "own", "unfolded", "eager", "eager fp32", "timm", "compiled"
#: Stage -> its variants that are measured at every degree (timm: once).
VARIANTS = {
    "fine-tuning": (OWN, EAGER, EAGER_FP32),
    "distillation": (OWN, EAGER, EAGER_FP32),
    "evaluation": (OWN, UNFOLDED, EAGER, TIMM),
}


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
        with torch.device(device):  # a GPU draws weights much faster
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


def finetuning(
    subject: Subject, max_degree: int, settings: BenchmarkSettings, device: torch.device, variant: str = OWN
) -> Work:
    """Return a fine-tuning step: forward, cross-entropy, backward and optimizer, of all weights."""
    recipe, vit = FinetuneSettings(), subject.vit(device)
    module, images = _with_head(subject, vit), vit.example(settings.batch_size)
    optimizer = make_optimizer(module.train(), recipe)
    shape = (len(images), *(images.shape[-2:] if subject.head else images.shape[1:] if vit.reads == "text" else ()))
    classes = subject.head[1] if subject.head else vit.outputs(vit.model)
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(0)).to(device)
    run = _forward(vit, variant) if subject.head is None else module

    def loss() -> torch.Tensor:
        if subject.head is not None:
            return pixel_loss(run(images), labels, IGNORED)
        logits = run(images).flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), label_smoothing=recipe.label_smoothing)

    work = step_work(module, loss, settings.precision, device, optimizer)
    return Work(module, getattr(run, "set_degree", vit.set_degree), work, (optimizer, images))


def distillation(
    subject: Subject, max_degree: int, settings: BenchmarkSettings, device: torch.device, variant: str = OWN
) -> Work:
    """Return a distillation step: teacher, student with the compensator, backward and optimizer of the latter."""
    teacher, student = (subject.vit(device) for _ in range(2))
    objective = _compensator(teacher, max_degree).objective(teacher, student, whole=False).to(device).train()
    images = student.example(settings.batch_size)
    optimizer = make_optimizer(objective, LearnSettings())
    eager = _forward(teacher, EAGER), _forward(student, EAGER)  # the compensator hangs on the student's own layers

    def set_degree(degree: int) -> None:
        objective.set((teacher_degree(degree), degree))
        for forward, at in zip(eager, (teacher_degree(degree), degree), strict=True):
            forward.set_degree(at)

    def loss() -> torch.Tensor:
        if variant == OWN:
            return objective(images)
        with torch.no_grad():
            expected = eager[0](images)
        return distillation_loss(expected.float(), eager[1](images).float())

    work = step_work(objective, loss, settings.precision, device, optimizer)
    return Work(objective, set_degree, work, (optimizer, images))


def evaluation(
    subject: Subject, max_degree: int, settings: BenchmarkSettings, device: torch.device, variant: str = OWN
) -> Work:
    """Return a forward pass of a model trained at degree 0, with the compensator folded in."""
    vit = subject.vit(device)
    module = _with_head(subject, vit).eval()
    images = vit.example(settings.batch_size)
    if variant in (OWN, UNFOLDED):
        cast_weights(vit.model, settings.precision)  # as tocom.training.inference does
    if variant == OWN:
        vit.attach(_compensator(vit, max_degree).to(device))
    run = module if variant == OWN else _forward(vit, variant)
    set_degree = getattr(run, "set_degree", vit.set_degree)
    return Work(module, set_degree, inference_work(run, images, settings.precision), (images,))


def _forward(vit: CompressedViT, variant: str) -> Any:
    """Return what runs a classifier in a variant, on the same weights."""
    if variant == COMPILED:
        return torch.compile(vit, dynamic=False)
    return {EAGER: EagerToMe(vit.model), TIMM: vit.model}.get(variant, vit)


#: Stage -> what makes its work.
STAGES: dict[str, Callable[..., Work]] = {
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


def make(
    subject: Subject, stage: str, variant: str, max_degree: int, settings: BenchmarkSettings, device: torch.device
) -> Work:
    """Return the work of one stage in one variant."""
    if variant == EAGER_FP32:
        variant, settings = EAGER, settings.model_copy(update={"precision": "fp32"})
    return STAGES[stage](subject, max_degree, settings, device, variant)


def captured(work: Work, degrees: Sequence[int], device: torch.device) -> Work:
    """Return a work without gradients as CUDA graphs, one a degree, which are launched whole."""
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    chosen = [degrees[0]]

    def set_degree(degree: int) -> None:
        chosen[0] = degree

    for degree in degrees:
        work.set_degree(degree)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is set up on first use must not be captured
                work.run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graphs[degree] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[degree]):
            work.run()
    return replace(work, set_degree=set_degree, run=lambda: graphs[chosen[0]].replay())


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
