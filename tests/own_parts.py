"""Parts that a user might write, with options and parameters; tests copy this file into a package elsewhere."""

from functools import partial

import torch
from pydantic import Field
from torch import nn

from tocom.degrees import counts
from tocom.distillation import Distillation, distillation_loss
from tocom.errors import TocomError
from tocom.parts import Compensator, Compressor, Objective, Tuning, TuningOptions, gather, train_heads
from tocom.settings import Settings


class GateOptions(Settings):
    strength: float = Field(0.1, gt=0, description="how much the score of a token changes it")


class Gate(Compressor):
    """Drop the tokens with the lowest scores, by a direction that is learned for every count; weigh the others."""

    Options = GateOptions
    title, reference, trains, needs = "Gate", "this file", "a direction for every degree", "images"

    def __init__(self, options=None, shape=None, max_degree=0):
        super().__init__(options, shape, max_degree)
        self.directions = nn.Parameter(torch.randn(max_degree + 1, shape.dim) / shape.dim)

    @classmethod
    def learns(cls, options):
        return True

    def reduce(self, tokens, attention):
        score = tokens.x @ self.directions[min(tokens.count, self.max_degree)].to(tokens.x.dtype)
        rank = score.detach().clone()
        rank[:, : tokens.prefix] = torch.inf
        kept = rank.argsort(dim=-1, descending=True, stable=True)[:, : score.shape[1] - tokens.count].sort(-1).values
        weight = 1 + self.options.strength * score.tanh().unsqueeze(-1)
        return tokens.now(gather(tokens.x * weight, kept), tokens.size)

    def penalty(self):
        return 1e-3 * self.directions.square().sum()

    def objective(self, teacher, student, whole):
        return Narrowing(teacher, student, self)


class Narrowing(Objective):
    """Have the logits at a degree be those at degree 0."""

    def __init__(self, teacher, student, gate):
        super().__init__()
        self.teacher, self.student, self.gate = teacher.requires_grad_(False), student.requires_grad_(False), gate
        gate.requires_grad_(True)

    def draw(self, generator=None):
        return 1 + int(torch.randint(self.gate.max_degree, (), generator=generator))

    def set(self, drawn):
        self.teacher.set_degree(0)
        self.student.set_degree(drawn)
        return self

    def forward(self, images):
        with torch.no_grad():
            expected = self.teacher(images)
        return distillation_loss(expected, self.student(images))


class Shifted(nn.Module):
    def __init__(self, mlp, dim, factor):
        super().__init__()
        self.mlp, self.factor, self.shift = mlp, factor, nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return self.mlp(x) + self.factor * self.shift


class ShiftOptions(TuningOptions):
    factor: float = Field(1.0, gt=0, description="factor on the shift")


class Shift(Tuning):
    """Train a vector that is added to the output of every block's MLP, and the head."""

    Options = ShiftOptions
    title, reference, trains, needs = "Shift", "this file", "vectors and the head", "labelled images"

    def prepare(self, model):
        train_heads(model)
        self.restore(model)
        for block in model.blocks:
            block.mlp.shift.requires_grad_(True)

    def restore(self, model):
        for block in model.blocks:
            block.mlp = Shifted(block.mlp, model.embed_dim, self.options.factor)


class BiasOptions(Settings):
    trained_scale: float = Field(0.5, gt=0, description="factor while it is learned")


class Bias(Compensator):
    """Change the bias of every block's projection in proportion to the change of its degree."""

    Options = BiasOptions
    title, reference, trains, needs = "Bias", "this file", "a vector for every block", "images"

    def __init__(self, options=None, shape=None, max_degree=0):
        super().__init__(options, shape, max_degree)
        self.slope = nn.Parameter(torch.zeros(shape.depth, shape.dim))
        self.between(0, max_degree)

    @property
    def trained_scale(self):
        return self.options.trained_scale

    def deltas(self, source, target):
        pairs = list(zip(counts(source, self.shape.depth), counts(target, self.shape.depth), strict=True))
        if max(map(max, pairs)) > self.max_degree:
            raise TocomError(f"degree {target} is out of range: up to {self.max_degree}")
        slope = self.slope.detach()
        return {f"blocks.{i}.attn.proj.bias": (n - m) * slope[i] for i, (m, n) in enumerate(pairs)}

    def between(self, source, target, whole=False):
        self.steps = target - source

    def branches(self):
        return {f"blocks.{block}.attn.proj": partial(self._beside, block) for block in range(self.shape.depth)}

    def _beside(self, block, x, output):
        return output + self.trained_scale * self.steps * self.slope[block]

    def objective(self, teacher, student, whole):
        return Distillation(teacher, student, self, whole)
