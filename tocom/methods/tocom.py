"""ToCom: low-rank weight updates that describe the gap between degrees (arXiv 2408.06798, section 4).

It holds one low-rank update for each step of one degree, i -> i+1, for the q and the v projection of every block
(ablations: for other projections, and for steps of several degrees). The update from degree m to degree n sums the
steps between them, with a minus sign when n < m: P(m->n) = -P(n->m) and P(m->k) + P(k->n) = P(m->n). It is linear in
the tokens, so it can be folded into the fused qkv weight, after which the model costs exactly what it cost before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.degrees import Degree, counts
from tocom.distillation import Distillation
from tocom.errors import TocomError
from tocom.files import load_tensors
from tocom.parts import Compensator, Shape, make_part
from tocom.settings import Fraction, Positive, Settings
from tocom.vit import CompressedViT

#: The three equal parts of a fused qkv weight, in their order there.
QKV = ("q", "k", "v")
#: The projections that the paper's compensator updates.
PROJECTIONS = ("q", "v")
_PUBLIC_NAME = re.compile(r"blocks\.(\d+)\.attn\.(\w+)_tocom\.adapter_(?:down|up)\.weight")


class ToComOptions(Settings):
    """Options of :class:`ToCom`."""

    rank: Positive = Field(2, description="rank of one step's update")
    projections: Annotated[tuple[Literal["q", "k", "v"], ...], Field(min_length=1)] = Field(
        PROJECTIONS, description="projections of the attention that are updated"
    )
    step: Positive = Field(
        1, description="degrees that one update spans; inside a step, they are interpolated linearly"
    )
    trained_scale: float = Field(1.0, gt=0, description="factor on the update while it is learned (public code: 0.1)")
    dropout: Fraction = Field(0.1, description="dropout on the bottleneck while it is learned")

    @field_validator("projections")
    @classmethod
    def _each_once_in_order(cls, value):
        if len(set(value)) < len(value):
            raise ValueError(f"projections lists something twice: {', '.join(value)}")
        return tuple(name for name in QKV if name in value)


class ToCom(Compensator):
    """The parameters of ToCom and their arithmetic.

    Attributes:
        down: [depth, P, steps, rank, dim], Kaiming-uniform. up: [depth, P, steps, dim, rank], zero at the start.
            P: projections; steps: as many as end at the highest degree, the last may reach beyond it.

    Raises:
        TocomError: the highest degree is below 1.
    """

    Options = ToComOptions
    title = "ToCom"
    reference = "arXiv 2408.06798"
    trains = "low-rank updates of q and v for every step of one degree"
    needs = "the backbone's pre-training images, no labels"

    def __init__(self, options: ToComOptions | None = None, shape: Shape | None = None, max_degree: int = 1):
        super().__init__(options, shape, max_degree)
        if max_degree < 1:
            raise TocomError(f"a compensator is for degrees from 0 to 1 or more, not to {max_degree}")
        options = self.options
        self.steps = -(-max_degree // options.step)
        depth, dim, n_projections = shape.depth, shape.dim, len(options.projections)
        down = torch.empty(depth * n_projections * self.steps * options.rank, dim)
        nn.init.kaiming_uniform_(down, a=5**0.5)
        self.down = nn.Parameter(down.view(depth, n_projections, self.steps, options.rank, dim))
        self.up = nn.Parameter(torch.zeros(depth, n_projections, self.steps, dim, options.rank))
        self._between: tuple[Tensor, int] = (self.down.new_zeros(0), 0)

    @property
    def trained_scale(self) -> float:
        """The factor on the update while it is learned."""
        return self.options.trained_scale

    def check_fits(self, vit: CompressedViT) -> None:
        """Raise TocomError unless it was learned for such a model and compressor."""
        super().check_fits(vit)
        if vit.model.blocks[0].attn.attn_dim != vit.model.embed_dim:
            raise TocomError("the attention is not as wide as the backbone; ToCom cannot be folded into it")

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
        return self.down.new_tensor([sign * overlap / step for overlap in overlaps])

    def update(self, source: Degree, target: Degree) -> Tensor:
        """Return P(source->target) as weights, before any scale [depth, P, dim, dim]; rows are outputs."""
        pairs = zip(counts(source, self.shape.depth), counts(target, self.shape.depth), strict=True)
        coefficients = torch.stack([self.coefficients(m, n) for m, n in pairs])
        return torch.einsum("ls,lpsok,lpski->lpoi", coefficients, self.up, self.down)

    @torch.no_grad()
    def deltas(self, source: Degree, target: Degree) -> dict[str, Tensor]:
        """Return the change of every block's fused qkv weight [3 * dim, dim], before any scale."""
        nothing = self.down.new_zeros(self.shape.dim, self.shape.dim)
        result = {}
        for block, update in enumerate(self.update(source, target)):
            rows = dict(zip(self.options.projections, update, strict=True))
            result[f"blocks.{block}.attn.qkv.weight"] = torch.cat([rows.get(name, nothing) for name in QKV])
        return result

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
        """Return what to do with the output of every block's fused qkv layer."""
        return {f"blocks.{block}.attn.qkv": partial(self._beside, block) for block in range(self.shape.depth)}

    def _beside(self, block: int, x: Tensor, output: Tensor) -> Tensor:
        """Add the update of one block: x [B, N, dim], output [B, N, 3 * dim]."""
        coefficients, first = self._between
        steps = slice(first, first + len(coefficients))
        factors = self.trained_scale * coefficients.view(-1, 1, 1)
        parts = dict(zip(QKV, output.chunk(3, dim=-1), strict=True))
        for p, name in enumerate(self.options.projections):
            change = self._bottleneck(self.down[block, p, steps], factors * self.up[block, p, steps], x)
            parts[name] = parts[name] + change
        return torch.cat(list(parts.values()), dim=-1)

    def _bottleneck(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        down, up = down.to(x.dtype), up.to(x.dtype)  # of a float32 compensator beside a backbone in bfloat16
        hidden = F.linear(x, down.flatten(0, 1))
        if self.training and self.options.dropout:
            hidden = F.dropout(hidden, self.options.dropout)
        return F.linear(hidden, up.transpose(0, 1).flatten(1))

    def objective(self, teacher: CompressedViT, student: CompressedViT, whole: bool) -> Distillation:
        """Distil between two degrees that are drawn for every step."""
        return Distillation(teacher, student, self, whole)

    # --- the public code's files ------------------------------------------------------------------------------

    @classmethod
    def from_public(
        cls, path: str | os.PathLike, steps: int = 16, trained_scale: float = 0.1, compressor: dict | None = None
    ) -> Self:
        """Import a checkpoint in the layout of the paper's public code.

        It holds ``blocks.{l}.attn.{q,v}_tocom.adapter_down.weight`` [steps * k, D] and ``.adapter_up.weight``
        [D, steps * k] under the key ``model``, and counts its steps backwards: P(i->i+1) is group steps - 1 - i.

        Raises:
            TocomError: the file is no such checkpoint, updates another projection than q and v, or its pickle holds
                more than tensors.
        """
        state = _read_public(path)
        groups: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        matches = [match for match in map(_PUBLIC_NAME.fullmatch, state) if match]
        if foreign := sorted({match[2] for match in matches} - set(PROJECTIONS)):
            raise TocomError(f"{path} updates {', '.join(foreign)} too; only public checkpoints for q and v are read")
        depth = 1 + max((int(match[1]) for match in matches), default=-1)
        for block in range(depth):
            for projection in PROJECTIONS:
                stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
                try:
                    groups[block, projection] = state[f"{stem}down.weight"], state[f"{stem}up.weight"]
                except KeyError as error:
                    raise TocomError(f"{path} lacks {error}; it is not a complete public ToCom checkpoint") from None
        if not groups:
            raise TocomError(f"{path} has no q_tocom or v_tocom weights; it is not a public ToCom checkpoint")
        rows, dim = len(groups[0, "q"][0]), len(groups[0, "q"][1])
        if any(down.shape != (rows, dim) or up.shape != (dim, rows) for down, up in groups.values()):
            raise TocomError(f"{path} has weights of unequal shapes; it is not a public ToCom checkpoint")
        if steps < 1 or rows % steps:
            raise TocomError(f"{path} has {rows} rows, which is not a multiple of {steps} steps; give its steps")
        options = {"kind": "tocom", "rank": rows // steps, "trained_scale": trained_scale}
        result = make_part("compensator", options, Shape(depth, dim, 0, 0, 0), steps)
        result.compressor, result.metadata = compressor, {"imported": True}
        with torch.no_grad():
            for (block, projection), (down, up) in groups.items():
                index = block, PROJECTIONS.index(projection)
                result.down[index] = down.reshape(steps, -1, dim).flip(0)
                result.up[index] = up.reshape(dim, steps, -1).transpose(0, 1).flip(0)
        return result.eval()

    def to_public(self) -> dict[str, Tensor]:
        """Return the parameters in the layout of the paper's public code; see :meth:`from_public`.

        Raises:
            TocomError: that layout cannot say which projections or how many degrees a step these updates are for.
        """
        options = self.options
        if options.projections != PROJECTIONS or options.step != 1:
            raise TocomError(
                "the public layout holds q and v in steps of 1 degree only; this compensator updates"
                f" {', '.join(options.projections)} in steps of {options.step}: save it with tocom.save_part"
            )
        result = {}
        for block in range(self.shape.depth):
            for index, projection in enumerate(PROJECTIONS):
                stem = f"blocks.{block}.attn.{projection}_tocom.adapter_"
                result[f"{stem}down.weight"] = self.down[block, index].flip(0).flatten(0, 1).detach()
                result[f"{stem}up.weight"] = self.up[block, index].flip(0).transpose(0, 1).flatten(1).detach()
        return result


def active(coefficients: Tensor) -> tuple[Tensor, int]:
    """Cut the zeros off both ends of coefficients [steps]; return what is left and the number of its first update."""
    numbers = coefficients.nonzero().flatten().tolist()
    first, end = (numbers[0], numbers[-1] + 1) if numbers else (0, 0)
    return coefficients[first:end], first


def _read_public(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a .pth with nothing but tensors in it, or a .safetensors file."""
    if os.fspath(path).endswith(".safetensors"):
        return load_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TocomError(f"no such file: {path}; check the path") from None
    except Exception:  # torch raises errors of many kinds, with advice to load it all the same
        raise TocomError(
            f"{path} cannot be read as tensors alone and is refused, since pickles can run code; save its tensors alone"
        ) from None
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise TocomError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
