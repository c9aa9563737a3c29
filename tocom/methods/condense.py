"""Condensed keys and values: one for every run of neighbouring patches, by maps of their own.

What becomes, on a ViT, of the condensing tokens of Activation Beacon (arXiv 2401.03462), which have projections of
their own, and of the pooled keys and values of stochastic wav2vec 2.0 (arXiv 2204.11934). There is no window or cache
here: all queries see all runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tocom.errors import TocomError
from tocom.parts import Shape, Share, Tokens, left_of, split_heads, widen
from tocom.settings import Settings


def morton(height: int, width: int) -> list[int]:
    """Return the patches of a grid in Morton order: by the bits of row and column in turns, the row's first.

    On other than square grids of a power of two it is that order of a larger such grid, without what lies outside.
    """

    def code(patch: int) -> int:
        row, column = divmod(patch, width)
        bits = range(max(height, width).bit_length())
        return sum((row >> bit & 1) << 2 * bit + 1 | (column >> bit & 1) << 2 * bit for bit in bits)

    return sorted(range(height * width), key=code)


def runs(order: Sequence[int], number: int) -> list[Sequence[int]]:
    """Split patches into ``number`` consecutive runs whose lengths differ by one at most."""
    ends = [len(order) * i // number for i in range(number + 1)]
    return [order[first:end] for first, end in pairwise(ends)]


def _padded(height: int, width: int, number: int) -> tuple[list[list[int]], list[int]]:
    """Return the patches of each run, the last of a shorter one twice, and how many it has."""
    found = runs(morton(height, width), number)
    longest = max(map(len, found))
    return [[*run, *run[-1:] * (longest - len(run))] for run in found], [len(run) for run in found]


class Runs(NamedTuple):
    """The runs of a grid of patches.

    Attributes:
        patches: of each run [runs, longest]; a shorter one has its last patch twice. sizes: patches in each [runs].
    """

    patches: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], number: int, device: torch.device) -> Runs:
        """Return the runs of a grid (height, width)."""
        return cls(*(torch.tensor(numbers, device=device) for numbers in _padded(*grid, number)))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of each run [B, runs, D] of patches [B, n, D]."""
        counted = torch.arange(self.patches.shape[1], device=x.device) < self.sizes.unsqueeze(-1)  # [runs, longest]
        total = (widen(x)[:, self.patches] * counted.unsqueeze(-1)).sum(dim=2)
        return (total / self.sizes.unsqueeze(-1)).to(x.dtype)


def some_rows(layer: nn.Module, x: Tensor, rows: slice, change: Tensor | None = None) -> Tensor:
    """Return some of the outputs of a linear layer for x [..., in], with a change of their weights [rows, in].

    Computes no others, unless something acts on the whole of the layer: an update beside it, or a hook.
    """
    if type(layer) is nn.Linear and not layer._forward_hooks:
        weight = layer.weight[rows] if change is None else layer.weight[rows] + change
        return F.linear(x, weight, None if layer.bias is None else layer.bias[rows])
    y = layer(x)[..., rows]
    return y if change is None else y + F.linear(x, change)


class CondenseOptions(Settings):
    """Options of :class:`Condense`."""

    own_maps: bool = Field(
        True,
        description="runs have projections of their own to keys and values, which start as the model's; false: the"
        " model's",
    )


class Condense(Share):
    """Let every token attend to the share 1 - d / 16 of keys and values, each of the mean of a run of patches."""

    Options = CondenseOptions
    title = "condensed keys and values"
    reference = "arXiv 2401.03462, 2204.11934, on a ViT"
    axis = "16ths by which keys and values of patches become fewer"
    trains = "maps to keys and values for runs, in fine-tuning"

    def __init__(self, options: CondenseOptions | None = None, shape: Shape | None = None, max_degree: int = 0):
        super().__init__(options, shape, max_degree)
        self.grid: tuple[int, int] | None = None
        self.change = None
        if self.options.own_maps and shape:
            self.change = nn.Parameter(torch.zeros(shape.depth, 2 * shape.dim, shape.dim))

    @classmethod
    def label(cls, options: CondenseOptions) -> str:
        """Return what tables call it with these options."""
        return cls.title if options.own_maps else f"{cls.title} (shared maps)"

    def fit_to(self, model: nn.Module) -> None:
        """Take the grid of patches from the model."""
        self.grid = tuple(model.patch_embed.grid_size)

    def runs(self, tokens: Tokens) -> Runs:
        """Return the runs that the patches are split into at a block's degree.

        Raises:
            TocomError: the patches are neither the grid of the model's input size nor a square.
        """
        n = tokens.x.shape[1] - tokens.prefix
        key = "runs", tokens.count
        if key not in tokens.memory:
            grid, side = self.grid, isqrt(n)
            if grid is None or grid[0] * grid[1] != n:
                grid = (side, side)
            if grid[0] * grid[1] != n:
                raise TocomError(f"{self.title}: {n} patches are no square; set the model's img_size to the images'")
            tokens.memory[key] = Runs.of(grid, left_of(n, tokens.count), tokens.x.device)
        return tokens.memory[key]

    def key_sizes(self, tokens: Tokens) -> Tensor | None:
        """Return how many patches each key stands for [1, keys, 1]."""
        if not tokens.count:
            return tokens.size
        sizes = F.pad(self.runs(tokens).sizes, (tokens.prefix, 0), value=1)
        return sizes.to(tokens.x.dtype).view(1, -1, 1)

    def project(self, attn: nn.Module, x: Tensor, tokens: Tokens) -> Sequence[Tensor]:
        """Return the queries of all tokens, and the keys and values of the prefix and of every run."""
        if not tokens.count:
            return super().project(attn, x, tokens)
        dim = x.shape[-1]
        head, patches = x[:, : tokens.prefix], x[:, tokens.prefix :]
        change = None if self.change is None else self.change[tokens.block].to(x.dtype)
        q = some_rows(attn.qkv, x, slice(0, dim))
        own = some_rows(attn.qkv, head, slice(dim, None))
        condensed = some_rows(attn.qkv, self.runs(tokens).mean(patches), slice(dim, None), change)
        return split_heads(attn, q, *torch.cat([own, condensed], dim=1).chunk(2, dim=-1))
