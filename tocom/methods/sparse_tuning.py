"""Pruning by class attention in a few blocks, adapters in all of them (Sparse-Tuning, arXiv 2405.14700).

A degree stands for a budget here: what merging that many tokens in every block costs. See
docs/methods/sparse_tuning.md.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.degrees import Degree, counts
from tocom.errors import TocomError
from tocom.merging import BUDGET, BlockCosts
from tocom.methods.evit import EViT, EViTOptions
from tocom.parts import Attention, Shape, Tokens
from tocom.settings import Positive

#: A keep rate is a whole number of these parts of 1.
PARTS = 1 << 16


class Adapter(nn.Module):
    """A bottleneck within a bottleneck, beside a block's MLP: up(mix [u; v] + h) of tokens x.

    h = relu(down x), u = inner_down h, v = inner_up u. ``up`` and ``inner_up`` are zero at the start, so that it adds
    nothing; the other weights are Kaiming-uniform, the biases zero.

    Args:
        dim: width of the tokens. width, inner: of the bottlenecks.
    """

    def __init__(self, dim: int, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.inner_down, self.inner_up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mix = nn.Linear(inner + width, width)
        for layer in self.children():
            nn.init.zeros_(layer.bias)
        for layer in (self.up, self.inner_up):
            nn.init.zeros_(layer.weight)

    @staticmethod
    def cost(dim: int, width: int, inner: int) -> int:
        """Return the multiply-adds of one token."""
        return 2 * dim * width + 2 * width * inner + (inner + width) * width

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, dim] -> [B, N, dim]."""
        h = F.relu(_apply(self.down, x))
        u = _apply(self.inner_down, h)
        v = _apply(self.inner_up, u)
        return _apply(self.up, _apply(self.mix, torch.cat([u, v], dim=-1)) + h)


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer in the type of x, which may be that of a model in half precision."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


Blocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None


class SparseTuningOptions(EViTOptions):
    """Options of :class:`SparseTuning`."""

    fuse: Literal["none", "sum", "mean"] = "sum"
    blocks: Blocks = Field(
        None, description="blocks that prune, from 0; null: those at a quarter, half and three quarters of the depth"
    )
    groups: Blocks = Field(
        None,
        description="first blocks of the groups whose adapters are linked; the first group starts at 0, and every block"
        " that prunes has to start one; null: the blocks that prune",
    )
    widths: tuple[Positive, Positive] | None = Field(
        None,
        description="widths of an adapter's bottlenecks, the outer one first; null: 64 and 32, but at most a quarter"
        " and an eighth of the model's",
    )
    embedding: bool = Field(
        False,
        description="the first group also adds the tokens that entered the first block, as in the public code; the"
        " model then does not start as the backbone",
    )
    mlp_ratio: float = Field(4.0, gt=0, description="width of the backbone's MLPs over its own, for what a token costs")

    @field_validator("blocks", "groups")
    @classmethod
    def _no_block_twice(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("it lists a block twice")
        return value if value is None else tuple(sorted(value))


class SparseTuning(EViT):
    """Prune what the class token attends to least in a few blocks, and add what adapters make of the tokens in all."""

    Options = SparseTuningOptions
    title = "Sparse-Tuning"
    reference = "arXiv 2405.14700"
    trains = "adapters in every block, with the model"
    needs = "labelled images of the task"
    axis = BUDGET
    adapts = True

    def __init__(self, options: SparseTuningOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        self.adapters = nn.ModuleList()
        if shape is None:
            return
        self.blocks, self.starts = self._places(shape.depth)
        self.widths = self.options.widths or tuple(max(min(w, shape.dim // d), 1) for w, d in ((64, 4), (32, 8)))
        self.adapters.extend(Adapter(shape.dim, *self.widths) for _ in range(shape.depth))

    @classmethod
    def label(cls, options: SparseTuningOptions) -> str:
        """Return what tables call it with these options."""
        blocks = None if options.blocks is None else f"blocks {', '.join(map(str, options.blocks))}"
        fuse = {"sum": None, "mean": "mean", "none": "not fused"}[options.fuse]
        return cls.noted(blocks, fuse, "embedding" if options.embedding else None)

    def _places(self, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the blocks that prune, and those that start a group."""
        options = self.options
        blocks = options.blocks or tuple(sorted({part * depth // 4 for part in (1, 2, 3)}))
        starts = tuple(sorted({0, *(options.groups or blocks)}))
        for name, places in (("blocks", blocks), ("groups", starts)):
            if places[-1] >= depth:
                raise TocomError(f"{name}: there is no block {places[-1]}; the model has blocks 0 to {depth - 1}")
        within = sorted(set(blocks) - set(starts))
        if within:
            raise TocomError(f"block {within[0]} prunes within a group, which loses no token; add it to groups")
        if options.embedding and blocks[0] == 0:
            raise TocomError("block 0 prunes, but with embedding the first group loses no token; choose other blocks")
        return blocks, starts

    # --- degrees --------------------------------------------------------------------------------------------

    @property
    def costs(self) -> BlockCosts:
        """What the backbone's blocks cost, adapters left out."""
        dim = self.shape.dim
        return BlockCosts(self.shape, 4 * dim**2, round(2 * self.options.mlp_ratio * dim**2))

    def blocks_cost(self, removed: Sequence[int]) -> int:
        """Return the cost of all blocks, adapters and ranking included, if each removes so many tokens."""
        costs = self.costs
        total, n = 0, self.shape.tokens
        for count in removed:
            total += costs.attending(n) + (costs.ranking(n) if count else 0)
            n -= count
            total += n * (costs.mlp + Adapter.cost(self.shape.dim, *self.widths))
        return total

    def removed(self, rate: float) -> tuple[int, ...]:
        """Return how many tokens each block removes at a keep rate; where less than one is saved, none."""
        result, n = [], self.shape.tokens
        for block in range(self.shape.depth):
            patches = n - self.shape.prefix
            count = patches - math.ceil(rate * patches) - self._fused if block in self.blocks else 0
            result.append(max(count, 0))
            n -= result[-1]
        return tuple(result)

    def keep_rate(self, degree: int) -> float:
        """Return the share of its patches that each of the chosen blocks keeps: the highest within the budget.

        If there is none, it is the lowest, at which a single patch stays.
        """
        if not degree:
            return 1.0
        budget = self.costs.merging(degree)
        shares = range(1, PARTS)
        affordable = bisect_right(shares, budget, key=lambda share: self.blocks_cost(self.removed(share / PARTS)))
        return max(affordable, 1) / PARTS

    def counts(self, degree: Degree, depth: int) -> tuple[int, ...]:
        """Return how many tokens each block removes; a list of numbers, a count a block, is taken as it is.

        Raises:
            TocomError: see :func:`tocom.degrees.counts`; a list has a count where no group starts; or its adapters are
                for another model.
        """
        removed = counts(degree, depth)
        if len(self.adapters) != depth:
            raise TocomError(f"{self.title} has adapters for {len(self.adapters)} blocks, but the model has {depth}")
        if isinstance(degree, int):
            return self.removed(self.keep_rate(degree))
        may = self.starts[1:] if self.options.embedding else self.starts
        within = [block for block, count in enumerate(removed) if count and block not in may]
        if within:
            raise TocomError(f"degree {degree!r} removes tokens in block {within[0]}, within a group; put 0 there")
        return removed

    @property
    def _fused(self) -> int:
        return int(self.options.fuse != "none")

    def most(self, n_tokens: int, prefix: int) -> int:
        """Return the most tokens that a block may remove of so many: one patch always stays."""
        return max(n_tokens - prefix - 1 - self._fused, 0)

    # --- tokens ---------------------------------------------------------------------------------------------

    def project(self, attn: nn.Module, x: Tensor, tokens: Tokens) -> Sequence[Tensor]:
        """Return queries, keys and values [B, heads, N, head_dim] of normalised tokens x [B, N, D]."""
        if self.options.embedding and tokens.block == 0:
            tokens.memory["linked"] = tokens.x
        return super().project(attn, x, tokens)

    def around_mlp(self, tokens: Tokens, attention: Attention, mlp: Callable[[Tensor], Tensor]) -> Tokens:
        """Finish a block: prune tokens, add the MLP's branch and the adapter's; at its end those of a group again."""
        tokens = self.compress(tokens, attention)
        adapted = self.adapters[tokens.block](tokens.x)
        linked = tokens.memory.get("linked")
        linked = adapted if linked is None else linked + adapted
        x = tokens.x + mlp(tokens.x) + adapted
        after = tokens.block + 1
        if after in self.starts or after == len(self.adapters):
            x, linked = x + linked, None
        # Another dict, not a change of this one: a block that is recomputed for its gradient starts from it again.
        return replace(tokens, x=x, memory=tokens.memory | {"linked": linked})
