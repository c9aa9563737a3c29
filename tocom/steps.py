"""Compensators whose changes add up over steps of the degree: updates of linear layers, and vectors.

They hold a change for each step of one degree, i -> i+1 (or of several). The change from degree m to degree n sums the
steps between them, with a minus sign when n < m: P(m->n) = -P(n->m) and P(m->k) + P(k->n) = P(m->n). All of it is named
by parameters of the model, so it can be folded into them, after which the model costs exactly what it cost before.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from tocom.compressed import Compressed
from tocom.degrees import Degree, counts
from tocom.distillation import Distillation
from tocom.errors import TocomError
from tocom.folding import check_deltas
from tocom.parts import Compensator, Shape
from tocom.settings import Positive, Settings

#: The three equal parts of a fused qkv weight, in their order there.
QKV = ("q", "k", "v")


class StepOptions(Settings):
    """Options of every :class:`StepCompensator`."""

    rank: Positive = Field(2, description="rank of one step's update")
    step: Positive | None = Field(
        1, description="degrees that one update spans; inside a step, they are interpolated linearly; null: all degrees"
    )
    sources: Literal["any", "zero"] = Field(
        "any", description="source degrees that are drawn while it is learned: any, or 0 alone"
    )
    need: float = Field(
        0.0,
        ge=0,
        description="pairs of degrees are drawn with a probability in proportion to their distance to this power; 0:"
        " all alike",
    )
    trained_scale: float = Field(1.0, gt=0, description="factor on the update while it is learned (public code: 0.1)")


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

    def product(self, coefficients: Tensor, steps: slice = slice(None)) -> Tensor:
        """Sum the updates of some steps with coefficients [depth, steps] -> weights [depth, P, out, in]."""
        return torch.einsum("ls,lpsok,lpski->lpoi", coefficients, self.up[:, :, steps], self.down[:, :, steps])


class Whole(NamedTuple):
    """The same, of any rank.

    Attributes:
        values: [depth, P, steps, out, in]. updated, parts: as in :class:`LowRank`.
    """

    values: Tensor
    updated: tuple[int, ...] = (0,)
    parts: int = 1

    def product(self, coefficients: Tensor, steps: slice = slice(None)) -> Tensor:
        """Sum the updates of some steps with coefficients [depth, steps] -> weights [depth, P, out, in]."""
        return torch.einsum("ls,lpsoi->lpoi", coefficients, self.values[:, :, steps])


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
    """Changes for every step of the degree; a subclass says which (:meth:`linear`, :meth:`vectors`).

    Attributes:
        blocks: the name of the list of blocks in a model.
        step: degrees that one of them spans. steps: as many as end at the highest degree, the last may reach beyond it.

    Raises:
        TocomError: the highest degree is below 1.
    """

    Options = StepOptions
    blocks: ClassVar[str] = "blocks"

    def __init__(self, options: StepOptions | None = None, shape: Shape | None = None, max_degree: int = 1):
        super().__init__(options, shape, max_degree)
        if max_degree < 1:
            raise TocomError(f"a compensator is for degrees from 0 to 1 or more, not to {max_degree}")
        self.step = self.options.step or max_degree
        self.steps = -(-max_degree // self.step)
        self._between: tuple[Tensor, int] = (torch.zeros(0), 0)

    def linear(self) -> dict[str, LowRank | Whole]:
        """Return the name of a linear layer in a block (``attn.qkv``) -> its updates."""
        return {}

    def vectors(self) -> dict[str, Vectors]:
        """Return the name of a bias, or of a norm's weight or bias -> its changes."""
        return {}

    @property
    def trained_scale(self) -> float:
        """The factor on the update while it is learned."""
        return self.options.trained_scale

    @property
    def source(self) -> int | None:
        """The source degree that it is learned for; None: any."""
        return 0 if self.options.sources == "zero" else None

    @property
    def need(self) -> float:
        """While it is learned, pairs of degrees are drawn in proportion to their distance to this power."""
        return self.options.need

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
        step = self.step
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
        return self._summed(self.block_coefficients(source, target))

    def _summed(self, coefficients: Tensor, steps: slice = slice(None)) -> dict[str, Tensor]:
        """Return the changes of all parameters, the sum of some steps with coefficients [depth, steps]."""
        result = {}
        for layer, updates in self.linear().items():
            for block, update in enumerate(updates.product(coefficients, steps)):
                rows = dict(zip(updates.updated, update, strict=True))
                nothing = torch.zeros_like(update[0])
                change = torch.cat([rows.get(part, nothing) for part in range(updates.parts)])
                result[f"{self.blocks}.{block}.{layer}.weight"] = change
        return result | {name: it.sum(coefficients[it.block], steps) for name, it in self.vectors().items()}

    # --- while it is learned --------------------------------------------------------------------------------

    def between(self, source: int, target: int, whole: bool = False) -> None:
        """Have :meth:`changes` be P(source->target) from now on.

        Args:
            whole: also compute the updates whose coefficient is 0. That costs a little, but the shapes no longer
                depend on the source degree: torch.compile makes one program a degree, not one for every pair.
        """
        coefficients = self.coefficients(source, target)
        self._between = (coefficients, 0) if whole else active(coefficients)

    def changes(self) -> dict[str, Tensor]:
        """Return the present changes at the trained scale, with gradients."""
        factors, steps = self._steps_between()
        return self._summed(factors.expand(self.shape.depth, -1), steps)

    def _steps_between(self) -> tuple[Tensor, slice]:
        """Return the coefficients to compute with, times the trained scale, and the steps that they are of."""
        coefficients, first = self._between
        return self.trained_scale * coefficients, slice(first, first + len(coefficients))

    def check_parameters(self, student: Compressed) -> None:
        """Raise TocomError unless a model has all parameters that are changed, in their shapes."""
        self.check_fits(student)
        try:
            check_deltas(student.model, self.deltas(0, self.max_degree))
        except TocomError as error:
            reason = str(error).rpartition(";")[0]
            raise TocomError(f"{reason}; set the options of {self.title} to what the model has") from None

    def objective(self, teacher: Compressed, student: Compressed, whole: bool) -> Distillation:
        """Distil between two degrees that are drawn for every step."""
        self.check_parameters(student)
        return Distillation(teacher, student, self, whole)


def active(coefficients: Tensor) -> tuple[Tensor, int]:
    """Cut the zeros off both ends of coefficients [steps]; return what is left and the number of its first update."""
    numbers = coefficients.nonzero().flatten().tolist()
    first, end = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
    return coefficients[first:end], first
