"""Compensators whose changes add up over steps of the degree: low-rank updates of linear layers, and vectors.

They hold a change for each step of one degree, i -> i+1 (or of several). The change from degree m to degree n sums the
steps between them, with a minus sign when n < m: P(m->n) = -P(n->m) and P(m->k) + P(k->n) = P(m->n). All of it is named
by parameters of the model, so it can be folded into them, after which the model costs exactly what it cost before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.compressed import Compressed
from tocom.degrees import Degree, counts
from tocom.distillation import Distillation
from tocom.errors import TocomError
from tocom.folding import check_deltas
from tocom.parts import Compensator, Shape
from tocom.settings import Fraction, Positive, Settings

#: The three equal parts of a fused qkv weight, in their order there.
QKV = ("q", "k", "v")


class StepOptions(Settings):
    """Options of every :class:`StepCompensator`."""

    rank: Positive = Field(2, description="rank of one step's update")
    step: Positive = Field(
        1, description="degrees that one update spans; inside a step, they are interpolated linearly"
    )
    trained_scale: float = Field(1.0, gt=0, description="factor on the update while it is learned (public code: 0.1)")
    dropout: Fraction = Field(0.1, description="dropout on the bottleneck while it is learned")


def each_once(chosen: tuple[str, ...], order: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Return the values of an option in a given order; two of a kind are a ValueError."""
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{what} lists something twice: {', '.join(chosen)}")
    return tuple(name for name in order if name in chosen)


class LowRank(NamedTuple):
    """Updates of one linear layer of every block, whose output is made of equal parts that are updated one by one.

    Attributes:
        down: [depth, P, steps, rank, in]. up: [depth, P, steps, out, rank]. P: parts that are updated.
        updated: which parts these are. parts: of how many.
    """

    down: Tensor
    up: Tensor
    updated: tuple[int, ...] = (0,)
    parts: int = 1

    def product(self, coefficients: Tensor) -> Tensor:
        """Sum the updates with coefficients [depth, steps] -> weights [depth, P, out, in]."""
        return torch.einsum("ls,lpsok,lpski->lpoi", coefficients, self.up, self.down)


class Vectors(NamedTuple):
    """Changes of one bias, or of one weight or bias of a norm.

    Attributes:
        values: [n, steps, length]. row: which of the n. block: whose degree counts.
    """

    values: Tensor
    row: int
    block: int

    def sum(self, coefficients: Tensor, steps: slice = slice(None)) -> Tensor:
        """Sum the changes of some steps with coefficients [steps] -> [length]."""
        return coefficients @ self.values[self.row, steps]


def draw_low_rank(shape: Shape, parts: int, steps: int, rank: int, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Return ``down``, Kaiming-uniform, and ``up``, zero, of :class:`LowRank` for ``parts`` parts, as parameters."""
    down = torch.empty(shape.depth * parts * steps * rank, n_in)
    nn.init.kaiming_uniform_(down, a=5**0.5)
    return (
        nn.Parameter(down.view(shape.depth, parts, steps, rank, n_in)),
        nn.Parameter(torch.zeros(shape.depth, parts, steps, n_out, rank)),
    )


class StepCompensator(Compensator):
    """Changes for every step of the degree; a subclass says which (:meth:`low_rank`, :meth:`vectors`).

    Attributes:
        blocks: the name of the list of blocks in a model.
        steps: as many as end at the highest degree, the last may reach beyond it.

    Raises:
        TocomError: the highest degree is below 1.
    """

    Options = StepOptions
    blocks: ClassVar[str] = "blocks"

    def __init__(self, options: StepOptions | None = None, shape: Shape | None = None, max_degree: int = 1):
        super().__init__(options, shape, max_degree)
        if max_degree < 1:
            raise TocomError(f"a compensator is for degrees from 0 to 1 or more, not to {max_degree}")
        self.steps = -(-max_degree // self.options.step)
        self._between: tuple[Tensor, int] = (torch.zeros(0), 0)
        self._eps: dict[str, float] = {}  # of the norms beside which it learns

    def low_rank(self) -> dict[str, LowRank]:
        """Return the name of a linear layer in a block (``attn.qkv``) -> its updates."""
        return {}

    def vectors(self) -> dict[str, Vectors]:
        """Return the name of a bias, or of a norm's weight or bias -> its changes; those of a norm come in pairs."""
        return {}

    @property
    def trained_scale(self) -> float:
        """The factor on the update while it is learned."""
        return self.options.trained_scale

    def check_fits(self, vit: Compressed) -> None:
        """Raise TocomError unless it was learned for such a model and compressor."""
        super().check_fits(vit)
        if vit.reads == "images" and vit.model.blocks[0].attn.attn_dim != vit.model.embed_dim:
            raise TocomError(f"the attention is not as wide as the backbone; {self.title} cannot be folded into it")

    # --- arithmetic -----------------------------------------------------------------------------------------

    def coefficients(self, source: int, target: int) -> Tensor:
        """Return the coefficient of every update in P(source->target) [steps].

        It is the part of the update's step that lies between the two degrees, negative when target < source:
        1, -1 or 0 with steps of one degree.

        Raises:
            TocomError: a degree lies outside 0..max_degree.
        """
        for degree in (source, target):
            if not 0 <= degree <= self.max_degree:
                raise TocomError(
                    f"degree {degree} is out of range: this compensator was trained for degrees 0 to {self.max_degree}"
                )
        step = self.options.step
        low, high, sign = min(source, target), max(source, target), 1 if target > source else -1
        starts = range(0, self.steps * step, step)
        overlaps = [max(0, min(high, start + step) - max(low, start)) for start in starts]
        return next(self.parameters()).new_tensor([sign * overlap / step for overlap in overlaps])

    def block_coefficients(self, source: Degree, target: Degree) -> Tensor:
        """Return the coefficient of every update in every block [depth, steps]; their degrees may differ."""
        pairs = zip(counts(source, self.shape.depth), counts(target, self.shape.depth), strict=True)
        return torch.stack([self.coefficients(m, n) for m, n in pairs])

    @torch.no_grad()
    def deltas(self, source: Degree, target: Degree) -> dict[str, Tensor]:
        """Return the change of every parameter that it changes, before any scale."""
        coefficients, result = self.block_coefficients(source, target), {}
        for layer, updates in self.low_rank().items():
            for block, update in enumerate(updates.product(coefficients)):
                rows = dict(zip(updates.updated, update, strict=True))
                nothing = torch.zeros_like(update[0])
                change = torch.cat([rows.get(part, nothing) for part in range(updates.parts)])
                result[f"{self.blocks}.{block}.{layer}.weight"] = change
        return result | {name: it.sum(coefficients[it.block]) for name, it in self.vectors().items()}

    # --- beside the frozen weights, while it is learned -------------------------------------------------------

    def between(self, source: int, target: int, whole: bool = False) -> None:
        """Have :meth:`branches` compute P(source->target) from now on.

        Args:
            whole: also compute the updates whose coefficient is 0. That costs a little, but the shapes no longer
                depend on the source degree: torch.compile makes one program a degree, not one for every pair.
        """
        coefficients = self.coefficients(source, target)
        self._between = (coefficients, 0) if whole else active(coefficients)

    def branches(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Return what to do with the output of every module that has a parameter which changes."""
        result = {}
        for layer in self.low_rank():
            for block in range(self.shape.depth):
                result[f"{self.blocks}.{block}.{layer}"] = [partial(self._beside_linear, layer, block)]
        for module in dict.fromkeys(name.rpartition(".")[0] for name in self.vectors()):
            result.setdefault(module, []).append(partial(self._beside_vectors, module))
        return {module: partial(_in_turn, changes) for module, changes in result.items()}

    def _steps_between(self) -> tuple[Tensor, slice]:
        """Return the coefficients to compute with, times the trained scale, and the steps that they are of."""
        coefficients, first = self._between
        return self.trained_scale * coefficients, slice(first, first + len(coefficients))

    def _beside_linear(self, layer: str, block: int, x: Tensor, output: Tensor) -> Tensor:
        """Add the updates of a layer of one block: x [B, N, in], output [B, N, parts * out]."""
        updates, (factors, steps) = self.low_rank()[layer], self._steps_between()
        parts = list(output.chunk(updates.parts, dim=-1))
        for p, part in enumerate(updates.updated):
            up = factors.view(-1, 1, 1) * updates.up[block, p, steps]
            parts[part] = parts[part] + self._bottleneck(updates.down[block, p, steps], up, x)
        return torch.cat(parts, dim=-1)

    def _bottleneck(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        down, up = down.to(x.dtype), up.to(x.dtype)  # of a float32 compensator beside a backbone in bfloat16
        hidden = F.linear(x, down.flatten(0, 1))
        if self.training and self.options.dropout:
            hidden = F.dropout(hidden, self.options.dropout)
        return F.linear(hidden, up.transpose(0, 1).flatten(1))

    def _beside_vectors(self, module: str, x: Tensor, output: Tensor) -> Tensor:
        """Add the change of the bias of a linear layer, or of the weight and bias of a norm: x [B, N, dim]."""
        factors, steps = self._steps_between()
        vectors = self.vectors()

        def change(name: str, dtype: torch.dtype) -> Tensor:
            return vectors[f"{module}.{name}"].sum(factors, steps).to(dtype)

        bias = change("bias", output.dtype)
        if f"{module}.weight" not in vectors:
            return output + bias
        weight = change("weight", output.dtype)
        normed = F.layer_norm(x, weight.shape, eps=self._eps[module])
        return output + normed.to(output.dtype) * weight + bias

    def fit_beside(self, student: Compressed) -> None:
        """Get ready to learn beside the weights of a model.

        Raises:
            TocomError: the model lacks a parameter that is changed, has it in another shape, or has other norms.
        """
        self.check_fits(student)
        model = student.model
        try:
            check_deltas(model, self.deltas(0, self.max_degree))
        except TocomError as error:
            reason = str(error).rpartition(";")[0]
            raise TocomError(f"{reason}; set the options of {self.title} to what the model has") from None
        for name in self.vectors():
            module, _, parameter = name.rpartition(".")
            if parameter == "weight":
                norm = model.get_submodule(module)
                if not isinstance(norm, nn.LayerNorm):
                    raise TocomError(f"{module} is a {type(norm).__name__}; {self.title} only changes layer norms")
                self._eps[module] = norm.eps

    def objective(self, teacher: Compressed, student: Compressed, whole: bool) -> Distillation:
        """Distil between two degrees that are drawn for every step."""
        self.fit_beside(student)
        return Distillation(teacher, student, self, whole)


def _in_turn(changes: list[Callable[[Tensor, Tensor], Tensor]], x: Tensor, output: Tensor) -> Tensor:
    for change in changes:
        output = change(x, output)
    return output


def active(coefficients: Tensor) -> tuple[Tensor, int]:
    """Cut the zeros off both ends of coefficients [steps]; return what is left and the number of its first update."""
    numbers = coefficients.nonzero().flatten().tolist()
    first, end = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
    return coefficients[first:end], first
