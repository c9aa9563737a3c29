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
from torch import Tensor
from torch.nn import functional as F

from tocom.degrees import Degree
from tocom.errors import TocomError
from tocom.files import check_finite, load_tensors, refuse_bomb
from tocom.parts import Shape, make_part
from tocom.settings import Fraction
from tocom.steps import QKV, LowRank, StepCompensator, StepOptions, draw_low_rank, each_once

#: The projections that the paper's compensator updates.
PROJECTIONS = ("q", "v")
_PUBLIC_NAME = re.compile(r"blocks\.(\d{1,5})\.attn\.(\w+)_tocom\.adapter_(?:down|up)\.weight")


class ToComOptions(StepOptions):
    """Options of :class:`ToCom`."""

    dropout: Fraction = Field(0.1, description="dropout on the bottleneck while it is learned")

    projections: Annotated[tuple[Literal["q", "k", "v"], ...], Field(min_length=1)] = Field(
        PROJECTIONS, description="projections of the attention that are updated"
    )

    @field_validator("projections")
    @classmethod
    def _each_once_in_order(cls, value):
        return each_once(value, QKV, "projections")


class ToCom(StepCompensator):
    """The parameters of ToCom.

    Attributes:
        down: [depth, P, steps, rank, dim], Kaiming-uniform. up: [depth, P, steps, dim, rank], zero at the start.
            P: projections; steps: as many as end at the highest degree, the last may reach beyond it.
    """

    Options = ToComOptions
    title = "ToCom"
    reference = "arXiv 2408.06798"
    trains = "low-rank updates of q and v for every step of one degree"
    needs = "the backbone's pre-training images, no labels"

    def __init__(self, options: ToComOptions | None = None, shape: Shape | None = None, max_degree: int = 1):
        super().__init__(options, shape, max_degree)
        n_projections, rank = len(self.options.projections), self.options.rank
        self.down, self.up = draw_low_rank(shape, n_projections, self.steps, rank, shape.dim, shape.dim)

    def linear(self) -> dict[str, LowRank]:
        """Return the updates of the fused qkv layers."""
        updated = tuple(map(QKV.index, self.options.projections))
        return {"attn.qkv": LowRank(self.down, self.up, updated, len(QKV))}

    def update(self, source: Degree, target: Degree) -> Tensor:
        """Return P(source->target) as weights, before any scale [depth, P, dim, dim]; rows are outputs."""
        return self.linear()["attn.qkv"].product(self.block_coefficients(source, target))

    # --- beside the frozen weights, while it is learned: dropout acts between the two factors ---------------------

    def changes(self) -> dict[str, Tensor]:
        """Return nothing: all that it changes is in :meth:`branches`."""
        return {}

    def branches(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Return what to do with the output of every fused qkv layer."""
        return {f"blocks.{block}.attn.qkv": partial(self._beside, block) for block in range(self.shape.depth)}

    def _beside(self, block: int, x: Tensor, output: Tensor) -> Tensor:
        """Add the updates of one block: x [B, N, dim], output [B, N, 3 * dim]."""
        factors, steps = self._steps_between()
        parts = list(output.chunk(len(QKV), dim=-1))
        for p, projection in enumerate(self.options.projections):
            up = factors.view(-1, 1, 1) * self.up[block, p, steps]
            part = QKV.index(projection)
            parts[part] = parts[part] + self._bottleneck(self.down[block, p, steps], up, x)
        return torch.cat(parts, dim=-1)

    def _bottleneck(self, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
        down, up = down.to(x.dtype), up.to(x.dtype)  # of a float32 compensator beside a backbone in bfloat16
        hidden = F.linear(x, down.flatten(0, 1))
        if self.training and self.options.dropout:
            hidden = F.dropout(hidden, self.options.dropout)
        return F.linear(hidden, up.transpose(0, 1).flatten(1))

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
        rows, dim = (side.shape[0] if side.ndim == 2 else 0 for side in groups[0, "q"])
        if not rows * dim or any(down.shape != (rows, dim) or up.shape != (dim, rows) for down, up in groups.values()):
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


def _read_public(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a .pth with nothing but tensors in it, or a .safetensors file."""
    if os.fspath(path).endswith(".safetensors"):
        return load_tensors(path)[0]
    refuse_bomb(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises errors of many kinds, with advice to load it all the same
        raise TocomError(
            f"{path} cannot be read as tensors alone and is refused, since pickles can run code; save its tensors alone"
        ) from None
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise TocomError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    check_finite(tensors, path)
    return tensors
